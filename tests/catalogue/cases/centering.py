"""Zero mean, and zero mean with unit variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from catalogue.cases.common import Case, bump
from torch import Tensor

from fxparam import catalogue as cat


def _by_slice(module: Any, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """``act`` on each slice by itself, as a vector."""
    kept = [dim for dim in range(x.ndim) if dim not in module.dims]
    order = (*kept, *module.dims)
    turned = x.permute(order)
    slices = turned.reshape(-1, *turned.shape[len(kept) :])
    acted = torch.stack([act(part.reshape(-1)).reshape(part.shape) for part in slices])
    return acted.reshape(turned.shape).permute([order.index(dim) for dim in range(x.ndim)])


def _centered(module: Any, x: Tensor) -> Tensor:
    return _by_slice(module, x, lambda part: part - part.sum() / len(part))


def _standardized(module: Any, x: Tensor, gain: Tensor | None = None) -> Tensor:
    def act(part: Tensor) -> Tensor:
        mean = part.sum() / len(part)
        variance = sum((one - mean) ** 2 for one in part) / len(part)
        return (part - mean) / (variance + module.eps) ** 0.5

    return _by_slice(module, x, act) * (1 if gain is None else gain)


CASES = [
    Case(cat.Centered(), (4, 3), _centered, bump, complex=True),
    Case(cat.Centered(), (2, 3, 4), _centered, bump, complex=True),
    Case(cat.Centered(dim=(0, -1)), (2, 3, 4), _centered, bump, complex=True),
    Case(cat.Centered(dim=0), (5,), _centered, bump, complex=True),
    Case(cat.Standardized(), (4, 3), _standardized, bump, nodes=20),
    Case(cat.Standardized(dim=(1, 2), eps=1e-5), (2, 3, 4), _standardized, bump, nodes=20),
    Case(cat.Standardized(dim=-1, eps=0.1), (2, 3, 4), _standardized, lambda w: 3 * w, nodes=20),
    Case(cat.Standardized(gain=True), (4, 3), _standardized, bump, latents=((4, 3), (4, 1)), nodes=20),
    Case(cat.Standardized(dim=0, gain=True), (3, 2, 2), _standardized, bump, latents=((3, 2, 2), (1, 2, 2)), nodes=20),
]
