"""Weights that increase, or decrease, along a dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fxparam.catalogue._image import (
    Constrained,
    check_dim,
    check_filled,
    check_flag,
    check_floating,
    check_integer,
    rounding,
    stored,
    widened,
)
from fxparam.catalogue.elementwise import inverse_softplus
from fxparam.declaration import Entry


@dataclass(frozen=True, repr=False)
class Monotone(Entry):
    """``W_0 = X_0`` and ``W_k = W_(k-1) + softplus(X_k)`` along one dimension: strictly increasing weights.

    Args:
        dim: the dimension along which the weight increases.
        increasing: False: it decreases, by ``W_k = W_(k-1) - softplus(X_k)``.

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension or is not floating-point.
    """

    name: ClassVar[str] = "monotone"
    dim: int = -1
    increasing: bool = True

    def __post_init__(self) -> None:
        check_integer(self.name, "dim", self.dim)
        check_flag(self.name, "increasing", self.increasing)

    def build(self, weight: Tensor) -> MonotoneMap:
        """The map for a weight of at least one dimension."""
        check_floating(self.name, weight)
        check_filled(self.name, weight)
        check_dim(self.name, weight, self.dim)
        return MonotoneMap(weight, self.dim, increasing=self.increasing)


class MonotoneMap(Constrained):
    """``W_k > W_(k-1)`` along ``dim`` (``<`` if decreasing).

    ``contains`` takes equal neighbours, too, for a small step is lost beside a large element; the right inverse refuses
    them, which no latent produces exactly.
    """

    def __init__(self, weight: Tensor, dim: int, *, increasing: bool) -> None:
        super().__init__(weight)
        self.dim, self.increasing = dim, increasing
        self.constraint = f"{'increasing' if increasing else 'decreasing'} elements (relative to the largest)"

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """The weight's shape."""
        x = widened(latent)
        steps = F.softplus(x.narrow(self.dim, 1, x.shape[self.dim] - 1))
        first = x.narrow(self.dim, 0, 1)
        return stored(torch.cat([first, steps if self.increasing else -steps], self.dim).cumsum(self.dim), latent.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """The largest step in the wrong direction, over the largest element."""
        wide = widened(weight)
        steps = self._steps(wide)
        wrong = (-steps).amax().clamp(min=0) if steps.numel() else wide.new_zeros(())
        return torch.where(wrong > 0, wrong / wide.abs().amax(), 0.0)

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a sum."""
        return rounding(weight.dtype, weight.shape[self.dim])

    def invert(self, weight: Tensor) -> Tensor:
        """The first element, and the steps through the inverse of softplus."""
        wide = widened(weight)
        steps = self._steps(wide)
        flat = int((steps <= 0).sum())
        if flat:
            raise self.refusal(
                weight,
                f"{flat} of {steps.numel()} steps are 0 up to rounding (tolerance {self.tolerance(weight):.3g}), and "
                "softplus is above 0",
            )
        return torch.cat([wide.narrow(self.dim, 0, 1), inverse_softplus(steps)], self.dim).to(weight.dtype)

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The mean of the largest element so far and the smallest from here on, with steps that are not too small.

        The mean is the nearest monotone weight in the largest absolute difference. A step smaller than four times the
        tolerance becomes that, relative to the largest element. Unchanged if in the image and of no equal neighbours.
        """
        self.require_finite(weight)
        if self.contains(weight) and not bool((self._steps(widened(weight)) <= 0).any()):
            return weight.clone()
        sign = 1 if self.increasing else -1
        wide = sign * widened(weight)
        ahead = wide.flip(self.dim).cummin(self.dim).values.flip(self.dim)
        between = wide.cummax(self.dim).values / 2 + ahead / 2
        least = 4 * self.tolerance(weight) * between.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny ** 0.5)
        first = between.narrow(self.dim, 0, 1)
        steps = between.diff(dim=self.dim).clamp(min=least)
        return (sign * torch.cat([first, steps], self.dim).cumsum(self.dim)).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal elements in order."""
        drawn = self.normal(*self.shape, generator=generator)
        return self.project(drawn.sort(self.dim, descending=not self.increasing).values.to(self._like.dtype))

    def _steps(self, weight: Tensor) -> Tensor:
        """What each element adds to the one before; of a decreasing weight, takes away."""
        steps = weight.diff(dim=self.dim)
        return steps if self.increasing else -steps

    def extra_repr(self) -> str:
        """The options."""
        return f"dim={self.dim}, increasing={self.increasing}"
