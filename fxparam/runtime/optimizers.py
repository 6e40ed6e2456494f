"""Optimizers that were built before the transform: pointed at the latents, or warned about."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxparam.errors import SpecError

Replaced = Sequence[tuple[Tensor, tuple[Tensor, ...]]]


def repoint(optimizer: Optimizer, replaced: Replaced) -> None:
    """Let an optimizer train the latents in place of the parameters they replace; state of the replaced ones is dropped.

    Args:
        optimizer: any optimizer of the given model's parameters.
        replaced: pairs of a parameter and the latents behind it now.

    Raises:
        SpecError: it holds none of the replaced parameters.
    """
    latents = {id(parameter): new for parameter, new in replaced}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if latents and held.isdisjoint(latents):
        raise SpecError("the optimizer holds none of the parameters that the spec replaces; build it from model.parameters()")
    seen: set[int] = set()
    for group in optimizer.param_groups:
        kept = []
        for parameter in group["params"]:
            new = latents.get(id(parameter), (parameter,))
            if id(parameter) in latents:
                optimizer.state.pop(parameter, None)
            # One latent may stand behind several parameters (joint declarations).
            kept += [tensor for tensor in new if not (id(tensor) in seen or seen.add(id(tensor)))]  # type: ignore[func-returns-value]
        group["params"] = [tensor for tensor in kept if isinstance(tensor, nn.Parameter)]


class _Watched:
    """The replaced parameters of one transformed model, held weakly."""

    def __init__(self, replaced: Replaced) -> None:
        self.pairs = [(weakref.ref(old), [weakref.ref(new) for new in latents]) for old, latents in replaced]
        self.warned = False


_WATCHED: weakref.WeakKeyDictionary[nn.Module, _Watched] = weakref.WeakKeyDictionary()
_HANDLES: list[Any] = []


def watch_replaced(model: nn.Module, replaced: Replaced) -> None:
    """Warn when an optimizer steps that holds parameters which no longer are in ``model``, while it is being trained."""
    if not _HANDLES:
        _HANDLES.append(register_optimizer_step_pre_hook(_before_step))
    if replaced:
        _WATCHED[model] = _Watched(replaced)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for watched in list(_WATCHED.values()):
        if watched.warned:
            continue
        lost = [
            old
            for ref, latents in watched.pairs
            if (old := ref()) is not None and id(old) in held and old.grad is None and _trained_elsewhere(latents, held)
        ]
        if lost:
            # The given model may well be trained on its own: then its parameters have gradients and nothing is lost.
            watched.warned = True
            warnings.warn(
                f"an optimizer holds {len(lost)} parameters that fxparam.transform replaced by latents, and steps without "
                "training the latents; build it from model.parameters() after the transform, or pass "
                "transform(..., optimizer=...)",
                RuntimeWarning,
                stacklevel=3,
            )


def _trained_elsewhere(latents: list[weakref.ref[Tensor]], held: set[int]) -> bool:
    """Whether a backward reached these latents and this optimizer does not hold them."""
    tensors = [tensor for ref in latents if (tensor := ref()) is not None]
    return any(tensor.grad is not None and id(tensor) not in held for tensor in tensors)
