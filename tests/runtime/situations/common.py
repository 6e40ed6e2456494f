"""A model and its oracle under ``torch.nn.utils.parametrize``, which computes weights at each read; how they are compared."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from runtime.models import TwoLayers
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxparam as fxp

X, Y = (torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))
Case = Callable[[Any], list[Any]]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def pair(trace: Any, make: Callable[[], nn.Module] = TwoLayers) -> tuple[Any, Any]:
    """A transformed model and its oracle."""
    torch.manual_seed(0)
    oracle: Any = make()
    owner = oracle if isinstance(oracle, TwoLayers) else oracle.net
    parametrizations.weight_norm(owner.first)
    parametrizations.orthogonal(owner.second, orthogonal_map="cayley")
    return fxp.transform(copy.deepcopy(oracle), trace=trace), oracle


def loss_of(m: Any, x: Tensor = X) -> Tensor:
    return m(x).pow(2).sum()


def grads(m: Any) -> list[Any]:
    return [None if p.grad is None else p.grad.clone() for p in m.parameters()]


def outcome(m: Any) -> list[Any]:
    """Values and gradients from here on."""
    m.zero_grad()
    loss_of(m).backward()
    return [m(Y).detach(), *grads(m)]


def latents(m: Any) -> list[nn.Parameter]:
    return [parameter for name, parameter in m.named_parameters() if "parametrizations" in name]


def forget(m: Any) -> None:
    """The next read computes."""
    if isinstance(m, fxp.ParametrizedModule):
        m.invalidate()


def same(got: Sequence[Any], want: Sequence[Any]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
        else:
            assert one == other


def attempt(function: Callable[[], object]) -> str:
    """The error's type and text. Which node made a tensor, and its number of writes so far, are nobody's business."""
    try:
        function()
    except Exception as error:
        text = re.sub(r", which is output \d+ of \w+,", "", f"{type(error).__name__}: {error}")
        return re.sub(r"is at version \d+; expected version \d+ instead", "is at another version", text)
    return "no error"
