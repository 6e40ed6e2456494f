"""Learnable gates. In eval mode, as all cases: what they do in training is random, and in test_gates.py."""

from __future__ import annotations

from typing import Any

import torch
from catalogue.cases.common import Case
from torch import Tensor

from fxparam import catalogue as cat


def _gated(low: float, high: float) -> Any:
    def oracle(_: Any, x: Tensor, log_alpha: Tensor) -> Tensor:
        s = low + (high - low) / (1 + torch.exp(-log_alpha))
        return x * torch.where(s < 0, 0.0, torch.where(s > 1, 1.0, s))

    return oracle


CASES = [
    Case(cat.Gate(), (4, 3), _gated(-0.1, 1.1), latents=((4, 3), (4, 3)), exact=True),
    Case(cat.Gate(dim=1), (2, 3, 2), _gated(-0.1, 1.1), latents=((2, 3, 2), (1, 3, 1)), exact=True),
    Case(cat.Gate(-2, 0.5, (-0.3, 1.5), "call", 0.5), (2, 4, 3), _gated(-0.3, 1.5), latents=((2, 4, 3), (1, 4, 1))),
]
