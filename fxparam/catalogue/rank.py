"""Matrices of low rank, ``(..., m, n)``, as products of thin factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fxparam.catalogue._image import (
    Constrained,
    check_inexact,
    check_integer,
    check_matrix,
    computing_dtype,
    rounding,
    shape_text,
    stored,
    widened,
)
from fxparam.catalogue._layers import is_kernel, output_dim
from fxparam.catalogue.elementwise import inverse_softplus
from fxparam.catalogue.orthogonal import Orthogonal
from fxparam.catalogue.sharing import FromMatrix
from fxparam.declaration import Chain, Declaration, Entry, Place
from fxparam.errors import SpecError


def check_rank(name: str, weight: Tensor, rank: int) -> None:
    """Refuse what is no matrix, batch of matrices, or has a dimension smaller than ``rank``."""
    check_inexact(name, weight)
    check_matrix(name, weight)
    most = min(weight.shape[-2:])
    if rank > most:
        raise SpecError(f"{name}: got rank={rank} for a weight of shape {shape_text(weight)}; expected 1 <= rank <= {most}")


def spectral_rounding(weight: Tensor) -> float:
    """Relative error of singular values of a stored matrix: of the product and its decomposition, and of storing.

    Storing adds noise to each element, a matrix whose norm grows like ``√m + √n``.
    """
    m, n = weight.shape[-2:]
    return rounding(weight.dtype, max(m, n)) + torch.finfo(weight.dtype).eps * (m**0.5 + n**0.5)


class _RankMap(Constrained):
    """Matrices of rank at most ``rank``."""

    constraint = "the rank"

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__(weight)
        self.rank = rank

    def distance(self, weight: Tensor) -> Tensor:
        """The first singular value too many, over the largest, or over the least normal number if that is larger.

        Below that number elements are rounded to a fixed grid, and a product of rank one is stored as one of any rank.
        """
        values = torch.linalg.svdvals(widened(weight))
        if self.rank == values.shape[-1]:
            return values.new_zeros(())
        return (values[..., self.rank] / values[..., 0].clamp(min=torch.finfo(weight.dtype).tiny)).amax()

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of singular values."""
        return spectral_rounding(weight)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """``L R / √rank`` with factors of standard normal elements, so that elements have variance 1.

        Its rank is exactly ``rank`` with probability 1.
        """
        *batch, m, n = self.shape
        left = self.normal(*batch, m, self.rank, generator=generator)
        right = self.normal(*batch, self.rank, n, generator=generator)
        return (left @ right / self.rank**0.5).to(self._like.dtype)

    def _truncated(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(widened(weight), full_matrices=False)
        return u[..., : self.rank], s[..., : self.rank], vh[..., : self.rank, :]

    def extra_repr(self) -> str:
        """The rank."""
        return f"rank={self.rank}"


@dataclass(frozen=True, repr=False)
class LowRank(Entry):
    """``W = L R`` with ``L`` of shape ``(..., m, rank)`` and ``R`` of shape ``(..., rank, n)``: rank at most ``rank``.

    For huge factors the product overflows.

    Args:
        rank: the inner size, from 1 to ``min(m, n)``.

    Raises:
        SpecError: ``rank`` is no integer of at least 1; at build, it exceeds ``min(m, n)``, or the weight is no matrix
            or batch of matrices, or neither floating-point nor complex.
    """

    name: ClassVar[str] = "low_rank"
    rank: int

    def __post_init__(self) -> None:
        check_integer(self.name, "rank", self.rank, least=1)

    def placed(self, place: Place) -> Declaration:
        """For the kernel of a convolution: that of a matrix, outputs times all else."""
        return Chain((self, FromMatrix(output_dim(place)))) if is_kernel(place) else self

    def build(self, weight: Tensor) -> LowRankMap:
        """The map for ``(..., m, n)``."""
        check_rank(self.name, weight, self.rank)
        return LowRankMap(weight, self.rank)


class LowRankMap(_RankMap):
    """``(L, R)`` to ``L R``: matrices of rank at most ``rank``."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., m, rank)`` and ``(..., rank, n)`` to ``(..., m, n)``."""
        return left @ right

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``U √S`` and ``√S Vᴴ`` of the truncated singular value decomposition.

        Where a singular value is zero, the column of ``L`` is zero and the row of ``R`` is not, or neither would ever
        train.
        """
        u, s, vh = self._truncated(weight)
        root = torch.where(s > self.tolerance(weight) * s[..., :1], s.sqrt(), 1.0)
        left, right = u * (s / root).unsqueeze(-2), root.unsqueeze(-1) * vh
        return left.to(weight.dtype).contiguous(), right.to(weight.dtype).contiguous()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The nearest matrix of that rank in every unitarily invariant norm (Eckart and Young 1936, Mirsky 1960).

        Unchanged if in the image.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        u, s, vh = self._truncated(weight)
        return ((u * s.unsqueeze(-2)) @ vh).to(weight.dtype)


@dataclass(frozen=True, repr=False)
class FixedRank(Entry):
    """``W = U diag(s) Vᴴ`` with orthonormal columns of ``U`` and ``V``, and ``s = softplus(σ) > 0``: of rank ``rank``.

    The factors of the manifold of matrices of fixed rank (Vandereycken 2013, section 2.1). ``U`` and ``V`` are computed as
    ``orthogonal`` does: ``householder`` without a trivialization for real weights, so that nothing larger than the
    latents is kept, and ``matrix_exp`` with one for complex weights.

    Latents are those of ``U`` (``original0``, ``(..., m, rank)``), ``σ`` (``original1``, ``(..., rank)``; of complex
    weights the real part counts) and those of ``V`` (``original2``, ``(..., n, rank)``).

    Args:
        rank: the rank, from 1 to ``min(m, n)``.

    Raises:
        SpecError: ``rank`` is no integer of at least 1; at build, it exceeds ``min(m, n)``, or the weight is no matrix
            or batch of matrices, or neither floating-point nor complex.
    """

    name: ClassVar[str] = "fixed_rank"
    rank: int

    def __post_init__(self) -> None:
        check_integer(self.name, "rank", self.rank, least=1)

    def placed(self, place: Place) -> Declaration:
        """For the kernel of a convolution: that of a matrix, outputs times all else."""
        return Chain((self, FromMatrix(output_dim(place)))) if is_kernel(place) else self

    def build(self, weight: Tensor) -> FixedRankMap:
        """The map for ``(..., m, n)``."""
        check_rank(self.name, weight, self.rank)
        return FixedRankMap(weight, self.rank)


class FixedRankMap(_RankMap):
    """``(U, σ, V)`` to ``U diag(softplus σ) Vᴴ``: matrices of rank exactly ``rank``.

    ``contains`` takes the closed set, rank at most ``rank``, for ``softplus`` underflows to zero, and beside a large
    singular value a small one drowns in rounding. The right inverse refuses what has a smaller rank.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__(weight, rank)
        *batch, m, n = weight.shape
        name = "matrix_exp" if weight.is_complex() else "householder"
        basis = Orthogonal(map=name, use_trivialization=weight.is_complex())
        dtype = computing_dtype(weight.dtype)
        self.left = basis.build(weight.detach().new_zeros(*batch, m, rank, dtype=dtype))
        self.right = basis.build(weight.detach().new_zeros(*batch, n, rank, dtype=dtype))

    def forward(self, left: Tensor, values: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., m, rank)``, ``(..., rank)`` and ``(..., n, rank)`` to ``(..., m, n)``."""
        u, v = self.left(widened(left)), self.right(widened(right))
        s = F.softplus(widened(values.real if values.is_complex() else values))
        return stored((u * s.unsqueeze(-2)) @ v.mH, left.dtype)

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The truncated singular value decomposition, each factor through its own right inverse."""
        u, s, vh = self._truncated(weight)
        least = float((s[..., -1] / s[..., 0].clamp(min=torch.finfo(s.dtype).tiny)).amin())
        if not least > self._negligible(s):
            raise self.refusal(
                weight,
                f"its rank is below {self.rank}: singular value {self.rank} is {least:.3g} of the largest, zero up to the "
                f"tolerance {self._negligible(s):.3g}",
            )
        left, right = self.left.right_inverse(u.contiguous()), self.right.right_inverse(vh.mH.contiguous())
        assert isinstance(left, Tensor) and isinstance(right, Tensor)
        return left.to(weight.dtype), inverse_softplus(s).to(weight.dtype), right.to(weight.dtype)

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The nearest matrix of rank at most ``rank``, with singular values raised to the tolerance times the largest.

        Of the zero matrix, singular values of epsilon. Unchanged if in the image and of no smaller rank.
        """
        self.require_finite(weight)
        u, s, vh = self._truncated(weight)
        if self.contains(weight) and bool((s[..., -1] > self._negligible(s) * s[..., 0]).all()):
            return weight.clone()
        floor = 4 * self.tolerance(weight) * s[..., :1]
        floor = torch.where(floor > torch.finfo(weight.dtype).tiny, floor, torch.finfo(weight.dtype).eps)
        return ((u * s.clamp(min=floor).unsqueeze(-2)) @ vh).to(weight.dtype)

    def _negligible(self, values: Tensor) -> float:
        """The relative size below which a singular value is rounding, as for ``torch.linalg.matrix_rank``.

        By the dtype that computes, not the one that stores: whatever rank a stored matrix has, it has exactly.
        """
        return max(self.shape[-2:]) * torch.finfo(values.dtype).eps
