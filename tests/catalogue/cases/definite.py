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
    real = x.real.to(x.dtype) if x.is_complex() else x
    return torch.where(row < column, x, torch.where(row == column, real, x.conj().transpose(-1, -2)))


def _skew_weight(_: Any, x: Tensor) -> Tensor:
    row, column = _triangles(x)
    imaginary = x.imag * 1j if x.is_complex() else torch.zeros_like(x)
    return torch.where(row < column, x, torch.where(row > column, -x.conj().transpose(-1, -2), imaginary))


def _positive_definite(_: Any, x: Tensor) -> Tensor:
    row, column = _triangles(x)
    positive = torch.log1p(torch.exp(x.real if x.is_complex() else x)).to(x.dtype)
    factor = torch.where(row > column, x, torch.where(row == column, positive, 0.0))
    return torch.einsum("...ij,...kj->...ik", factor, factor.conj())


_HUGE = {"huge": "the product overflows"}


CASES = [
    Case(cat.Symmetric(), (4, 4), _symmetric, crossed, exact=True, complex=True),
    Case(cat.Symmetric(), (2, 3, 3), _symmetric, crossed, exact=True, complex=True),
    Case(cat.Skew(), (4, 4), _skew_weight, crossed, exact=True, complex=True),
    Case(cat.Skew(), (2, 3, 3), _skew_weight, bump, exact=True, complex=True),
    Case(cat.PositiveDefinite(), (4, 4), _positive_definite, crossed, complex=True, extremes=_HUGE),
    Case(cat.PositiveDefinite(), (2, 3, 3), _positive_definite, torch.neg, complex=True, extremes=_HUGE),
]
