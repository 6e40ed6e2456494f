"""Weights whose norm is fixed or bounded: spheres, balls, Lipschitz bounds.

A ball is ``W = X · min(1, r / ‖X‖)``: weights inside are their own latents, bit for bit, and the others lie on the surface.
There only the direction of a latent counts, so that its gradient has no part along ``X``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    check_dim,
    check_filled,
    check_inexact,
    check_integer,
    check_number,
    rounding,
    stored,
    widened,
)
from fxparam.catalogue._layers import output_dim
from fxparam.catalogue.norms import Normalized
from fxparam.catalogue.spectral import as_matrix
from fxparam.declaration import Entry, Place
from fxparam.errors import SpecError


def _check_positive(name: str, option: str, value: object) -> None:
    check_number(name, option, value)
    if value <= 0:  # type: ignore[operator]
        raise SpecError(f"{name}: got {option}={value!r}; expected a number above 0")


@dataclass(frozen=True, repr=False)
class Sphere(Entry):
    """``W = radius · X / ‖X‖``: the whole weight on a sphere of the Frobenius norm.

    A latent of zeros has no direction and counts as one of ones.

    Args:
        radius: the norm, above 0.

    Raises:
        SpecError: the radius is no number above 0; at build, the weight is empty or neither floating-point nor complex.
    """

    name: ClassVar[str] = "sphere"
    radius: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self.name, "radius", self.radius)

    def build(self, weight: Tensor) -> SphereMap:
        """The map for a weight of any shape."""
        check_inexact(self.name, weight)
        check_filled(self.name, weight)
        return SphereMap(weight, float(self.radius))


class SphereMap(Normalized):
    """``‖W‖ = radius``."""

    def __init__(self, weight: Tensor, radius: float) -> None:
        super().__init__(weight, radius, 2.0, None)
        self.constraint = f"the norm {radius} (relative to it)"

    def extra_repr(self) -> str:
        """The radius."""
        return f"radius={self.radius}"


class _BallMap(Constrained):
    """``‖W‖ <= radius``, for the norm that a subclass gives."""

    def __init__(self, weight: Tensor, radius: float) -> None:
        super().__init__(weight)
        self.radius = radius

    @abstractmethod
    def norm(self, weight: Tensor) -> Tensor:
        """The norm, at least as large as the largest element: a scalar."""

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """The weight's shape."""
        x = widened(latent)
        # In units of the largest element, or of the radius if that is larger, no square overflows, and what underflows is
        # inside. The unit cancels, in the gradient as well.
        unit = x.detach().abs().amax().clamp(min=self.radius)
        return stored(x / (self.norm(x / unit) * (unit / self.radius)).clamp(min=1), latent.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """By how much the norm exceeds the radius, relative to it."""
        return (self.norm(widened(weight) / self.radius) - 1).clamp(min=0)

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a norm."""
        return rounding(weight.dtype, weight.numel())

    def invert(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight.clone()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The weight scaled to the surface; unchanged if in the image."""
        self.require_finite(weight)
        return weight.clone() if self.contains(weight) else self.forward(weight)


@dataclass(frozen=True, repr=False)
class Ball(Entry):
    """``W = X · min(1, radius / ‖X‖)``: the whole weight in a ball of the Frobenius norm.

    Args:
        radius: the largest norm, above 0.

    Raises:
        SpecError: the radius is no number above 0; at build, the weight is empty or neither floating-point nor complex.
    """

    name: ClassVar[str] = "ball"
    radius: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self.name, "radius", self.radius)

    def build(self, weight: Tensor) -> BallMap:
        """The map for a weight of any shape."""
        check_inexact(self.name, weight)
        check_filled(self.name, weight)
        return BallMap(weight, float(self.radius))


