"""Orthonormal matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from catalogue.cases.common import Case, Oracle, bump
from torch import Tensor

from fxparam import catalogue as cat


def _tall(oracle: Callable[[Tensor], Tensor]) -> Oracle:
    """An oracle for tall matrices as one for all, with the base of a trivialization in front."""

    def whole(module: Any, x: Tensor) -> Tensor:
        wide = x.shape[-2] < x.shape[-1]
        q = oracle(x.transpose(-1, -2) if wide else x)
        if module.base is not None:
            q = torch.einsum("...ij,...jk->...ik", module.base, q)
        return q.transpose(-1, -2) if wide else q

    return whole


def _skew(x: Tensor) -> Tensor:
    n, k = x.shape[-2:]
    row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    square = torch.cat([x, torch.zeros(*x.shape[:-2], n, n - k, dtype=x.dtype)], -1)
    lower = torch.where(row > column, square, 0.0)
    return lower - lower.transpose(-1, -2)


def _exp(x: Tensor) -> Tensor:
    """The series after eight halvings, squared eight times."""
    a = _skew(x) / 256
    term = total = torch.eye(x.shape[-2], dtype=x.dtype).expand_as(a)
    for power in range(1, 20):
        term = term @ a / power
        total = total + term
    for _ in range(8):
        total = total @ total
    return total[..., : x.shape[-1]]


def _cayley(x: Tensor) -> Tensor:
    a, eye = _skew(x), torch.eye(x.shape[-2], dtype=x.dtype)
    return (torch.linalg.inv(eye - a / 2) @ (eye + a / 2))[..., : x.shape[-1]]


def _householder(x: Tensor) -> Tensor:
    n, k = x.shape[-2:]
    eye = torch.eye(n, dtype=x.dtype)
    product = eye.expand(*x.shape[:-2], n, n)
    for j in range(k):
        v = torch.where(torch.arange(n) > j, x[..., j], eye[j])
        product = product @ (eye - 2 * v[..., :, None] * v[..., None, :] / (v * v).sum(-1)[..., None, None])
    signs = torch.stack([torch.where(x[..., j, j] < 0, -1.0, 1.0).to(x.dtype) for j in range(k)], -1)
    return product[..., :k] * signs[..., None, :]


_ORACLES = {"matrix_exp": _exp, "cayley": _cayley, "householder": _householder}

ORTHOGONAL = [
    Case(
        cat.Orthogonal(map=name, use_trivialization=trivial),
        shape,
        _tall(_ORACLES[name]),
        bump,
        exact=trivial,
        invertible=trivial or name != "matrix_exp" or shape[-1] == shape[-2],
        growth=2e4,
        nodes=16,
    )
    for name in _ORACLES
    for trivial in (True, False)
    for shape in [(4, 4), (5, 3), (2, 1, 3, 4)] + [(1, 1), (3, 5), (2, 4, 4)] * trivial
]


CASES = [
    *ORTHOGONAL,
    Case(cat.Orthogonal(), (4, 4), _tall(_exp), bump, exact=True, growth=2e4),
    Case(cat.Orthogonal(), (5, 3), _tall(_householder), bump, exact=True, growth=2e4, nodes=14),
]
