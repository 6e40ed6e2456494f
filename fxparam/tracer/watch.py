"""The Python state that a traced graph took for granted, and whether it still holds.

A graph bakes in what the modules' code looked at: options, flags, hooks, submodules. Anything of it may be changed later
(``model.temperature = 0.5``), and then the graph is wrong. A watch remembers every attribute of a set of modules by identity.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_REGISTRIES = ("_parameters", "_buffers")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


class Watch:
    """Remembers the attributes of modules, one level into containers and plain objects; never their tensors.

    Args:
        modules: the modules whose code was looked into.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._dicts: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._containers: list[tuple[Any, Any]] = []
        for module in modules:
            self._remember(module.__dict__)
            for name in ("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                self._hold(module.__dict__[name])
        for name in _GLOBAL_HOOKS:
            self._hold(getattr(torch_module, name))
        self._values = list(map(operator.getitem, self._dicts, self._keys))
        self._sizes = list(map(len, self._dicts))

    def _remember(self, state: dict[str, Any], *, deep: bool = True) -> None:
        for key, value in state.items():
            if key in _REGISTRIES or isinstance(value, nn.Module):
                continue
            self._dicts.append(state)
            self._keys.append(key)
            if isinstance(value, list | set | dict):
                self._hold(value)
            elif deep and hasattr(value, "__dict__") and not isinstance(value, type | Tensor) and not callable(value):
                self._remember(value.__dict__, deep=False)

    def _hold(self, container: Any) -> None:
        self._containers.append((container, container.copy()))

    def holds(self) -> bool:
        """Whether everything is as it was."""
        try:
            values = list(map(operator.getitem, self._dicts, self._keys))
        except KeyError:
            return False
        if list(map(len, self._dicts)) != self._sizes:
            return False
        same = all(map(operator.is_, values, self._values)) or all(map(_equal, values, self._values))
        return same and all(len(now) == len(then) and _same_items(now, then) for now, then in self._containers)

    def first_change(self) -> str:
        """The name of an attribute that changed, for messages."""
        for state, key, then in zip(self._dicts, self._keys, self._values, strict=True):
            if key not in state or not _equal(state[key], then):
                return key
        return "a container or hook"


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or not isinstance(a, int | float | complex | str | bytes | tuple):
        return False
    return bool(a == b)


def _same_items(now: Any, then: Any) -> bool:
    if isinstance(now, dict):
        return all(map(operator.is_, now, then)) and all(map(_equal, now.values(), then.values()))
    if isinstance(now, set):
        return bool(now == then)
    return all(map(_equal, now, then))
