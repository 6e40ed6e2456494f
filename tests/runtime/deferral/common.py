"""A model with two computed weights and its oracle, micro-batches, and how gradients are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from runtime.models import ThreeLayers, three_parametrized_layers
from torch import Tensor, nn

import fxparam as fxp

N = 5
DTYPE = torch.float64
Block = Callable[[], AbstractContextManager[Any]]
Scenario = Callable[[Any, Block], Any]
A, B = "a.parametrizations.weight.original", "b.parametrizations.weight.original"


def plain() -> ThreeLayers:
    return three_parametrized_layers(N)


def pair() -> tuple[Any, fxp.ParametrizedModule]:
    """The oracle and the transformed model, with the same latents under the same names."""
    oracle = plain()
    return oracle, fxp.transform(copy.deepcopy(oracle))


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, N, generator=generator, dtype=DTYPE) for size in sizes]


X = batches(3, 1, 4, 2)


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def check(got: Any, want: Any, tol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def accumulate(model: Any, xs: list[Tensor] = X) -> None:
    for x in xs:
        model(x).square().mean().backward()
