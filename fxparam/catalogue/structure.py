"""Matrices whose structure is linear: zeros, ones or equal elements at fixed places, ``(..., m, n)``."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    check_flag,
    check_inexact,
    check_integer,
    check_matrix,
    rounding,
    shape_text,
    widened,
)
from fxparam.declaration import Entry
from fxparam.errors import SpecError


class _StructuredMap(Constrained):
    """A latent that is written to its places, each element once or several times.

    The latent of the projection of any matrix is found without solving anything, so ``invert`` takes any matrix.
    """

    latent_shape: tuple[int, ...]

    def __init__(self, weight: Tensor, latent_shape: tuple[int, ...] | None = None) -> None:
        super().__init__(weight)
        self.latent_shape = tuple(weight.shape) if latent_shape is None else latent_shape

    @abstractmethod
    def invert(self, weight: Tensor) -> Tensor:
        """The latent of the projection of any matrix, in memory of its own."""

    def distance(self, weight: Tensor) -> Tensor:
        """The largest absolute value of what the projection changes."""
        return (weight - self.forward(self.invert(weight))).abs().amax()

    def tolerance(self, weight: Tensor) -> float:
        """Zero: nothing is rounded."""
        return 0.0

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The nearest such matrix in the Frobenius norm."""
        self.require_finite(weight)
        return self.forward(self.invert(weight))

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """The matrix of a latent of independent standard normal elements."""
        return self.forward(self.normal(*self.latent_shape, generator=generator).to(self._like.dtype))


@dataclass(frozen=True, repr=False)
class BlockDiagonal(Entry):
    """``W = diag(X_1, ..., X_k)``: ``blocks`` blocks of equal shape on the diagonal, zeros elsewhere.

    The latent ``X`` has the shape ``(..., blocks, m / blocks, n / blocks)``, a batch of matrices: ``orthogonal() >>
    block_diagonal(4)`` makes each block orthogonal. Real or complex.

    Args:
        blocks: how many blocks; it divides both ``m`` and ``n``.

    Raises:
        SpecError: ``blocks`` is no integer of at least 1; at build, it does not divide ``m`` and ``n``, or the weight is
            no matrix or batch of matrices, or neither floating-point nor complex.
    """

    name: ClassVar[str] = "block_diagonal"
    blocks: int

    def __post_init__(self) -> None:
        check_integer(self.name, "blocks", self.blocks, least=1)

    def build(self, weight: Tensor) -> BlockDiagonalMap:
        """The map for ``(..., m, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight)
        check_blocks(self.name, weight, self.blocks)
        return BlockDiagonalMap(weight, self.blocks)


def check_blocks(name: str, weight: Tensor, blocks: int) -> None:
    """Refuse a matrix that cannot be cut into ``blocks`` times ``blocks`` equal blocks."""
    m, n = weight.shape[-2:]
    if m % blocks or n % blocks:
        raise SpecError(
            f"{name}: got blocks={blocks} for a weight of shape {shape_text(weight)}; expected a divisor of {m} and {n}"
        )


class BlockDiagonalMap(_StructuredMap):
    """Zeros off ``blocks`` equal blocks on the diagonal."""

    constraint = "zero off the blocks (the largest absolute value)"

    def __init__(self, weight: Tensor, blocks: int) -> None:
        *batch, m, n = weight.shape
        super().__init__(weight, (*batch, blocks, m // blocks, n // blocks))
        self.blocks = blocks

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., k, p, q)`` to ``(..., k p, k q)``."""
        # From (..., p, q, k) to (..., k, p, k, q), the two new dimensions being the diagonal.
        spread = torch.diag_embed(latent.movedim(-3, -1), dim1=-4, dim2=-2)
        return spread.flatten(-2).flatten(-3, -2)

    def invert(self, weight: Tensor) -> Tensor:
        """The blocks."""
        _, p, q = self.latent_shape[-3:]
        apart = weight.unflatten(-1, (self.blocks, q)).unflatten(-3, (self.blocks, p))
        return apart.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).clone(memory_format=torch.contiguous_format)

    def extra_repr(self) -> str:
        """The number of blocks."""
        return f"blocks={self.blocks}"


