"""All weights as one flat vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue.joint import JointEntry, JointMap, Weights, check_joint


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


class FlatMap(JointMap):
    """A vector to weights by splitting and reshaping.

    The latent has the widest dtype among the weights; each weight is cast back to its own.
    """

    def forward(self, latent: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """``(total,)`` to the weights."""
        return self.split(latent)

    @torch.no_grad()
    def right_inverse(self, weight: Weights) -> Tensor:
        """The concatenation of the weights.

        Raises:
            ImageError: the weights have other shapes or are not finite.
        """
        return self.joined(weight)
