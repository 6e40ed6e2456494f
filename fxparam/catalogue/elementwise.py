"""Maps that act on each element by itself: positive weights, bounded weights, and affine rescaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxparam.catalogue._image import (
    Constrained,
    Unconstrained,
    check_choice,
    check_flag,
    check_floating,
    check_number,
    computing_dtype,
    rounding,
    widened,
)
from fxparam.declaration import Entry
from fxparam.errors import SpecError

_SOFTPLUS_LINEAR_ABOVE = 20.0  # where torch's softplus returns its argument


def inverse_softplus(weight: Tensor) -> Tensor:
    """The ``x`` with ``softplus(x) == weight > 0``, for torch's softplus, which is the identity above 20."""
    return torch.where(weight > _SOFTPLUS_LINEAR_ABOVE, weight, weight + torch.log(-torch.expm1(-weight)))


@dataclass(frozen=True, repr=False)
class Positive(Entry):
    """Elements above zero: ``softplus(X)``, ``exp(X)`` or ``X²``.

    Args:
        map: ``"softplus"``, ``"exp"`` or ``"square"``. Only ``"square"`` reaches zero; its latents start positive. Where
            the square or the exponential overflows, so does the weight.

    Raises:
        SpecError: another map; at build, a dtype that is not floating-point.
    """

    name: ClassVar[str] = "positive"
    map: str = "softplus"

    def __post_init__(self) -> None:
        check_choice(self.name, "map", self.map, tuple(_FORWARD))

    def build(self, weight: Tensor) -> PositiveMap:
        """The map for a weight of any shape."""
        check_floating(self.name, weight)
        return PositiveMap(weight, self.map)


_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {"softplus": F.softplus, "exp": torch.exp, "square": torch.square}
_INVERSE: dict[str, Callable[[Tensor], Tensor]] = {"softplus": inverse_softplus, "exp": torch.log, "square": torch.sqrt}


