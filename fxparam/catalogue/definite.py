"""Symmetric, skew-symmetric and positive definite matrices, ``(..., n, n)``; complex ones are (skew-)Hermitian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fxparam.catalogue._image import Constrained, check_inexact, check_matrix, rounding, stored, widened
from fxparam.catalogue.elementwise import inverse_softplus
from fxparam.declaration import Entry


class _Matrices(Constrained):
    """Square matrices; distances are relative to the largest element."""

    def tolerance(self, weight: Tensor) -> float:
        """Rounding of products of ``n`` terms."""
        return rounding(weight.dtype, weight.shape[-1])


def _relative(gap: Tensor, weight: Tensor) -> Tensor:
    """The largest element of ``gap`` over the largest of ``weight``; zero where the gap is."""
    largest = gap.abs().amax()
    return largest if largest == 0 else largest / weight.abs().amax()


@dataclass(frozen=True, repr=False)
class Symmetric(Entry):
    """``W = triu(X) + triu(X, 1)ᵀ``: symmetric matrices from the upper triangle of the latent.

    Complex ones are Hermitian, ``Wᴴ = W``: of the diagonal the real part is read.

    Raises:
        SpecError: at build, the weight is not square, or neither floating-point nor complex.
    """

    name: ClassVar[str] = "symmetric"

    def build(self, weight: Tensor) -> SymmetricMap:
        """The map for ``(..., n, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight, square=True)
        return SymmetricMap(weight)


class SymmetricMap(_Matrices):
    """``Wᴴ = W``, which is ``Wᵀ = W`` for real ones."""

    constraint = "Wᴴ = W (relative to the largest element)"

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., n, n)``; the strictly lower triangle of the latent is not read."""
        if latent.is_complex():
            upper = latent.triu(1)
            return upper + upper.mH + torch.diag_embed(latent.diagonal(dim1=-2, dim2=-1).real)
        return latent.triu() + latent.triu(1).mT

    def distance(self, weight: Tensor) -> Tensor:
        """``max |W - Wᴴ| / max |W|``."""
        return _relative(weight - weight.mH, weight)

    def invert(self, weight: Tensor) -> Tensor:
        """The upper triangle."""
        return weight.triu()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """``(W + Wᴴ) / 2``, the nearest in the Frobenius norm."""
        self.require_finite(weight)
        return weight / 2 + weight.mH / 2

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """The Gaussian orthogonal (unitary) ensemble: ``(G + Gᴴ) / 2`` with ``G`` of standard normal elements."""
        drawn = self.normal(*self.shape, generator=generator).to(self._like.dtype)
        return self.project(drawn)


@dataclass(frozen=True, repr=False)
class Skew(Entry):
    """``W = triu(X, 1) - triu(X, 1)ᵀ``: skew-symmetric matrices from the strictly upper triangle of the latent.

    Complex ones are skew-Hermitian, ``Wᴴ = -W``: the imaginary part of the diagonal is read as well.

    Raises:
        SpecError: at build, the weight is not square, or neither floating-point nor complex.
    """

    name: ClassVar[str] = "skew"

    def build(self, weight: Tensor) -> SkewMap:
        """The map for ``(..., n, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight, square=True)
        return SkewMap(weight)


class SkewMap(_Matrices):
    """``Wᴴ = -W``, which is ``Wᵀ = -W`` for real ones."""

    constraint = "Wᴴ = -W (relative to the largest element)"

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., n, n)``; the lower triangle and the real part of the diagonal of the latent are not read."""
        upper = latent.triu(1)
        if latent.is_complex():
            return upper - upper.mH + torch.diag_embed(1j * latent.diagonal(dim1=-2, dim2=-1).imag)
        return upper - upper.mT

    def distance(self, weight: Tensor) -> Tensor:
        """``max |W + Wᴴ| / max |W|``."""
        return _relative(weight + weight.mH, weight)

    def invert(self, weight: Tensor) -> Tensor:
        """The strictly upper triangle, and of complex weights the diagonal."""
        return weight.triu(0 if weight.is_complex() else 1)

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """``(W - Wᴴ) / 2``, the nearest in the Frobenius norm."""
        self.require_finite(weight)
        return weight / 2 - weight.mH / 2

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """``(G - Gᴴ) / 2`` with ``G`` of standard normal elements."""
        drawn = self.normal(*self.shape, generator=generator).to(self._like.dtype)
        return self.project(drawn)


@dataclass(frozen=True, repr=False)
class PositiveDefinite(Entry):
    """``W = L Lᴴ`` with ``L = tril(X, -1) + diag(softplus(diag X))``: the Cholesky factor as latent.

    Of a complex diagonal the real part is read. Where the square of a latent overflows, the product does.

    Raises:
        SpecError: at build, the weight is not square, or neither floating-point nor complex.
    """

    name: ClassVar[str] = "positive_definite"

    def build(self, weight: Tensor) -> PositiveDefiniteMap:
        """The map for ``(..., n, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight, square=True)
        return PositiveDefiniteMap(weight)


