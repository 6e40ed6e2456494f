"""Entries that can yield several weights at once, for rules that start with ``fxp.joint(...)``, and what their maps share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from fxparam.catalogue._image import check_filled, check_floating, computing_dtype, rounding, stored
from fxparam.declaration import Entry, Latents, Parametrization
from fxparam.errors import ImageError, SpecError

Weights = Tensor | Sequence[Tensor]
"""One weight as a tensor, several as a sequence."""


class JointEntry(Entry):
    """A catalogue entry that also takes several weights: one latent behind all of them.

    ``build(weight)`` is the case of one weight, whose ``forward`` returns a tensor and whose ``right_inverse`` takes
    one.
    """

    @abstractmethod
    def build_joint(self, weights: Sequence[Tensor]) -> nn.Module:
        """A map whose ``forward(latent)`` returns a tuple of tensors shaped like ``weights``, in their order.

        Its ``right_inverse`` takes a sequence of weights and returns the latent.

        Raises:
            SpecError: there are no weights, they are on several devices, or the options do not fit them.
        """


def check_joint(name: str, weights: Sequence[Tensor]) -> None:
    """Refuse no weights, weights on several devices, and weights that are not floating-point."""
    if not weights:
        raise SpecError(f"{name}: got no weights; expected at least one")
    for weight in weights:
        check_floating(name, weight)
        check_filled(name, weight)
    devices = sorted({str(weight.device) for weight in weights})
    if len(devices) > 1:
        raise SpecError(
            f"{name}: got weights on {len(devices)} devices ({', '.join(devices)}); expected one device, for they "
            "share one latent; move the model to one device first, or use a rule for each device"
        )


class JointMap(Parametrization):
    """A map to one weight or several that can make all finite ones; it computes them as one flat vector.

    The vector and the latent have the widest dtype among the weights; each weight is cast back to its own.

    Args:
        weights: what the map is for.
        single: whether it yields a tensor instead of a tuple.
    """

    def __init__(self, weights: Sequence[Tensor], *, single: bool) -> None:
        super().__init__()
        self.single = single
        self.shapes = tuple(weight.shape for weight in weights)
        self.total = sum(shape.numel() for shape in self.shapes)
        # Empty tensors remember each weight's dtype and device through .to() and pickling, outside the state dict.
        for number, weight in enumerate(weights):
            self.register_buffer(f"_like{number}", weight.detach().new_empty(0), persistent=False)

    @torch.no_grad()
    def contains(self, weight: Weights, tol: float | None = None) -> bool:
        """Whether the weights have the right shapes and are finite."""
        tensors = self._tensors(weight)
        return [t.shape for t in tensors] == list(self.shapes) and all(bool(t.isfinite().all()) for t in tensors)

    @torch.no_grad()
    def project(self, weight: Weights) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """The weights themselves, in the dtypes of this map."""
        return self.split(self.joined(weight))

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self, *, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Weights of independent standard normal elements."""
        return self.split(self.normal(self.total, generator))

    def split(self, vector: Tensor) -> Tensor | tuple[Tensor, ...]:
        """A vector ``(total,)`` as the weights, each in its dtype."""
        parts = vector.split([shape.numel() for shape in self.shapes])
        tensors = tuple(
            stored(part.reshape(shape), like.dtype) for part, shape, like in zip(parts, self.shapes, self._likes(), strict=True)
        )
        return tensors[0] if self.single else tensors

    def joined(self, weights: Weights) -> Tensor:
        """The weights as a vector ``(total,)`` of the widest dtype, in memory of its own.

        Raises:
            ImageError: they have other shapes or are not finite.
        """
        tensors = self._tensors(weights)
        name = type(self).__name__
        if [t.shape for t in tensors] != list(self.shapes):
            got, expected = ([tuple(shape) for shape in shapes] for shapes in ([t.shape for t in tensors], self.shapes))
            raise ImageError(f"{name}: got weights of shapes {got}; expected {expected}")
        bad = sum(int((~t.isfinite()).sum()) for t in tensors)
        if bad:
            raise ImageError(
                f"{name}: {bad} elements of the weights are NaN or infinite (infinitely far from the image, tolerance "
                "0), and have no projection; repair the weights first"
            )
        return torch.cat([t.detach().flatten().to(self.widest) for t in tensors])

    @property
    def widest(self) -> torch.dtype:
        """The widest dtype among the weights."""
        return reduce(torch.promote_types, (like.dtype for like in self._likes()))

    def rounding(self, size: int) -> float:
        """The error to expect of sums of ``size`` terms, in the narrowest weight."""
        return max(rounding(like.dtype, size) for like in self._likes())

    def normal(self, size: int, generator: torch.Generator | None) -> Tensor:
        """``(size,)`` standard normal numbers of the widest dtype."""
        like = self._likes()[0]
        device = like.device if generator is None else generator.device
        dtype = computing_dtype(self.widest)
        drawn = torch.randn(size, generator=generator, dtype=dtype, device=device)
        return drawn.to(like.device, self.widest)

    def _likes(self) -> tuple[Tensor, ...]:
        return tuple(self.get_buffer(f"_like{number}") for number in range(len(self.shapes)))

    def _tensors(self, weights: Weights) -> tuple[Tensor, ...]:
        return (weights,) if isinstance(weights, Tensor) else tuple(weights)


class SpannedMap(JointMap):
    """A joint map whose weights fill only a part of their space: right inverses are least squares.

    Subclasses give ``forward``, ``span``, ``depth`` and ``solve``.
    """

    span: str
    """What the weights lie in, as errors say it."""

    depth: int
    """Of how many roundings an element of the weights consists."""

    @abstractmethod
    def solve(self, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The latent whose weights are nearest to ``vector``, these weights, and the largest number among their terms.

        All in float64; the first is ``(size of the latent,)``, the second ``(total,)``, the last ``()``.
        """

    @torch.no_grad()
    def contains(self, weight: Weights, tol: float | None = None) -> bool:
        """Whether the weights have the right shapes, are finite and at most ``tol`` away from the image."""
        if not super().contains(weight):
            return False
        return self._solved(self.joined(weight))[1] <= (self.rounding(self.depth) if tol is None else tol)

    @torch.no_grad()
    def right_inverse(self, weight: Weights) -> Latents:
        """The least-squares solution.

        Raises:
            ImageError: the weights have other shapes, are not finite, or are not in the image.
        """
        latent, distance = self._solved(self.joined(weight))
        tolerance = self.rounding(self.depth)
        # Written so that a distance of NaN is refused.
        if not distance <= tolerance:
            raise ImageError(
                f"{type(self).__name__}: weights of {self.total} elements are not in the image: {self.span} is missed by "
                f"{distance:.3g} (relative to the weights), tolerance {tolerance:.3g}; type model.assign(name, weight, "
                "project=True) to start from the projection"
            )
        return latent

    @torch.no_grad()
    def project(self, weight: Weights) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """The nearest weights in the image; unchanged if in the image."""
        vector = self.joined(weight)
        latent, distance = self._solved(vector)
        return self.split(vector) if distance <= self.rounding(self.depth) else self.forward(latent)

    def _solved(self, vector: Tensor) -> tuple[Tensor, float]:
        """The latent in its dtype, and the largest element of what it misses, over the largest term there is."""
        wide = vector.double()
        latent, image, largest = self.solve(wide)
        gap = (wide - image).abs().amax()
        scale = torch.maximum(largest, wide.abs().amax())
        return latent.to(vector.dtype), float(gap / scale) if gap != 0 else 0.0
