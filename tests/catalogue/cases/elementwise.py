"""Maps that act on each element by itself, and along a line."""

from __future__ import annotations

import math
from typing import Any

import torch
from catalogue.cases.common import Case
from torch import Tensor

from fxparam import catalogue as cat


def _bounded(module: Any, x: Tensor) -> Tensor:
    return module.low + (module.high - module.low) / (1 + torch.exp(-2 * x))


def _monotone(module: Any, x: Tensor) -> Tensor:
    parts = list(x.unbind(module.dim))
    for k in range(1, len(parts)):
        step = torch.log1p(torch.exp(parts[k]))
        parts[k] = parts[k - 1] + step if module.increasing else parts[k - 1] - step
    return torch.stack(parts, module.dim)


CASES = [
    Case(cat.Positive(), (4, 3), lambda _, x: torch.log1p(torch.exp(x)), torch.neg),
    Case(cat.Positive(map="exp"), (), lambda _, x: math.e**x, torch.neg),
    Case(cat.Positive(map="square"), (2, 3, 2), lambda _, x: x * x, torch.neg, extremes={"huge": "the square overflows"}),
    Case(cat.Bounded(), (4, 3), _bounded, lambda w: w + 2),
    Case(cat.Bounded(low=0.1, high=0.7), (5,), _bounded, lambda w: w - 1),
    Case(cat.Scale(factor=-2.5, shift=0.3), (4, 3), lambda _, x: 0.3 - 2.5 * x),
    Case(cat.Scale(factor=0.5, shift=-1.0, trainable=True), (3,), lambda m, x: m.factor * x + m.shift),
    Case(cat.Monotone(), (4, 3), _monotone, torch.neg),
    Case(cat.Monotone(dim=1, increasing=False), (2, 5, 3), _monotone, torch.neg),
    Case(cat.Monotone(dim=0), (1, 2), _monotone),
]
