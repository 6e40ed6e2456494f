"""Kronecker products, Monarch matrices, and sums of a diagonal and a product."""

from __future__ import annotations

from typing import Any

import torch
from catalogue.cases.common import Case
from torch import Tensor

from fxparam import catalogue as cat

_OVERFLOW = {"huge": "the products overflow"}


def _kronecker(_: Any, a: Tensor, b: Tensor) -> Tensor:
    """Rows of blocks, one block after the other."""
    rows = []
    for i in range(a.shape[-2]):
        blocks = [(a[..., i, j, None, None] * b).sum(-3) for j in range(a.shape[-1])]
        rows.append(torch.cat(blocks, -1))
    return torch.cat(rows, -2)


def _monarch(module: Any, left: Tensor, right: Tensor) -> Tensor:
    """The product of the two sparse factors and the permutations, all of them as full matrices."""
    b, r = module.blocks, module.rank

    def full(blocks: Tensor) -> Tensor:
        *batch, k, p, q = blocks.shape
        whole = blocks.new_zeros(*batch, k * p, k * q)
        for index in range(k):
            place = blocks.new_zeros(k, k)
            place[index, index] = 1
            whole = whole + torch.einsum("gh,...pq->...gphq", place, blocks[..., index, :, :]).reshape(whole.shape)
        return whole

    m = left.shape[-2] * b
    inner = left.new_zeros(b * b * r, b * b * r)
    for k in range(b):
        for j in range(b):
            for s in range(r):
                inner[(j * b + k) * r + s, (k * b + j) * r + s] = 1
    outer = left.new_zeros(m, m)
    for j in range(b):
        for row in range(m // b):
            outer[row * b + j, j * (m // b) + row] = 1
    return outer @ full(left) @ inner @ full(right)


def _off(weight: Tensor) -> Tensor:
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(21), dtype=torch.float64)
    return weight + drawn.to(weight.dtype)


def _diagonal_low_rank(_: Any, d: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Element by element."""
    n = d.shape[-1]
    rows = [[(u[..., i, :] * v[..., j, :].conj()).sum(-1) + (d[..., i] if i == j else 0) for j in range(n)] for i in range(n)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


_KRONECKER = [
    (cat.Kronecker((2, 3)), (4, 6), (1, 2, 3), (1, 2, 2)),
    (cat.Kronecker((2, 2), terms=2), (2, 6, 4), (2, 2, 2, 2), (2, 2, 3, 2)),
    (cat.Kronecker((1, 3), terms=3), (2, 6), (3, 1, 3), (3, 2, 2)),
]
_MONARCH = [
    (cat.Monarch(2), (4, 4), (2, 2, 2), (2, 2, 2)),
    (cat.Monarch(3), (9, 9), (3, 3, 3), (3, 3, 3)),
    (cat.Monarch(2), (2, 6, 8), (2, 2, 3, 2), (2, 2, 2, 4)),
    (cat.Monarch(2, rank=2), (8, 6), (2, 4, 4), (2, 4, 3)),
]
_ANY = ((2, 6),)  # three terms of three elements make any matrix

CASES = [
    *(
        Case(
            entry,
            shape,
            _kronecker if isinstance(entry, cat.Kronecker) else _monarch,
            None if shape in _ANY else _off,
            latents=(left, right),
            nodes=20,
            complex=True,
            extremes=_OVERFLOW,
        )
        for entry, shape, left, right in [*_KRONECKER, *_MONARCH]
    ),
    *(
        Case(
            cat.DiagonalLowRank(rank),
            (*batch, n, n),
            _diagonal_low_rank,
            _off,
            latents=((*batch, n), (*batch, n, rank), (*batch, n, rank)),
            complex=True,
            extremes=_OVERFLOW,
        )
        for rank, batch, n in [(1, (), 5), (2, (2,), 7), (1, (), 3), (2, (), 12)]
    ),
]
