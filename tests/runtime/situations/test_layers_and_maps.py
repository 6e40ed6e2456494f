"""Every layer with every map: warmed without gradient, then called with other tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.oracles import TRACES
from runtime.situations.common import Doubled, grads, same
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import fxparam as fxp

LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[Tensor, ...]]] = {
    "linear": (lambda: nn.Linear(4, 4), "weight", (torch.randn(3, 4),)),
    "conv": (lambda: nn.Conv1d(4, 4, 4), "weight", (torch.randn(2, 4, 9),)),
    "cell": (lambda: nn.RNNCell(4, 4), "weight_hh", (torch.randn(3, 4), torch.randn(3, 4))),
    "lstm": (lambda: nn.LSTM(4, 4), "weight_hh_l0", (torch.randn(5, 3, 4),)),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", (torch.randn(5, 3, 4),) * 3),
}
MAPS: dict[str, Callable[[Any, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda layer, name: parametrizations.spectral_norm(layer, name).eval(),
    "matrix_exp": lambda layer, name: parametrizations.orthogonal(layer, name, "matrix_exp"),
    "householder": lambda layer, name: parametrizations.orthogonal(layer, name, "householder"),
    "function": lambda layer, name: parametrize.register_parametrization(layer, name, Doubled()),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_and_map(kind: str, name: str, trace: Any) -> None:
    make, weight, inputs = LAYERS[kind]
    inputs = tuple(x.to(torch.float64) for x in inputs)
    oracle = MAPS[name](make(), weight)
    model = fxp.transform(copy.deepcopy(oracle), trace=trace)

    def first(m: Any, tensors: Any = None) -> Tensor:
        found = m(*inputs) if tensors is None else functional_call(m, tensors, inputs)
        return found if isinstance(found, Tensor) else found[0]

    results = []
    for m in (model, oracle):
        with torch.no_grad():
            seen = [first(m)]
            seen.append(first(m, {key: 1.5 * value for key, value in m.named_parameters()}))
        others = {key: (2 * value.detach()).requires_grad_() for key, value in m.named_parameters()}
        first(m, others).pow(2).sum().backward()
        first(m).pow(2).sum().backward()
        results.append([*seen, *(value.grad for value in others.values()), *grads(m), first(m).detach()])
    same(*results)
    assert all(value is not None for value in results[1])