class PositiveMap(Constrained):
    """``W > 0`` elementwise (``W >= 0`` for the square).

    ``contains`` takes the closed set ``W >= 0``, for the outputs of ``softplus`` and ``exp`` underflow to zero; the
    right inverse refuses such zeros, which no latent produces exactly.
    """

    constraint = "every element above zero"

    def __init__(self, weight: Tensor, map: str) -> None:
        super().__init__(weight)
        self.map = map

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """Elementwise, any shape."""
        return _FORWARD[self.map](latent)

    def distance(self, weight: Tensor) -> Tensor:
        """How far the smallest element is below zero."""
        return (-weight).clamp(min=0).amax() if weight.numel() else weight.new_zeros(())

    def tolerance(self, weight: Tensor) -> float:
        """Zero: a negative number of any size has no latent."""
        return 0.0

    def invert(self, weight: Tensor) -> Tensor:
        """Elementwise, computed in float32 or better."""
        zeros = int((weight == 0).sum())
        if zeros and self.map != "square":
            raise self.refusal(weight, f"{self.constraint} is missed by {zeros} elements that are 0 (distance 0, tolerance 0)")
        return _INVERSE[self.map](widened(weight)).to(weight.dtype)

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """Elements that are too small become the dtype's epsilon (zero for the square); the others stay."""
        self.require_finite(weight)
        if self.map == "square":
            return weight.clamp(min=0)
        return weight.masked_fill(weight <= 0, torch.finfo(weight.dtype).eps)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Independent half-normal elements: the absolute values of standard normal numbers."""
        drawn = self.normal(*self.shape, generator=generator).abs().to(self._like.dtype)
        return drawn.clamp(min=torch.finfo(drawn.dtype).tiny)

    def extra_repr(self) -> str:
        """The map."""
        return f"map={self.map!r}"


@dataclass(frozen=True, repr=False)
class Bounded(Entry):
    """Elements strictly between two numbers: ``(low + high) / 2 + (high - low) / 2 · tanh(X)``.

    Args:
        low: the lower bound.
        high: the upper bound.

    Raises:
        SpecError: ``low >= high``, or a bound that is not finite; at build, a dtype that is not floating-point, or one
            in which the bounds cannot be told apart.
    """

    name: ClassVar[str] = "bounded"
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.name, "low", self.low)
        check_number(self.name, "high", self.high)
        if self.low >= self.high:
            raise SpecError(f"bounded: got low={self.low!r}, high={self.high!r}; expected low < high")

    def build(self, weight: Tensor) -> BoundedMap:
        """The map for a weight of any shape."""
        check_floating(self.name, weight)
        module = BoundedMap(weight, float(self.low), float(self.high))
        if module.margin(weight.dtype) >= 0.5:
            raise SpecError(f"bounded: {weight.dtype} cannot tell low={self.low!r} from high={self.high!r}; use a wider dtype")
        return module


class BoundedMap(Constrained):
    """``low < W < high`` elementwise. ``contains`` takes the bounds themselves, which ``tanh`` reaches by rounding."""

    def __init__(self, weight: Tensor, low: float, high: float) -> None:
        super().__init__(weight)
        self.low, self.high = low, high
        self.middle, self.radius = low / 2 + high / 2, high / 2 - low / 2
        self.constraint = f"every element between {low} and {high} (in units of half their distance)"

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """Elementwise, any shape."""
        return self.middle + self.radius * torch.tanh(latent)

    def margin(self, dtype: torch.dtype) -> float:
        """Rounding of a weight near a bound, in units of the radius."""
        return 4 * torch.finfo(dtype).eps * max(abs(self.low), abs(self.high)) / self.radius

    def distance(self, weight: Tensor) -> Tensor:
        """How far the farthest element is beyond a bound, in units of the radius."""
        if not weight.numel():
            return weight.new_zeros(())
        return (self._unit(weight).abs() - 1).clamp(min=0).amax()

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of the bounds themselves."""
        return self.margin(weight.dtype)

    def invert(self, weight: Tensor) -> Tensor:
        """``atanh`` of the place between the bounds, computed in float32 or better."""
        unit = self._unit(weight)
        beyond = (unit.abs() >= 1) | (weight <= self.low) | (weight >= self.high)
        if beyond.any():
            raise self.refusal(
                weight,
                f"{int(beyond.sum())} of {weight.numel()} elements are on or beyond the bounds {self.low} and "
                f"{self.high}, by up to {float(self.distance(weight)) * self.radius:.3g} (tolerance 0)",
            )
        return torch.atanh(unit).to(weight.dtype)

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """Elements on or beyond a bound come back inside, by the rounding of the dtype; the others stay."""
        self.require_finite(weight)
        beyond = (self._unit(weight).abs() >= 1) | (weight <= self.low) | (weight >= self.high)
        inside = 1 - self.margin(weight.dtype)
        clamped = self.middle + self.radius * self._unit(weight).clamp(-inside, inside)
        return torch.where(beyond, clamped.to(weight.dtype), weight)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Independent elements, uniform between the bounds."""
        device = self._like.device if generator is None else generator.device
        dtype = computing_dtype(self._like.dtype)
        uniform = torch.rand(self.shape, generator=generator, dtype=dtype, device=device).to(self._like.device)
        return self.project((self.low + 2 * self.radius * uniform).to(self._like.dtype))

    def _unit(self, weight: Tensor) -> Tensor:
        return (widened(weight) - self.middle) / self.radius

    def extra_repr(self) -> str:
        """The bounds."""
        return f"low={self.low}, high={self.high}"


@dataclass(frozen=True, repr=False)
class Scale(Entry):
    """``factor · X + shift``, elementwise: equalized learning rates, or a learned range.

    Args:
        factor: what the latent is multiplied with, not zero.
        shift: what is added.
        trainable: whether factor and shift train along, as scalar parameters of the map named so.

    Raises:
        SpecError: a factor of zero, or a number that is not finite; at build, a dtype that is not floating-point.
    """

    name: ClassVar[str] = "scale"
    factor: float = 1.0
    shift: float = 0.0
    trainable: bool = False

    def __post_init__(self) -> None:
        check_number(self.name, "factor", self.factor)
        check_number(self.name, "shift", self.shift)
        check_flag(self.name, "trainable", self.trainable)
        if self.factor == 0:
            raise SpecError("scale: got factor=0; expected a number other than 0, or no weight but the shift can be made")

    def build(self, weight: Tensor) -> ScaleMap:
        """The map for a weight of any shape."""
        check_floating(self.name, weight)
        return ScaleMap(weight, float(self.factor), float(self.shift), trainable=self.trainable)


class ScaleMap(Unconstrained):
    """``factor · X + shift``."""

    factor: Tensor | float
    shift: Tensor | float

    def __init__(self, weight: Tensor, factor: float, shift: float, *, trainable: bool) -> None:
        super().__init__(weight)
        if trainable:
            self.factor = nn.Parameter(weight.detach().new_full((), factor))
            self.shift = nn.Parameter(weight.detach().new_full((), shift))
        else:
            self.factor, self.shift = factor, shift

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """Elementwise, any shape."""
        return latent * self.factor + self.shift

    def invert(self, weight: Tensor) -> Tensor:
        """``(W - shift) / factor``."""
        factor = self.factor.detach().item() if isinstance(self.factor, Tensor) else self.factor
        if not math.isfinite(factor) or factor == 0:
            raise self.refusal(weight, f"the factor has become {factor} by training", "; give it another value first")
        return (weight - self.shift) / self.factor

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of one product and one sum."""
        return rounding(weight.dtype)

    def extra_repr(self) -> str:
        """The numbers, where they do not train."""
        return "" if isinstance(self.factor, Tensor) else f"factor={self.factor}, shift={self.shift}"