class BallMap(_BallMap):
    """``‖W‖ <= radius`` in the Frobenius norm, in which scaling to the surface is the nearest projection."""

    def __init__(self, weight: Tensor, radius: float) -> None:
        super().__init__(weight, radius)
        self.constraint = f"a norm of at most {radius} (relative to it)"

    def norm(self, weight: Tensor) -> Tensor:
        """The Frobenius norm."""
        return torch.linalg.vector_norm(weight)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Uniform in the ball: the first ``N`` of ``N + 2`` real coordinates that are uniform on a sphere."""
        size = math.prod(self.shape)
        drawn = self.normal(size + (1 if self._like.is_complex() else 2), generator=generator)
        inside = drawn[:size] / torch.linalg.vector_norm(drawn)
        return (inside * self.radius).reshape(self.shape).to(self._like.dtype)

    def extra_repr(self) -> str:
        """The radius."""
        return f"radius={self.radius}"


@dataclass(frozen=True, repr=False)
class Lipschitz(Entry):
    """``W = X · min(1, bound / ‖X‖_p)`` with the exact operator norm of the weight as a matrix.

    A linear layer so bounded has that Lipschitz constant, in the ``p`` norm of inputs and outputs. Of a convolution the
    reshaped kernel is bounded, as by ``spectral_norm``, and not the convolution itself, whose norm may be larger: up to
    the square root of the number of taps for ``p=2``.

    Args:
        bound: the largest norm, above 0.
        p: ``1``: the largest absolute sum of a column; ``2``: the largest singular value; ``inf``: that of a row.
        dim: the dimension that becomes the rows of the matrix; the others become its columns. None: the outputs of the
            layer, 1 for a weight of ``nn.ConvTranspose1d``, ``2d`` and ``3d``, else 0 (also without a layer). A vector
            is a matrix of one column.

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension or is neither floating-point nor
            complex.
    """

    name: ClassVar[str] = "lipschitz"
    bound: float = 1.0
    p: float = 2
    dim: int | None = None

    def __post_init__(self) -> None:
        _check_positive(self.name, "bound", self.bound)
        if isinstance(self.p, bool) or self.p not in (1, 2, math.inf):
            raise SpecError(f"lipschitz: got p={self.p!r}; expected one of 1, 2, inf")
        if self.dim is not None:
            check_integer(self.name, "dim", self.dim)

    def placed(self, place: Place) -> Lipschitz:
        """With the dimension of the outputs of this layer, where none is given."""
        return self if self.dim is not None else replace(self, dim=output_dim(place))

    def build(self, weight: Tensor) -> LipschitzMap:
        """The map for a weight of at least one dimension."""
        check_inexact(self.name, weight)
        check_filled(self.name, weight)
        dim = check_dim(self.name, weight, self.dim or 0)
        return LipschitzMap(weight, float(self.bound), float(self.p), dim)


class LipschitzMap(_BallMap):
    """``‖W‖_p <= bound`` as an operator from its columns to its rows.

    Where the largest singular value is a repeated one the norm has no gradient; one of its subgradients is taken.
    """

    def __init__(self, weight: Tensor, bound: float, p: float, dim: int) -> None:
        super().__init__(weight, bound)
        self.p, self.dim = p, dim
        self.constraint = f"an operator norm of at most {bound} (relative to it)"

    def norm(self, weight: Tensor) -> Tensor:
        """The operator norm of the reshaped weight."""
        matrix = weight.unsqueeze(-1) if weight.ndim == 1 else as_matrix(weight, self.dim)
        if self.p == 2:
            # svdvals rounds in another way where no gradient is needed, and a folded weight would differ in the last bit.
            return torch.linalg.svd(matrix, full_matrices=False).S[0]
        return matrix.abs().sum(0 if self.p == 1 else 1).amax()

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """A matrix of standard normal elements, scaled to the bound."""
        drawn = self.normal(*self.shape, generator=generator)
        return (drawn * (self.radius / self.norm(drawn))).to(self._like.dtype)

    def extra_repr(self) -> str:
        """The options."""
        return f"bound={self.radius}, p={self.p}, dim={self.dim}"
