"""Maps that rearrange."""

from __future__ import annotations

from typing import Any

import torch
from catalogue.cases.common import Case
from torch import Tensor

from fxparam import catalogue as cat


def _from_matrix(module: Any, x: Tensor) -> Tensor:
    """Slice by slice along the dimension of the rows."""
    others = [size for d, size in enumerate(module.shape) if d != module.dim]
    return torch.stack([row.reshape(others) for row in x.unbind(0)], module.dim)


def _convolution(entry: cat.FromMatrix, shape: tuple[int, ...], matrix: tuple[int, int]) -> Case:
    return Case(entry, shape, _from_matrix, latents=(matrix,), exact=True, complex=True)


CASES = [
    Case(cat.Transpose(), (4, 3), lambda _, x: torch.einsum("ij->ji", x), latents=((3, 4),), exact=True),
    Case(cat.Transpose(0, -1), (2, 3, 4), lambda _, x: torch.einsum("ijk->kji", x), latents=((4, 3, 2),), exact=True),
    _convolution(cat.FromMatrix(), (4, 3, 2, 2), (4, 12)),
    _convolution(cat.FromMatrix(dim=1), (3, 4, 2), (4, 6)),
    _convolution(cat.FromMatrix(dim=-1), (2, 3), (3, 2)),
    _convolution(cat.FromMatrix(), (3, 2), (3, 2)),
]
