"""Learnable gates: which elements or slices of a weight are zero is trained together with their values.

A gate is the hard concrete random number of Louizos, Welling and Kingma 2018: with ``u`` uniform between 0 and 1,

    s = sigmoid((log u - log(1 - u) + log_alpha) / temperature)                               (eq. 10)
    z = min(1, max(0, s (high - low) + low)),  (low, high) = stretch around [0, 1]            (eqs. 10 and 11)

so that it is exactly 0 or 1 with a probability above zero, and has a gradient in between. In eval mode
``z = min(1, max(0, sigmoid(log_alpha) (high - low) + low))`` (eq. 13), and folding leaves exact zeros where gates are shut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Unconstrained,
    check_dim,
    check_filled,
    check_floating,
    check_integer,
    check_number,
    rounding,
    stored,
    widened,
)
from fxparam.declaration import Entry, check_resample
from fxparam.errors import SpecError

_MARGIN = 0.5  # of the default start above the least at which a gate is open; rounding must not close it a little


@dataclass(frozen=True, repr=False)
class Gate(Entry):
    """``W = X · z`` with hard concrete gates ``z``: random in training, their estimate in eval (Louizos et al. 2018).

    ``original0`` is ``X`` and ``original1`` is ``log_alpha``. The penalty for the loss (eq. 12) is a method of the map:

        site = model.get_submodule("layer.parametrizations.weight")
        loss = loss + strength * site[0].expected_l0(site.original1)

    Args:
        dim: one gate for each index of this dimension; None: one for each element.
        temperature: of the concrete distribution, above 0.
        stretch: the interval that ``s`` is stretched to, below 0 and above 1.
        resample: ``"step"`` draws once per optimizer step for all reads of the weight, ``"call"`` at each read.
        init: ``log_alpha`` at the start; the gates it gives in eval mode must be above 0, and ``X`` starts at the weight
            over them. None: 0.5 above the least for which they are 1.

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension or is not floating-point.
    """

    name: ClassVar[str] = "gate"
    dim: int | None = None
    temperature: float = 2 / 3
    stretch: tuple[float, float] = (-0.1, 1.1)
    resample: str = "step"
    init: float | None = None

    def __post_init__(self) -> None:
        if self.dim is not None:
            check_integer(self.name, "dim", self.dim)
        check_number(self.name, "temperature", self.temperature)
        if self.temperature <= 0:
            raise SpecError(f"gate: got temperature={self.temperature!r}; expected a number above 0")
        if not isinstance(self.stretch, tuple | list) or len(self.stretch) != 2:
            raise SpecError(f"gate: got stretch={self.stretch!r}; expected two numbers such as (-0.1, 1.1)")
        object.__setattr__(self, "stretch", tuple(self.stretch))
        for bound in self.stretch:
            check_number(self.name, "stretch", bound)
        low, high = self.stretch
        if not low < 0 < 1 < high:
            raise SpecError(f"gate: got stretch={self.stretch!r}; expected one number below 0 and one above 1")
        check_resample(self.name, self.resample)
        if self.init is not None:
            check_number(self.name, "init", self.init)
            least = math.log(-low / high)
            if self.init <= least:
                raise SpecError(
                    f"gate: got init={self.init!r}, at which all gates are shut; expected a number above {least:.4g}, and "
                    f"{self._open():.4g} for gates of 1"
                )

    def build(self, weight: Tensor) -> GateMap:
        """The map for a weight of any shape (of at least one dimension, if ``dim`` is given)."""
        check_floating(self.name, weight)
        check_filled(self.name, weight)
        dim = None if self.dim is None else check_dim(self.name, weight, self.dim)
        init = self._open() + _MARGIN if self.init is None else float(self.init)
        module = GateMap(weight, dim, float(self.temperature), self.stretch, self.resample, init)
        if not module.estimate(widened(torch.tensor(init, dtype=weight.dtype))) > 0:
            raise SpecError(f"gate: got init={self.init!r}, at which all gates are shut in a weight of dtype {weight.dtype}")
        return module

    def _open(self) -> float:
        """The least ``log_alpha`` for which a gate is 1 in eval mode: ``sigmoid`` of it is ``(1 - low) / (high - low)``."""
        low, high = self.stretch
        return math.log((1 - low) / (high - 1))


class GateMap(Unconstrained):
    """``(X, log_alpha)`` to ``X · z``.

    Every finite weight is in the image, with all gates open: the right inverse is that of eval mode, and starts
    ``log_alpha`` anew, for a weight says nothing about its gates.
    """

    def __init__(
        self, weight: Tensor, dim: int | None, temperature: float, stretch: tuple[float, float], resample: str, init: float
    ) -> None:
        super().__init__(weight)
        self.dim, self.temperature, self.stretch, self.resample, self.init = dim, temperature, stretch, resample, init

    def forward(self, latent: Tensor, log_alpha: Tensor) -> Tensor:  # type: ignore[override]
        """``X`` of the weight's shape, and ``log_alpha`` of the same or ``(1, ..., n, ..., 1)``; in float32 or better."""
        logits = widened(log_alpha)
        if self.training:
            # A uniform number of exactly 0 has the logit -inf: a gate that is shut, and no gradient.
            logits = (torch.rand_like(logits).logit() + logits) / self.temperature
        return stored(widened(latent) * self.estimate(logits), latent.dtype)

    def estimate(self, log_alpha: Tensor) -> Tensor:
        """The gates of eval mode, between 0 and 1 (eq. 13); those that are 0 are shut."""
        low, high = self.stretch
        return (log_alpha.sigmoid() * (high - low) + low).clamp(0, 1)

    def expected_l0(self, log_alpha: Tensor) -> Tensor:
        """How many elements of the weight are expected not to be zero in training, as a differentiable scalar.

        The sum of the probabilities ``sigmoid(log_alpha - temperature · log(-low / high))`` that gates are not shut
        (eq. 12), each times the number of elements behind the gate.

        Args:
            log_alpha: the latent ``original1``.
        """
        low, high = self.stretch
        behind = self.shape.numel() // max(1, log_alpha.numel())
        return behind * (widened(log_alpha) - self.temperature * math.log(-low / high)).sigmoid().sum()

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a quotient and a product."""
        return rounding(weight.dtype)

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight over the gates of the start (itself, where they are 1), and their ``log_alpha``."""
        sizes = [n if self.dim in (None, d) else 1 for d, n in enumerate(self.shape)]
        log_alpha = torch.full(sizes, self.init, dtype=weight.dtype, device=weight.device)
        return (widened(weight) / self.estimate(widened(log_alpha))).to(weight.dtype), log_alpha

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """A weight of independent standard normal elements, with all gates open."""
        return super().sample(generator=generator)

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"dim={self.dim}, temperature={self.temperature:.6g}, stretch={self.stretch}, resample={self.resample!r}, "
            f"init={self.init:.6g}"
        )
