"""Maps that rearrange."""

from __future__ import annotations

import torch
from catalogue.cases.common import Case

from fxparam import catalogue as cat

CASES = [
    Case(cat.Transpose(), (4, 3), lambda _, x: torch.einsum("ij->ji", x), latents=((3, 4),), exact=True),
    Case(cat.Transpose(0, -1), (2, 3, 4), lambda _, x: torch.einsum("ijk->kji", x), latents=((4, 3, 2),), exact=True),
]