class PositiveDefiniteMap(_Matrices):
    """``Wᴴ = W`` with eigenvalues above zero.

    ``contains`` asks for eigenvalues above minus the tolerance: where ``softplus`` underflows, or ``L`` is worse
    conditioned than the square root of the precision, the product is semidefinite up to rounding. The right inverse
    needs a Cholesky factor, so it refuses those.
    """

    constraint = "Wᴴ = W with eigenvalues above zero (relative to the largest)"

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., n, n)``; the strictly upper triangle of the latent is not read."""
        wide = widened(latent)
        diagonal = wide.diagonal(dim1=-2, dim2=-1)
        factor = wide.tril(-1) + torch.diag_embed(F.softplus(diagonal.real if wide.is_complex() else diagonal))
        return stored(factor @ factor.mH, latent.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """The larger of the asymmetry and the most negative eigenvalue, both relative."""
        wide = widened(weight)
        values = torch.linalg.eigvalsh((wide + wide.mH) / 2)
        largest = values.abs().amax(-1)
        below = torch.where(largest > 0, -values[..., 0] / largest, 0.0).amax()
        return torch.maximum(_relative(wide - wide.mH, wide), below.clamp(min=0))

    def invert(self, weight: Tensor) -> Tensor:
        """The Cholesky factor, its diagonal through the inverse of softplus."""
        wide = widened(weight)
        factor, info = torch.linalg.cholesky_ex((wide + wide.mH) / 2)
        if info.any():
            smallest = float(torch.linalg.eigvalsh((wide + wide.mH) / 2).amin())
            raise self.refusal(
                weight,
                f"{self.constraint} is missed: the smallest eigenvalue is {smallest:.3g}, zero up to the tolerance "
                f"{self.tolerance(weight):.3g}, and there is no Cholesky factor",
            )
        diagonal = inverse_softplus(factor.diagonal(dim1=-2, dim2=-1).real)
        return (factor.tril(-1) + torch.diag_embed(diagonal)).to(weight.dtype)

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The symmetric part with its eigenvalues raised to the tolerance times the largest; unchanged if in the image.

        The nearest semidefinite matrix in the Frobenius norm has the negative ones at zero (Higham 1988); no Cholesky
        factor could be had of that. Where no eigenvalue is above zero, a multiple of the identity.
        """
        self.require_finite(weight)
        wide = widened(weight)
        if self.contains(weight) and not torch.linalg.cholesky_ex((wide + wide.mH) / 2).info.any():
            return weight.clone()
        values, vectors = torch.linalg.eigh((wide + wide.mH) / 2)
        floor = 4 * self.tolerance(weight) * values.abs().amax(-1, keepdim=True)
        floor = torch.where(floor > 0, floor, torch.finfo(weight.dtype).eps)
        raised = (vectors * values.clamp(min=floor).unsqueeze(-2)) @ vectors.mH
        return (raised / 2 + raised.mH / 2).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """``G Gᴴ / 2n`` with ``G`` of shape ``(..., n, 2n)`` and standard normal elements: Wishart, of mean ``I``."""
        size = self.shape[-1]
        drawn = self.normal(*self.shape[:-1], 2 * size, generator=generator)
        return (drawn @ drawn.mH / (2 * size)).to(self._like.dtype)
