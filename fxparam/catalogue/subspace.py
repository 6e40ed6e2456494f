"""One short vector behind one weight or many, and all weights as one flat vector.

``W = E d + θ₀`` (Li, Farkhoor, Liu and Yosinski 2018, *Measuring the Intrinsic Dimension of Objective Landscapes*):
only ``d`` trains, ``E`` is a fixed random matrix and ``θ₀`` the weights at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    check_choice,
    check_filled,
    check_floating,
    check_integer,
    computing_dtype,
    rounding,
    stored,
    widened,
)
from fxparam.catalogue.joint import JointEntry
from fxparam.declaration import Parametrization
from fxparam.errors import ImageError, SpecError

Weights = Tensor | Sequence[Tensor]
"""One weight as a tensor, several as a sequence."""


@dataclass(frozen=True, repr=False)
class Subspace(JointEntry):
    """``W = E d + θ₀``: a random affine subspace of ``dim`` dimensions through the weights at the start.

    Args:
        dim: the size of the latent ``d``, from 1 to the number of elements of all weights.
        projection: the kind of ``E``: ``"dense"``, a Gaussian matrix whose columns have norm 1, so that a step in ``d``
            is a step of nearly the same length in the weights.
        seed: draws ``E``; the same on every device and for every dtype, up to rounding.

    Raises:
        SpecError: an option is out of range; at build, there are fewer elements than ``dim``, or the weights are on
            several devices or not floating-point.
    """

    name: ClassVar[str] = "subspace"
    dim: int
    projection: str = "dense"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self.name, "dim", self.dim, least=1)
        check_choice(self.name, "projection", self.projection, ("dense",))
        check_integer(self.name, "seed", self.seed)

    def build(self, weight: Tensor) -> SubspaceMap:
        """The map for one weight: ``forward`` returns a tensor."""
        return self._map((weight,), single=True)

    def build_joint(self, weights: Sequence[Tensor]) -> SubspaceMap:
        """The map for several weights, with one ``E`` over their concatenation."""
        return self._map(tuple(weights), single=False)

    def _map(self, weights: tuple[Tensor, ...], *, single: bool) -> SubspaceMap:
        check_joint(self.name, weights)
        total = sum(weight.numel() for weight in weights)
        if self.dim > total:
            raise SpecError(f"subspace: got dim={self.dim} for {total} elements; expected 1 <= dim <= {total}")
        return SubspaceMap(weights, self.dim, self.seed, single=single)


@dataclass(frozen=True, repr=False)
class Flat(JointEntry):
    """The weights as one flat vector, in their order: what optimizers over a single vector and hypernetworks want.

    Raises:
        SpecError: at build, the weights are on several devices or not floating-point.
    """

    name: ClassVar[str] = "flat"

    def build(self, weight: Tensor) -> FlatMap:
        """The map for one weight: ``forward`` returns a tensor."""
        check_joint(self.name, (weight,))
        return FlatMap((weight,), single=True)

    def build_joint(self, weights: Sequence[Tensor]) -> FlatMap:
        """The map for several weights."""
        check_joint(self.name, weights)
        return FlatMap(tuple(weights), single=False)


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


class FlatMap(Parametrization):
    """A vector to weights by splitting and reshaping.

    The latent has the widest dtype among the weights; each weight is cast back to its own.
    """

    def __init__(self, weights: Sequence[Tensor], *, single: bool) -> None:
        super().__init__()
        self.single = single
        self.shapes = tuple(weight.shape for weight in weights)
        # Empty tensors remember each weight's dtype and device through .to() and pickling, outside the state dict.
        for number, weight in enumerate(weights):
            self.register_buffer(f"_like{number}", weight.detach().new_empty(0), persistent=False)

    def forward(self, latent: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """``(total,)`` to the weights."""
        return self._split(latent)

    @torch.no_grad()
    def contains(self, weight: Weights, tol: float | None = None) -> bool:
        """Whether the weights have the right shapes and are finite."""
        tensors = self._tensors(weight)
        return [t.shape for t in tensors] == list(self.shapes) and all(bool(t.isfinite().all()) for t in tensors)

    @torch.no_grad()
    def right_inverse(self, weight: Weights) -> Tensor:
        """The concatenation of the weights.

        Raises:
            ImageError: the weights have other shapes or are not finite.
        """
        return self._joined(weight)

    @torch.no_grad()
    def project(self, weight: Weights) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """The weights themselves, in the dtypes of this map."""
        return self._split(self._joined(weight))

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self, *, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Weights of independent standard normal elements."""
        return self._split(self._normal(sum(shape.numel() for shape in self.shapes), generator))

    def _likes(self) -> tuple[Tensor, ...]:
        return tuple(self.get_buffer(f"_like{number}") for number in range(len(self.shapes)))

    def _widest(self) -> torch.dtype:
        return reduce(torch.promote_types, (like.dtype for like in self._likes()))

    def _normal(self, size: int, generator: torch.Generator | None) -> Tensor:
        like = self._likes()[0]
        device = like.device if generator is None else generator.device
        dtype = computing_dtype(self._widest())
        drawn = torch.randn(size, generator=generator, dtype=dtype, device=device)
        return drawn.to(like.device, self._widest())

    def _tensors(self, weights: Weights) -> tuple[Tensor, ...]:
        return (weights,) if isinstance(weights, Tensor) else tuple(weights)

    def _split(self, vector: Tensor) -> Tensor | tuple[Tensor, ...]:
        """A vector as the weights, each in its dtype."""
        parts = vector.split([shape.numel() for shape in self.shapes])
        tensors = tuple(
            stored(part.reshape(shape), like.dtype) for part, shape, like in zip(parts, self.shapes, self._likes(), strict=True)
        )
        return tensors[0] if self.single else tensors

    def _joined(self, weights: Weights) -> Tensor:
        """The weights as a vector of the widest dtype, after the checks every right inverse does."""
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
        return torch.cat([t.detach().flatten().to(self._widest()) for t in tensors])


