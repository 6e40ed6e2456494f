"""Optimizer steps as a sign that latents changed: fused optimizers write parameters without moving their version."""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Stepped(Protocol):
    """What wants to know of steps."""

    def before_step(self, held: frozenset[int]) -> None:
        """An optimizer is about to step that holds the tensors with these ids. May raise, and so stop it."""

    def known(self, held: frozenset[int]) -> frozenset[int]:
        """Which of these ids belong to tensors of this listener."""

    def after_step(self, held: frozenset[int], *, unknown: bool) -> None:
        """An optimizer stepped that holds the tensors with these ids; some of which, perhaps, nobody here knows."""

    def after_fork(self) -> None:
        """This process is a forked child."""


_LISTENERS: weakref.WeakSet[Any] = weakref.WeakSet()


def listen(listener: Stepped) -> None:
    """Tell ``listener`` of every optimizer step from now on, until it is collected."""
    if not _LISTENERS:
        _installed()
    _LISTENERS.add(listener)


_HANDLES: list[Any] = []
_STRANGERS: weakref.WeakKeyDictionary[Optimizer, tuple[Any, bool]] = weakref.WeakKeyDictionary()
"""Whether an optimizer holds tensors that no listener knows."""


def _installed() -> None:
    if not _HANDLES:
        _HANDLES.append(register_optimizer_step_pre_hook(_before_step))
        _HANDLES.append(register_optimizer_step_post_hook(_after_step))
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for listener in list(_LISTENERS):
        listener.after_fork()


def _held(optimizer: Optimizer) -> frozenset[int]:
    return frozenset(id(parameter) for group in optimizer.param_groups for parameter in group["params"])


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = _held(optimizer)
    for listener in list(_LISTENERS):
        listener.before_step(held)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = _held(optimizer)
    listeners = list(_LISTENERS)
    # Looked up once for each optimizer, as long as nothing about it changes: it holds its tensors.
    about = (held, frozenset(map(id, listeners)))
    if _STRANGERS.get(optimizer, (None, False))[0] != about:
        _STRANGERS[optimizer] = (about, bool(held.difference(*(listener.known(held) for listener in listeners))))
    for listener in listeners:
        listener.after_step(held, unknown=_STRANGERS[optimizer][1])
