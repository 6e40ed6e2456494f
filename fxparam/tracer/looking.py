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
from fxparam.tracer.site import SiteModule

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
    saved = [(m, dict(m.__dict__), dict(m._buffers), _contents(m.__dict__)) for m in modules]
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
        for m, state, buffers, contents in saved:
            look.wrote = look.wrote or _differs(m.__dict__, state) or any(now != then for now, then in contents)
            m.__dict__.clear()
            m.__dict__.update(state)
            m._buffers.clear()
            m._buffers.update(buffers)
            for container, then in contents:
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


def _contents(state: dict[str, Any]) -> list[tuple[Any, Any]]:
    plain = (value for name, value in state.items() if type(value) in (list, dict, set) and not name.startswith("_"))
    return [(value, value.copy()) for value in plain]


def _put_back(container: Any, then: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(then)
    else:
        container.update(then)


def _differs(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return now.keys() != then.keys() or any(now[name] is not value for name, value in then.items() if name != "training")
