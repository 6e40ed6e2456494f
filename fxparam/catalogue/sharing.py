"""Maps that only rearrange: what lets one weight be another one's transpose, and a convolution take the map of a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import Unconstrained, check_dim, check_filled, check_integer, shape_text
from fxparam.catalogue._layers import output_dim
from fxparam.declaration import Entry, Place
from fxparam.errors import SpecError


@dataclass(frozen=True, repr=False)
class Transpose(Entry):
    """``W = X.transpose(dim0, dim1)``; ``ref("encoder.weight") >> transpose()`` ties a decoder to its encoder.

    Args:
        dim0: one dimension of the weight.
        dim1: the other.

    Raises:
        SpecError: an option is no integer; at build, the weight has no such dimension.
    """

    name: ClassVar[str] = "transpose"
    dim0: int = -2
    dim1: int = -1

    def __post_init__(self) -> None:
        check_integer(self.name, "dim0", self.dim0)
        check_integer(self.name, "dim1", self.dim1)

    def build(self, weight: Tensor) -> TransposeMap:
        """The transposition that yields a weight of this shape; any dtype."""
        check_dim(self.name, weight, self.dim0, "dim0")
        check_dim(self.name, weight, self.dim1, "dim1")
        return TransposeMap(weight, self.dim0, self.dim1)


class TransposeMap(Unconstrained):
    """Exchanges two dimensions."""

    def __init__(self, weight: Tensor, dim0: int, dim1: int) -> None:
        super().__init__(weight)
        self.dim0, self.dim1 = dim0, dim1

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., n, m)`` to ``(..., m, n)``, a view."""
        return latent.transpose(self.dim0, self.dim1)

    def tolerance(self, weight: Tensor) -> float:
        """Zero: nothing is rounded."""
        return 0.0

    def invert(self, weight: Tensor) -> Tensor:
        """The same transposition, contiguous and not an alias."""
        return weight.transpose(self.dim0, self.dim1).contiguous().clone()

    def extra_repr(self) -> str:
        """The options."""
        return f"dim0={self.dim0}, dim1={self.dim1}"


@dataclass(frozen=True, repr=False)
class FromMatrix(Entry):
    """The weight of a convolution from a matrix: ``orthogonal() >> from_matrix()``.

    The index of ``dim`` is the row, and all others, in their order, are the column: as ``spectral_norm`` reads a weight.
    The latent has the shape ``(size of dim, product of the other sizes)``; any dtype.

    Args:
        dim: the dimension of the weight that becomes the rows of the matrix. None: the outputs of the layer, 1 in transposed
            convolutions, else 0 (also without a layer).

    Raises:
        SpecError: ``dim`` is no integer; at build, the weight has no such dimension, no second one or no elements.
    """

    name: ClassVar[str] = "from_matrix"
    dim: int | None = None

    def __post_init__(self) -> None:
        if self.dim is not None:
            check_integer(self.name, "dim", self.dim)

    def placed(self, place: Place) -> FromMatrix:
        """With the dimension of the outputs of this layer, where none is given."""
        return self if self.dim is not None else replace(self, dim=output_dim(place))

    def build(self, weight: Tensor) -> FromMatrixMap:
        """The map for a weight of at least two dimensions."""
        if weight.ndim < 2:
            raise SpecError(f"from_matrix: got a weight of shape {shape_text(weight)}; expected at least two dimensions")
        check_filled(self.name, weight)
        return FromMatrixMap(weight, check_dim(self.name, weight, self.dim or 0))


class FromMatrixMap(Unconstrained):
    """Splits the columns of a matrix into dimensions, and puts the rows where they belong."""

    def __init__(self, weight: Tensor, dim: int) -> None:
        super().__init__(weight)
        self.dim = dim
        self.others = (*weight.shape[:dim], *weight.shape[dim + 1 :])

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(shape[dim], product of the others)`` to the weight's shape, a view."""
        return latent.unflatten(-1, self.others).movedim(0, self.dim)

    def tolerance(self, weight: Tensor) -> float:
        """Zero: nothing is rounded."""
        return 0.0

    def invert(self, weight: Tensor) -> Tensor:
        """The matrix, contiguous and not an alias."""
        return weight.movedim(self.dim, 0).reshape(-1, math.prod(self.others)).clone(memory_format=torch.contiguous_format)

    def extra_repr(self) -> str:
        """The dimension."""
        return f"dim={self.dim}"
