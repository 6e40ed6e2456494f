"""Symmetric, skew-symmetric and definite matrices."""

from __future__ import annotations

from typing import Any

import torch
from catalogue.cases.common import Case, bump, crossed
from torch import Tensor

from fxparam import catalogue as cat


def _triangles(x: Tensor) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    return row, column


def _symmetric(_: Any, x: Tensor) -> Tensor:
    row, column = _triangles(x)
    return torch.where(row <= column, x, x.transpose(-1, -2))


def _skew_weight(_: Any, x: Tensor) -> Tensor:
    row, column = _triangles(x)
    return torch.where(row < column, x, torch.where(row > column, -x.transpose(-1, -2), 0.0))


def _positive_definite(_: Any, x: Tensor) -> Tensor:
    row, column = _triangles(x)
    factor = torch.where(row > column, x, torch.where(row == column, torch.log1p(torch.exp(x)), 0.0))
    return torch.einsum("...ij,...kj->...ik", factor, factor)


CASES = [
    Case(cat.Symmetric(), (4, 4), _symmetric, crossed, exact=True),
    Case(cat.Symmetric(), (2, 3, 3), _symmetric, crossed, exact=True),
    Case(cat.Skew(), (4, 4), _skew_weight, crossed, exact=True),
    Case(cat.Skew(), (2, 3, 3), _skew_weight, bump, exact=True),
    Case(cat.PositiveDefinite(), (4, 4), _positive_definite, crossed),
    Case(cat.PositiveDefinite(), (2, 3, 3), _positive_definite, torch.neg),
]
