"""Low-rank updates of a frozen weight."""

from __future__ import annotations

from typing import Any

import torch
from catalogue.cases.common import Case
from torch import Tensor

from fxparam import catalogue as cat


def _above(w: Tensor) -> Tensor:
    return w + 3 * torch.eye(*w.shape[-2:], dtype=w.dtype)


def _updated(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    update = torch.zeros_like(base)
    for k in range(a.shape[-2]):
        update = update + b[..., :, k, None] * a[..., None, k, :]
    return base + scaling * update


def _dora(module: Any, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float) -> Tensor:
    v = _updated(module.base, a, b, scaling)
    rows = []
    for i in range(v.shape[-2]):
        norm = (v[..., i, :] ** 2).sum(-1, keepdim=True).sqrt()
        rows.append(magnitude[..., i, :] * v[..., i, :] / (norm.detach() if module.detach_norm else norm))
    return torch.stack(rows, -2)


def _latents(rank: int, *shape: int) -> tuple[tuple[int, ...], ...]:
    *batch, m, n = shape
    return (*batch, rank, n), (*batch, m, rank), (*batch, m, 1)


_OVERFLOW = {"huge": "the product overflows"}
_DETACHED = "the norm counts as a constant"

CASES = [
    Case(
        cat.Lora(2),
        (4, 5),
        lambda m, a, b: _updated(m.base, a, b, 1.0),
        _above,
        latents=_latents(2, 4, 5)[:2],
        extremes=_OVERFLOW,
        complex=True,
    ),
    Case(
        cat.Lora(1, alpha=0.5),
        (2, 3, 3),
        lambda m, a, b: _updated(m.base, a, b, 0.5),
        _above,
        latents=_latents(1, 2, 3, 3)[:2],
        extremes=_OVERFLOW,
        complex=True,
    ),
    Case(
        cat.Lora(4, alpha=8, rslora=True),
        (6, 4),
        lambda m, a, b: _updated(m.base, a, b, 4.0),
        latents=_latents(4, 6, 4)[:2],
        extremes=_OVERFLOW,
        complex=True,
    ),
    *[
        Case(
            cat.Dora(rank, alpha=alpha, rslora=rslora, detach_norm=detach),
            shape,
            lambda m, a, b, g, s=scaling: _dora(m, a, b, g, s),
            latents=_latents(rank, *shape),
            exact=True,
            nodes=18,
            extremes=_OVERFLOW,
            gradient=_DETACHED if detach else "",
        )
        for rank, alpha, rslora, shape, scaling in [(2, None, False, (4, 5), 1.0), (1, 3, True, (2, 3, 3), 3.0)]
        for detach in (True, False)
    ],
]
