"""Checkpoints of other forms: plain weights and legacy names become latents while a state dict is loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxparam.errors import ImageError
from fxparam.program import Site
from fxparam.tracer.looking import present_values


class Checkpoints:
    """Translates state dicts of other forms into those of one model.

    Args:
        root: the live module tree.
        sites: its sites.
        legacy: names that checkpoints of the old hooks use -> the model's names.
    """

    def __init__(self, root: nn.Module, sites: Sequence[Site], legacy: Mapping[str, str]) -> None:
        self.root, self.sites, self.legacy = root, tuple(sites), dict(legacy)

    def translated(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state dict with the model's own names; the given one if there is nothing to translate."""
        plain = any(name in state for site in self.sites for aliases in site.aliases for name in aliases)
        if not plain and self.legacy.keys().isdisjoint(state):
            return state
        copy = OrderedDict(state)
        if hasattr(state, "_metadata"):
            copy._metadata = state._metadata  # type: ignore[attr-defined]
        self.translate(copy, "")
        return copy

    def translate(self, state: dict[str, Any], prefix: str) -> None:
        """Rename legacy keys, and send plain weights through the right inverse of their site, in place.

        Raises:
            ImageError: a plain weight is not in the image of its parametrization.
        """
        for old, new in self.legacy.items():
            if prefix + old in state and prefix + new not in state:
                state[prefix + new] = state.pop(prefix + old)
        for site in self.sites:
            self._from_plain(site, state, prefix)

    def _from_plain(self, site: Site, state: dict[str, Any], prefix: str) -> None:
        given = [next((prefix + name for name in names if prefix + name in state), None) for names in site.aliases]
        if None in given or any(prefix + name in state for name in site.latents):
            return
        weights: list[Tensor] = [state[name] for name in given if name is not None]
        for names in site.aliases:
            for name in names:
                state.pop(prefix + name, None)
        if not site.latents:
            self._compare(site, weights, state, prefix)
            return
        home: Any = self.root.get_submodule(site.home)
        moved = tuple(weight.detach().to(home.latents[0].device) for weight in weights)
        try:
            latents = home.right_inverse(moved if len(moved) > 1 else moved[0])
        except ImageError as error:
            weight = ", ".join(site.names)
            raise ImageError(
                f"the checkpoint holds the plain weight {weight}, which {site.declaration} cannot produce: {error}"
            ) from error
        state |= {prefix + name: latent for name, latent in zip(site.latents, latents, strict=True)}
        # The maps keep the buffers they have: a plain checkpoint knows nothing of them.
        for name, value in home.state_dict().items():
            state.setdefault(f"{prefix}{site.home}.{name}", value)

    def _compare(self, site: Site, weights: Sequence[Tensor], state: Mapping[str, Any], prefix: str) -> None:
        """A weight that is computed from others must be what a plain checkpoint says it is, where that can be told."""
        if not all(prefix + name in state for name in site.reads):
            return
        home: Any = self.root.get_submodule(site.home)
        for weight, value in zip(weights, present_values(home, [state[prefix + name] for name in site.reads]), strict=True):
            if not torch.allclose(value, weight.to(value), rtol=1e-4, atol=1e-6):
                raise ImageError(
                    f"the checkpoint holds {', '.join(site.names)}, which is computed from {', '.join(site.reads)} here "
                    f"({site.declaration}), with another value; load it into the plain model"
                )
