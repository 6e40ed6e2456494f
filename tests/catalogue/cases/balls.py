"""Spheres, balls and Lipschitz bounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from catalogue.cases.common import Case
from torch import Tensor

from fxparam import catalogue as cat


def _length(x: Tensor) -> Tensor:
    return (x * x.conj()).real.sum().sqrt()


def _shrunk(x: Tensor, norm: Tensor, radius: float) -> Tensor:
    return x * (radius / norm) if norm > radius else x


def _operator(module: Any, x: Tensor) -> Tensor:
    rows = torch.stack([part.reshape(-1) for part in x.unbind(module.dim)])
    if module.p == 1:
        return torch.stack([column.abs().sum() for column in rows.unbind(1)]).max()
    if module.p == math.inf:
        return torch.stack([row.abs().sum() for row in rows.unbind(0)]).max()
    return torch.linalg.eigvalsh(rows @ rows.conj().T)[-1].sqrt()


def _sphere(module: Any, x: Tensor) -> Tensor:
    return x * (module.radius / _length(x))


def _ball(module: Any, x: Tensor) -> Tensor:
    return _shrunk(x, _length(x), module.radius)


def _lipschitz(module: Any, x: Tensor) -> Tensor:
    return _shrunk(x, _operator(module, x), module.radius)


def _doubled(weight: Tensor) -> Tensor:
    return 2 * weight


CASES = [
    Case(cat.Sphere(), (4, 3), _sphere, _doubled, complex=True),
    Case(cat.Sphere(radius=3.5), (2, 3, 2), _sphere, _doubled, complex=True),
    Case(cat.Sphere(radius=0.5), (), _sphere, _doubled, complex=True),
    Case(cat.Ball(), (4, 3), _ball, _doubled, complex=True),
    Case(cat.Ball(radius=0.01), (2, 3, 2), _ball, _doubled, complex=True),
    Case(cat.Ball(radius=100.0), (4, 3), _ball, lambda w: 1e3 * w, exact=True, complex=True),
    Case(cat.Lipschitz(), (4, 3), _lipschitz, _doubled, complex=True, nodes=16),
    Case(cat.Lipschitz(bound=0.5, dim=1), (3, 4, 2), _lipschitz, _doubled, complex=True, nodes=16),
    Case(cat.Lipschitz(p=1), (4, 3), _lipschitz, _doubled, complex=True, nodes=16),
    Case(cat.Lipschitz(bound=2.0, p=math.inf, dim=-1), (3, 2, 4), _lipschitz, _doubled, complex=True, nodes=16),
    Case(cat.Lipschitz(), (5,), _lipschitz, _doubled, complex=True, nodes=16),
    Case(cat.Lipschitz(bound=100.0), (3, 4), _lipschitz, lambda w: 1e3 * w, exact=True, complex=True, nodes=16),
]
