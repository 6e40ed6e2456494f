"""Weights of zero mean, and weight standardization: zero mean and unit variance for each output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    check_dim,
    check_filled,
    check_flag,
    check_floating,
    check_inexact,
    check_integer,
    check_number,
    rounding,
    shape_text,
    stored,
    widened,
)
from fxparam.catalogue._layers import output_dim
from fxparam.declaration import Entry, Latents, Place
from fxparam.errors import SpecError

Dims = int | Sequence[int] | None


def _check_dims(name: str, dim: Dims) -> Dims:
    """``dim`` as a number, a tuple or None, each number checked."""
    if dim is None:
        return None
    if not isinstance(dim, list | tuple):
        check_integer(name, "dim", dim)
        return dim
    for one in dim:
        check_integer(name, "dim", one)
    if not dim:
        raise SpecError(f"{name}: got dim={dim!r}; expected at least one dimension")
    return tuple(dim)


def _dims(name: str, weight: Tensor, dim: Dims) -> tuple[int, ...]:
    """The dimensions to reduce, from the front, ascending.

    Raises:
        SpecError: the weight has no such dimension, one is named twice, or all but the first are meant and there is none.
    """
    if dim is None:
        if weight.ndim < 2:
            raise SpecError(
                f"{name}: got a weight of shape {shape_text(weight)}, in which all dimensions but the first are none; "
                f"type fxp.{name}(dim=0)"
            )
        return tuple(range(1, weight.ndim))
    dims = [check_dim(name, weight, one) for one in ([dim] if isinstance(dim, int) else dim)]
    if len(set(dims)) < len(dims):
        raise SpecError(f"{name}: got dim={dim!r} for a weight of shape {shape_text(weight)}, which names a dimension twice")
    return tuple(sorted(dims))


def _behind_outputs(place: Place) -> tuple[int, ...]:
    """All dimensions but that of the outputs."""
    return tuple(dim for dim in range(len(place.shape)) if dim != output_dim(place))


@dataclass(frozen=True, repr=False)
class Centered(Entry):
    """``W = X - mean(X)``: zero mean over some dimensions.

    Args:
        dim: the dimension or dimensions of the mean; None: all but that of the outputs, so that each output has zero mean: the
            second in transposed convolutions, else the first.

    Raises:
        SpecError: ``dim`` is no integer or sequence of some; at build, the weight has no such dimension or is neither
            floating-point nor complex.
    """

    name: ClassVar[str] = "centered"
    dim: Dims = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", _check_dims(self.name, self.dim))

    def placed(self, place: Place) -> Centered:
        """With the dimensions behind an output of this layer, where none are given."""
        return replace(self, dim=_behind_outputs(place)) if self.dim is None and output_dim(place) else self

    def build(self, weight: Tensor) -> CenteredMap:
        """The map for a weight that has these dimensions."""
        check_inexact(self.name, weight)
        check_filled(self.name, weight)
        return CenteredMap(weight, _dims(self.name, weight, self.dim))


class CenteredMap(Constrained):
    """Zero mean over ``dims``. Distances are relative to the largest element.

    Of latents that are all equal to rounding nothing or the rounding of a rounding is left, whose mean may not be zero.
    """

    constraint = "zero mean (relative to the largest element)"

    def __init__(self, weight: Tensor, dims: tuple[int, ...]) -> None:
        super().__init__(weight)
        self.dims = dims

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """The weight's shape."""
        return stored(_without_mean(widened(latent), self.dims), latent.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """The largest ``|mean|`` over the largest element."""
        wide = widened(weight)
        largest = wide.abs().amax()
        return torch.where(largest > 0, wide.mean(self.dims).abs().amax() / largest, 0.0)

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a mean."""
        return rounding(weight.dtype, _count(weight, self.dims))

    def invert(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight.clone()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The weight without its mean, the nearest; unchanged if in the image."""
        self.require_finite(weight)
        return weight.clone() if self.contains(weight) else self.forward(weight)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal elements without their mean."""
        return self.forward(self.normal(*self.shape, generator=generator)).to(self._like.dtype)

    def extra_repr(self) -> str:
        """The dimensions."""
        return f"dims={self.dims}"


@dataclass(frozen=True, repr=False)
class Standardized(Entry):
    """``W = g · (X - μ) / √(σ² + eps)``: weight standardization (Qiao et al. 2019).

    ``μ`` and ``σ²`` are the mean and the variance of a slice, by default of an output. The variance is the mean square
    deviation, divided by ``n`` as in the paper, not by ``n - 1``.

    Args:
        dim: the dimension or dimensions of the mean; None: all but that of the outputs, so that each output is standardized.
        gain: whether there is a second latent ``g``, one number for each slice (Brock et al. 2021 train one, too). With
            it the weights are all those of zero mean, without it ``g`` is 1.
        eps: what is added to the variance, above 0. It bounds the gradient where a slice is constant, and so the variance
            of a weight is a little below 1: ``σ² / (σ² + eps)``.

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension or is not floating-point.
    """

    name: ClassVar[str] = "standardized"
    dim: Dims = None
    gain: bool = False
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", _check_dims(self.name, self.dim))
        check_flag(self.name, "gain", self.gain)
        check_number(self.name, "eps", self.eps)
        if self.eps <= 0:
            raise SpecError(f"standardized: got eps={self.eps!r}; expected a number above 0")

    def placed(self, place: Place) -> Standardized:
        """With the dimensions behind an output of this layer, where none are given."""
        return replace(self, dim=_behind_outputs(place)) if self.dim is None and output_dim(place) else self

    def build(self, weight: Tensor) -> StandardizedMap:
        """The map for a weight that has these dimensions."""
        check_floating(self.name, weight)
        check_filled(self.name, weight)
        dims = _dims(self.name, weight, self.dim)
        if _count(weight, dims) == 1:
            raise SpecError(
                f"standardized: got a weight of shape {shape_text(weight)} with one element for each slice over {dims}, "
                "which has no variance; choose other dimensions"
            )
        return StandardizedMap(weight, dims, float(self.eps), gain=self.gain)


class StandardizedMap(Constrained):
    """Zero mean and, without gain, a variance of at most 1 over ``dims``.

    Distances of the mean are relative to the largest element, or to 1 without gain, where that is larger.
    Without gain a variance below 1 is that of a constant slice and ``eps``: the latent is tiny, and gradients of it are as
    large as it is small. Assign weights of variance 1, or use ``gain``.
    """

    def __init__(self, weight: Tensor, dims: tuple[int, ...], eps: float, *, gain: bool) -> None:
        super().__init__(weight)
        self.dims, self.eps, self.gain = dims, eps, gain
        self.constraint = "zero mean (relative to the largest element)" if gain else "zero mean and a variance of at most 1"

    def forward(self, latent: Tensor, gain: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The weight's shape, and for the gain the same with 1 in place of the reduced dimensions."""
        x = widened(latent)
        # Large slices in units of the largest element: no square overflows. The unit cancels, in the gradient as well.
        unit = x.detach().abs().amax(self.dims, keepdim=True).clamp(min=1)
        # What is left of a constant slice is smaller than the floor under eps.
        centered = _without_mean(x / unit, self.dims)
        floor = (math.sqrt(self.eps) / unit).square().clamp(min=torch.finfo(x.dtype).eps ** 2)
        unscaled = centered / (centered.square().mean(self.dims, keepdim=True) + floor).sqrt()
        return stored(unscaled if gain is None else unscaled * widened(gain), latent.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """The larger of what the mean misses, and the standard deviation exceeds."""
        wide = widened(weight)
        largest = wide.abs().amax()
        mean = wide.mean(self.dims).abs().amax()
        if self.gain:
            return torch.where(largest > 0, mean / largest, 0.0)
        excess = self._deviation(wide).amax() - 1
        return torch.maximum(mean / largest.clamp(min=1), excess.clamp(min=0))

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a mean."""
        return rounding(weight.dtype, _count(weight, self.dims))

    def invert(self, weight: Tensor) -> Latents:
        """With gain, the weight and ``√(σ² + eps)``; without, the weight times ``√(eps / (1 - σ²))``."""
        wide = widened(weight)
        variance = self._deviation(wide).square()
        if self.gain:
            return weight.clone(), (variance + self.eps).sqrt().to(weight.dtype)
        # A variance of 1 is a limit that needs infinite latents; up to rounding it is reached by these.
        room = (1 - variance).clamp(min=torch.finfo(wide.dtype).eps)
        return (wide * (self.eps / room).sqrt()).to(weight.dtype)

    @torch.no_grad()
    def start(self, weight: Tensor) -> Latents:
        """The latents of ``weight``; where it is not in the image, ``weight`` itself, to be standardized.

        Raises:
            ImageError: ``weight`` has another shape or is not finite.
        """
        self.require_finite(weight)
        if self.gain or self.contains(weight):
            return super().start(weight)
        return weight.clone()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """Without its mean, and divided by its standard deviation where that exceeds 1: the nearest.

        Unchanged if in the image.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        centered = _without_mean(widened(weight), self.dims)
        if not self.gain:
            centered = centered / self._deviation(centered).clamp(min=1)
        return centered.to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal elements, standardized."""
        drawn = _without_mean(self.normal(*self.shape, generator=generator), self.dims)
        return (drawn / self._deviation(drawn)).to(self._like.dtype)

    def _deviation(self, centered: Tensor) -> Tensor:
        """The root of the mean square of each slice."""
        return torch.linalg.vector_norm(centered, dim=self.dims, keepdim=True) / math.sqrt(_count(centered, self.dims))

    def extra_repr(self) -> str:
        """The options."""
        return f"dims={self.dims}, gain={self.gain}, eps={self.eps}"


def _without_mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``x - mean(x)``, twice: where the mean is much larger than the rest, its rounding is not small beside the rest."""
    x = x - x.mean(dims, keepdim=True)
    return x - x.mean(dims, keepdim=True)


def _count(weight: Tensor, dims: tuple[int, ...]) -> int:
    return math.prod(weight.shape[dim] for dim in dims)
