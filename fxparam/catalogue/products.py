"""Matrices that become low-rank ones when their elements change places, ``(..., m, n)``.

A Kronecker product is a matrix of rank one once its blocks are laid out as rows (Van Loan and Pitsianis 1993), and a
Monarch matrix consists of blocks of rank one once its rows are permuted (Dao et al. 2022). So the nearest one is a
truncated singular value decomposition, and so are the factors of one that is in the class.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import Constrained, check_inexact, check_integer, check_matrix, shape_text, widened
from fxparam.catalogue.rank import LowRankMap
from fxparam.catalogue.structure import check_blocks
from fxparam.declaration import Entry
from fxparam.errors import SpecError


class _RearrangedMap(Constrained):
    """Weights whose rearrangement consists of matrices of rank at most ``rank``.

    Args:
        weight: the weight.
        matrices: ``weight``, rearranged by ``apart``.
        rank: the rank.
    """

    def __init__(self, weight: Tensor, matrices: Tensor, rank: int) -> None:
        super().__init__(weight)
        self.rank = rank
        self.matrices = LowRankMap(matrices, rank)

    @abstractmethod
    def apart(self, weight: Tensor) -> Tensor:
        """The weight as matrices of low rank."""

    @abstractmethod
    def together(self, matrices: Tensor) -> Tensor:
        """The inverse of ``apart``."""

    def distance(self, weight: Tensor) -> Tensor:
        """The largest singular value too many of all rearranged matrices of a weight, over the largest one of all.

        Where that is below the least normal number, over that: elements are rounded to a fixed grid there.
        """
        values = torch.linalg.svdvals(widened(self.apart(weight)))
        if self.rank == values.shape[-1]:
            return values.new_zeros(())
        values = values.reshape(*self.shape[:-2], -1, values.shape[-1]).amax(dim=-2)
        return (values[..., self.rank] / values[..., 0].clamp(min=torch.finfo(weight.dtype).tiny)).amax()

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of singular values of a rearranged matrix."""
        return self.matrices.tolerance(self.apart(weight))

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The nearest in the Frobenius norm, by truncated singular value decompositions; unchanged if in the image."""
        self.require_finite(weight)
        return weight.clone() if self.contains(weight) else self.together(self.matrices.project(self.apart(weight)))

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Factors of standard normal elements, over the root of how many products are summed: elements of variance 1."""
        return self.together(self.matrices.sample(generator=generator))


