"""One table of cases for the whole catalogue, one file for each family."""

from __future__ import annotations

from catalogue.cases import definite, elementwise, noise, norms, orthogonal, rank, sharing, sparsity, subspace
from catalogue.cases.common import Case

_FAMILIES = (orthogonal, norms, definite, elementwise, rank, sparsity, sharing, subspace, noise)

CASES: list[Case] = [case for family in _FAMILIES for case in family.CASES]

__all__ = ["CASES", "Case"]
