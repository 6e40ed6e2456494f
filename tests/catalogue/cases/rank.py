"""Products of factors."""

from __future__ import annotations

from typing import Any

import torch
from catalogue.cases.common import Case
from torch import Tensor

from fxparam import catalogue as cat


def _above(w: Tensor) -> Tensor:
    return w + 3 * torch.eye(*w.shape[-2:], dtype=w.dtype)


def _columns(module: Any, x: Tensor) -> Tensor:
    """Orthonormal columns: reflections one after the other, or for complex weights an exponential."""
    n, k = x.shape[-2:]
    eye = torch.eye(n, dtype=x.dtype)
    if x.is_complex():
        lower = torch.cat([x, x.new_zeros(*x.shape[:-1], n - k)], -1).tril()
        return module.base @ torch.linalg.matrix_exp(lower - lower.transpose(-1, -2).conj())[..., :k]
    product = eye
    for j in range(k):
        v = torch.where(torch.arange(n) > j, x[..., j], eye[j])
        product = product @ (eye - 2 * v[..., :, None] * v[..., None, :] / (v * v).sum(-1)[..., None, None])
    signs = [torch.where(x[..., j, j] < 0, -1.0, 1.0).to(x.dtype) for j in range(k)]
    return torch.stack([product[..., j] * signs[j][..., None] for j in range(k)], -1)


def _fixed_rank(module: Any, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    u, v = _columns(module.left, left), _columns(module.right, right)
    s = torch.log1p(torch.exp(values.real)) if values.is_complex() else torch.logaddexp(values, torch.zeros_like(values))
    terms = [s[..., j, None, None] * u[..., :, j, None] * v[..., None, :, j].conj() for j in range(s.shape[-1])]
    return torch.stack(terms).sum(0)


_OVERFLOW = {"huge": "the product overflows"}

CASES = [
    Case(
        cat.LowRank(2),
        (4, 5),
        lambda _, a, b: torch.einsum("ik,kj->ij", a, b),
        _above,
        latents=((4, 2), (2, 5)),
        extremes=_OVERFLOW,
        complex=True,
    ),
    Case(
        cat.LowRank(1),
        (2, 3, 3),
        lambda _, a, b: (a[..., None] * b[:, None]).sum(2),
        _above,
        latents=((2, 3, 1), (2, 1, 3)),
        extremes=_OVERFLOW,
        complex=True,
    ),
    *[
        Case(
            cat.FixedRank(rank),
            shape,
            _fixed_rank,
            _above if rank < min(shape[-2:]) else None,
            latents=((*batch, m, rank), (*batch, rank), (*batch, n, rank)),
            nodes=40,
            complex=True,
        )
        for rank, shape in [(2, (5, 4)), (1, (2, 3, 4)), (3, (2, 1, 3, 3)), (2, (2, 6))]
        for *batch, m, n in [shape]
    ],
]
