"""Matrices that have an inverse, ``(..., n, n)``, by triangular factors: ``W = P L (U + diag(signs · exp(s)))``.

This is the decomposition of Glow's invertible convolution (Kingma and Dhariwal 2018, eq. 10): ``P`` a fixed
permutation, ``L`` lower triangular with ones on its diagonal, ``U`` strictly upper triangular, and ``log|det W| = sum(s)``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    check_floating,
    check_matrix,
    computing_dtype,
    rounding,
    stored,
    widened,
)
from fxparam.declaration import Entry


@dataclass(frozen=True, repr=False)
class Invertible(Entry):
    """``W = P L (U + diag(signs · exp(s)))``: the determinant is never zero, and does not change its sign by training.

    The latent holds ``L`` below its diagonal, ``s`` on it and ``U`` above; the buffers ``permutation`` (``W``'s row ``i`` is
    row ``permutation[i]`` of the product) and ``signs`` are those of the weight that was assigned last, the identity and ones
    before.

    ``s`` is cut off at a quarter of the exponents of the dtype in which weights are computed: ``|s| <= 22`` in float32. Latents
    of size 1000 give matrices that are singular to working precision; for huge ones the product overflows.

    Raises:
        SpecError: at build, the weight is not square or not floating-point (complex weights are refused as well).
    """

    name: ClassVar[str] = "invertible"

    def build(self, weight: Tensor) -> InvertibleMap:
        """The map for ``(..., n, n)``."""
        check_floating(self.name, weight)
        check_matrix(self.name, weight, square=True)
        return InvertibleMap(weight)


@dataclass(frozen=True, repr=False)
class SpecialLinear(Entry):
    """``W = P L (U + diag(signs · exp(s - mean(s))))`` with determinant 1: volumes are kept.

    Latent and buffers are those of ``invertible()``; the product of the signs is that of the permutation. As there, latents of
    size 1000 give matrices that are singular to working precision, and for huge ones the product overflows.

    Raises:
        SpecError: at build, the weight is not square or not floating-point (complex weights are refused as well).
    """

    name: ClassVar[str] = "special_linear"

    def build(self, weight: Tensor) -> SpecialLinearMap:
        """The map for ``(..., n, n)``."""
        check_floating(self.name, weight)
        check_matrix(self.name, weight, square=True)
        return SpecialLinearMap(weight)


class _FactoredMap(Constrained):
    """The product of a permutation and two triangular factors."""

    permutation: Tensor
    signs: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        order = torch.arange(weight.shape[-1], device=weight.device)
        self.register_buffer("permutation", order.expand(weight.shape[:-1]).clone())
        self.register_buffer("signs", torch.ones_like(weight[..., 0]).detach())

    @abstractmethod
    def exponents(self, diagonal: Tensor) -> Tensor:
        """The logarithms of the pivots, from the diagonal of the latent."""

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., n, n)`` to the same."""
        wide = widened(latent)
        pivots = widened(self.signs) * self.exponents(wide.diagonal(dim1=-2, dim2=-1)).exp()
        lower = wide.tril(-1) + torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
        product = lower @ (wide.triu(1) + torch.diag_embed(pivots))
        return stored(torch.take_along_dim(product, self.permutation.unsqueeze(-1), dim=-2), latent.dtype)

    def invert(self, weight: Tensor) -> Tensor:
        """The factors of a decomposition with partial pivoting; ``permutation`` and ``signs`` become its own."""
        order, lower, upper = _factors(weight)
        pivots = upper.diagonal(dim1=-2, dim2=-1)
        self.permutation.copy_(order.argmax(dim=-1))
        self.signs.copy_(pivots.sign())
        return (lower.tril(-1) + upper.triu(1) + torch.diag_embed(pivots.abs().log())).to(weight.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """How far the pivots of the decomposition are from where they may be; 1 for a singular matrix.

        The smallest is to be no less than ``n`` roundings of the largest, and all are to be within the limits of ``exp(s)``:
        which part is missing from the smallest, or too much in the largest.
        """
        pivots = _factors(weight)[2].diagonal(dim1=-2, dim2=-1).abs()
        smallest, largest = pivots.amin(dim=-1), pivots.amax(dim=-1)
        dtype = computing_dtype(weight.dtype)
        limit = math.exp(_limit(dtype))
        least = (largest * (pivots.shape[-1] * torch.finfo(dtype).eps)).clamp(min=1 / limit)
        return torch.maximum(1 - smallest / least, 1 - limit / largest).amax().clamp(min=0)

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of the product."""
        return rounding(weight.dtype, weight.shape[-1]) + torch.finfo(weight.dtype).eps * weight.shape[-1] ** 0.5

    def regular(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition, values below the root of the rounding (of the largest one) raised to that.

        All are kept within the limits of ``exp(s)``. No pivot is less than the smallest one over ``√n``.
        """
        u, values, vh = torch.linalg.svd(weight.to(torch.float64))
        info, limit, n = torch.finfo(weight.dtype), math.exp(_limit(computing_dtype(weight.dtype))), weight.shape[-1]
        # Of a weight of zeros, what the dtype can store.
        least = (info.eps**0.5 * values[..., :1]).clamp(min=max(info.tiny**0.5, 2 * n**0.5 / limit))
        return u, torch.maximum(values, least).clamp(max=limit / n), vh


class InvertibleMap(_FactoredMap):
    """``det W ≠ 0``."""

    constraint = "pivots well above zero (by which part of the least that are)"

    def exponents(self, diagonal: Tensor) -> Tensor:
        """The diagonal itself, limited."""
        return diagonal.clamp(-_limit(diagonal.dtype), _limit(diagonal.dtype))

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The weight with its smallest singular values raised to the root of the rounding; unchanged if in the image.

        It is relative to the largest one. There is no nearest matrix: those with an inverse are everywhere.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        u, values, vh = self.regular(weight)
        return ((u * values.unsqueeze(-2)) @ vh).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Independent standard normal elements, which are invertible with probability 1."""
        return self.project(self.normal(*self.shape, generator=generator).to(self._like.dtype))


class SpecialLinearMap(_FactoredMap):
    """``det W = 1``."""

    constraint = "determinant 1 (by which part of its norm the weight has to change)"

    def exponents(self, diagonal: Tensor) -> Tensor:
        """The diagonal, limited, less its mean."""
        limited = diagonal.clamp(-_limit(diagonal.dtype), _limit(diagonal.dtype))
        return limited - limited.mean(dim=-1, keepdim=True)

    def distance(self, weight: Tensor) -> Tensor:
        """By which part of its norm the weight has to change to have determinant 1; 1 for a singular matrix.

        The shorter of two ways. To scale it takes ``||det W|^(-1/n) - 1|``. To change its smallest singular value, with a
        negative determinant also its sign, takes ``(e^d ∓ 1) σ_min / σ_max`` with ``d = |log|det W||`` (to divide counts
        like to multiply, or a large matrix would be near the almost singular ones). Near the image that is ``d / n`` or ``d``
        over the condition number: up to rounding times that number is all that can be known of ``d``.
        """
        scaling, bending = self._ways(weight)[-2:]
        return torch.maximum(torch.minimum(scaling, bending).amax(), super().distance(weight))

    def invert(self, weight: Tensor) -> Tensor:
        """As for all invertible matrices, after the way to determinant 1 that ``distance`` takes.

        Raises:
            ImageError: the weight is so badly conditioned that its factors miss it.
        """
        u, values, vh, log, sign, scaling, bending = self._ways(weight)
        bent = torch.cat([values[..., :-1], (values[..., -1] * sign * (-log).exp()).unsqueeze(-1)], dim=-1)
        scaled = values * (-log / values.shape[-1]).exp().unsqueeze(-1)
        values = torch.where((scaling <= bending).unsqueeze(-1), scaled, bent)
        before = self.permutation.clone(), self.signs.clone()
        latent = super().invert((u * values.unsqueeze(-2)) @ vh)
        # What rounding left of the determinant goes to the smallest pivot, where it matters least.
        s = latent.diagonal(dim1=-2, dim2=-1)
        smallest = s.argmin(dim=-1, keepdim=True)
        s.scatter_add_(-1, smallest, -s.sum(dim=-1, keepdim=True))
        parity = _parity(self.permutation) * self.signs.prod(dim=-1, keepdim=True)
        self.signs.scatter_(-1, smallest, self.signs.gather(-1, smallest) * parity.to(self.signs.dtype))
        latent = latent.to(weight.dtype)
        missed, allowed = float(_relative(self.forward(latent) - weight, weight)), 10 * self.tolerance(weight)
        if not missed <= allowed:
            self.permutation.copy_(before[0])
            self.signs.copy_(before[1])
            raise self.refusal(
                weight, f"its factors miss it by {missed:.3g}, tolerance {allowed:.3g}, for it is badly conditioned"
            )
        return latent

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The weight over the ``n``-th root of its determinant; unchanged if in the image.

        Before, its smallest singular values are raised to the root of the rounding, and with a negative determinant the
        smallest changes its sign.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        u, values, vh = self.regular(weight)
        values = values / values[..., :1]
        root = values.log().mean(dim=-1, keepdim=True).exp()
        sign = torch.linalg.det(u @ vh).sign()
        values = torch.cat([values[..., :-1], values[..., -1:] * sign.unsqueeze(-1)], dim=-1) / root
        return ((u * values.unsqueeze(-2)) @ vh).to(weight.dtype)

    def _ways(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The singular value decomposition, ``log|det|``, its sign, and the lengths of the two ways to determinant 1."""
        u, values, vh = torch.linalg.svd(weight.to(torch.float64))
        log, sign = values.log().sum(dim=-1), torch.linalg.det(u @ vh).sign()
        # Infinity, and infinity times zero, are those of a singular matrix.
        scaling = torch.expm1(-log / values.shape[-1]).abs().nan_to_num(posinf=1.0)
        bending = ((log.abs().exp() - sign) * (values[..., -1] / values[..., 0])).nan_to_num(nan=1.0, posinf=1.0)
        return u, values, vh, log, sign, torch.where(sign > 0, scaling, bending), bending

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Independent standard normal elements, over the ``n``-th root of the determinant as ``project`` does."""
        return self.project(self.normal(*self.shape, generator=generator)).to(self._like.dtype)


def _factors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``P``, ``L`` and ``U`` of the decomposition with partial pivoting, in float64."""
    return torch.linalg.lu(weight.to(torch.float64))


def _parity(permutation: Tensor) -> Tensor:
    """The determinant of a permutation matrix, ``(..., n)`` to ``(..., 1)``."""
    n = permutation.shape[-1]
    order = torch.arange(n, device=permutation.device)
    rows = (permutation.unsqueeze(-1) == order).to(torch.float64)
    return torch.linalg.det(rows).round().unsqueeze(-1)


def _relative(gap: Tensor, weight: Tensor) -> Tensor:
    """The largest element of a gap, over that of its matrix."""
    return (gap.abs().amax(dim=(-2, -1)) / weight.abs().amax(dim=(-2, -1))).amax()


def _limit(dtype: torch.dtype) -> float:
    """The largest ``|s|``: ``exp(s)`` of all pivots, its inverse and the product of two do not overflow."""
    return math.log(torch.finfo(dtype).max) / 4