@dataclass(frozen=True, repr=False)
class Banded(Entry):
    """``W[i, j] = X[i, j]`` on the band ``-lower <= j - i <= upper``, zero elsewhere.

    The latent has the weight's shape, which need not be square; off the band it is not read. Real or complex.

    Args:
        lower: how many diagonals below the main one are in the band.
        upper: how many above.

    Raises:
        SpecError: an option is no integer of at least 0; at build, the weight is no matrix or batch of matrices, or
            neither floating-point nor complex.
    """

    name: ClassVar[str] = "banded"
    lower: int
    upper: int

    def __post_init__(self) -> None:
        check_integer(self.name, "lower", self.lower, least=0)
        check_integer(self.name, "upper", self.upper, least=0)

    def build(self, weight: Tensor) -> BandedMap:
        """The map for ``(..., m, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight)
        return BandedMap(weight, self.lower, self.upper)


class BandedMap(_StructuredMap):
    """Zeros off a band around the diagonal."""

    constraint = "zero off the band (the largest absolute value)"

    def __init__(self, weight: Tensor, lower: int, upper: int) -> None:
        super().__init__(weight)
        self.lower, self.upper = lower, upper

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., m, n)`` to the same."""
        return latent.tril(self.upper).triu(-self.lower)

    def invert(self, weight: Tensor) -> Tensor:
        """The band, and zeros."""
        return self.forward(weight)

    def extra_repr(self) -> str:
        """The options."""
        return f"lower={self.lower}, upper={self.upper}"


@dataclass(frozen=True, repr=False)
class Triangular(Entry):
    """``W = tril(X)``, or ``triu(X)``; with ``unit_diagonal``, ones take the place of the diagonal.

    The latent has the weight's shape, which need not be square; what is replaced is not read. Real or complex.

    Args:
        upper: whether the upper triangle is kept, instead of the lower.
        unit_diagonal: whether the diagonal is 1.

    Raises:
        SpecError: an option is no boolean; at build, the weight is no matrix or batch of matrices, or neither
            floating-point nor complex.
    """

    name: ClassVar[str] = "triangular"
    upper: bool = False
    unit_diagonal: bool = False

    def __post_init__(self) -> None:
        check_flag(self.name, "upper", self.upper)
        check_flag(self.name, "unit_diagonal", self.unit_diagonal)

    def build(self, weight: Tensor) -> TriangularMap:
        """The map for ``(..., m, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight)
        return TriangularMap(weight, upper=self.upper, unit_diagonal=self.unit_diagonal)


class TriangularMap(_StructuredMap):
    """Zeros on one side of the diagonal and, where asked, ones on it."""

    def __init__(self, weight: Tensor, *, upper: bool, unit_diagonal: bool) -> None:
        super().__init__(weight)
        self.upper, self.unit_diagonal = upper, unit_diagonal
        self.constraint = f"zero {'below' if upper else 'above'} the diagonal{' and one on it' if unit_diagonal else ''}"

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., m, n)`` to the same."""
        triangle = latent.triu(int(self.unit_diagonal)) if self.upper else latent.tril(-int(self.unit_diagonal))
        if not self.unit_diagonal:
            return triangle
        return triangle + torch.eye(*latent.shape[-2:], dtype=latent.dtype, device=latent.device)

    def invert(self, weight: Tensor) -> Tensor:
        """The triangle with the diagonal, and zeros."""
        return weight.triu() if self.upper else weight.tril()

    def extra_repr(self) -> str:
        """The options."""
        return f"upper={self.upper}, unit_diagonal={self.unit_diagonal}"


