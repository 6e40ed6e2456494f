"""Rotations, unitary matrices, subspaces, nearly orthogonal matrices."""

from __future__ import annotations

from typing import Any

import torch
from catalogue.cases.common import Case, Oracle, bump
from catalogue.cases.orthogonal import LOWER_RANK, NODES, ORACLES, cayley, exponential, extremes_of, tall
from torch import Tensor

from fxparam import catalogue as cat
from fxparam.catalogue.orthogonal import RETRACTIONS

_HUGE = {"huge": "rounding grows with the norm of the latent"}
_MAPS = {"matrix_exp": exponential, "cayley": cayley}


def _below(name: str) -> Oracle:
    """The oracle of a map for a latent whose first rows (columns of a wide one) are zero."""

    def whole(module: Any, x: Tensor) -> Tensor:
        m, n = x.shape[-2:]
        rows, columns = torch.arange(m)[:, None], torch.arange(n)
        return tall(_MAPS[name])(module, torch.where((rows if m > n else columns) >= min(m, n), x, 0.0))

    return whole


def _turned(base: Tensor, lower: Tensor, name: str) -> Tensor:
    """The first columns of a base times a rotation from the strictly lower triangle."""
    n, k = lower.shape[-2:]
    strict = torch.where(torch.arange(n)[:, None] > torch.arange(k), lower, 0.0)
    return torch.einsum("...ij,...jk->...ik", base, _MAPS[name](strict))


def _almost(spread: float, squash: str = "sin", name: str = "matrix_exp") -> Oracle:
    """A sum of outer products, one for each singular value."""

    def whole(module: Any, x: Tensor) -> Tensor:
        wide = x.shape[-2] < x.shape[-1]
        x = x.transpose(-1, -2) if wide else x
        k = x.shape[-1]
        u = _turned(module.left, x, name)
        v = _turned(module.right, x[..., :k, :].transpose(-1, -2), name)
        total = torch.zeros_like(x)
        for j in range(k):
            s = x[..., j, j].real
            size = 1 + spread * {"sin": torch.sin(s), "tanh": torch.tanh(s), "scaled_sigmoid": 2 * s.sigmoid() - 1}[squash]
            total = total + size[..., None, None] * u[..., :, None, j] * v[..., None, :, j].conj()
        return total.transpose(-1, -2) if wide else total

    return whole


CASES = [
    *[
        Case(
            cat.SpecialOrthogonal(map=name, use_trivialization=trivial),
            shape,
            tall(_MAPS[name]),
            bump,
            exact=trivial,
            growth=2e4,
            nodes=14,
            extremes=extremes_of(name, shape),
        )
        for name in _MAPS
        for trivial in (True, False)
        for shape in [(4, 4), (2, 3, 3)]
    ],
    *[
        Case(
            cat.Grassmann(map=name),
            shape,
            _below(name),
            bump,
            exact=True,
            growth=2e4,
            nodes=18,
            complex=True,
            extremes=_HUGE if name == "matrix_exp" else {},
        )
        for name, shape in [
            ("matrix_exp", (5, 3)),
            ("matrix_exp", (3, 4)),
            ("matrix_exp", (2, 1, 5, 2)),
            ("cayley", (3, 2)),
            ("cayley", (2, 1, 2, 3)),
        ]
    ],
    *[
        Case(
            cat.AlmostOrthogonal(spread, squash, name),
            shape,
            _almost(spread, squash, name),
            lambda weight: weight * 3,
            growth=2e4,
            nodes=40,
            complex=True,
            extremes=_HUGE,
        )
        for spread, squash, name, shape in [
            (0.25, "sin", "matrix_exp", (4, 4)),
            (0.25, "sin", "matrix_exp", (5, 3)),
            (1.0, "sin", "matrix_exp", (3, 4)),
            (0.5, "tanh", "cayley", (2, 1, 4, 3)),
            (0.5, "scaled_sigmoid", "cayley", (2, 3, 3)),
        ]
    ],
]

COMPLEX_ONLY = [
    Case(
        cat.Unitary(map=name, iterations=40 if name == "newton_schulz" else None),
        shape,
        tall(ORACLES[name]),
        bump,
        exact=name in _MAPS,
        growth=2e4,
        nodes=NODES.get(name, 16),
        complex=True,
        extremes=LOWER_RANK if name == "newton_schulz" else extremes_of(name, shape),
    )
    for name in (*_MAPS, *RETRACTIONS)
    for shape in [(4, 4), (5, 3), (2, 3, 4)]
]
"""Cases of entries that take complex weights only."""
