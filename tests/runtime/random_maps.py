"""Maps that draw random numbers, and a model that reads them, for the tests of such maps."""

# mypy: disable-error-code="operator,union-attr,arg-type,assignment"

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam as fxp

N = 4
TRACES = pytest.mark.parametrize("trace", ["live", "auto"])
STEP = "draws random numbers, once per step"


class Noisy(nn.Module):
    """Adds noise in training, nothing in eval."""

    def forward(self, w: Tensor) -> Tensor:
        if not self.training:
            return w
        return w + 0.5 * torch.randn_like(w)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w


class PerStep(Noisy):
    resample = "step"


class Tripled(nn.Module):
    """Draws nothing."""

    def forward(self, w: Tensor) -> Tensor:
        return 3 * w

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 3


class PythonNoise(Noisy):
    def forward(self, w: Tensor) -> Tensor:
        return w * (1 + random.random()) if self.training else w


class TwoReads(nn.Module):
    """Reads each weight twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return x


def net() -> nn.Module:
    torch.manual_seed(1)
    return TwoReads().double()


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(5, N, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(count)]


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def eps_after(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def per_step(**options: Any) -> dict[str, Any]:
    """Declarations of the same map that all resample per step."""
    return {
        "attribute of the class": PerStep(),
        "custom": fxp.custom(Noisy(), resample="step"),
        "custom function": fxp.custom(lambda w: w + 0.5 * torch.randn_like(w), resample="step"),
        "factory": fxp.custom(lambda w: Noisy(), resample="step"),
        "attribute of the instance": _with_attribute(),
        "entry": fxp.noise(std=0.5, resample="step"),
    }


def _with_attribute() -> Noisy:
    noisy = Noisy()
    noisy.resample = "step"
    return noisy
