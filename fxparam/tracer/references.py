"""What refers to what: the parts of a value through which a module can be reached, and how each kind of value is made anew.

A *mutable* value can be made empty and filled later, so that cycles close; an *immutable* one is made whole, from the copies
of its parts. All else is shared.
"""

from __future__ import annotations

import collections
import enum
import functools
import logging
import numbers
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fxparam.tracer import adoption

_Resolve = Callable[[Any], Any]
PLAIN = (
    *(list, dict, set, tuple),
    *(collections.deque, collections.OrderedDict, collections.defaultdict, collections.Counter),
)
TABLES = ("_modules", "_parameters", "_buffers")


class _Part(NamedTuple):
    """Something a value refers to; a weak reference does not keep it in the model."""

    label: str
    value: Any
    weak: bool = False


@dataclass(frozen=True)
class Immutable:
    """Values that are made whole, from the copies of their parts."""

    parts: Callable[[Any], Iterator[_Part]]
    build: Callable[[Any, _Resolve], Any]


@dataclass(frozen=True)
class Mutable:
    """Values that can be made empty and filled later, so that cycles close."""

    parts: Callable[[Any], Iterator[_Part]]
    shell: Callable[[Any], Any]
    fill: Callable[[Any, Any, _Resolve], None]


# What torch.compile keeps on a module refers to the compiled code of that very module; its wrapper can make it anew.
_COMPILED = ("forward", "_forward", "_torchdynamo_orig_callable", "_torchdynamo_wrapper_id", "get_compiler_config")


def is_compiled(value: Any) -> bool:
    """Whether ``value`` is the wrapper that ``torch.compile`` returns (asked without the slow import of its class)."""
    return type(value).__name__ == "OptimizedModule" and type(value).__module__.startswith("torch._dynamo")


def _slots(cls: type) -> Iterator[tuple[str, Any]]:
    for base in cls.__mro__:
        if "__slots__" in vars(base):
            yield from ((n, d) for n, d in vars(base).items() if isinstance(d, types.MemberDescriptorType))


def _state_parts(value: Any) -> Iterator[_Part]:
    skipped = _COMPILED if is_compiled(value) else ("_compiled_call_impl",)
    for name, entry in getattr(value, "__dict__", {}).items():
        if name not in skipped:
            yield _Part(name, entry)
    for name, slot in _slots(type(value)):
        if (held := _slot_value(slot, value)) is not None:
            yield _Part(name, held)


def _slot_value(slot: Any, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:  # an unset slot
        return None


def _fill_state(value: Any, new: Any, resolve: _Resolve) -> None:
    state = getattr(value, "__dict__", None)
    if state is value:  # a dictionary that is its own attributes
        new.__dict__ = new
    elif state is not None:
        skipped = _COMPILED if is_compiled(value) else ("_compiled_call_impl",)
        new.__dict__.update({name: resolve(entry) for name, entry in state.items() if name not in skipped})
    for _, slot in _slots(type(value)):
        if (held := _slot_value(slot, value)) is not None:
            slot.__set__(new, resolve(held))


def _empty(value: Any) -> Any:
    cls: Any = type(value)
    return cls.__new__(cls)


def _object_shell(value: Any) -> Any:
    try:
        return object.__new__(type(value))
    except TypeError:  # a class on top of a built-in type
        return _empty(value)


def _module_shell(value: nn.Module) -> nn.Module:
    if isinstance(value, fx.GraphModule):
        return type(value).__new__(type(value))  # a class of its own: the forward of a graph lives on the class
    return object.__new__(type(value).__bases__[0] if adoption.has_generated_class(value) else type(value))


def _list_fill(value: Any, new: Any, resolve: _Resolve) -> None:
    list.extend(new, map(resolve, list.__iter__(value)))
    _fill_state(value, new, resolve)


def _deque_fill(value: Any, new: Any, resolve: _Resolve) -> None:
    collections.deque.__init__(new, map(resolve, value), value.maxlen)
    _fill_state(value, new, resolve)


def _set_fill(value: Any, new: Any, resolve: _Resolve) -> None:
    set.update(new, map(resolve, set.__iter__(value)))
    _fill_state(value, new, resolve)


def _dict_fill(value: Any, new: Any, resolve: _Resolve) -> None:
    base = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
    if isinstance(value, collections.defaultdict):
        new.default_factory = resolve(value.default_factory)
    for key, entry in base.items(value):
        base.__setitem__(new, resolve(key), resolve(entry))
    _fill_state(value, new, resolve)


def _weak_fill(value: Any, new: Any, resolve: _Resolve) -> None:
    if isinstance(value, weakref.WeakSet):
        new.update(map(resolve, value))
    else:
        new.update({resolve(key): resolve(entry) for key, entry in value.items()})


def _items_parts(value: Any) -> Iterator[_Part]:
    for index, entry in enumerate(value):
        yield _Part(str(index), entry)
    yield from _state_parts(value)


def _dict_parts(value: Any) -> Iterator[_Part]:
    for key, entry in (collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict).items(value):
        label = key if isinstance(key, str) else type(key).__name__
        yield _Part(label, key)
        yield _Part(label, entry)
    if isinstance(value, collections.defaultdict):
        yield _Part("default_factory", value.default_factory)
    yield from _state_parts(value)


def _weak_parts(value: Any) -> Iterator[_Part]:
    keys, values = (value, ()) if isinstance(value, weakref.WeakSet) else (value.keys(), value.values())
    for key in keys:
        yield _Part("key", key, not isinstance(value, weakref.WeakValueDictionary))
    for entry in values:
        yield _Part("value", entry, isinstance(value, weakref.WeakValueDictionary))


def _cell_parts(value: Any) -> Iterator[_Part]:
    try:
        yield _Part("", value.cell_contents)
    except ValueError:  # an empty cell
        return


def _cell_fill(value: Any, new: Any, resolve: _Resolve) -> None:
    for part in _cell_parts(value):
        new.cell_contents = resolve(part.value)


def _function_parts(value: types.FunctionType) -> Iterator[_Part]:
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        yield _Part(name, cell)
    for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
        yield _Part("default", default)
    yield from _state_parts(value)


def _function_build(value: types.FunctionType, resolve: _Resolve) -> types.FunctionType:
    defaults = None if value.__defaults__ is None else tuple(map(resolve, value.__defaults__))
    closure = None if value.__closure__ is None else tuple(map(resolve, value.__closure__))
    new = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, closure)
    new.__kwdefaults__ = value.__kwdefaults__ and {k: resolve(v) for k, v in value.__kwdefaults__.items()}
    new.__qualname__, new.__module__, new.__doc__ = value.__qualname__, value.__module__, value.__doc__
    new.__annotations__ = dict(value.__annotations__)
    _fill_state(value, new, resolve)
    return new


