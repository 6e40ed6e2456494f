"""Maps that separate or fix the norms of slices: weight norm and unit norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    Unconstrained,
    check_dim,
    check_filled,
    check_floating,
    check_inexact,
    check_integer,
    check_number,
    rounding,
    shape_text,
    stored,
    widened,
)
from fxparam.declaration import Entry
from fxparam.errors import ImageError, SpecError


@dataclass(frozen=True, repr=False)
class WeightNorm(Entry):
    """``W = g · V / ‖V‖`` with one norm for each index of ``dim`` (Salimans and Kingma 2016, eq. 2).

    Latents, numbers and state-dict names are those of ``torch.nn.utils.parametrizations.weight_norm``: ``original0`` is
    ``g`` and ``original1`` is ``V``. It is torch's fused kernel, several times as fast as the same in plain operations,
    with its limits: a norm of ``V`` that is zero, or so small that its square underflows, gives 0/0; and where ``dim`` is
    the first or the last dimension, second derivatives by ``V`` take the norm for a constant (PyTorch 2.13).

    Args:
        dim: the dimension that keeps a norm for each index; ``None`` or ``-1``: one norm for the whole weight.

    Raises:
        SpecError: ``dim`` is no integer; at build, the weight has no such dimension or is not floating-point.
    """

    name: ClassVar[str] = "weight_norm"
    dim: int | None = 0

    def __post_init__(self) -> None:
        if self.dim is not None:
            check_integer(self.name, "dim", self.dim)

    def build(self, weight: Tensor) -> WeightNormMap:
        """The map for a weight of at least one dimension."""
        check_floating(self.name, weight)
        check_filled(self.name, weight)
        dim = -1 if self.dim is None else self.dim
        # torch's kernel reads -1 as "the whole weight", so no other negative number can mean a dimension.
        if not -1 <= dim < weight.ndim:
            raise SpecError(
                f"weight_norm: got dim={dim} for a weight of shape {shape_text(weight)}; expected "
                f"0 <= dim < {weight.ndim}, or None for one norm of the whole weight"
            )
        return WeightNormMap(weight, dim)


class WeightNormMap(Unconstrained):
    """``(g, V)`` to ``g · V / ‖V‖``, any finite weight."""

    def __init__(self, weight: Tensor, dim: int) -> None:
        super().__init__(weight)
        self.dim = dim

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:  # type: ignore[override]
        """``g`` of shape ``(1, ..., n, ..., 1)`` (a scalar for the whole weight) and ``V`` of the weight's shape."""
        return torch._weight_norm(weight_v, weight_g, self.dim)

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a norm."""
        return rounding(weight.dtype, weight.numel())

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Norms and the weight itself; a slice of zeros gets norm 0 and the direction of all ones, to be finite."""
        norms = torch.norm_except_dim(weight, 2, self.dim)
        return norms, torch.where(norms == 0, 1.0, weight)

    def extra_repr(self) -> str:
        """The dimension."""
        return f"dim={self.dim}"


def directed(x: Tensor, p: float = 2.0, dim: int | None = None) -> Tensor:
    """Slices over their norm, ``x / ‖x‖_p`` along ``dim`` (of all elements: None), finite with finite gradient everywhere.

    Each slice is divided by its largest absolute value first, so that no power overflows or underflows; the quotient
    does not depend on the scale, so neither value nor gradient changes. A slice whose elements all vanish (below the
    smallest normal number over epsilon, where ``1 / ‖x‖`` may overflow) has no direction of its own; ones are added to
    it, which gives it the direction of all ones and a gradient by which it can leave.
    """
    limits = torch.finfo(x.dtype)
    size = x.detach().abs()
    largest = size.amax() if dim is None else size.amax(dim, keepdim=True)
    vanishing = largest < limits.tiny / limits.eps
    scaled = torch.where(vanishing, x + 1, x) / torch.where(vanishing, 1, largest)
    return scaled / torch.linalg.vector_norm(scaled, p, dim, keepdim=dim is not None)


class Normalized(Constrained):
    """``W = radius · X / ‖X‖_p`` along ``dim``, or of all elements where that is None: the base of unit norms and spheres.

    A slice of zeros (or of numbers that vanish, see ``directed``) counts as one of ones.
    """

    def __init__(self, weight: Tensor, radius: float, p: float, dim: int | None) -> None:
        super().__init__(weight)
        self.radius, self.p, self.dim = radius, p, dim

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """The weight's shape."""
        unit = directed(widened(latent), self.p, self.dim)
        return stored(unit if self.radius == 1 else unit * self.radius, latent.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """How far the norm of the worst slice is from the radius, relative to it."""
        wide = widened(weight) / self.radius
        return (torch.linalg.vector_norm(wide, self.p, self.dim) - 1).abs().amax()

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a norm."""
        return rounding(weight.dtype, weight.numel() if self.dim is None else weight.shape[self.dim])

    def invert(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight.clone()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """Each slice scaled to the radius: the nearest for ``p = 2``; unchanged if in the image.

        Raises:
            ImageError: a slice is zero and has no direction.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        live = weight.any() if self.dim is None else weight.any(self.dim)
        zeros = int((~live).sum())
        if zeros:
            raise ImageError(
                f"{type(self).__name__}: {zeros} of {live.numel()} slices of the weight are zero and have no direction to "
                "scale; give them a value first, or start from sample()"
            )
        return self.forward(weight)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Slices of standard normal elements, scaled to the radius: uniform on the sphere for ``p = 2``."""
        drawn = self.normal(*self.shape, generator=generator)
        return self.forward(drawn).to(self._like.dtype)


@dataclass(frozen=True, repr=False)
class UnitNorm(Entry):
    """``W = X / ‖X‖_p`` along one dimension: rows (or columns, ...) of norm 1. Of complex weights, the absolute values.

    A slice of zeros has no direction and counts as one of ones.

    Args:
        dim: the dimension over which the norm is taken.
        p: the norm, at least 1; ``inf`` for the largest absolute value.

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension or is neither floating-point nor
            complex.
    """

    name: ClassVar[str] = "unit_norm"
    dim: int = -1
    p: float = 2

    def __post_init__(self) -> None:
        check_integer(self.name, "dim", self.dim)
        if self.p != math.inf:
            check_number(self.name, "p", self.p)
            if self.p < 1:
                raise SpecError(f"unit_norm: got p={self.p!r}; expected a number of at least 1, or inf")

    def build(self, weight: Tensor) -> UnitNormMap:
        """The map for a weight of at least one dimension."""
        check_inexact(self.name, weight)
        check_filled(self.name, weight)
        check_dim(self.name, weight, self.dim)
        return UnitNormMap(weight, self.dim, float(self.p))


class UnitNormMap(Normalized):
    """``‖W‖_p = 1`` along ``dim``."""

    constraint = "norm 1 of every slice"

    def __init__(self, weight: Tensor, dim: int, p: float) -> None:
        super().__init__(weight, 1.0, p, dim)

    def extra_repr(self) -> str:
        """The options."""
        return f"dim={self.dim}, p={self.p}"
