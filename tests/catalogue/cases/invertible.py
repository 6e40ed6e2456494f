"""Matrices with an inverse."""

from __future__ import annotations

from typing import Any

import torch
from catalogue.cases.common import Case
from torch import Tensor

from fxparam import catalogue as cat


def _factored(module: Any, x: Tensor) -> Tensor:
    """The three factors element by element, the permutation as a matrix."""
    n = x.shape[-1]
    row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    s = torch.stack([x[..., i, i] for i in range(n)], -1)
    if type(module).__name__ == "SpecialLinearMap":
        s = s - s.sum(-1, keepdim=True) / n
    lower = torch.where(row > column, x, (row == column).to(x.dtype))
    upper = torch.where(row < column, x, torch.where(row == column, (module.signs * torch.e**s)[..., None, :], 0.0))
    order = (module.permutation[..., :, None] == torch.arange(n)).to(x.dtype)
    return torch.einsum("...ij,...jk,...kl->...il", order, lower, upper)


def _repeated(weight: Tensor) -> Tensor:
    """A row twice, or no row at all."""
    singular = weight.clone()
    singular[..., -1, :] = weight[..., 0, :] if weight.shape[-1] > 1 else 0
    return singular


_OVERFLOW = {"huge": "the product overflows"}

# With latents of size 1000 the weights are singular to working precision: the distance is 1.
CASES = [
    *(
        Case(cat.Invertible(), shape, _factored, _repeated, growth=1e14, nodes=20, extremes=_OVERFLOW)
        for shape in [(4, 4), (2, 3, 3)]
    ),
    Case(cat.Invertible(), (1, 1), _factored, _repeated, nodes=20),
    *(
        Case(cat.SpecialLinear(), shape, _factored, lambda w: 2 * w, growth=1e14, nodes=20, extremes=_OVERFLOW)
        for shape in [(4, 4), (2, 3, 3)]
    ),
    Case(cat.SpecialLinear(), (2, 2), _factored, lambda w: w.flip(-1), growth=1e14, nodes=20, extremes=_OVERFLOW),
]