class _DiagonalsMap(_StructuredMap):
    """Matrices with equal elements along each diagonal, possibly with further equalities between diagonals."""

    def distance(self, weight: Tensor) -> Tensor:
        """The largest absolute value of what the projection changes, over the largest element."""
        gap = super().distance(weight)
        # A gap of zero is that of a weight of zeros, too.
        return gap if gap == 0 else gap / weight.abs().amax()

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of an element and of a mean."""
        return rounding(weight.dtype)

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The nearest such matrix in the Frobenius norm: means over equal elements; unchanged if in the image."""
        return weight.clone() if self.contains(weight) else super().project(weight)


@dataclass(frozen=True, repr=False)
class Toeplitz(Entry):
    """``W[i, j] = t[i - j + n - 1]``: one element for each diagonal, from the top right corner to the bottom left.

    The latent ``t`` has the shape ``(..., m + n - 1)``. Real or complex.

    Raises:
        SpecError: at build, the weight is no matrix or batch of matrices, or neither floating-point nor complex.
    """

    name: ClassVar[str] = "toeplitz"

    def build(self, weight: Tensor) -> ToeplitzMap:
        """The map for ``(..., m, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight)
        return ToeplitzMap(weight)


class ToeplitzMap(_DiagonalsMap):
    """Equal elements along each diagonal."""

    constraint = "equal elements along each diagonal (relative to the largest element)"

    def __init__(self, weight: Tensor) -> None:
        *batch, m, n = weight.shape
        super().__init__(weight, (*batch, m + n - 1))

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., m + n - 1)`` to ``(..., m, n)``."""
        return _diagonals(latent, self.shape[-1])

    def invert(self, weight: Tensor) -> Tensor:
        """The mean of each diagonal."""
        m, n = self.shape[-2:]
        means = [_mean(weight.diagonal(offset, dim1=-2, dim2=-1)) for offset in range(n - 1, -m, -1)]
        return torch.stack(means, dim=-1)


@dataclass(frozen=True, repr=False)
class Circulant(Entry):
    """``W[i, j] = c[(i - j) mod n]``: each column is the one before, moved down by one; ``W x`` is the circular
    convolution of ``c`` and ``x``.

    The latent ``c``, the first column, has the shape ``(..., n)``. Real or complex.

    Raises:
        SpecError: at build, the weight is not square, or neither floating-point nor complex.
    """

    name: ClassVar[str] = "circulant"

    def build(self, weight: Tensor) -> CirculantMap:
        """The map for ``(..., n, n)``."""
        check_inexact(self.name, weight)
        check_matrix(self.name, weight, square=True)
        return CirculantMap(weight)


class CirculantMap(_DiagonalsMap):
    """Equal elements along each diagonal that goes on at the other side."""

    constraint = "equal elements along each circular diagonal (relative to the largest element)"

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, tuple(weight.shape[:-1]))

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., n)`` to ``(..., n, n)``."""
        return _diagonals(torch.cat([latent[..., 1:], latent], dim=-1), self.shape[-1])

    def invert(self, weight: Tensor) -> Tensor:
        """The mean of each circular diagonal."""
        column = torch.arange(self.shape[-1], device=weight.device)
        row = (column.unsqueeze(-1) + column) % self.shape[-1]
        return _mean(weight[..., row, column])


def _diagonals(elements: Tensor, columns: int) -> Tensor:
    """``(..., m + n - 1)`` to ``(..., m, n)``, the element ``i - j + n - 1`` at row ``i`` and column ``j``.

    Windows instead of a table of indices: they need no constant, and take no memory before the copy by ``flip``.
    """
    return elements.unfold(-1, columns, 1).flip(-1)


def _mean(elements: Tensor) -> Tensor:
    """The mean over the last dimension: exact where all elements are equal, and of huge ones no overflow."""
    wide = widened(elements)
    first = wide[..., :1]
    return (wide[..., 0] + (wide - first).mean(dim=-1)).to(elements.dtype)
