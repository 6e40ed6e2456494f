"""Checkpoints of other forms: plain weights and legacy names become latents while a state dict is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fxparam.errors import ImageError
from fxparam.program import Site


class Checkpoints:
    """A pre-hook of ``load_state_dict`` that rewrites the keys it is given.

    Args:
        sites: the sites of the model.
        legacy: names that checkpoints of the old hooks use -> the model's names.
    """

    def __init__(self, sites: Sequence[Site], legacy: Mapping[str, str]) -> None:
        self.sites, self.legacy = tuple(sites), dict(legacy)

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Rename legacy keys, and send plain weights through the right inverse of their site."""
        for old, new in self.legacy.items():
            if prefix + old in state and prefix + new not in state:
                state[prefix + new] = state.pop(prefix + old)
        for site in self.sites:
            self._from_plain(module, site, state, prefix)

    def _from_plain(self, module: nn.Module, site: Site, state: dict[str, Any], prefix: str) -> None:
        given = [next((prefix + name for name in names if prefix + name in state), None) for names in site.aliases]
        if None in given or any(prefix + name in state for name in site.latents):
            return
        weights: list[Tensor] = [state[name] for name in given]  # type: ignore[index]
        for names in site.aliases:
            for name in names:
                state.pop(prefix + name, None)
        if not site.latents:
            return
        home: Any = module.get_submodule(site.home)
        like = home.latents[0]
        moved = tuple(weight.detach().to(like.device) for weight in weights)
        try:
            latents = home.right_inverse(moved if len(moved) > 1 else moved[0])
        except ImageError as error:
            raise ImageError(
                f"the checkpoint holds the plain weight {', '.join(site.names)}, which {site.declaration} cannot "
                f"produce: {error}"
            ) from error
        state |= {prefix + name: latent for name, latent in zip(site.latents, latents, strict=True)}
        # The maps keep the buffers they have: a plain checkpoint knows nothing of them.
        for name, value in home.state_dict().items():
            state.setdefault(f"{prefix}{site.home}.{name}", value)
