"""Looking at a map without leaving a mark: its state, its attributes and the random generators are put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fxparam.tracer.hazards import preserved_generators
from fxparam.tracer.site import SiteModule, invert
from fxparam.tracer.watch import is_plain

_DEPTH = 6
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)


@dataclass
class Look:
    """What happened during a look; known at its end.

    Attributes:
        drew: random numbers were drawn.
        wrote: a plain attribute of a module was written.
    """

    drew: bool = False
    wrote: bool = False


@contextmanager
def looking(module: nn.Module, *, evaluate: bool = False) -> Iterator[Look]:
    """Run the module inside the block as if it had not run: buffers are copies, attributes and generators come back.

    Args:
        module: the module.
        evaluate: whether it is in eval mode inside the block.
    """
    modules = list(module.modules())
    saved = [(m, dict(m.__dict__), dict(m._buffers)) for m in modules]
    contents = [one for m in modules for one in _contents(m.__dict__)]
    generators = [(g, g.get_state()) for m in modules for g in m.__dict__.values() if isinstance(g, torch.Generator)]
    copies: dict[int, Tensor] = {}
    for m in modules:
        for name, buffer in m._buffers.items():
            if buffer is not None:
                m._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        if evaluate:
            m.__dict__["training"] = False
    look = Look()
    used: list[bool] = []
    try:
        with preserved_generators() as used, _without_global_hooks():
            yield look
    finally:
        look.drew = any(used) or any(not torch.equal(generator.get_state(), then) for generator, then in generators)
        for generator, then in generators:
            generator.set_state(then)
        look.wrote = any(_moved(now, then) for now, then in contents)
        for m, state, buffers in saved:
            look.wrote = look.wrote or _differs(m.__dict__, state)
            m.__dict__.clear()
            m.__dict__.update(state)
            m._buffers.clear()
            m._buffers.update(buffers)
        for container, then in contents:
            _put_back(container, then)


@contextmanager
def contents_kept(module: nn.Module) -> Iterator[None]:
    """Put back what is written inside the block into containers that the module holds."""
    contents = [one for m in module.modules() for one in _contents(m.__dict__)]
    try:
        yield
    finally:
        for container, then in contents:
            if _moved(container, then):
                _put_back(container, then)


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Hooks for all modules (profilers, counters of operations) do not see what is run only to look at it."""
    saved = [(hooks, hooks.copy()) for hooks in _GLOBAL_HOOKS]
    for hooks in _GLOBAL_HOOKS:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, then in saved:
            hooks.update(then)


@torch.no_grad()
def present_values(site: SiteModule, reads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The weights of a site as they are now, in eval mode.

    Args:
        site: the site.
        reads: the present values of the weights it reads.
    """
    with looking(site, evaluate=True):
        value = site(*reads)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


@torch.no_grad()
def retracted(site: SiteModule) -> Tensor | tuple[Tensor, ...]:
    """Latents for what the first map of a chain makes of the present ones, in eval mode.

    The other maps are not asked: what they make of it may be out of the image of the first.

    Raises:
        ImageError: the first map has no right inverse; nothing was changed.
    """
    first = next(iter(site))
    with looking(site, evaluate=True):
        value = first(*site.latents)
    return invert(first, tuple(value) if isinstance(value, list) else value, project=False)


def _contents(state: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The containers that a module holds, also in other ones and in plain objects, each with a copy."""
    found: dict[int, tuple[Any, Any]] = {}
    todo = [(value, _DEPTH) for name, value in state.items() if not name.startswith("_")]
    while todo:
        value, depth = todo.pop()
        container = vars(value) if is_plain(value) else value
        if depth == 0 or type(container) not in (list, dict, set, tuple) or id(container) in found:
            continue
        if type(container) is not tuple:
            found[id(container)] = (container, container.copy())
        todo += [(item, depth - 1) for item in (container.values() if isinstance(container, dict) else container)]
    return list(found.values())


def _moved(container: Any, then: Any) -> bool:
    """Whether a container holds other objects than a copy of it: by identity, tensors have no truth value."""
    if isinstance(container, dict):
        return list(container) != list(then) or any(value is not then[key] for key, value in container.items())
    if isinstance(container, list):
        return len(container) != len(then) or any(a is not b for a, b in zip(container, then, strict=True))
    return bool(container != then)


def _put_back(container: Any, then: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(then)
    else:
        container.update(then)


def _differs(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return now.keys() != then.keys() or any(now[name] is not value for name, value in then.items() if name != "training")
