"""Weights on a grid of integers, ``W = (q - z) · s``: fake quantization, with a step from the weight's range or a learned one.

Training sees the rounded weight; gradients go straight through the rounding (Bengio et al. 2013) to a latent that is not
rounded. ``integers`` gives the ``q``, ``s`` and ``z`` of a weight, so that an exporter may store those instead.

The maps are written in plain operations that round as ``torch.fake_quantize_per_tensor_affine`` and
``torch.fake_quantize_per_channel_affine`` do, bit for bit in float32. Those take float32 steps only, whatever the weight's
dtype, and ``torch.vmap`` has no rule for them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    check_dim,
    check_filled,
    check_flag,
    check_floating,
    check_integer,
    rounding,
    shape_text,
    stored,
    widened,
)
from fxparam.declaration import Entry, Latents
from fxparam.errors import SpecError

_PROBES = 64  # elements of a slice that tell which steps cannot be its own


class Integers(NamedTuple):
    """A weight as integers: ``(values - zero_point) * scale`` computed in the scale's dtype, stored in the weight's.

    Attributes:
        values: ``q``, of the weight's shape, int8 (int16 where they have more than 8 bits).
        scale: ``s``, in the dtype the weight is computed in: a scalar, or ``(1, ..., n, ..., 1)`` for one a channel.
        zero_point: ``z``, of the scale's shape and the dtype of the values; zeros where the grid is symmetric.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor


class Levels(NamedTuple):
    """A weight ``levels · step`` in the course of its computation, all of the dtype it is computed in.

    Attributes:
        levels: ``q - z``, whole numbers of the weight's shape.
        step: ``s``, as in ``Integers``.
        lowest: the level of the smallest integer, of the step's shape; None where ``z = 0``.
    """

    levels: Tensor
    step: Tensor
    lowest: Tensor | None = None