class SubspaceMap(FlatMap):
    """``W = E d + θ₀``.

    ``origin`` is ``θ₀``, ``(total,)``, and ``basis`` is ``E``, ``(total, dim)``, both in the widest dtype among the
    weights, like the latent ``d``; each weight is cast back to its own dtype. Where ``d`` is zero, the weights are the
    start's bit for bit.
    """

    origin: Tensor
    basis: Tensor

    def __init__(self, weights: Sequence[Tensor], dim: int, seed: int, *, single: bool) -> None:
        super().__init__(weights, single=single)
        origin = torch.cat([weight.detach().flatten().to(self._widest()) for weight in weights])
        self.register_buffer("origin", origin)
        self.register_buffer("basis", _dense(len(origin), dim, seed).to(origin))

    def forward(self, latent: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """``(dim,)`` to the weights."""
        offset = widened(self.basis) @ widened(latent)
        return self._split(stored(widened(self.origin) + offset, self.origin.dtype))

    @torch.no_grad()
    def contains(self, weight: Weights, tol: float | None = None) -> bool:
        """Whether the weights have the right shapes, are finite and at most ``tol`` away from the subspace."""
        if not super().contains(weight):
            return False
        return self._solve(weight)[1] <= (self._tolerance() if tol is None else tol)

    @torch.no_grad()
    def right_inverse(self, weight: Weights) -> Tensor:
        """The least-squares solution of ``E d = W - θ₀``.

        Raises:
            ImageError: the weights have other shapes, are not finite, or are not in the subspace.
        """
        latent, distance = self._solve(weight)
        # Written so that a distance of NaN is refused.
        if not distance <= self._tolerance():
            raise ImageError(
                f"{type(self).__name__}: weights of {len(self.origin)} elements are not in the image: the subspace of "
                f"{self.basis.shape[1]} dimensions is missed by {distance:.3g} (relative to the weights), tolerance "
                f"{self._tolerance():.3g}; type model.assign(name, weight, project=True) to start from the projection"
            )
        return latent

    @torch.no_grad()
    def project(self, weight: Weights) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """The nearest weights in the subspace."""
        return self.forward(self._solve(weight)[0])

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self, *, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """``E d + θ₀`` with ``d`` of independent standard normal elements."""
        return self.forward(self._normal(self.basis.shape[1], generator))

    def _solve(self, weights: Weights) -> tuple[Tensor, float]:
        """The least-squares latent and the largest element of what it misses, over the largest element there is."""
        vector = widened(self._joined(weights))
        basis, origin = widened(self.basis), widened(self.origin)
        latent = torch.linalg.lstsq(basis, (vector - origin).unsqueeze(-1)).solution.squeeze(-1)
        gap = (vector - origin - basis @ latent).abs().amax()
        largest = torch.maximum(vector.abs().amax(), origin.abs().amax())
        return latent.to(self.origin.dtype), float(gap / largest) if gap else 0.0

    def _tolerance(self) -> float:
        """Rounding of the products, and of the narrowest weight."""
        return max(rounding(like.dtype, self.basis.shape[1]) for like in self._likes())

    def extra_repr(self) -> str:
        """The sizes."""
        return f"dim={self.basis.shape[1]}, total={len(self.origin)}"


def _dense(total: int, dim: int, seed: int) -> Tensor:
    """A Gaussian matrix ``(total, dim)`` with columns of norm 1, drawn in float32 on the CPU."""
    drawn = torch.randn(total, dim, generator=torch.Generator().manual_seed(seed))
    return drawn / torch.linalg.vector_norm(drawn, dim=0)
