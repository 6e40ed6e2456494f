"""Hooks of latents that share autograd nodes.

The engine visits every latent of a group, those that a loss does not reach as well, and would call their hooks with None.
PyTorch's own graph never does that, so such hooks are wrapped, when it is about to happen, in one that is quiet where there is
no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Stamp = tuple[int | None, int]


def keep_hooks_quiet(latent: Tensor) -> None:
    """The present backward pass has no gradient for ``latent``, as far as one node knows: its hooks must not hear of it."""
    if hooks := latent._backward_hooks:
        for key, hook in hooks.items():
            if not isinstance(hook, _OnGradient) and not _counts_visits(hook):
                hooks[key] = _OnGradient(hook)
    if after := latent._post_accumulate_grad_hooks:
        for key, hook in after.items():
            if not isinstance(hook, _OnAccumulation):
                hook = after[key] = _OnAccumulation(hook)
            # Another node may still bring one: then it is another gradient when the hook is called.
            hook.unless = (torch._C._current_graph_task_id(), gradient_stamp(latent))


class _OnGradient:
    """A tensor hook that is not called with None."""

    def __init__(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        self.hook = hook

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else self.hook(gradient)


class _OnAccumulation:
    """A hook after accumulation that is not called where nothing was accumulated.

    Attributes:
        unless: the backward pass and the state of the gradient before; in it the hook is not called while that is the same.
    """

    def __init__(self, hook: Callable[[Tensor], None]) -> None:
        self.hook = hook
        self.unless: object = None

    def __call__(self, latent: Tensor) -> None:
        unless, self.unless = self.unless, None
        if (torch._C._current_graph_task_id(), gradient_stamp(latent)) != unless:
            self.hook(latent)


def _counts_visits(hook: Any) -> bool:
    """Whether it belongs to ``register_multi_grad_hook``, which waits for every latent the engine visits, and takes None."""
    return getattr(hook, "__module__", "") == "torch.autograd.graph" and hook.__name__ == "inner_hook"


def is_zero(gradient: Tensor | None) -> bool:
    """Whether there is no gradient, or one that is zero everywhere."""
    if gradient is None:
        return True
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return not bool(values.any())


def gradient_stamp(latent: Tensor) -> Stamp:
    """Another value wherever the gradient of a latent is another, or has been written."""
    gradient = latent.grad
    return (None, 0) if gradient is None else (id(gradient), gradient._version)
