"""What code finds outside of itself: globals, closures, members of classes and modules, attributes and what they hold.

Places are containers and keys, as a ``Watch`` takes them; snapshots are lists of objects, to be compared by identity.
"""

from __future__ import annotations

import gc
import sys
import types
from operator import is_
from typing import Any

from torch import nn

from fxparam.tracer.watch import DERIVED

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_DEPTH = 6


class Reads:
    """What functions read from outside.

    Attributes:
        names: the attribute names that the code mentions.
        dynamic: whether it may read attributes whose names it does not mention.
    """

    def __init__(self) -> None:
        self.names: set[str] = {"training", "forward"}
        self.dynamic = False
        # With the containers, whose ids must not be used again.
        self._places: dict[tuple[int, Any], tuple[Any, Any]] = {}

    @property
    def places(self) -> list[tuple[Any, Any]]:
        """The globals, closures, defaults and attributes of classes, as containers and keys."""
        return list(self._places.values())

    def note(self, container: Any, key: Any) -> None:
        """One more place."""
        self._places[id(container), key] = (container, key)

    def add(self, other: Reads) -> None:
        """What another function reads."""
        self.names |= other.names
        self.dynamic |= other.dynamic
        self._places |= other._places


class Cell:
    """The content of a closure's cell as an item."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, name: str) -> Any:
        return self.cell.cell_contents

    def holds(self, value: Any) -> bool:
        """Whether it has this content now."""
        try:
            return self.cell.cell_contents is value
        except ValueError:
            return False


class Members:
    """What a class or a module defines, as items; methods are seen to be replaced, but nobody looks into them."""

    def __init__(self, holder: Any) -> None:
        self.holder = holder
        methods = vars(holder).items() if isinstance(holder, type) else ()
        self._methods = {name: value for name, value in methods if isinstance(value, types.FunctionType)}

    def __getitem__(self, name: str) -> Any:
        value = vars(self.holder)[name]
        return "as it was" if name in self._methods and value is self._methods[name] else value


def classes_of(root: nn.Module) -> list[type]:
    """The classes of a user's behind the modules of a model."""
    every = {base: None for module in root.modules() for base in type(module).__mro__}
    return [base for base in every if not is_torchs_or_standard(base.__module__)]


def is_torchs_or_standard(home: str) -> bool:
    """Whether a Python module belongs to PyTorch, to us, or to the standard library."""
    package = home.split(".")[0]
    return package in ("torch", "fxparam") or (package in sys.stdlib_module_names and home != "__main__")


def functions_of(code: types.CodeType) -> list[types.FunctionType]:
    """The functions that have this code: one, or one for each time the function around it ran."""
    return [one for one in gc.get_referrers(code) if type(one) is types.FunctionType and one.__code__ is code]


def cells_of(code: types.CodeType, name: str) -> list[Cell]:
    """The cells that functions with this code have for a variable of an enclosing function."""
    at = code.co_freevars.index(name)
    return [Cell(function.__closure__[at]) for function in functions_of(code) if function.__closure__]


def snapshot(value: Any) -> list[Any]:
    """What a container or an object holds, at any depth, as a list to be compared by identity; all of it stays alive."""
    found: list[Any] = []
    for item in _items(value) or ():
        _gather(item, found, set(), _DEPTH)
    return found or [value]


def _gather(value: Any, found: list[Any], seen: set[int], depth: int) -> None:
    found.append(value)
    items = _items(value) if depth and id(value) not in seen else None
    if items is not None:
        seen.add(id(value))
        for item in items:
            _gather(item, found, seen, depth - 1)


def _items(value: Any) -> list[Any] | None:
    if isinstance(value, dict):
        return [part for item in list(value.items()) for part in item]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    return [part for item in list(vars(value).items()) for part in item] if _is_plain(value) else None


def contents_of(module: nn.Module) -> list[Any]:
    """The attributes of a module and what they hold, to be compared by identity with ``same``."""
    left_out = (_OF_EVERY_MODULE | DERIVED) - {"training"}
    plain = {name: value for name, value in module.__dict__.items() if name not in left_out}
    registries = (module._parameters, module._buffers, module._modules)
    return [part for holder in (plain, *registries) for part in (*snapshot(holder), None)]


def same(now: list[Any], then: list[Any]) -> bool:
    """Whether two snapshots hold the very same objects."""
    return len(now) == len(then) and all(map(is_, now, then))


def _is_plain(value: Any) -> bool:
    home = type(value).__module__.split(".")[0]
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type | types.ModuleType | types.FunctionType | nn.Module)
        and home not in ("torch", "numpy")
        and (home == "__main__" or home not in sys.stdlib_module_names or type(value) is types.SimpleNamespace)
    )
