"""Entries that can yield several weights at once, for rules that start with ``fxp.joint(...)``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from fxparam.declaration import Entry


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
