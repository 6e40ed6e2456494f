"""Layers that are prepared for quantization: made of small modules, or with observers that write at each call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.qat as qat
import torch.ao.nn.quantizable as quantizable
from layers.common import (
    FLAT,
    TRACES,
    Case,
    Check,
    every_check,
)
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations

import fxparam as fxp


def three() -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, 5, 8) for _ in range(3))


def steps(layers: int, batch: int = 3) -> Callable[[], tuple[Any, ...]]:
    """With a state: without one PyTorch starts from zeros of single precision, whatever the weights are."""
    return lambda: (torch.randn(5, 3, 4), (torch.randn(layers, batch, 6), torch.randn(layers, batch, 6)))


CASES: dict[str, Case] = {
    "LSTM": Case(lambda: quantizable.LSTM(4, 6, 2), ("*gates.weight",), steps(2)),
    "LSTM, both ways": Case(
        lambda: quantizable.LSTM(4, 6, bidirectional=True, batch_first=True), ("*hgates.*",), steps(2, 5), FLAT
    ),
    "LSTM, gates apart": Case(lambda: quantizable.LSTM(4, 6, split_gates=True), ("*hgates.*.weight",), steps(1)),
    "attention": Case(
        lambda: quantizable.MultiheadAttention(8, 2, batch_first=True), ("linear_[QKV].weight", "out_proj.weight"), three
    ),
}


@every_check(CASES, kinds=4)
def test_what_every_layer_must_do(check: Check, case: Case, kind: str, trace: str) -> None:
    check(case, kind, trace)


def _qconfig() -> Any:
    return get_default_qat_qconfig("fbgemm")


OBSERVED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: qat.Linear(4, 3, qconfig=_qconfig()), (5, 4)),
    "convolution": (lambda: qat.Conv2d(2, 3, 3, qconfig=_qconfig()), (2, 2, 6, 5)),
}


@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max")
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", OBSERVED)
def test_observers_see_computed_weights_as_in_pytorch(name: str, trace: str) -> None:
    """Fake quantization runs in float32, by the same operations on both sides."""
    make, size = OBSERVED[name]
    torch.set_default_dtype(torch.float32)
    net = make()
    oracle = copy.deepcopy(net)
    parametrizations.weight_norm(oracle)
    model = fxp.transform(net, {"weight": fxp.weight_norm()}, trace=trace, copy=True)
    for _ in range(3):
        x = torch.randn(size)
        for mode in (True, False):
            model.train(mode)
            oracle.train(mode)
            torch.testing.assert_close(model(x), oracle(x), rtol=1e-6, atol=1e-6)
        for module in (model.train(), oracle.train()):
            module.zero_grad()
            module(x).sin().sum().backward()
        for got, want in zip(model.parameters(), oracle.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-6, atol=1e-6)
        state, expected = model.state_dict(), oracle.state_dict()
        assert set(state) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-6)
        for module in (model, oracle):
            torch.optim.SGD(module.parameters(), 0.05).step()
    restored = fxp.restore(model.eval())
    assert type(restored) is type(net)
    with torch.no_grad():
        torch.testing.assert_close(restored(x), oracle.eval()(x), rtol=1e-6, atol=1e-6)