@dataclass(frozen=True, repr=False)
class Kronecker(Entry):
    """``W = A_1 ⊗ B_1 + ... + A_terms ⊗ B_terms``: a sum of Kronecker products.

    The latents are ``A`` of shape ``(..., terms, a, b)`` and ``B`` of shape ``(..., terms, m / a, n / b)``, real or
    complex. For huge latents the products overflow.

    Args:
        shape: ``(a, b)``, the shape of the left factors; ``a`` divides ``m`` and ``b`` divides ``n``.
        terms: how many products, from 1 to the number of elements of the smaller factor (of which any matrix is a sum).

    Raises:
        SpecError: ``shape`` is no pair of integers of at least 1, or ``terms`` none; at build, they do not fit the
            weight, or it is no matrix or batch of matrices, or neither floating-point nor complex.
    """

    name: ClassVar[str] = "kronecker"
    shape: tuple[int, int]
    terms: int = 1

    def __post_init__(self) -> None:
        pair: Any = self.shape
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise SpecError(f"kronecker: got shape={pair!r}; expected two integers, the shape (a, b) of the left factor")
        for size in pair:
            check_integer(self.name, "shape[...]", size, least=1)
        object.__setattr__(self, "shape", tuple(pair))
        check_integer(self.name, "terms", self.terms, least=1)

    def build(self, weight: Tensor) -> KroneckerMap:
        """The map for ``(..., m, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight)
        (m, n), (a, b) = weight.shape[-2:], self.shape
        if m % a or n % b:
            raise SpecError(
                f"kronecker: got shape={self.shape} for a weight of shape {shape_text(weight)}; "
                f"expected divisors of {m} and {n}"
            )
        most = min(a * b, m * n // (a * b))
        if self.terms > most:
            raise SpecError(
                f"kronecker: got terms={self.terms} for a weight of shape {shape_text(weight)} with left factors of shape "
                f"{self.shape}; expected 1 <= terms <= {most}"
            )
        return KroneckerMap(weight, self.shape, self.terms)


class KroneckerMap(_RearrangedMap):
    """Sums of at most ``rank`` Kronecker products.

    Rearranged, ``R[(i, j), (k, l)] = W[(i, k), (j, l)]`` is the sum of ``vec(A_t) vec(B_t)ᵀ``.
    """

    constraint = "the number of Kronecker products (the rank of the rearranged weight)"

    def __init__(self, weight: Tensor, left: tuple[int, int], terms: int) -> None:
        *_, m, n = weight.shape
        self.left, self.right = left, (m // left[0], n // left[1])
        super().__init__(weight, self.apart(weight.detach()), terms)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., terms, a, b)`` and ``(..., terms, p, q)`` to ``(..., a p, b q)``."""
        return self.together(left.flatten(-2).mT @ right.flatten(-2))

    def apart(self, weight: Tensor) -> Tensor:
        """``(..., a p, b q)`` to ``(..., a b, p q)``."""
        (a, b), (p, q) = self.left, self.right
        return weight.unflatten(-1, (b, q)).unflatten(-3, (a, p)).transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def together(self, matrices: Tensor) -> Tensor:
        """``(..., a b, p q)`` to ``(..., a p, b q)``."""
        return matrices.unflatten(-1, self.right).unflatten(-3, self.left).transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of equal norm; of products that are not needed, a left factor of zero and a right one that is not."""
        left, right = self.matrices.invert(self.apart(weight))
        return left.mT.unflatten(-1, self.left).contiguous(), right.unflatten(-1, self.right).contiguous()

    def extra_repr(self) -> str:
        """The options."""
        return f"shape={self.left}, terms={self.rank}"


@dataclass(frozen=True, repr=False)
class Monarch(Entry):
    """``W = P₂ L P₁ R`` with block-diagonal ``L`` and ``R`` and permutations ``P₁`` and ``P₂`` (Dao et al. 2022, section 3.1).

    With ``b = blocks`` and ``r = rank``, the latents are the blocks of the factors, real or complex:

    - ``L`` of shape ``(..., b, m / b, b r)``: ``b`` blocks, as a block-diagonal matrix ``m x b² r``;
    - ``R`` of shape ``(..., b, b r, n / b)``: ``b`` blocks, as a block-diagonal matrix ``b² r x n``.

    Both permutations are strides: ``P₁`` moves element ``(k, j, s)`` of ``b x b x r`` to ``(j, k, s)``, and ``P₂`` element
    ``(j, l)`` of ``b x m/b`` to ``(l, j)``. So, summed over ``s``, ``W[l b + j, k n/b + i] = L[j, l, k r + s] ·
    R[k, j r + s, i]``: for each ``j`` and ``k`` a block of rank ``r``. The paper's matrices are those of ``m = n = b²`` and
    ``rank=1``, where ``P₂ = P₁ᵀ``. For huge latents the products overflow.

    Args:
        blocks: how many blocks each factor has; it divides both ``m`` and ``n``.
        rank: the rank of the blocks, from 1 to ``min(m, n) / blocks`` (which makes any matrix).

    Raises:
        SpecError: an option is no integer of at least 1; at build, it does not fit the weight, or that is no matrix or
            batch of matrices, or neither floating-point nor complex.
    """

    name: ClassVar[str] = "monarch"
    blocks: int
    rank: int = 1

    def __post_init__(self) -> None:
        check_integer(self.name, "blocks", self.blocks, least=1)
        check_integer(self.name, "rank", self.rank, least=1)

    def build(self, weight: Tensor) -> MonarchMap:
        """The map for ``(..., m, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight)
        check_blocks(self.name, weight, self.blocks)
        most = min(weight.shape[-2:]) // self.blocks
        if self.rank > most:
            raise SpecError(
                f"monarch: got rank={self.rank} for a weight of shape {shape_text(weight)} in {self.blocks} x {self.blocks} "
                f"blocks; expected 1 <= rank <= {most}"
            )
        return MonarchMap(weight, self.blocks, self.rank)


class MonarchMap(_RearrangedMap):
    """Matrices of ``blocks x blocks`` interleaved blocks of rank at most ``rank``.

    Rearranged, ``M[j, k][l, i] = W[(l, j), (k, i)]``. The nearest one is their algorithm 1: the best approximation of
    each block.
    """

    constraint = "the rank of the blocks"

    def __init__(self, weight: Tensor, blocks: int, rank: int) -> None:
        self.blocks = blocks
        super().__init__(weight, self.apart(weight.detach()), rank)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., b, m / b, b r)`` and ``(..., b, b r, n / b)`` to ``(..., m, n)``."""
        left = left.unflatten(-1, (self.blocks, self.rank)).transpose(-3, -2)
        right = right.unflatten(-2, (self.blocks, self.rank)).transpose(-4, -3)
        return self.together(left @ right)

    def apart(self, weight: Tensor) -> Tensor:
        """``(..., m, n)`` to ``(..., b, b, m / b, n / b)``."""
        b = self.blocks
        *_, m, n = weight.shape
        return weight.unflatten(-1, (b, n // b)).unflatten(-3, (m // b, b)).movedim(-4, -2)

    def together(self, matrices: Tensor) -> Tensor:
        """``(..., b, b, m / b, n / b)`` to ``(..., m, n)``."""
        return matrices.movedim(-2, -4).flatten(-2).flatten(-3, -2)

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of each block of equal norm; where its rank is lower, zeros on the left, and not on the right."""
        left, right = self.matrices.invert(self.apart(weight))
        left = left.transpose(-3, -2).flatten(-2)
        right = right.transpose(-4, -3).flatten(-3, -2)
        return left.contiguous(), right.contiguous()

    def extra_repr(self) -> str:
        """The options."""
        return f"blocks={self.blocks}, rank={self.rank}"
