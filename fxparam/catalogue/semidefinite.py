"""Positive semidefinite matrices, ``(..., n, n)``, of any rank or of bounded rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    check_inexact,
    check_integer,
    check_matrix,
    shape_text,
    stored,
    widened,
)
from fxparam.catalogue.rank import spectral_rounding
from fxparam.declaration import Entry
from fxparam.errors import SpecError


@dataclass(frozen=True, repr=False)
class PositiveSemidefinite(Entry):
    """``W = B Bᴴ`` with ``B`` of shape ``(..., n, rank)``: Hermitian, without eigenvalues below zero (Burer, Monteiro 2003).

    For huge factors the product overflows.

    Args:
        rank: the largest rank, from 1 to ``n``; None: ``n``.

    Raises:
        SpecError: ``rank`` is no integer of at least 1; at build, it exceeds ``n``, or the weight is not square, or neither
            floating-point nor complex.
    """

    name: ClassVar[str] = "positive_semidefinite"
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_integer(self.name, "rank", self.rank, least=1)

    def build(self, weight: Tensor) -> PositiveSemidefiniteMap:
        """The map for ``(..., n, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight, square=True)
        n = weight.shape[-1]
        rank = n if self.rank is None else self.rank
        if rank > n:
            raise SpecError(
                f"{self.name}: got rank={rank} for a weight of shape {shape_text(weight)}; expected 1 <= rank <= {n}"
            )
        return PositiveSemidefiniteMap(weight, rank)


class PositiveSemidefiniteMap(Constrained):
    """``B`` to ``B Bᴴ``: ``Wᴴ = W`` with at most ``rank`` eigenvalues above zero and none below."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__(weight)
        self.rank = rank
        few = "no eigenvalue" if rank == weight.shape[-1] else f"at most {rank} eigenvalues above and none"
        self.constraint = f"Wᴴ = W with {few} below zero (relative to the largest)"

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., n, rank)`` to ``(..., n, n)``."""
        factor = widened(latent)
        return stored(factor @ factor.mH, latent.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """The largest of the asymmetry, the most negative eigenvalue and the first eigenvalue too many.

        All relative to the largest, or to the least normal number if that is larger: elements below it are rounded to a
        fixed grid.
        """
        wide, tiny = widened(weight), torch.finfo(weight.dtype).tiny
        values = torch.linalg.eigvalsh(_hermitian(wide))
        # Ascending: what may not be below zero, and after it the ``rank`` values that may be above.
        many = values[..., : -self.rank].abs().amax(-1) if self.rank < values.shape[-1] else -values[..., 0]
        below = torch.maximum(many, -values[..., 0]) / values.abs().amax(-1).clamp(min=tiny)
        skew = (wide - wide.mH).abs().amax((-2, -1)) / wide.abs().amax((-2, -1)).clamp(min=tiny)
        return torch.maximum(below, skew).amax().clamp(min=0)

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of eigenvalues."""
        return spectral_rounding(weight)

    def invert(self, weight: Tensor) -> Tensor:
        """``U √Λ`` of the eigenvalue decomposition, the largest first.

        Eigenvalues of zero become epsilon times the largest (epsilon itself in a zero matrix), which is within rounding: a
        column of ``B`` that is zero has no gradient and would never train.
        """
        values, vectors = self._largest(weight)
        limits, largest = torch.finfo(values.dtype), values[..., :1]
        floor = (limits.eps * largest).clamp(min=limits.eps * limits.tiny)
        floor = torch.where(largest > 0, floor, limits.eps)
        return (vectors * values.clamp(min=floor).sqrt().unsqueeze(-2)).to(weight.dtype).contiguous()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The nearest in the Frobenius norm: the Hermitian part with its ``rank`` largest eigenvalues, those above zero.

        Higham 1988, theorem 2.1, for full rank. Unchanged if in the image.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        values, vectors = self._largest(weight)
        return ((vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mH).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """``G Gᴴ / rank`` with ``G`` of shape ``(..., n, rank)`` and standard normal elements: Wishart, of mean ``I``."""
        drawn = self.normal(*self.shape[:-1], self.rank, generator=generator)
        return (drawn @ drawn.mH / self.rank).to(self._like.dtype)

    def _largest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(_hermitian(widened(weight)))
        return values[..., -self.rank :].flip(-1), vectors[..., -self.rank :].flip(-1)

    def extra_repr(self) -> str:
        """The rank."""
        return f"rank={self.rank}"


def _hermitian(matrix: Tensor) -> Tensor:
    """The Hermitian part."""
    return matrix / 2 + matrix.mH / 2
