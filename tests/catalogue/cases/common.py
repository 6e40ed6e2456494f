"""What a case of the catalogue is: an entry, a shape, and the same map written down plainly as its oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxparam.declaration import Entry

Oracle = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One entry on one shape.

    Attributes:
        entry: the declaration.
        shape: the weight's shape.
        oracle: ``(module, *latents) -> weight``, written independently of the catalogue.
        outside: turns a weight in the image into one that is not; None where every finite weight is in the image.
        latents: the shapes of the latents, if not one of the weight's shape.
        exact: whether the right inverse gives the weight back bit for bit.
        invertible: whether there is a right inverse at all.
        growth: by how much rounding may grow with latents of size 1000.
        nodes: how many operations a trace may have; 0: none, for the weight is a latent.
        kept: whether the projection leaves weights in the image as they are bit for bit.
        gradient: why finite differences do not give the gradient; only the oracle then does.
        second: why the second derivative is not that of finite differences.
        extremes: kinds of extreme latents (``EXTREMES``) for which the weight is not promised to be finite and in the image
            (``"huge"``), or only the gradient not to be finite (``"huge gradient"``), and the reason, as documented.
        adjust: turns random latents into such as training has (a step size is positive).
        complex: whether complex weights are taken as well; the oracle holds for them, too.
    """

    entry: Entry
    shape: tuple[int, ...]
    oracle: Oracle
    outside: Callable[[Tensor], Tensor] | None = None
    latents: tuple[tuple[int, ...], ...] = ()
    exact: bool = False
    invertible: bool = True
    growth: float = 1.0
    nodes: int = 12
    kept: bool = True
    gradient: str = ""
    second: str = ""
    extremes: Mapping[str, str] = field(default_factory=dict)
    adjust: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    complex: bool = False

    def __str__(self) -> str:
        return f"{self.entry!r}-{'x'.join(map(str, self.shape))}"

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """The module for a random weight, in eval mode (in which nothing writes buffers)."""
        return self.entry.build(self.weight(dtype, seed)).eval()

    def weight(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """A random weight, as a layer would have it before."""
        return _random(self.shape, torch.Generator().manual_seed(seed), dtype)

    def draw(self, seed: int = 1, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Random latents, leaves that require gradients."""
        generator = torch.Generator().manual_seed(seed)
        drawn = tuple(_random(shape, generator, dtype) * scale for shape in self.latent_shapes)
        drawn = drawn if self.adjust is None else self.adjust(drawn)
        return tuple(tensor.to(dtype).requires_grad_() for tensor in drawn)

    def extreme(self, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Latents of one of the kinds of ``EXTREMES``, leaves that require gradients."""
        made = tuple(EXTREMES[kind](shape, dtype) for shape in self.latent_shapes)
        made = made if self.adjust is None else self.adjust(made)
        return tuple(tensor.to(dtype).requires_grad_() for tensor in made)

    @property
    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all latents."""
        return self.latents or (self.shape,)


def _random(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def _scattered(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    return (drawn * size).to(dtype)


def _identity(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if len(shape) < 2:
        return torch.ones(shape, dtype=dtype)
    return torch.eye(*shape[-2:], dtype=dtype).expand(shape).clone()


EXTREMES: Mapping[str, Callable[[tuple[int, ...], torch.dtype], Tensor]] = {
    "zero": lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    "denormal": lambda shape, dtype: _scattered(shape, dtype, torch.finfo(dtype).tiny / 64),
    "tiny": lambda shape, dtype: _scattered(shape, dtype, torch.finfo(dtype).tiny ** 0.6),
    "huge": lambda shape, dtype: _scattered(shape, dtype, torch.finfo(dtype).max ** 0.6),
    "equal": lambda shape, dtype: torch.ones(shape, dtype=dtype),
    "identity": _identity,
}
"""Latents at which maps break: their squares overflow or underflow, or singular values are repeated."""


def bump(weight: Tensor) -> Tensor:
    """One element off."""
    bumped = weight.clone()
    bumped[(0,) * weight.ndim] += 0.5
    return bumped


def crossed(weight: Tensor) -> Tensor:
    """An element off the diagonal, on one side only."""
    bumped = weight.clone()
    bumped[..., 0, 1] += 0.5
    return bumped
