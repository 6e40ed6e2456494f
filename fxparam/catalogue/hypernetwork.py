"""A small network that produces the weights.

Ha, Dai and Le 2017, *HyperNetworks*: weights from embeddings through a shared network. Produced in chunks, each with an
embedding of its own (von Oswald, Henning, Grewe and Sacramento 2020, *Continual Learning with Hypernetworks*, section 2), so
that the network can be smaller than what it makes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxparam.catalogue._hashing import LIMIT
from fxparam.catalogue._image import check_integer, stored, widened
from fxparam.catalogue._layers import place_seed
from fxparam.catalogue.joint import JointEntry, JointMap, Weights, check_joint
from fxparam.declaration import Place
from fxparam.errors import SpecError


@dataclass(frozen=True, repr=False)
class Hypernetwork(JointEntry):
    """``W = θ₀ + f(z)`` with a network ``f`` of its own and an embedding ``z`` for each chunk of the weights; both train.

    The last layer starts at zero, so that the weights start at what they were, bit for bit. ``f`` has affine layers with
    ``tanh`` between them. A network of your own goes through ``fxp.custom``: ``forward(z)`` returns the weights of a ``joint``
    rule as a tuple, and ``init`` gives the first ``z``.

    Args:
        dim: the size of an embedding.
        hidden: the sizes of the hidden layers; none of them gives an affine ``f``.
        chunk: how many elements an embedding stands for. By default about the square root of their number, which keeps
            embeddings and output layer small alike.
        seed: draws embeddings and hidden layers, from 0 to 2³² - 1. In a model, each rule and each weight gets its own: the
            seed becomes ``zlib.crc32(name, seed)`` with the name of the weight, of the first of several.

    Raises:
        SpecError: an option is out of range; at build, ``chunk`` exceeds the number of elements, or the weights are on several
            devices or not floating-point.
    """

    name: ClassVar[str] = "hypernetwork"
    dim: int = 8
    hidden: Sequence[int] = (64,)
    chunk: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self.name, "dim", self.dim, least=1)
        if not isinstance(self.hidden, list | tuple):
            raise SpecError(f"hypernetwork: got hidden={self.hidden!r}; expected the sizes of hidden layers, such as (64,)")
        for size in self.hidden:
            check_integer(self.name, "hidden", size, least=1)
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.chunk is not None:
            check_integer(self.name, "chunk", self.chunk, least=1)
        check_integer(self.name, "seed", self.seed, least=0)
        if self.seed >= LIMIT:
            raise SpecError(f"hypernetwork: got seed={self.seed}; expected an integer below 2**32")

    def placed(self, place: Place) -> Hypernetwork:
        """With the seed of this place."""
        return replace(self, seed=place_seed(self.seed, place))

    def build(self, weight: Tensor) -> HypernetworkMap:
        """The map for one weight: ``forward`` returns a tensor."""
        return self._map((weight,), single=True)

    def build_joint(self, weights: Sequence[Tensor]) -> HypernetworkMap:
        """The map for several weights, whose chunks run across their borders."""
        return self._map(tuple(weights), single=False)

    def _map(self, weights: tuple[Tensor, ...], *, single: bool) -> HypernetworkMap:
        check_joint(self.name, weights)
        total = sum(weight.numel() for weight in weights)
        if self.chunk is not None and self.chunk > total:
            raise SpecError(f"hypernetwork: got chunk={self.chunk} for {total} elements; expected 1 <= chunk <= {total}")
        return HypernetworkMap(weights, self, single=single)


class HypernetworkMap(JointMap):
    """``(chunks, dim)`` to ``θ₀ + f(z)``, where the chunks of ``f(z)`` follow each other and the last may be cut.

    The parameters ``weights`` and ``biases`` are those of ``f``, and the buffer ``origin`` is ``θ₀``, ``(total,)``; all have
    the widest dtype among the weights, and half precision is computed in float32.

    The right inverse moves ``origin``, as that of a trivialization moves its base: it returns the embeddings of the start and
    sets ``origin`` to what ``f`` misses there.
    """

    origin: Tensor

    def __init__(self, weights: Sequence[Tensor], entry: Hypernetwork, *, single: bool) -> None:
        super().__init__(weights, single=single)
        chunk = entry.chunk or math.isqrt(self.total - 1) + 1
        self.seed = entry.seed
        self.embeddings = (-(-self.total // chunk), entry.dim)
        sizes = (entry.dim, *entry.hidden, chunk)
        origin = torch.cat([weight.detach().flatten().to(self.widest) for weight in weights])
        drawn = [torch.randn(b, a, generator=self._generator(1 + at)) / a**0.5 for at, (a, b) in enumerate(pairwise(sizes))]
        drawn[-1].zero_()
        self.weights = nn.ParameterList(nn.Parameter(matrix.to(origin)) for matrix in drawn)
        self.biases = nn.ParameterList(nn.Parameter(origin.new_zeros(size)) for size in sizes[1:])
        self.register_buffer("origin", origin)

    def forward(self, latent: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """``(chunks, dim)`` to the weights."""
        return self.split(stored(widened(self.origin) + self._made(latent), self.origin.dtype))

    @torch.no_grad()
    def right_inverse(self, weight: Weights) -> Tensor:
        """The embeddings of the start; ``origin`` becomes what ``f`` misses there.

        Raises:
            ImageError: the weights have other shapes or are not finite.
        """
        vector = self.joined(weight)
        latent = torch.randn(self.embeddings, generator=self._generator(0)).to(vector)
        self.origin.copy_(widened(vector) - self._made(latent))
        return latent

    def _made(self, latent: Tensor) -> Tensor:
        x = widened(latent)
        for at, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.linear(x.tanh() if at else x, widened(weight), widened(bias))
        return x.flatten()[: self.total]

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + (stream << 32))

    def extra_repr(self) -> str:
        """The sizes."""
        chunks, dim = self.embeddings
        return f"chunks={chunks}, dim={dim}, total={self.total}"
