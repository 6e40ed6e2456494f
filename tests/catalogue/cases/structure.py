"""Matrices whose structure is linear, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from catalogue.cases.common import Case, bump, crossed
from torch import Tensor

from fxparam import catalogue as cat


def _by_element(element: Callable[[Any, Tensor, int, int], Tensor | float]) -> Callable[[Any, Tensor], Tensor]:
    """The matrix whose elements a function of latent, row and column gives."""

    def whole(module: Any, x: Tensor) -> Tensor:
        m, n = module.shape[-2:]
        flat = x.new_zeros(module.shape[:-2])
        rows = [torch.stack([flat + element(module, x, i, j) for j in range(n)], -1) for i in range(m)]
        return torch.stack(rows, -2)

    return whole


def _block(module: Any, x: Tensor, i: int, j: int) -> Tensor | float:
    p, q = x.shape[-2:]
    return x[..., i // p, i % p, j % q] if i // p == j // q else 0.0


def _band(module: Any, x: Tensor, i: int, j: int) -> Tensor | float:
    return x[..., i, j] if -module.lower <= j - i <= module.upper else 0.0


def _triangle(module: Any, x: Tensor, i: int, j: int) -> Tensor | float:
    if i == j and module.unit_diagonal:
        return 1.0
    return x[..., i, j] if (i <= j if module.upper else i >= j) else 0.0


def _circulant(module: Any, c: Tensor, i: int, j: int) -> Tensor:
    return c[..., (i - j) % c.shape[-1]]


def _toeplitz(module: Any, t: Tensor, i: int, j: int) -> Tensor:
    return t[..., i - j + module.shape[-1] - 1]


_BLOCKS = [(3, (6, 6), (3, 2, 2)), (2, (2, 4, 6), (2, 2, 2, 3)), (1, (3, 2), (1, 3, 2)), (3, (3, 3), (3, 1, 1))]
_BANDS = [(1, 1, (4, 4)), (0, 2, (2, 3, 5)), (2, 0, (5, 3)), (9, 0, (3, 4))]
_TRIANGLES = [(False, False, (4, 4)), (True, False, (2, 3, 5)), (False, True, (5, 3)), (True, True, (2, 4, 4))]
_CIRCULANTS = [(5, 5), (2, 4, 4), (1, 1)]
_TOEPLITZ = [((4, 3), (6,)), ((2, 3, 5), (2, 7)), ((4, 4), (7,)), ((1, 4), (4,))]


def _corner(weight: Tensor) -> Tensor:
    """The element in the bottom left corner off."""
    bumped = weight.clone()
    bumped[..., -1, 0] += 0.5
    return bumped


CASES = [
    *(
        Case(
            cat.BlockDiagonal(blocks),
            shape,
            _by_element(_block),
            _corner if blocks > 1 else None,
            latents=(latent,),
            exact=True,
            complex=True,
        )
        for blocks, shape, latent in _BLOCKS
    ),
    *(
        Case(cat.Banded(lower, upper), shape, _by_element(_band), lambda w: w + 1, exact=True, complex=True)
        for lower, upper, shape in _BANDS
    ),
    *(
        Case(
            cat.Triangular(upper, unit),
            shape,
            _by_element(_triangle),
            bump if unit else lambda w: w + 1,
            exact=True,
            complex=True,
        )
        for upper, unit, shape in _TRIANGLES
    ),
    *(
        Case(
            cat.Circulant(),
            shape,
            _by_element(_circulant),
            crossed if shape != (1, 1) else None,
            latents=(shape[:-1],),
            exact=True,
            complex=True,
        )
        for shape in _CIRCULANTS
    ),
    *(
        Case(
            cat.Toeplitz(),
            shape,
            _by_element(_toeplitz),
            crossed if shape[-2] > 1 else None,
            latents=(latent,),
            exact=True,
            complex=True,
        )
        for shape, latent in _TOEPLITZ
    ),
]
