"""One table of cases for the whole catalogue, one file for each family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
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


def parametrized(cases: Iterable[Case], each: int = 2) -> Any:
    """Parametrizes a test over ``case``: the first few of each entry and map, and all of them in the exhaustive runs."""
    seen: Counter[tuple[str, object]] = Counter()

    def row(case: Case) -> Any:
        key = (case.entry.name, getattr(case.entry, "map", None))
        seen[key] += 1
        return pytest.param(case, id=str(case), marks=[] if seen[key] <= each else [pytest.mark.exhaustive])

    return pytest.mark.parametrize("case", [row(case) for case in cases])


__all__ = ["CASES", "COMPLEX_ONLY", "Case", "parametrized"]
