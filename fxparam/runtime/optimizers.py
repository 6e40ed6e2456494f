"""Optimizers that were built before the transform: pointed at the latents, or warned about."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxparam.errors import SpecError

Replaced = Sequence[tuple[Tensor, tuple[Tensor, ...], str]]
"""A parameter, the latents and parameters of maps behind its weight now, and the home of their site.

A latent that stays, with maps added behind it, is among what stands for it.
"""


def repoint(optimizer: Optimizer, replaced: Replaced) -> None:
    """Let an optimizer train the latents in place of the parameters they replace; state of the replaced ones is dropped.

    Args:
        optimizer: any optimizer of the given model's parameters.
        replaced: what the transform replaced, and by what.

    Raises:
        SpecError: it holds none of the replaced parameters.
    """
    latents = {id(parameter): new for parameter, new, _ in replaced}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if latents and held.isdisjoint(latents):
        raise SpecError("the optimizer holds none of the parameters that are replaced; build it from model.parameters()")
    seen: set[int] = set()
    for group in optimizer.param_groups:
        kept = []
        for parameter in group["params"]:
            new = latents.get(id(parameter), (parameter,))
            if all(tensor is not parameter for tensor in new):
                optimizer.state.pop(parameter, None)
            # One latent may stand behind several parameters (joint declarations).
            kept += [tensor for tensor in new if not (id(tensor) in seen or seen.add(id(tensor)))]  # type: ignore[func-returns-value]
        # In place: some optimizers (LBFGS) keep the very list.
        group["params"][:] = [tensor for tensor in kept if isinstance(tensor, nn.Parameter)]
    if hasattr(optimizer, "_numel_cache"):
        optimizer._numel_cache = None


@dataclass(frozen=True)
class _Old:
    """A replaced parameter, held in a way that neither keeps it alive nor stands in the way of ``swap_tensors``.

    Attributes:
        identity: its ``id``; may be used again after it is gone.
        storage: a weak reference to its storage.
        gradient: the ``id`` and version of the gradient it had at the transform.
        site: the home of the site that replaces it.
    """

    identity: int
    storage: StorageWeakRef
    gradient: tuple[int, int] | None
    site: str

    def is_untrained(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is the replaced one and got no gradient since the transform."""
        same = id(parameter) == self.identity and not self.storage.expired()
        return same and StorageWeakRef(parameter.untyped_storage()) == self.storage and _stamp(parameter) == self.gradient


class _Watched:
    """What a transformed model replaced."""

    def __init__(self, replaced: Replaced) -> None:
        self.olds = [
            _Old(id(old), StorageWeakRef(old.untyped_storage()), _stamp(old), home)
            for old, new, home in replaced
            if all(tensor is not old for tensor in new)
        ]
        self.warned = False


_WATCHED: weakref.WeakKeyDictionary[nn.Module, _Watched] = weakref.WeakKeyDictionary()
_HANDLES: list[Any] = []


def watch_replaced(model: nn.Module, replaced: Replaced) -> None:
    """Warn when an optimizer steps that holds parameters which no longer are in ``model``, while it is being trained."""
    if not _HANDLES:
        _HANDLES.append(register_optimizer_step_pre_hook(_before_step))
    if replaced:
        _WATCHED[model] = _Watched(replaced)


def _stamp(parameter: Tensor) -> tuple[int, int] | None:
    gradient = parameter.grad
    return None if gradient is None else (id(gradient), gradient._version)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    for model, watched in list(_WATCHED.items()):
        if watched.warned:
            continue
        # The given model may well be trained on its own: then its parameters get gradients and nothing is lost.
        lost = [
            old
            for old in watched.olds
            if old.identity in held and old.is_untrained(held[old.identity]) and _trained(model, old.site, held)
        ]
        if lost:
            watched.warned = True
            warnings.warn(
                f"an optimizer holds {len(lost)} parameters that fxparam.transform replaced by latents, and steps without "
                "training the latents; build it from model.parameters() after the transform, or pass "
                "transform(..., optimizer=...)",
                RuntimeWarning,
                stacklevel=3,
            )


def _trained(model: nn.Module, home: str, held: Mapping[int, Tensor]) -> bool:
    """Whether a backward reached the latents of a site and the optimizer does not hold them."""
    return any(latent.grad is not None and id(latent) not in held for latent in model.get_submodule(home).parameters())
