"""Orthonormal matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from catalogue.cases.common import Case, Oracle, bump
from torch import Tensor

from fxparam import catalogue as cat
from fxparam.catalogue.orthogonal import MOVES, RETRACTIONS


def tall(oracle: Callable[[Tensor], Tensor]) -> Oracle:
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
    lower = torch.where(row >= column, square, 0.0)
    return lower - lower.transpose(-1, -2).conj()


def exponential(x: Tensor) -> Tensor:
    """The series after eight halvings, squared eight times."""
    a = _skew(x) / 256
    term = total = torch.eye(x.shape[-2], dtype=x.dtype).expand_as(a)
    for power in range(1, 20):
        term = term @ a / power
        total = total + term
    for _ in range(8):
        total = total @ total
    return total[..., : x.shape[-1]]


def cayley(x: Tensor) -> Tensor:
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


def _gram_schmidt(x: Tensor) -> Tensor:
    """Column by column, each without its parts along those before it."""
    columns: list[Tensor] = []
    for j in range(x.shape[-1]):
        left = x[..., j]
        for before in columns:
            left = left - before * (before.conj() * x[..., j]).sum(-1, keepdim=True)
        columns.append(left / (left.abs() ** 2).sum(-1, keepdim=True).sqrt())
    return torch.stack(columns, -1)


def _newton(x: Tensor) -> Tensor:
    """Newton's iteration for the polar factor: the mean of ``X`` and the adjoint of its pseudoinverse."""
    for _ in range(60):
        gram = torch.einsum("...ji,...jk->...ik", x.conj(), x)
        x = (x + torch.einsum("...ij,...jk->...ik", x, torch.linalg.inv(gram))) / 2
    return x


def _bjorck(x: Tensor, iterations: int = 40) -> Tensor:
    """The iteration, from singular values scaled by their 16-norm."""
    x = x / (torch.linalg.svdvals(x) ** 16).sum(-1)[..., None, None] ** (1 / 16)
    for _ in range(iterations):
        x = x + torch.einsum("...ij,...kj,...kl->...il", x, x.conj(), x) * -0.5 + x / 2
    return x


ORACLES = {
    "matrix_exp": exponential,
    "cayley": cayley,
    "householder": _householder,
    "qr": _gram_schmidt,
    "polar": _newton,
    "newton_schulz": _bjorck,
}
NODES = {"newton_schulz": 200, "qr": 40, "polar": 70, "householder": 17}


LOWER_RANK = {"equal": "a latent of lower rank keeps it"}


def extremes_of(name: str, shape: tuple[int, ...]) -> dict[str, str]:
    if name == "matrix_exp" and max(shape[-2:]) > 1:
        return {"huge": "rounding grows with the norm of the latent"}
    if name == "cayley" and shape in ((5, 3), (2, 3, 3)):
        return {"huge": "a skew matrix of odd size is singular: rounding, which grows with its norm, may show"}
    return {}


ORTHOGONAL = [
    Case(
        cat.Orthogonal(map=name, use_trivialization=trivial),
        shape,
        tall(ORACLES[name]),
        bump,
        exact=trivial,
        invertible=trivial or name != "matrix_exp" or shape[-1] == shape[-2],
        growth=2e4,
        nodes=NODES.get(name, 16),
        extremes=extremes_of(name, shape),
        complex=name != "householder",
    )
    for name in MOVES
    for trivial in (True, False)
    for shape in [(4, 4), (5, 3), (2, 1, 3, 4)] + [(1, 1), (3, 5), (2, 4, 4)] * trivial
]

RETRACTED = [
    Case(
        cat.Orthogonal(map=name, iterations=40 if name == "newton_schulz" else None),
        shape,
        tall(ORACLES[name]),
        bump,
        nodes=NODES[name],
        complex=True,
        extremes=LOWER_RANK if name == "newton_schulz" and shape != (1, 1) else {},
    )
    for name in RETRACTIONS
    for shape in [(4, 4), (5, 3), (2, 1, 3, 4), (1, 1), (3, 5), (2, 4, 4)]
]


CASES = [
    *ORTHOGONAL,
    *RETRACTED,
    Case(
        cat.Orthogonal(),
        (4, 4),
        tall(exponential),
        bump,
        exact=True,
        growth=2e4,
        extremes=extremes_of("matrix_exp", (4, 4)),
    ),
    Case(cat.Orthogonal(), (5, 3), tall(_householder), bump, exact=True, growth=2e4, nodes=16),
    Case(
        cat.Orthogonal("newton_schulz"),
        (6, 4),
        tall(lambda x: _bjorck(x, 25)),
        bump,
        nodes=NODES["newton_schulz"],
        extremes=LOWER_RANK,
    ),
]
