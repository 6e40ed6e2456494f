"""Maps that only rearrange: what lets one weight be another one's transpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxparam.catalogue._image import Unconstrained, check_dim, check_integer
from fxparam.declaration import Entry


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