def _partial_build(value: functools.partial[Any], resolve: _Resolve) -> functools.partial[Any]:
    keywords = {k: resolve(v) for k, v in value.keywords.items()}
    new = type(value)(resolve(value.func), *map(resolve, value.args), **keywords)
    _fill_state(value, new, resolve)
    return new


def _partial_parts(value: functools.partial[Any]) -> Iterator[_Part]:
    yield _Part("func", value.func)
    for part in (*value.args, *value.keywords.values()):
        yield _Part("argument", part)
    yield from _state_parts(value)


def _tuple_build(value: Any, resolve: _Resolve) -> Any:
    try:
        return tuple.__new__(type(value), map(resolve, value))
    except TypeError:  # a struct sequence
        return type(value)(map(resolve, value))


def _referent(value: Any) -> Any:
    try:
        if type(value) in weakref.ProxyTypes:
            return value.__init__.__self__
        return getattr(value(), "__self__", None) if isinstance(value, weakref.WeakMethod) else value()
    except ReferenceError:  # a dead proxy
        return None


def _reference_build(value: Any, resolve: _Resolve) -> Any:
    new = resolve(_referent(value))
    if type(value) in weakref.ProxyTypes:
        return weakref.proxy(new)
    if isinstance(value, weakref.WeakMethod):
        method: Any = value()
        return weakref.WeakMethod(types.MethodType(method.__func__, new))
    return weakref.ref(new, resolve(value.__callback__))


def _reference_parts(value: Any) -> Iterator[_Part]:
    if (referent := _referent(value)) is not None:
        yield _Part("", referent, weak=True)
    if type(value) is weakref.ref:
        yield _Part("callback", value.__callback__)


# The first row whose types a class derives from decides; a class in no row is a plain object if it has attributes.
_ATOMS = (
    *(type, types.ModuleType, types.NoneType, str, bytes, bytearray, numbers.Number, enum.Enum, logging.Logger),
    *(BaseException, Tensor, torch.Size, fx.Graph, fx.Node, torch.jit.ScriptModule, torch.jit.ScriptFunction),
)
_LRU = type(functools.lru_cache(len))
_OBJECT = Mutable(_state_parts, _object_shell, _fill_state)
_SELF = ("__self__", "__func__")
_KINDS: tuple[tuple[tuple[type, ...], Mutable | Immutable | None], ...] = (
    (_ATOMS, None),
    ((nn.Module,), Mutable(_state_parts, _module_shell, _fill_state)),
    (
        (types.MethodType,),
        Immutable(
            lambda v: iter((_Part("__self__", v.__self__), _Part("__func__", v.__func__))),
            lambda v, resolve: types.MethodType(resolve(v.__func__), resolve(v.__self__)),
        ),
    ),
    (
        (types.BuiltinMethodType, types.MethodWrapperType),
        Immutable(
            lambda v: iter((_Part("__self__", v.__self__),)),
            lambda v, resolve: getattr(resolve(v.__self__), v.__name__),
        ),
    ),
    (
        (_LRU,),
        Immutable(
            lambda v: iter((_Part("__wrapped__", v.__wrapped__),)),
            lambda v, resolve: functools.lru_cache(**v.cache_parameters())(resolve(v.__wrapped__)),
        ),
    ),
    ((functools.partial,), Immutable(_partial_parts, _partial_build)),
    ((types.FunctionType,), Immutable(_function_parts, _function_build)),
    ((types.CellType,), Mutable(_cell_parts, lambda v: types.CellType(), _cell_fill)),
    ((weakref.ref, *weakref.ProxyTypes), Immutable(_reference_parts, _reference_build)),
    (
        (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary),
        Mutable(_weak_parts, lambda v: type(v)(), _weak_fill),
    ),
    ((tuple,), Immutable(_items_parts, _tuple_build)),
    ((frozenset,), Immutable(_items_parts, lambda v, resolve: frozenset.__new__(type(v), map(resolve, v)))),
    ((list,), Mutable(_items_parts, _empty, _list_fill)),
    ((collections.deque,), Mutable(_items_parts, _empty, _deque_fill)),
    ((set,), Mutable(_items_parts, _empty, _set_fill)),
    ((dict,), Mutable(_dict_parts, _empty, _dict_fill)),
)


def kind_of(cls: type) -> Mutable | Immutable | None:
    """How to take values of this class apart; ``None`` where there is nothing inside to look for."""
    for bases, kind in _KINDS:
        if issubclass(cls, bases):
            return kind
    return _OBJECT if getattr(cls, "__dictoffset__", 0) or any(True for _ in _slots(cls)) else None
