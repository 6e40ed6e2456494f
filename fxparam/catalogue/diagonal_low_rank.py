"""A diagonal plus a matrix of low rank: ``W = diag(d) + U Vᴴ``, ``(..., n, n)``.

Which part of the diagonal of a given ``W`` is whose? Off the diagonal ``W`` is ``L = U Vᴴ``. Take three sets of indices
``I``, ``J`` and ``K`` without common elements. Where ``L[I, J]`` has the rank of ``L``, its rows and columns span all
others, so that ``L[K, K] = W[K, J] W[I, J]⁺ W[I, K]``: a skeleton decomposition (Goreinov, Tyrtyshnikov and Zamarashkin
1997) whose three factors are all off the diagonal. Gauss-Newton steps then remove what rounding did to that estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    check_inexact,
    check_integer,
    check_matrix,
    rounding,
    shape_text,
)
from fxparam.catalogue.rank import LowRankMap
from fxparam.declaration import Entry
from fxparam.errors import SpecError

_NEWTON_STEPS = 12
_PROJECTIONS = 50


@dataclass(frozen=True, repr=False)
class DiagonalLowRank(Entry):
    """``W = diag(d) + U Vᴴ`` with ``d`` of shape ``(..., n)`` and ``U`` and ``V`` of shape ``(..., n, rank)``, real or complex.

    For huge latents the product overflows.

    Args:
        rank: the number of columns of ``U`` and ``V``, at least 1 with ``2 * rank + 1 <= n``. With more, there are more
            latents than elements.

    Raises:
        SpecError: ``rank`` is no integer of at least 1; at build, it is too large, or the weight is not square, or
            neither floating-point nor complex.
    """

    name: ClassVar[str] = "diagonal_low_rank"
    rank: int

    def __post_init__(self) -> None:
        check_integer(self.name, "rank", self.rank, least=1)

    def build(self, weight: Tensor) -> DiagonalLowRankMap:
        """The map for ``(..., n, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight, square=True)
        if 2 * self.rank + 1 > weight.shape[-1]:
            raise SpecError(
                f"diagonal_low_rank: got rank={self.rank} for a weight of shape {shape_text(weight)}; expected "
                f"2 * rank + 1 <= {weight.shape[-1]}"
            )
        return DiagonalLowRankMap(weight, self.rank)


