"""Zeros at chosen places."""

from __future__ import annotations

import torch
from catalogue.cases.common import Case

from fxparam import catalogue as cat

_KEEP = [[1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]]

CASES = [
    Case(cat.Mask(density=0.5), (4, 3), lambda m, x: torch.where(m.mask > 0, x, 0.0), lambda w: w + 1, exact=True),
    Case(cat.Mask(density=0.3, by="random", seed=3), (2, 5), lambda m, x: m.mask * x, lambda w: w + 1, exact=True),
    Case(cat.Mask(keep=_KEEP), (3, 4), lambda _, x: torch.tensor(_KEEP) * x, lambda w: w + 1, exact=True),
]
