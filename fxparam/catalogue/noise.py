"""Random weights: Gaussian noise on a weight, and a Gaussian distribution of weights whose mean and spread are trained.

Both draw in training mode only, each time anew or once per optimizer step, as ``resample`` says. In eval mode the weight is
the mean, and so it is where it is folded and exported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fxparam.catalogue._image import Unconstrained, check_flag, check_floating, check_number, stored, widened
from fxparam.declaration import Entry, check_resample
from fxparam.errors import SpecError


@dataclass(frozen=True, repr=False)
class Noise(Entry):
    """In training ``X + std · ε``, or ``X · (1 + std · ε)``, with standard normal ``ε``; in eval ``X``.

    Args:
        std: the standard deviation of the noise, at least 0.
        relative: whether it is that of the noise over the weight, element by element.
        resample: ``"call"`` draws at each read of the weight, ``"step"`` once per optimizer step for all reads.

    Raises:
        SpecError: ``std`` is negative or no finite number, or another ``resample``; at build, a dtype that is not
            floating-point.
    """

    name: ClassVar[str] = "noise"
    std: float = 0.01
    relative: bool = False
    resample: str = "call"

    def __post_init__(self) -> None:
        check_number(self.name, "std", self.std)
        if self.std < 0:
            raise SpecError(f"noise: got std={self.std!r}; expected a number of at least 0")
        check_flag(self.name, "relative", self.relative)
        check_resample(self.name, self.resample)

    def build(self, weight: Tensor) -> NoiseMap:
        """The map for a weight of any shape."""
        check_floating(self.name, weight)
        return NoiseMap(weight, float(self.std), relative=self.relative, resample=self.resample)


class NoiseMap(Unconstrained):
    """``X`` with noise in training mode. The right inverse is that of eval mode: the weight without noise."""

    def __init__(self, weight: Tensor, std: float, *, relative: bool, resample: str) -> None:
        super().__init__(weight)
        self.std, self.relative, self.resample = std, relative, resample

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """Elementwise, any shape; noise is drawn and added in float32 or better."""
        if not self.training:
            return latent
        mean = widened(latent)
        noise = self.std * torch.randn_like(mean)
        return stored(mean + (mean * noise if self.relative else noise), latent.dtype)

    def tolerance(self, weight: Tensor) -> float:
        """Zero: nothing is computed in eval mode."""
        return 0.0

    def invert(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight.clone()

    def extra_repr(self) -> str:
        """The options."""
        return f"std={self.std}, relative={self.relative}, resample={self.resample!r}"


@dataclass(frozen=True, repr=False)
class Variational(Entry):
    """In training ``μ + softplus(ρ) · ε`` with standard normal ``ε``; in eval ``μ`` (Blundell et al. 2015, section 3.2).

    A weight is one draw of a Gaussian posterior with independent elements, and gradients reach its mean and spread. The
    complexity cost (eq. 1) is for the loss: ``original0`` is ``μ``, ``original1`` is ``ρ``.

    Args:
        init_std: the standard deviation ``softplus(ρ)`` at the start, above 0.
        resample: ``"step"`` draws once per optimizer step for all reads of the weight, ``"call"`` at each read.

    Raises:
        SpecError: ``init_std`` is not above 0 and finite, or another ``resample``; at build, a dtype that is not
            floating-point, or one in which ``ρ`` would not be finite.
    """

    name: ClassVar[str] = "variational"
    init_std: float = 0.05
    resample: str = "step"

    def __post_init__(self) -> None:
        check_number(self.name, "init_std", self.init_std)
        if self.init_std <= 0:
            raise SpecError(f"variational: got init_std={self.init_std!r}; expected a number above 0")
        check_resample(self.name, self.resample)

    def build(self, weight: Tensor) -> VariationalMap:
        """The map for a weight of any shape."""
        check_floating(self.name, weight)
        if not math.isfinite(torch.tensor(_rho(float(self.init_std)), dtype=weight.dtype).item()):
            raise SpecError(f"variational: got init_std={self.init_std!r}, too large for a weight of dtype {weight.dtype}")
        return VariationalMap(weight, float(self.init_std), resample=self.resample)


class VariationalMap(Unconstrained):
    """``(μ, ρ)`` to ``μ + softplus(ρ) · ε`` in training mode, to ``μ`` in eval mode.

    The right inverse is that of eval mode, and starts ``ρ`` anew: a weight says nothing about its spread.
    """

    def __init__(self, weight: Tensor, init_std: float, *, resample: str) -> None:
        super().__init__(weight)
        self.init_std, self.resample = init_std, resample

    def forward(self, mean: Tensor, rho: Tensor) -> Tensor:  # type: ignore[override]
        """Elementwise, both of the weight's shape; drawn and added in float32 or better."""
        if not self.training:
            return mean
        wide = widened(mean)
        return stored(wide + F.softplus(widened(rho)) * torch.randn_like(wide), mean.dtype)

    def tolerance(self, weight: Tensor) -> float:
        """Zero: nothing is computed in eval mode."""
        return 0.0

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight itself as mean, and the ``ρ`` of ``init_std``."""
        return weight.clone(), torch.full_like(weight, _rho(self.init_std))

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """A weight of independent standard normal elements: the usual prior, whatever the posterior is now."""
        return super().sample(generator=generator)

    def extra_repr(self) -> str:
        """The options."""
        return f"init_std={self.init_std}, resample={self.resample!r}"


def _rho(std: float) -> float:
    """The ``ρ`` with ``softplus(ρ) == std``."""
    return std + math.log(-math.expm1(-std))