def least_step(dtype: torch.dtype) -> float:
    """The smallest step of a grid computed in ``dtype``: its reciprocal, and the grid itself, stay clear of denormals."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def check_channels(name: str, weight: Tensor, dim: int | None) -> int | None:
    """``dim`` counted from the front, for a weight that can be quantized.

    Raises:
        SpecError: the weight is not floating-point, is empty, has no such dimension, or nothing but it.
    """
    check_floating(name, weight)
    check_filled(name, weight)
    if dim is None:
        return None
    channel = check_dim(name, weight, dim)
    if weight.ndim == 1:
        raise SpecError(
            f"{name}: got dim={dim} for a weight of shape {shape_text(weight)}, which would give each element a step of its "
            f"own; type fxp.{name}(dim=None)"
        )
    return channel


class QuantizedMap(Constrained):
    """What all quantized weights share. The latent of a weight is that weight before rounding.

    Attributes:
        bits: how many bits the signed integers ``q`` have.
        dim: the dimension with a step for each index; None: one step for the weight.
        symmetric: whether ``z = 0``.
    """

    def __init__(self, weight: Tensor, bits: int, dim: int | None, *, symmetric: bool = True) -> None:
        super().__init__(weight)
        self.bits, self.dim, self.symmetric = bits, dim, symmetric
        # For torch's reductions () is "all dimensions", and so is it here.
        self.over = () if dim is None else tuple(d for d in range(weight.ndim) if d != dim)

    @abstractmethod
    def quantized(self, *latents: Tensor) -> Levels:
        """The grid and the weight on it, from latents without gradient of the dtype to compute in."""

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """The weight's shape; half precision is computed in float32. The gradient is that of the identity."""
        plain = latent.detach()
        levels, step, _ = self.quantized(widened(plain))
        # The difference is zero, so that the value is exact, and its gradient is that of the latent.
        return stored(levels * step, latent.dtype) + (latent - plain)

    @torch.no_grad()
    def integers(self, *latents: Tensor) -> Integers:
        """What ``forward`` makes of these latents, as integers: bit for bit the same weight."""
        levels, step, lowest = self.quantized(*(widened(latent.detach()) for latent in latents))
        zero = torch.zeros_like(step) if lowest is None else -(2 ** (self.bits - 1)) - lowest
        dtype = torch.int8 if self.bits <= 8 else torch.int16
        return Integers((levels + zero).to(dtype), step, zero.to(dtype))

    def nearest(self, weight: Tensor) -> Levels:
        """The grid a weight in the image would be on, and what is nearest to the weight there."""
        return self.quantized(weight)

    def distance(self, weight: Tensor) -> Tensor:
        """How far the farthest element is off the grid, in steps, beyond what storing it in its dtype rounds."""
        wide = widened(weight)
        levels, step, _ = self.nearest(wide)
        return self.misfit(wide, widened(stored(levels * step, weight.dtype)), step, weight.dtype).amax()

    def misfit(self, weight: Tensor, near: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
        """The same for each element of a weight that is stored as ``dtype``."""
        beyond = (weight - near).abs() - rounding(dtype) * weight.abs()
        return beyond.clamp(min=0) / step.clamp(min=least_step(weight.dtype))

    def invert(self, weight: Tensor) -> Latents:
        """The weight itself."""
        return weight.clone()

    @torch.no_grad()
    def start(self, weight: Tensor) -> Latents:
        """The weight itself, also where it is not on a grid: the latent is what is not rounded.

        Raises:
            ImageError: ``weight`` has another shape or is not finite.
        """
        self.require_finite(weight)
        return self.invert(weight) if self.contains(weight) else weight.clone()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The weight this map makes of it, which is not always the nearest; unchanged if in the image."""
        self.require_finite(weight)
        return weight.clone() if self.contains(weight) else self.forward(weight)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Independent standard normal elements, quantized."""
        return self.project(self.normal(*self.shape, generator=generator).to(self._like.dtype))

    def extra_repr(self) -> str:
        """The options."""
        return f"bits={self.bits}, dim={self.dim}, symmetric={self.symmetric}"


@dataclass(frozen=True, repr=False)
class FakeQuantize(Entry):
    """``W = (q - z) · s`` with ``q = clamp(round(X / s) + z)`` and a grid that spans the elements of ``X``.

    Symmetric: ``z = 0``, ``|q| <= 2^(bits-1) - 1`` and ``s`` the largest absolute value over that bound. Affine: all
    ``2^bits`` integers, ``s`` the range of the elements over ``2^bits - 1``, and zero on the grid. Both are the numbers
    of ``MinMaxObserver`` and ``PerChannelMinMaxObserver`` of ``torch.ao.quantization``, up to the least step, which here
    is far smaller, and to one tie (see ``FakeQuantizeMap``). Ties round to even.

    As there, no gradient goes through ``s`` and ``z``, so that of ``X`` is that of ``W``: no element is beyond the grid.

    Args:
        bits: the bits of an integer, 2 to 16.
        dim: the dimension with a step (and zero point) for each index; None: one for the whole weight.
        symmetric: whether the zero point is 0.

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension, has one dimension only and a
            ``dim``, is empty or not floating-point.
    """

    name: ClassVar[str] = "fake_quantize"
    bits: int = 8
    dim: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        _check_bits(self.name, self.bits, 16)
        if self.dim is not None:
            check_integer(self.name, "dim", self.dim)
        check_flag(self.name, "symmetric", self.symmetric)

    def build(self, weight: Tensor) -> FakeQuantizeMap:
        """The map for a weight of any shape."""
        return FakeQuantizeMap(weight, self.bits, check_channels(self.name, weight, self.dim), symmetric=self.symmetric)


class FakeQuantizeMap(QuantizedMap):
    """Weights that quantization leaves alone, with the grid found from the weight.

    The largest element (affine: the largest and smallest) is therefore at the end of the grid. Rounding both ends of an
    affine range to even may lose an integer: ``-0.5`` and ``254.5`` steps become ``0`` and ``254``. The range of the result
    would give another step, so the step is then made smaller by 8 roundings, and they become ``-1`` and ``254``.

    Channels whose elements are all smaller than ``2^bits`` of the least step (1e-31 in float32) are rounded to zero
    coarsely; a latent within half a step of the dtype's largest number may overflow.
    """

    constraint = "every element a whole number of steps"

    def quantized(self, latent: Tensor) -> Levels:  # type: ignore[override]
        """Levels from a minimum or maximum of the latent; see ``QuantizedMap``."""
        least = least_step(latent.dtype)
        if self.symmetric:
            step = latent.abs().amax(self.over, keepdim=self.dim is not None) / (2 ** (self.bits - 1) - 1)
            step = step.clamp(min=least)
            return Levels(_rounded(latent, step), step)
        low, high = (end(latent, self.over, keepdim=self.dim is not None) for end in (torch.amin, torch.amax))
        low, high, span = low.clamp(max=0), high.clamp(min=0), 2**self.bits - 1
        # Halves do not overflow, and change no bit of the quotient.
        step = ((high / 2 - low / 2) / (span / 2)).clamp(min=least)
        narrow = _rounded(high, step) - _rounded(low, step) < span
        step = torch.where(narrow, step * (1 - 8 * torch.finfo(latent.dtype).eps), step)
        lowest = _rounded(low, step)
        return Levels(torch.minimum(_rounded(latent, step), lowest + span), step, lowest)


def _rounded(latent: Tensor, step: Tensor) -> Tensor:
    # A product with the reciprocal, as torch's kernels have it: a quotient may round to another integer.
    return (latent * step.reciprocal()).round()


def _check_bits(name: str, bits: object, most: int) -> None:
    check_integer(name, "bits", bits, least=2)
    if bits > most:  # type: ignore[operator]
        raise SpecError(f"{name}: got bits={bits!r}; expected an integer from 2 to {most}")


@dataclass(frozen=True, repr=False)
class LearnedStep(Entry):
    """``W = round(clip(X / s, -2^(bits-1), 2^(bits-1) - 1)) · s`` with a step that trains (Esser et al. 2020, eqs. 1 and 2).

    Rounding is passed by gradients, clipping is not; that gives both gradients of the paper (eqs. 3 and 5). The gradient
    of ``s`` is scaled by ``1 / √(N · Qp)`` (section 2.2), ``N`` being the number of elements that share the step and
    ``Qp`` the largest integer. ``original0`` is ``X``, ``original1`` is ``s``.

    The start is that of the paper: the weight as ``X`` and ``s = 2 · mean|X| / √Qp`` (1 where all are zero). The weight of
    the model moves to the grid of that step, and the report says by how much.

    Args:
        bits: the bits of an integer, 2 to 8.
        dim: the dimension with a step for each index; None: one for the whole weight.

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension, has one dimension only and a
            ``dim``, is empty or not floating-point.
    """

    name: ClassVar[str] = "learned_step"
    bits: int = 8
    dim: int | None = None

    def __post_init__(self) -> None:
        _check_bits(self.name, self.bits, 8)
        if self.dim is not None:
            check_integer(self.name, "dim", self.dim)

    def build(self, weight: Tensor) -> LearnedStepMap:
        """The map for a weight of any shape."""
        return LearnedStepMap(weight, self.bits, check_channels(self.name, weight, self.dim))


class LearnedStepMap(QuantizedMap):
    """Weights on a grid of any step that reaches them: ``(X, s)`` to whole multiples of ``|s|``.

    Training may drive ``s`` below zero, where its absolute value counts, and the least step stands for smaller ones. The
    step has the weight's dtype; in float16 one below 6e-5 is a denormal, too coarse for many bits.

    The right inverse finds the step from the weight: its largest absolute value is ``k`` steps for one of the possible
    ``k``, and the largest step that fits is taken.
    """

    constraint = "every element a whole number of steps"

    def __init__(self, weight: Tensor, bits: int, dim: int | None) -> None:
        super().__init__(weight, bits, dim)
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        sharing = weight.numel() if dim is None else weight.numel() // weight.shape[dim]
        self.pace = 1 / math.sqrt(sharing * self.high)

    def forward(self, latent: Tensor, step: Tensor) -> Tensor:  # type: ignore[override]
        """The weight's shape and the step, a scalar or ``(1, ..., n, ..., 1)``; half precision is computed in float32."""
        size = self._size(widened(step))
        held = size.detach()
        size = held + self.pace * (size - held)
        # Clipped before it is divided: a quotient that overflows would have no gradient.
        unit = widened(latent).clamp(self.low * size, self.high * size) / size
        plain = unit.detach()
        return stored((plain.round() + (unit - plain)) * size, latent.dtype)

    def quantized(self, latent: Tensor, step: Tensor) -> Levels:  # type: ignore[override]
        """The levels of ``forward``."""
        size = self._size(step)
        return Levels((latent.clamp(self.low * size, self.high * size) / size).round(), size)

    def _size(self, step: Tensor) -> Tensor:
        return step.abs().clamp(min=least_step(step.dtype))

    def distance(self, weight: Tensor) -> Tensor:
        """How far the farthest element is off the grid that fits best, in steps, beyond what storing it rounds."""
        return self._fit(weight)[1].amax()

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight itself, and its step."""
        return weight.clone(), self._fit(weight)[0].to(weight.dtype)

    @torch.no_grad()
    def start(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and its step if it is in the image, else the weight and the step of the paper's start.

        Raises:
            ImageError: ``weight`` has another shape or is not finite.
        """
        self.require_finite(weight)
        return self.invert(weight) if self.contains(weight) else (weight.clone(), self._first(weight))

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The weight on the grid of the paper's start; unchanged if in the image."""
        self.require_finite(weight)
        return weight.clone() if self.contains(weight) else self.forward(weight, self._first(weight))

    def _first(self, weight: Tensor) -> Tensor:
        """``2 · mean|W| / √Qp``, 1 for zeros."""
        count = weight.numel() if self.dim is None else weight.numel() // weight.shape[self.dim]
        # Divided before it is summed, which cannot overflow.
        mean = (widened(weight).abs() / count).sum(self.over, keepdim=self.dim is not None)
        return torch.where(mean > 0, 2 * mean / math.sqrt(self.high), 1.0).to(weight.dtype)

    def _fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """For each step its size and misfit: the largest size that fits, or that of the least misfit on some elements.

        A few elements of each slice rule out nearly every ``k``, so that only the rest is compared whole.
        """
        wide, tol = widened(weight), self.tolerance(weight)
        rows = wide.reshape(1, -1) if self.dim is None else wide.movedim(self.dim, 0).flatten(1)
        largest = rows.abs().amax(1, keepdim=True)
        some = rows[:, :: -(-rows.shape[1] // _PROBES)]
        partial = torch.stack([self._off(some, largest / k, weight.dtype) for k in range(1, -self.low + 1)])
        best = partial.argmin(0)
        done = torch.zeros_like(best, dtype=torch.bool)
        for k, plausible in enumerate((partial <= tol).unbind()):
            left = (plausible & ~done).nonzero().squeeze(1)
            if len(left):
                fits = left[self._off(rows[left], largest[left] / (k + 1), weight.dtype) <= tol]
                best[fits], done[fits] = k, True
        size = largest / (best + 1).unsqueeze(1)
        misfit = self._off(rows, size, weight.dtype)
        size = torch.where(largest > 0, size, 1.0)
        shape = () if self.dim is None else [-1 if d == self.dim else 1 for d in range(weight.ndim)]
        return size.reshape(shape), misfit

    def _off(self, rows: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
        """The misfit of the worst element of each row."""
        size = self._size(size)
        levels = (rows.clamp(self.low * size, self.high * size) / size).round()
        return self.misfit(rows, levels * size, size, dtype).amax(1)

    def extra_repr(self) -> str:
        """The options."""
        return f"bits={self.bits}, dim={self.dim}"
