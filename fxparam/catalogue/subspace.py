"""One short vector behind one weight or many.

``W = E d + θ₀`` (Li, Farkhoor, Liu and Yosinski 2018, *Measuring the Intrinsic Dimension of Objective Landscapes*):
only ``d`` trains, ``E`` is a fixed random matrix and ``θ₀`` the weights at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._hashing import LIMIT
from fxparam.catalogue._image import check_choice, check_integer, stored, widened
from fxparam.catalogue._layers import place_seed
from fxparam.catalogue._projections import KINDS, Projection, make_projection
from fxparam.catalogue.joint import JointEntry, SpannedMap, check_joint
from fxparam.declaration import Place
from fxparam.errors import SpecError

_NONZEROS = 2


@dataclass(frozen=True, repr=False)
class Subspace(JointEntry):
    """``W = E d + θ₀``: a random affine subspace of ``dim`` dimensions through the weights at the start.

    Columns of ``E`` have norm 1 or about 1 and are nearly orthogonal, so that a step in ``d`` is a step of nearly the same
    length in the weights, whatever the projection. ``E`` is in no state dict; its seed is.

    Args:
        dim: the size of the latent ``d``, from 1 to the number of elements of all weights.
        projection: the kind of ``E``. ``"dense"``, a Gaussian matrix: ``elements · dim`` numbers in memory, for small ones.
            ``"fastfood"``, products with Walsh-Hadamard matrices: nothing is stored, time grows as ``elements · log(dim)``.
            ``"sparse"``, a few nonzeros in each row: nothing is stored, time grows as ``elements · nonzeros``.
        seed: draws ``E``, from 0 to 2³² - 1; the same on every device and for every dtype, up to rounding. In a model, each
            rule and each weight gets an ``E`` of its own: the seed becomes ``zlib.crc32(name, seed)`` with the name of the
            weight, of the first of several.
        nonzeros: of each row of a sparse ``E``; ``dim`` if that is less. By default 2, about as many as Li et al. take.

    Raises:
        SpecError: an option is out of range; at build, there are fewer elements than ``dim``, or the weights are on
            several devices or not floating-point.
    """

    name: ClassVar[str] = "subspace"
    dim: int
    projection: str = "dense"
    seed: int = 0
    nonzeros: int | None = None

    def __post_init__(self) -> None:
        check_integer(self.name, "dim", self.dim, least=1)
        check_choice(self.name, "projection", self.projection, KINDS)
        check_integer(self.name, "seed", self.seed, least=0)
        if self.seed >= LIMIT:
            raise SpecError(f"subspace: got seed={self.seed}; expected an integer below 2**32")
        if self.nonzeros is not None:
            check_integer(self.name, "nonzeros", self.nonzeros, least=1)
            if self.projection != "sparse":
                raise SpecError(
                    f"subspace: got nonzeros={self.nonzeros} with projection={self.projection!r}; type projection='sparse'"
                )

    def placed(self, place: Place) -> Subspace:
        """With the seed of this place."""
        return replace(self, seed=place_seed(self.seed, place))

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
        return SubspaceMap(weights, self, single=single)


class SubspaceMap(SpannedMap):
    """``W = E d + θ₀``.

    The buffer ``origin`` is ``θ₀``, ``(total,)`` in the widest dtype among the weights, like the latent ``d``; each weight is
    cast back to its own dtype. Where ``d`` is zero, the weights are the start's bit for bit. ``projection`` is ``E``; only its
    seed is in the state dict, as ``dense.seed``, ``sparse2.seed`` (with the nonzeros) or ``fastfood.seed``. A checkpoint brings
    its own projection: the seed in it counts, not the one this map was built with.

    The right inverse is computed in float64, by decomposition of small ``E`` and by conjugate gradients for large ones.
    """

    origin: Tensor

    def __init__(self, weights: Sequence[Tensor], entry: Subspace, *, single: bool) -> None:
        super().__init__(weights, single=single)
        self.register_buffer("origin", torch.cat([weight.detach().flatten().to(self.widest) for weight in weights]))
        made = make_projection(
            entry.projection,
            self.total,
            entry.dim,
            entry.seed,
            nonzeros=entry.nonzeros or _NONZEROS,
            device=self.origin.device,
            dtype=self.origin.dtype,
        )
        self.label = made.label
        self.add_module(made.label, made)
        self.span = f"the subspace of {entry.dim} dimensions"
        self.depth = made.depth

    @property
    def projection(self) -> Projection:
        """``E`` as a module that multiplies."""
        return self.get_submodule(self.label)  # type: ignore[return-value]

    def forward(self, latent: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """``(dim,)`` to the weights."""
        return self.split(stored(widened(self.origin) + self.projection(widened(latent)), self.origin.dtype))

    def solve(self, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest point of the subspace."""
        origin = self.origin.double()
        if torch.equal(vector, origin):
            # The start: nothing to solve, and memory to save.
            return vector.new_zeros(self.projection.dim), vector, origin.abs().amax()
        latent = self.projection.nearest(vector - origin)
        return latent, origin + self.projection(latent), origin.abs().amax()

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self, *, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """``E d + θ₀`` with ``d`` of independent standard normal elements."""
        return self.forward(self.normal(self.projection.dim, generator))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"dim={self.projection.dim}, total={self.total}"
