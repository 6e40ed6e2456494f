"""Zeros at chosen places."""

from __future__ import annotations

from typing import Any

import torch
from catalogue.cases.common import Case, Oracle
from torch import Tensor

from fxparam import catalogue as cat

_KEEP = [[1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]]


def _case(entry: Any, shape: tuple[int, ...], oracle: Oracle) -> Case:
    return Case(entry, shape, oracle, lambda w: w + 1, exact=True, complex=True)


def _slices(module: Any, x: Tensor) -> Tensor:
    """What is kept along dimension 1, read off one element of each slice of the mask."""
    parts = [part if bool(module.mask[0, i, 0] != 0) else 0 * part for i, part in enumerate(x.unbind(1))]
    return torch.stack(parts, 1)


def _largest(n: int, m: int, dim: int) -> Oracle:
    """The n largest of every m, by the weight that the case builds from."""

    def oracle(module: Any, x: Tensor) -> Tensor:
        start = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).movedim(dim, -1)
        keep = torch.zeros(start.shape)
        for row, kept in zip(start.reshape(-1, m), keep.view(-1, m), strict=True):
            for i in range(m):
                kept[i] = sum(float(abs(other)) > float(abs(row[i])) for other in row) < n
        return x * keep.movedim(-1, dim)

    return oracle


CASES = [
    _case(cat.Mask(density=0.5), (4, 3), lambda m, x: torch.where(m.mask != 0, x, 0.0)),
    _case(cat.Mask(density=0.3, by="random", seed=3), (2, 5), lambda m, x: m.mask * x),
    _case(cat.Mask(keep=_KEEP), (3, 4), lambda _, x: torch.tensor(_KEEP) * x),
    _case(cat.Mask(density=0.5, dim=1), (2, 6, 3), _slices),
    _case(cat.Mask(density=0.4, dim=-2, p=1), (3, 5, 2), _slices),
    _case(cat.Mask(density=0.6, by="random", seed=4, dim=1), (2, 5, 2), _slices),
    _case(cat.SemiStructured(), (3, 8), _largest(2, 4, 1)),
    _case(cat.SemiStructured(), (2, 4, 3, 2), _largest(2, 4, 1)),
    _case(cat.SemiStructured(1, 3, dim=0), (6, 2), _largest(1, 3, 0)),
]
