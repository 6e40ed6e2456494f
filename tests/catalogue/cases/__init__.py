"""One table of cases for the whole catalogue, one file for each family."""

from __future__ import annotations

from catalogue.cases import (
    adapters,
    balls,
    centering,
    definite,
    elementwise,
    gates,
    generation,
    invertible,
    manifolds,
    noise,
    norms,
    orthogonal,
    products,
    quantization,
    rank,
    semidefinite,
    sharing,
    sparsity,
    stochastic,
    structure,
    subspace,
)
from catalogue.cases.common import Case
from catalogue.cases.manifolds import COMPLEX_ONLY

_FAMILIES = (
    orthogonal,
    norms,
    definite,
    elementwise,
    rank,
    sparsity,
    sharing,
    subspace,
    generation,
    noise,
    adapters,
    structure,
    products,
    quantization,
    gates,
    semidefinite,
    balls,
    centering,
    stochastic,
    manifolds,
    invertible,
)

CASES: list[Case] = [case for family in _FAMILIES for case in family.CASES]

__all__ = ["CASES", "COMPLEX_ONLY", "Case"]
