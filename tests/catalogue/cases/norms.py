"""Maps that fix or separate a norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from catalogue.cases.common import Case, bump
from torch import Tensor

from fxparam import catalogue as cat


def _weight_norm(module: Any, g: Tensor, v: Tensor) -> Tensor:
    if module.dim == -1:
        return g * v / (v * v).sum().sqrt()
    slices = zip(g.unbind(module.dim), v.unbind(module.dim), strict=True)
    return torch.stack([norm * part / (part * part).sum().sqrt() for norm, part in slices], module.dim)


def _spectral_norm(module: Any, x: Tensor) -> Tensor:
    if x.ndim == 1:
        return x / (x * x).sum().sqrt()
    rows = torch.stack([part.reshape(-1) for part in x.unbind(module.dim)])
    return x / (module._u[:, None] * rows * module._v[None, :]).sum()


def _unit_norm(module: Any, x: Tensor) -> Tensor:
    if module.p == math.inf:
        return x / x.abs().amax(module.dim, keepdim=True)
    return x / (x.abs() ** module.p).sum(module.dim, keepdim=True) ** (1 / module.p)


_FUSED = "torch's fused kernel takes the norm for a constant there"
_SMALL = dict.fromkeys(("zero", "denormal", "tiny"), "the norm is 0 or its square underflows: 0/0, as torch")
_ROWS = {**_SMALL, "identity": "a row of zeros: 0/0, as torch"}
_WITHOUT_SIGMA = {"zero": "0/0, as torch", "denormal gradient": "no digits are left of the largest singular value, as torch"}

CASES = [
    Case(cat.WeightNorm(), (4, 3), _weight_norm, latents=((4, 1), (4, 3)), second=_FUSED, extremes=_ROWS),
    Case(cat.WeightNorm(dim=1), (4, 3, 2), _weight_norm, latents=((1, 3, 1), (4, 3, 2)), extremes=_ROWS),
    Case(cat.WeightNorm(dim=None), (4, 3), _weight_norm, latents=((), (4, 3)), extremes=_SMALL),
    Case(cat.WeightNorm(), (5,), _weight_norm, latents=((5,), (5,)), second=_FUSED, extremes=_SMALL),
    Case(cat.SpectralNorm(), (4, 3), _spectral_norm, lambda w: 2 * w, extremes=_WITHOUT_SIGMA),
    Case(cat.SpectralNorm(dim=1, n_power_iterations=2), (3, 4, 2), _spectral_norm, lambda w: 2 * w, extremes=_WITHOUT_SIGMA),
    Case(cat.SpectralNorm(), (5,), _spectral_norm, lambda w: 2 * w),
    Case(cat.UnitNorm(), (4, 3), _unit_norm, bump, complex=True),
    Case(cat.UnitNorm(dim=0, p=1), (2, 4, 3), _unit_norm, bump, complex=True),
    Case(cat.UnitNorm(p=3.5), (5,), _unit_norm, bump, complex=True),
    Case(cat.UnitNorm(p=math.inf), (4, 3), _unit_norm, lambda w: 1.5 * w, complex=True),
]
