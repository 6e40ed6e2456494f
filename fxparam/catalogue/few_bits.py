"""Weights of one magnitude for each filter and two or three signs: ternary and binary weights.

As in ``fxparam.catalogue.quantization``, gradients go straight through to a latent that is not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import check_choice, check_integer, check_number, widened
from fxparam.catalogue.quantization import Levels, QuantizedMap, check_channels
from fxparam.declaration import Entry
from fxparam.errors import SpecError


class SignMap(QuantizedMap):
    """``W = α · n`` with ``n`` of -1, 0 and 1 or a subset, and one ``α`` for the weight or for each index of ``dim``."""

    def __init__(self, weight: Tensor, dim: int | None) -> None:
        super().__init__(weight, 2, dim)
        # How many elements share an α.
        self.count = weight.numel() if dim is None else weight.numel() // weight.shape[dim]

    def summed(self, values: Tensor) -> Tensor:
        """The sum of what shares an ``α``."""
        return values.sum(self.over, keepdim=self.dim is not None)

    def largest(self, weight: Tensor) -> Tensor:
        """The ``α`` of a weight in the image."""
        return weight.abs().amax(self.over, keepdim=self.dim is not None)


@dataclass(frozen=True, repr=False)
class Ternary(Entry):
    """``W = α · n``: ``n = sign(X)`` where ``|X|`` is above ``threshold`` times its mean, else 0.

    With the defaults these are the ternary weights of Li, Zhang and Liu 2016: ``α`` by eq. 5, the threshold by eq. 6.
    ``ternary(threshold=0.5, scale="absmean")`` is the weight of BitNet b1.58 (Ma et al. 2024, eqs. 1 to 3).

    No gradient goes through ``α`` and ``n``: that of ``X`` is that of ``W``.

    Args:
        threshold: in units of the mean absolute value, in ``[0, 1)``.
        dim: the dimension with a threshold and an ``α`` for each index; None: one for the whole weight.
        scale: ``α`` is the mean absolute value of the elements above the threshold (``"kept"``), or of all (``"absmean"``).

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension, has one dimension only and a
            ``dim``, is empty or not floating-point.
    """

    name: ClassVar[str] = "ternary"
    threshold: float = 0.7
    dim: int | None = None
    scale: str = "kept"

    def __post_init__(self) -> None:
        check_number(self.name, "threshold", self.threshold)
        if not 0 <= self.threshold < 1:
            raise SpecError(f"ternary: got threshold={self.threshold!r}; expected 0 <= threshold < 1")
        if self.dim is not None:
            check_integer(self.name, "dim", self.dim)
        check_choice(self.name, "scale", self.scale, ("kept", "absmean"))

    def build(self, weight: Tensor) -> TernaryMap:
        """The map for a weight of any shape."""
        return TernaryMap(weight, check_channels(self.name, weight, self.dim), float(self.threshold), self.scale)


class TernaryMap(SignMap):
    """Every element ``-α``, ``0`` or ``α``, and ``α = 0`` where all elements of the latent are."""

    constraint = "every element -α, 0 or α"

    def __init__(self, weight: Tensor, dim: int | None, threshold: float, scale: str) -> None:
        super().__init__(weight, dim)
        self.threshold, self.scale = threshold, scale

    def quantized(self, latent: Tensor) -> Levels:  # type: ignore[override]
        """The signs and ``α``."""
        size = latent.abs()
        # Divided before they are summed, which cannot overflow.
        mean = self.summed(size / self.count)
        kept = size > self.threshold * mean
        if self.scale == "kept":
            kept_count = self.summed(kept).clamp(min=1)
            mean = self.summed(torch.where(kept, size / kept_count, 0.0))
        return Levels(torch.where(kept, latent.sign(), 0.0), mean)

    def nearest(self, weight: Tensor) -> Levels:
        """The nearest multiple of the largest absolute value."""
        step = self.largest(weight)
        return Levels(torch.where(weight.abs() > step / 2, weight.sign(), 0.0), step)

    def invert(self, weight: Tensor) -> Tensor:
        """The weight itself; for ``"absmean"`` over the fraction of nonzero elements, which has the right mean.

        Raises:
            ImageError: so few elements are not zero that the latent overflows.
        """
        if self.scale == "kept":
            return weight.clone()
        latent = (widened(weight) * self.count / self.summed(weight != 0).clamp(min=1)).to(weight.dtype)
        if not latent.isfinite().all():
            raise self.refusal(weight, f'with so many zeros the latent of scale="absmean" overflows {weight.dtype}')
        return latent

    def extra_repr(self) -> str:
        """The options."""
        return f"threshold={self.threshold}, dim={self.dim}, scale={self.scale!r}"


@dataclass(frozen=True, repr=False)
class Binary(Entry):
    """``W = α · sign(X)`` with ``α`` the mean of ``|X|`` (Rastegari et al. 2016, section 3.1), and ``sign(0) = 1``.

    This is the nearest such weight to ``X``. No gradient goes through ``α``, and that of the sign is that of the identity,
    without the paper's cut at ``|X| = 1``: the gradient of ``X`` is that of ``W``.

    Args:
        dim: the dimension with an ``α`` for each index (0: each filter, as in the paper); None: one for the whole weight.

    Raises:
        SpecError: ``dim`` is no integer; at build, the weight has no such dimension, has one dimension only and a
            ``dim``, is empty or not floating-point.
    """

    name: ClassVar[str] = "binary"
    dim: int | None = 0

    def __post_init__(self) -> None:
        if self.dim is not None:
            check_integer(self.name, "dim", self.dim)

    def build(self, weight: Tensor) -> BinaryMap:
        """The map for a weight of any shape."""
        return BinaryMap(weight, check_channels(self.name, weight, self.dim))


class BinaryMap(SignMap):
    """Every element ``-α`` or ``α``, and ``α = 0`` where all elements of the latent are."""

    constraint = "every element -α or α"

    def quantized(self, latent: Tensor) -> Levels:  # type: ignore[override]
        """The signs and ``α``."""
        return Levels(latent.sign() + (latent == 0), self.summed(latent.abs() / self.count))

    def nearest(self, weight: Tensor) -> Levels:
        """The largest absolute value with the signs of the weight."""
        return Levels(self.quantized(weight).levels, self.largest(weight))

    def extra_repr(self) -> str:
        """The dimension."""
        return f"dim={self.dim}"