class DiagonalLowRankMap(Constrained):
    """Sums of a diagonal matrix and one of rank at most ``rank``.

    The split that ``contains`` and the right inverse look for is found for almost all such matrices. It may be missed, and
    the weight refused, where the low-rank part is zero at so many places that no block off the diagonal has its rank.
    """

    constraint = "being a diagonal and a matrix of that rank (relative to the largest element)"

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__(weight)
        self.rank = rank
        self.low_rank = LowRankMap(weight, rank)

    def forward(self, diagonal: Tensor, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., n)``, ``(..., n, rank)`` and ``(..., n, rank)`` to ``(..., n, n)``."""
        return torch.diag_embed(diagonal) + left @ right.mH

    def distance(self, weight: Tensor) -> Tensor:
        """The largest element of ``|W - diag(d) - L|``, over the largest of ``|W|``, for the best ``d`` and ``L`` found."""
        scaled, _ = _scaled(weight)
        diagonal, low = self._split(scaled, self._diagonal(scaled, self.tolerance(weight)))
        return (scaled - torch.diag_embed(diagonal) - low).abs().amax()

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of the product."""
        return rounding(weight.dtype, weight.shape[-1])

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The diagonal, and factors of equal norm; where the rank is lower, zeros in ``U`` and not in ``V``.

        Raises:
            ImageError: the two parts are so much larger than their sum that, rounded to the dtype, they miss it.
        """
        scaled, scale = _scaled(weight)
        diagonal, low = self._split(scaled, self._diagonal(scaled, self.tolerance(weight)))
        left, right = self.low_rank.invert(low * scale)
        latents = (
            (diagonal * scale.squeeze(-1)).to(weight.dtype),
            left.to(weight.dtype),
            right.mH.to(weight.dtype).contiguous(),
        )
        missed = float(((self.forward(*latents) - weight) / scale).abs().amax())
        allowed = 10 * self.tolerance(weight)
        if not missed <= allowed:
            raise self.refusal(weight, f"{self.constraint} is missed by {missed:.3g} after rounding, tolerance {allowed:.3g}")
        return latents

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """A local optimum: alternating projections from the split that ``contains`` finds; unchanged if in the image.

        In turns the nearest diagonal and the nearest matrix of low rank to what the other leaves, at most 50 times: the
        distance in the Frobenius norm never grows.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        scaled, scale = _scaled(weight)
        diagonal = self._diagonal(scaled, self.tolerance(weight))
        for _ in range(_PROJECTIONS):
            previous, (diagonal, low) = diagonal, self._split(scaled, diagonal)
            if (diagonal - previous).abs().amax() <= rounding(weight.dtype):
                break
        return ((torch.diag_embed(diagonal) + low) * scale).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """``diag(d) + U Vᴴ / √rank`` with ``d``, ``U`` and ``V`` of standard normal elements."""
        *batch, n, _ = self.shape
        diagonal = self.normal(*batch, n, generator=generator)
        left, right = (self.normal(*batch, n, self.rank, generator=generator) for _ in range(2))
        return self.forward(diagonal, left / self.rank**0.5, right).to(self._like.dtype)

    def _split(self, weight: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest matrix of low rank to the weight less a diagonal, and the nearest diagonal to what that leaves."""
        low = self.low_rank.project(weight - torch.diag_embed(diagonal))
        return (weight - low).diagonal(dim1=-2, dim2=-1), low

    def _diagonal(self, weight: Tensor, noise: float) -> Tensor:
        """The best ``d`` of a few starts, ``(..., n)``: with it, ``weight - diag(d)`` is nearest to the rank.

        The first start finds nearly all; the others are for low-rank parts with many zeros.
        """
        best = own = weight.diagonal(dim1=-2, dim2=-1)
        least = torch.full_like(own[..., 0].real, torch.inf)
        for start in self._starts(weight, noise):
            diagonal = start
            for _ in range(_NEWTON_STEPS):
                missed, step = self._newton(weight, diagonal)
                gained = bool((missed < least / 2).any())
                best = torch.where((missed < least).unsqueeze(-1), diagonal, best)
                least = torch.minimum(missed, least)
                if not gained and diagonal is not start:
                    break
                diagonal = diagonal + step
            if bool((least <= noise).all()):
                break
        return best

    def _starts(self, weight: Tensor, noise: float) -> Iterator[Tensor]:
        own = weight.diagonal(dim1=-2, dim2=-1)
        for seed in range(3):
            yield own - self._skeleton(weight, noise, seed)
        yield own
        for seed in range(2):
            yield own + torch.randn(own.shape, generator=torch.Generator().manual_seed(seed), dtype=own.dtype).to(own.device)

    def _newton(self, weight: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """How far ``weight - diag(diagonal)`` is from the rank, and a Gauss-Newton step for ``diagonal``.

        With the singular vectors too many, ``P = I - U Uᴴ`` and ``Q = I - V Vᴴ``, what is to vanish is ``P E Q``; a change
        ``δ`` of the diagonal changes its diagonal by ``(P ∘ Qᵀ) δ``, of which the matrix is semidefinite.
        """
        u, s, vh = torch.linalg.svd(weight - torch.diag_embed(diagonal))
        u, s, vh = u[..., self.rank :], s[..., self.rank :], vh[..., self.rank :, :]
        rest = ((u * s.unsqueeze(-2)) @ vh).diagonal(dim1=-2, dim2=-1)
        system = (u @ u.mH) * (vh.mH @ vh).mT
        step = torch.linalg.pinv(system, hermitian=True, rtol=1e-9) @ rest.unsqueeze(-1)
        return torch.linalg.vector_norm(s, dim=-1), step.squeeze(-1)

    def _skeleton(self, weight: Tensor, noise: float, seed: int) -> Tensor:
        """The diagonal of the low-rank part, ``(..., n)``, from what is off the diagonal."""
        found = torch.zeros_like(weight[..., 0])
        for outside, rows, columns in _index_sets(weight.shape[-1], self.rank, seed):
            u, s, vh = torch.linalg.svd(weight[..., rows, :][..., columns], full_matrices=False)
            u, s, vh = u[..., : self.rank], s[..., : self.rank], vh[..., : self.rank, :]
            inverse = torch.where(s > noise * s[..., :1], 1 / s, 0.0)
            left = weight[..., outside, :][..., columns] @ vh.mH
            right = u.mH @ weight[..., rows, :][..., outside]
            found[..., outside] = ((left * inverse.unsqueeze(-2)) * right.mT).sum(dim=-1)
        return found


def _scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each matrix in double precision, its largest element 1, and what it was divided by: ``(..., 1, 1)``."""
    wide = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
    scale = wide.abs().amax(dim=(-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return wide / scale, scale


def _index_sets(n: int, rank: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sets ``K``, ``I`` and ``J`` of ``n`` indices without common elements; the ``K`` together are all indices.

    ``I`` and ``J`` have at least ``rank`` elements. The order is random (by ``seed``): sets of neighbours would be
    a bad choice for a weight whose neighbouring rows are alike.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for outside in order.tensor_split(max(3, -(-n // (n - 2 * rank)))):
        others = order[~torch.isin(order, outside)]
        half = len(others) // 2
        yield outside, others[:half], others[half:]
