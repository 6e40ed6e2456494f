"""The Python state that a traced graph took for granted, and whether it still holds.

A graph bakes in what the modules' code looked at: options, flags, hooks, submodules. Anything of it may be changed later
(``model.temperature = 0.5``), and then the graph is wrong. A watch remembers all of it by identity, as one flat list of
(container, key), because it is looked at before each forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from operator import getitem, is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYWHERE = tuple(f"_global{name}" for name in _HOOKS)


class Watch:
    """Remembers the attributes of modules, one level into containers and plain objects, but none of their tensors.

    Args:
        modules: the modules whose code was looked into.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._containers: list[Any] = []
        self._keys: list[Any] = []
        self._sized: list[Sized] = [getattr(torch_module, name) for name in _EVERYWHERE]
        self._sets: list[tuple[set[Any], set[Any]]] = []
        for module in modules:
            state = module.__dict__
            self._sized += [state[name] for name in _HOOKS]
            self._remember_items(state["_modules"])
            self._remember(state, [key for key in state if key not in _OF_EVERY_MODULE])
        self._values = list(map(getitem, self._containers, self._keys))
        self._sizes = list(map(len, self._sized))

    def _remember(self, state: dict[str, Any], keys: Iterable[str], *, deep: bool = True) -> None:
        self._sized.append(state)
        for key in keys:
            value = state[key]
            self._containers.append(state)
            self._keys.append(key)
            if isinstance(value, list | dict):
                self._remember_items(value)
            elif isinstance(value, set):
                self._sets.append((value, value.copy()))
            elif (
                deep and hasattr(value, "__dict__") and not isinstance(value, type | Tensor | nn.Module) and not callable(value)
            ):
                self._remember(value.__dict__, value.__dict__, deep=False)

    def _remember_items(self, container: Any) -> None:
        self._sized.append(container)
        keys = list(container) if isinstance(container, dict) else range(len(container))
        self._containers += [container] * len(keys)
        self._keys += keys

    def holds(self) -> bool:
        """Whether everything is as it was."""
        try:
            values = list(map(getitem, self._containers, self._keys))
        except (KeyError, IndexError):
            return False
        if list(map(len, self._sized)) != self._sizes:
            return False
        if not all(map(is_, values, self._values)) and not all(map(_equal, values, self._values)):
            return False
        return all(now == then for now, then in self._sets)

    def first_change(self) -> str:
        """The name of something that changed, for messages."""
        for container, key, then in zip(self._containers, self._keys, self._values, strict=True):
            try:
                if not _equal(container[key], then):
                    return str(key)
            except (KeyError, IndexError):
                return str(key)
        return "a container, attribute or hook that was added or removed"


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    # Equal numbers and strings are the same to a trace; for anything else only the very object is known to be.
    return type(a) is type(b) and isinstance(a, int | float | complex | str | bytes) and bool(a == b)
