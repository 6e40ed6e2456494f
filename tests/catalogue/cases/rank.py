"""Products of factors."""

from __future__ import annotations

import torch
from catalogue.cases.common import Case

from fxparam import catalogue as cat

CASES = [
    Case(
        cat.LowRank(2),
        (4, 5),
        lambda _, a, b: torch.einsum("ik,kj->ij", a, b),
        lambda w: w + torch.eye(4, 5, dtype=w.dtype),
        latents=((4, 2), (2, 5)),
    ),
    Case(
        cat.LowRank(1),
        (2, 3, 3),
        lambda _, a, b: (a[..., None] * b[:, None]).sum(2),
        lambda w: w + torch.eye(3, dtype=w.dtype),
        latents=((2, 3, 1), (2, 1, 3)),
    ),
]
