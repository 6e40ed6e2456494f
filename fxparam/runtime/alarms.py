"""Alarms for what would otherwise go wrong in silence: writes that are lost, latents that are not finite."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fxparam.errors import NonFiniteError
from fxparam.program import Site

_EVERY = 16
"""What is not finite stays so: after as many evaluations that looked, only one of this many does, if nothing but steps came
between. A look costs a few microseconds for each latent, and waits for a GPU.
"""


class Alarms:
    """What one runtime has found and warned of. The methods take the sites of the model as they are now."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def lost_writes(self, sites: Sequence[Site], names: Sequence[str]) -> None:
        """Warn of weights that somebody wrote in place."""
        for name in names:
            site = next((site for site in sites if name in site.names), None)
            if site is not None:
                behind = (
                    f"its latents: {', '.join(site.latents)}" if site.latents else f"what it reads: {', '.join(site.reads)}"
                )
                _warn(
                    f"{name} was written in place, and the write does not last: the weight is computed ({site.declaration}). "
                    f"Type model.assign({name!r}, value), or write to {behind}"
                )

    def due(self, evaluations: int) -> bool:
        """Whether to look although nothing but steps came before this evaluation."""
        return evaluations <= _EVERY or evaluations % _EVERY == 0

    def look(self, sites: Sequence[Site], names: Sequence[str], sources: Sequence[Tensor]) -> None:
        """Warn of sources that hold NaN or infinity, once until they are finite again.

        Args:
            sites: the sites of the model.
            names: the names of the sources.
            sources: the tensors behind the weights.
        """
        if not self._known and _all_finite(sources):
            return
        broken = [name for name, source in zip(names, sources, strict=True) if not _all_finite([source])]
        new, self._known = [name for name in broken if name not in self._known], set(broken)
        for name, source in zip(names, sources, strict=True):
            if name in new:
                _warn(f"{_describe(sites, name, source)}; so is what is computed from it")

    def explain(
        self, sites: Sequence[Site], error: Exception, names: Sequence[str], sources: Sequence[Tensor]
    ) -> NonFiniteError | None:
        """The error to raise where an evaluation failed because sources are not finite; None if that is not why.

        Args:
            sites: the sites of the model.
            error: what the evaluation raised.
            names: the names of the sources.
            sources: the tensors behind the weights.
        """
        broken = [_describe(sites, n, s) for n, s in zip(names, sources, strict=True) if not _all_finite([s])]
        if not broken:
            return None
        return NonFiniteError(f"computing the weights raised {type(error).__name__}: {error}; {'; '.join(broken)}")


def _describe(sites: Sequence[Site], name: str, source: Tensor) -> str:
    bad = int((~torch.isfinite(source.detach())).sum())
    home = name.rpartition(".")[0]
    site = next((site for site in sites if name in site.latents or site.home == home), None)
    where = f" of {', '.join(site.names[:3])} ({site.declaration})" if site is not None else ""
    return f"the latent {name}{where} holds NaN or infinity: {bad} of {source.numel()} elements"


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no floating-point tensor holds NaN or infinity."""
    floating = [t.detach() for t in tensors if t.numel() and (t.is_floating_point() or t.is_complex())]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in floating]
    if not real or any(t.is_meta for t in real):
        return True
    # The norm is the fastest reduction there is for many tensors at once; it may overflow where no element is infinite.
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(real))) or all(bool(torch.isfinite(t).all()) for t in real)


def _warn(text: str) -> None:
    """Warn at the line of the user's code that was on its way here."""
    frame, depth = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fxparam", "torch", "contextlib"):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(text, RuntimeWarning, stacklevel=depth)
