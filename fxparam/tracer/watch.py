"""The Python state that a traced graph took for granted, and whether it still holds.

A graph bakes in what the model's code looked at: options, flags, hooks, submodules. Anything of it may be changed later
(``model.temperature = 0.5``), and then the graph is wrong. A watch remembers all of it by identity, as one flat list of
(container, key), because it is looked at before each forward.
"""

from __future__ import annotations

import contextvars
import enum
import functools
import sys
import types
from collections.abc import Collection, Iterable, Sequence, Sized
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}
# What is kept here on modules of a user's.
_OURS = frozenset({"_compiled_call_impl", "_fxparam_binding"})
# What recurrent layers derive from their parameters at each call.
DERIVED = frozenset({"_flat_weights", "_flat_weight_refs"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYWHERE = tuple(f"_global{name}" for name in _HOOKS)
_VALUES = (int, float, complex, str, bytes, type(None), type(...), enum.Enum)
_FIXED = (
    *_VALUES,
    # Its value is asked for by a call, and calls are seen.
    contextvars.ContextVar,
    *(Tensor, nn.Module, torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(
        types.FunctionType,
        types.BuiltinFunctionType,
        types.ModuleType,
        type,
        torch._ops.OpOverload,
        torch._ops.OpOverloadPacket,
    ),
)
_DEPTH = 6


def is_watchable(value: Any, depth: int = _DEPTH) -> bool:
    """Whether every change of ``value`` can be seen by looking at identities: no iterators, generators, arrays or slots."""
    if isinstance(value, _FIXED):
        return True
    if depth == 0:
        return False
    if type(value) in (tuple, list, set, frozenset, torch.Size):
        return all(is_watchable(item, depth - 1) for item in value)
    if isinstance(value, dict):
        return all(is_watchable(item, depth - 1) for item in value.values())
    if isinstance(value, functools.partial):
        return is_watchable((value.func, value.args, value.keywords), depth - 1)
    if isinstance(value, types.MethodType):
        return is_watchable(value.__self__, depth - 1)
    return is_plain(value) and all(is_watchable(item, depth - 1) for item in vars(value).values())


def is_plain(value: Any) -> bool:
    """Whether an object is nothing but its attributes, defined in Python by a user or a third party."""
    cls = type(value)
    home = cls.__module__.split(".")[0]
    if home in ("torch", "numpy") or (
        home in sys.stdlib_module_names and cls is not types.SimpleNamespace and home != "__main__"
    ):
        return False
    slots = any(getattr(base, "__slots__", ()) for base in cls.__mro__)
    return hasattr(value, "__dict__") and not slots and not hasattr(value, "__next__") and not hasattr(value, "__array__")


class Watch:
    """Remembers attributes of modules and what functions find outside of themselves, but the value of no tensor.

    Args:
        modules: the modules whose code was looked into.
        others: modules of which only attributes are looked at.
        fixed: modules whose attributes do not change, but for their mode, hooks and children.
        names: the attributes that the code mentions; None: all.
        places: further containers and keys, such as the globals of a function.
        functions: functions whose closures and globals count.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        *,
        others: Iterable[nn.Module] = (),
        fixed: Iterable[nn.Module] = (),
        names: Collection[str] | None = None,
        places: Iterable[tuple[Any, str]] = (),
        functions: Iterable[types.FunctionType] = (),
    ) -> None:
        self._containers: list[Any] = []
        self._keys: list[Any] = []
        self._sized: list[Sized] = [getattr(torch_module, name) for name in _EVERYWHERE]
        self._empty: list[Sized] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._known: set[int] = set()
        for module in modules:
            self._hold_structure(module)
            self._hold_attributes(module, names)
        for module in fixed:
            self._hold_structure(module)
            self._hold(module.__dict__, "training", 0)
        for module in others:
            self._hold_attributes(module, names)
        for container, key in places:
            self._hold(container, key, _DEPTH)
        for function in functions:
            self._hold_function(function, _DEPTH)
        self.renew()

    def _hold_structure(self, module: nn.Module) -> None:
        state = module.__dict__
        if isinstance(module, torch.jit.ScriptModule):
            # Its Python does not change, and its registries are not in it.
            return
        self._sized += [state[name] for name in _HOOKS]
        self._hold_items(state["_modules"], deep=False)
        self._sized.append(state)

    def _hold_attributes(self, module: nn.Module, names: Collection[str] | None) -> None:
        for key in module.__dict__:
            if key not in _OURS | DERIVED and key not in _OF_EVERY_MODULE and (names is None or key in names):
                self._hold(module.__dict__, key, _DEPTH)

    def _hold(self, container: Any, key: Any, depth: int) -> None:
        self._containers.append(container)
        self._keys.append(key)
        value = container[key]
        if depth == 0 or id(value) in self._known or isinstance(value, (*_VALUES, Tensor, nn.Module, type, types.ModuleType)):
            return
        if isinstance(value, tuple) and all(isinstance(item, _VALUES) for item in value):
            return
        self._known.add(id(value))
        if isinstance(value, list | dict | tuple):
            self._hold_items(value, depth=depth - 1)
        elif isinstance(value, set):
            self._sets.append((value, value.copy()))
        elif isinstance(value, types.FunctionType):
            self._hold_function(value, depth - 1)
        elif isinstance(value, types.MethodType) and isinstance(value.__func__, types.FunctionType):
            self._hold_function(value.__func__, depth - 1)
        elif is_plain(value):
            self._sized.append(vars(value))
            for name in vars(value):
                self._hold(vars(value), name, depth - 1)
            for base in type(value).__mro__[:-1]:
                for name, held in vars(base).items():
                    if isinstance(held, _VALUES) and not name.startswith("__"):
                        self._hold(ClassItems(base), name, 0)

    def _hold_items(self, container: Any, *, deep: bool = True, depth: int = 0) -> None:
        self._sized.append(container)
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            self._hold(container, key, depth if deep else 0)

    def _hold_function(self, function: types.FunctionType, depth: int) -> None:
        if (function.__module__ or "").startswith("torch") or depth < 0:
            return
        for number, cell in enumerate(function.__closure__ or ()):
            if _is_filled(cell):
                self._hold(_Cells(function.__closure__ or ()), number, depth)
        for name in function.__code__.co_names:
            if name in function.__globals__:
                self._hold(function.__globals__, name, depth)
        for defaults in (function.__defaults__, function.__kwdefaults__):
            if defaults:
                self._hold_items(defaults, depth=depth)

    def holds(self) -> bool:
        """Whether everything is as it was."""
        try:
            values = list(map(getitem, self._containers, self._keys))
        except (KeyError, IndexError, ValueError):
            return False
        if any(self._empty) or list(map(len, self._sized)) != self._sizes:
            return False
        if not all(map(is_, values, self._values)) and not all(map(_equal, values, self._values)):
            return False
        return all(now == then for now, then in self._sets)

    def first_change(self) -> str:
        """What changed, for messages."""
        for container, key, then in zip(self._containers, self._keys, self._values, strict=True):
            try:
                if not _equal(container[key], then):
                    return f"the attribute {str(key)!r} of a module"
            except (KeyError, IndexError, ValueError):
                return f"the attribute {str(key)!r} of a module"
        return "a container, or adds or removes an attribute or hook"

    def renew(self) -> None:
        """Take everything as it is now."""
        self._values = list(map(getitem, self._containers, self._keys))
        self._sets = [(now, now.copy()) for now, _ in self._sets]
        # Most of them are the empty hooks of modules: one call looks whether all still are.
        sized = [*self._empty, *self._sized]
        self._empty, self._sized = [one for one in sized if not len(one)], [one for one in sized if len(one)]
        self._sizes = list(map(len, self._sized))


class ClassItems:
    """The attributes of a class as items."""

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def __getitem__(self, name: str) -> Any:
        return vars(self._cls)[name]


class _Cells:
    """The values of a closure as items."""

    def __init__(self, cells: Sequence[types.CellType]) -> None:
        self._cells = cells

    def __getitem__(self, number: int) -> Any:
        return self._cells[number].cell_contents


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    # Equal numbers and strings are the same to a trace; for anything else only the very object is known to be.
    return type(a) is type(b) and isinstance(a, int | float | complex | str | bytes) and bool(a == b)
