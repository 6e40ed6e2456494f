"""Short vectors behind weights."""

from __future__ import annotations

from typing import Any

from catalogue.cases.common import Case, bump
from torch import Tensor

from fxparam import catalogue as cat


def _subspace(module: Any, d: Tensor) -> Tensor:
    return ((module.basis * d).sum(1) + module.origin).reshape(module.shapes[0])


CASES = [
    Case(cat.Subspace(3), (4, 5), _subspace, bump, latents=((3,),), nodes=8),
    Case(cat.Subspace(2, seed=5), (7,), _subspace, bump, latents=((2,),), nodes=8),
    Case(cat.Flat(), (2, 3, 2), lambda _, v: v.reshape(2, 3, 2), latents=((12,),), exact=True, nodes=3),
]
