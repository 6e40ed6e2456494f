"""Changes of base: after every so many optimizer steps, the maps that declare it start anew at their present weight.

A map declares it by an attribute ``rebase_every``, a buffer ``steps`` that counts, and a method ``rebase(*latents)``, which
moves what the latents say into its buffers and returns latents that stand for the same weight (Lezcano-Casado 2019,
*Trivializations for Gradient-Based Optimization on Manifolds*, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fxparam.tracer.site import SiteModule


class Rebasing:
    """Counts the optimizer steps of the sites whose map changes its base.

    Args:
        homes: the sites of a model.
    """

    def __init__(self, homes: Iterable[SiteModule]) -> None:
        self._homes = [home for home in homes if rebase_interval(home) is not None]

    def after_step(self, held: frozenset[int]) -> None:
        """An optimizer stepped that holds the tensors with these ids."""
        for home in self._homes:
            every, first = rebase_interval(home), next(iter(home))
            if every is None or held.isdisjoint(map(id, home.latents)):
                continue
            steps = first.get_buffer("steps")
            steps.add_(1)
            if int(steps) % every == 0:
                _rebase(home)


def rebase_interval(home: SiteModule) -> int | None:
    """After how many optimizer steps the base of a site is changed; None: never."""
    first: Any = next(iter(home), None)
    every = getattr(first, "rebase_every", None)
    # Maps of other libraries may have an attribute of that name for something else.
    return every if isinstance(every, int) and hasattr(first, "rebase") else None


@torch.no_grad()
def _rebase(home: SiteModule) -> None:
    first: Any = next(iter(home))
    latents = first.rebase(*home.latents)
    home.set_latents(latents if isinstance(latents, tuple) else (latents,))
