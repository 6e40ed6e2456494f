"""Products of two thin factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    check_floating,
    check_integer,
    check_matrix,
    rounding,
    shape_text,
    widened,
)
from fxparam.declaration import Entry
from fxparam.errors import SpecError


@dataclass(frozen=True, repr=False)
class LowRank(Entry):
    """``W = L R`` with ``L`` of shape ``(..., m, rank)`` and ``R`` of shape ``(..., rank, n)``.

    Args:
        rank: the inner size, from 1 to ``min(m, n)``.

    Raises:
        SpecError: ``rank`` is no integer of at least 1; at build, it exceeds ``min(m, n)``, or the weight is no matrix
            or batch of matrices, or not floating-point.
    """

    name: ClassVar[str] = "low_rank"
    rank: int

    def __post_init__(self) -> None:
        check_integer(self.name, "rank", self.rank, least=1)

    def build(self, weight: Tensor) -> LowRankMap:
        """The map for ``(..., m, n)``."""
        check_floating(self.name, weight)
        check_matrix(self.name, weight)
        most = min(weight.shape[-2:])
        if self.rank > most:
            raise SpecError(
                f"low_rank: got rank={self.rank} for a weight of shape {shape_text(weight)}; expected 1 <= rank <= {most}"
            )
        return LowRankMap(weight, self.rank)


class LowRankMap(Constrained):
    """Matrices of rank at most ``rank``."""

    constraint = "the rank"

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__(weight)
        self.rank = rank

    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., m, rank)`` and ``(..., rank, n)`` to ``(..., m, n)``."""
        return left @ right

    def distance(self, weight: Tensor) -> Tensor:
        """The first singular value too many, over the largest."""
        values = torch.linalg.svdvals(widened(weight))
        if self.rank == values.shape[-1]:
            return values.new_zeros(())
        return torch.where(values[..., 0] > 0, values[..., self.rank] / values[..., 0], 0.0).amax()

    def tolerance(self, weight: Tensor) -> float:
        """Rounding of the product and its decomposition; storing adds noise whose norm grows like ``√m + √n``."""
        m, n = weight.shape[-2:]
        return rounding(weight.dtype, max(m, n)) + torch.finfo(weight.dtype).eps * (m**0.5 + n**0.5)

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``U √S`` and ``√S Vᵀ`` of the truncated singular value decomposition.

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

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """``L R / √rank`` with factors of standard normal elements, so that elements have variance 1."""
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
