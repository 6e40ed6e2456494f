"""Weights under autocast, around a forward and inside of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from runtime.oracles import TRACES, loss_of
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam as fxp


class Mixed(nn.Module):
    """One layer used inside and outside an autocast region of its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = self.layer(x)
        return inside.float() + self.layer(x)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def autocast_pair(net: nn.Module) -> tuple[fxp.ParametrizedModule, nn.Module]:
    """A product, which autocast computes in its lower precision."""
    oracle = copy.deepcopy(net)

    class Square(nn.Module):
        def forward(self, latent: Tensor) -> Tensor:
            return latent @ latent

    parametrize.register_parametrization(oracle.layer, "weight", Square())  # type: ignore[arg-type]
    return fxp.transform(net, {"layer.weight": Square()}), oracle


@pytest.mark.parametrize("trace", TRACES)
def test_autocast_around_and_not(trace: str) -> None:
    with default_dtype(torch.float32):
        model, oracle = autocast_pair(Mixed())
        x = torch.randn(4, 6)
        for _ in range(2):
            assert torch.equal(model(x), oracle(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(model(x), oracle(x))
        for module in (model, oracle):
            loss_of(module, x).backward()
        for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
            # Where plain PyTorch adds two gradients in bfloat16, a private graph may add them in float32.
            torch.testing.assert_close(p.grad, q.grad, rtol=2**-7, atol=0.05)


def test_autocast_inside_the_forward_evaluates_once_per_mode() -> None:
    with default_dtype(torch.float32):
        model, _ = autocast_pair(Mixed())
        before = model.stats.refreshes
        for _ in range(5):
            model(torch.randn(4, 6))
        assert model.stats.refreshes - before <= 2
