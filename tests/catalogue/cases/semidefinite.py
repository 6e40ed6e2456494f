"""Positive semidefinite matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from catalogue.cases.common import Case, crossed
from torch import Tensor

from fxparam import catalogue as cat


def _outer_products(_: object, b: Tensor) -> Tensor:
    return sum((c[..., :, None] * c[..., None, :].conj() for c in b.unbind(-1)), torch.zeros(()))


def _more(w: Tensor) -> Tensor:
    return w + torch.eye(w.shape[-1], dtype=w.dtype)


_OVERFLOW = {"huge": "the product overflows"}


def _case(rank: int | None, shape: tuple[int, ...], outside: Callable[[Tensor], Tensor]) -> Case:
    latents = ((*shape[:-1], rank or shape[-1]),)
    entry = cat.PositiveSemidefinite(rank)
    return Case(entry, shape, _outer_products, outside, latents=latents, extremes=_OVERFLOW, complex=True)


CASES = [
    _case(None, (4, 4), crossed),
    _case(None, (2, 3, 3), torch.neg),
    _case(2, (4, 4), _more),
    _case(1, (2, 1, 3, 3), _more),
]
