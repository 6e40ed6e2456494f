"""The structural copy: the user's modules once more, same classes and tensors, with the computed weights taken off.

Everything strongly reachable from the model is scanned once. Copied are the modules, the plain containers they hold,
and whatever leads back to one of those (bound methods, partials, closures, weak references, plain objects); all else
is shared. Nothing of the user's runs: modules and objects are made by ``object.__new__`` and written through
``__dict__``, so ``__init__``, ``__setattr__``, ``__deepcopy__`` and ``__getstate__`` have no say, and no random number
is drawn.
"""

from __future__ import annotations

import collections
import copy
import enum
import functools
import logging
import numbers
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from fxparam.errors import AdoptionError
from fxparam.tracer import adoption


@dataclass(frozen=True, eq=False)
class Copied:
    """A structural copy.

    Attributes:
        root: the copy of the given model.
        adopted: the computed weights taken off it, in registration order of their owners.
        memo: ``id`` of each module -> its copy; a shared module maps to itself. Valid while the given model lives.
        notes: what is not a copy, or was not adopted, each with its dotted name and the reason.
    """

    root: nn.Module
    adopted: tuple[adoption.Adopted, ...]
    memo: Mapping[int, nn.Module]
    notes: tuple[str, ...]


def structural_copy(model: nn.Module, *, adopt: bool = True, copy_tensors: bool = False) -> Copied:
    """Copy the modules of ``model`` and share its tensors; ``model`` itself stays as it is, down to its hooks.

    Args:
        model: any module, also after a backward, and also where ``deepcopy`` fails.
        adopt: take computed weights (``torch.nn.utils.parametrize``, legacy ``weight_norm`` and ``spectral_norm``,
            ``torch.nn.utils.prune``) off the copy and return them. A parametrization inside a parametrization stays.
        copy_tensors: clone every tensor, each storage once, so that ties and views hold among the clones. What has an
            autograd graph of its own stays shared, and ``.grad`` and gradient hooks of tensors are not copied.

    Raises:
        AdoptionError: a computed weight cannot be taken over; the message names module, tensor and remedy.
    """
    scan = _Scan(model, copy_tensors)
    memo, notes = _build(scan)
    modules = [module for module in scan.modules if not isinstance(module, torch.jit.ScriptModule)]
    inside = _inside_parametrizations(modules) if adopt else {id(module) for module in modules}
    adopted: list[adoption.Adopted] = []
    # Inner parametrizations first: whether an outer one can be taken over is asked of finished inner ones.
    for module in sorted(modules, key=lambda module: id(module) not in inside):
        new, path = memo[id(module)], scan.path(module)
        names = adoption.parametrized_names(module)
        if id(module) not in inside:
            if names and not adoption.has_generated_class(module):
                raise AdoptionError(
                    f"module {path or '(root)'!r} ({type(module).__name__}), tensor {names[0]!r}: expected the class "
                    "that torch.nn.utils.parametrize generated, and found one that was changed afterwards "
                    "(remove_parametrizations on a deep copy does that, and so does fully_shard); transform the model "
                    "before, or type transform(..., adopt=False)"
                )
            taken, reasons = adoption.take_over(new, path)
            adopted += taken
            notes += reasons
        elif adopt and (names or adoption.has_legacy_hooks(module)):
            notes.append(f"{path}: keeps its own parametrization, because it is part of another one")
        if adoption.has_generated_class(module) and (kept := adoption.parametrized_names(new)):
            adoption.reparametrize(new, kept)
        if copy_tensors:
            notes += [
                f"{adoption.dotted(path, name)}: a tensor computed from others, shared with the given model"
                for name, value in new.__dict__.items()
                if isinstance(value, Tensor) and value.grad_fn is not None
            ]
    copies = {id(module): memo[id(module)] for module in scan.modules}
    return Copied(copies[id(model)], tuple(adopted), types.MappingProxyType(copies), tuple(notes))


def _inside_parametrizations(modules: list[nn.Module]) -> set[int]:
    """Ids of the parametrization lists and of all modules registered below one."""
    stack: list[nn.Module | None] = [module for module in modules if isinstance(module, ParametrizationList)]
    inside: set[int] = set()
    while stack:
        module = stack.pop()
        if module is not None and id(module) not in inside:
            inside.add(id(module))
            if not isinstance(module, torch.jit.ScriptModule):
                stack.extend(module.__dict__["_modules"].values())
    return inside


# --- what refers to what --------------------------------------------------------------------------------------------

_Resolve = Callable[[Any], Any]
_PLAIN = (
    *(list, dict, set, tuple),
    *(collections.deque, collections.OrderedDict, collections.defaultdict, collections.Counter),
)
_TABLES = ("_modules", "_parameters", "_buffers")


class _Part(NamedTuple):
    """Something a value refers to; a weak reference does not keep it in the model."""

    label: str
    value: Any
    weak: bool = False


@dataclass(frozen=True)
class _Immutable:
    """Values that are made whole, from the copies of their parts."""

    parts: Callable[[Any], Iterator[_Part]]
    build: Callable[[Any, _Resolve], Any]


@dataclass(frozen=True)
class _Mutable:
    """Values that can be made empty and filled later, so that cycles close."""

    parts: Callable[[Any], Iterator[_Part]]
    shell: Callable[[Any], Any]
    fill: Callable[[Any, Any, _Resolve], None]


# What torch.compile keeps on a module refers to the compiled code of that very module; its wrapper can make it anew.
_COMPILED = ("forward", "_forward", "_torchdynamo_orig_callable", "_torchdynamo_wrapper_id", "get_compiler_config")


def _is_compiled(value: Any) -> bool:
    """Whether ``value`` is the wrapper that ``torch.compile`` returns (asked without the slow import of its class)."""
    return type(value).__name__ == "OptimizedModule" and type(value).__module__.startswith("torch._dynamo")


def _slots(cls: type) -> Iterator[tuple[str, Any]]:
    for base in cls.__mro__:
        if "__slots__" in vars(base):
            yield from ((n, d) for n, d in vars(base).items() if isinstance(d, types.MemberDescriptorType))


def _state_parts(value: Any) -> Iterator[_Part]:
    skipped = _COMPILED if _is_compiled(value) else ("_compiled_call_impl",)
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
        skipped = _COMPILED if _is_compiled(value) else ("_compiled_call_impl",)
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
_OBJECT = _Mutable(_state_parts, _object_shell, _fill_state)
_SELF = ("__self__", "__func__")
_KINDS: tuple[tuple[tuple[type, ...], _Mutable | _Immutable | None], ...] = (
    (_ATOMS, None),
    ((nn.Module,), _Mutable(_state_parts, _module_shell, _fill_state)),
    (
        (types.MethodType,),
        _Immutable(
            lambda v: iter((_Part("__self__", v.__self__), _Part("__func__", v.__func__))),
            lambda v, resolve: types.MethodType(resolve(v.__func__), resolve(v.__self__)),
        ),
    ),
    (
        (types.BuiltinMethodType, types.MethodWrapperType),
        _Immutable(
            lambda v: iter((_Part("__self__", v.__self__),)),
            lambda v, resolve: getattr(resolve(v.__self__), v.__name__),
        ),
    ),
    (
        (_LRU,),
        _Immutable(
            lambda v: iter((_Part("__wrapped__", v.__wrapped__),)),
            lambda v, resolve: functools.lru_cache(**v.cache_parameters())(resolve(v.__wrapped__)),
        ),
    ),
    ((functools.partial,), _Immutable(_partial_parts, _partial_build)),
    ((types.FunctionType,), _Immutable(_function_parts, _function_build)),
    ((types.CellType,), _Mutable(_cell_parts, lambda v: types.CellType(), _cell_fill)),
    ((weakref.ref, *weakref.ProxyTypes), _Immutable(_reference_parts, _reference_build)),
    (
        (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary),
        _Mutable(_weak_parts, lambda v: type(v)(), _weak_fill),
    ),
    ((tuple,), _Immutable(_items_parts, _tuple_build)),
    ((frozenset,), _Immutable(_items_parts, lambda v, resolve: frozenset.__new__(type(v), map(resolve, v)))),
    ((list,), _Mutable(_items_parts, _empty, _list_fill)),
    ((collections.deque,), _Mutable(_items_parts, _empty, _deque_fill)),
    ((set,), _Mutable(_items_parts, _empty, _set_fill)),
    ((dict,), _Mutable(_dict_parts, _empty, _dict_fill)),
)


def _kind_of(cls: type) -> _Mutable | _Immutable | None:
    """How to take values of this class apart; ``None`` where there is nothing inside to look for."""
    for bases, kind in _KINDS:
        if issubclass(cls, bases):
            return kind
    return _OBJECT if getattr(cls, "__dictoffset__", 0) or any(True for _ in _slots(cls)) else None


# --- the scan -------------------------------------------------------------------------------------------------------


class _Scan:
    """What a model reaches, in the order it was found, and which of it must be copied."""

    def __init__(self, model: nn.Module, copy_tensors: bool) -> None:
        self.copy_tensors = copy_tensors
        self.found: dict[int, Any] = {}
        self.strays: list[tuple[Any, nn.Module]] = []
        self._kinds: dict[type, _Mutable | _Immutable | None] = {}
        self._labels: dict[int, tuple[int | None, str]] = {}
        self._readers: dict[int, list[int]] = {}
        self._own: set[int] = set()
        # Registered modules first: their dotted names are what a user knows them by, whoever else refers to them.
        for parent, name, module in _registered(model):
            self._add(module, parent, name)
        self._explore()
        self.modules: list[nn.Module] = [value for value in self.found.values() if issubclass(type(value), nn.Module)]
        self.needed = self._closure()

    def kind(self, value: object) -> _Mutable | _Immutable | None:
        """The kind of ``value``. By its type, never ``isinstance``: a proxy says it is what it stands for."""
        cls = type(value)
        if cls not in self._kinds:
            self._kinds[cls] = _kind_of(cls)
        return self._kinds[cls]

    def path(self, value: object) -> str:
        """The dotted name under which ``value`` was found; empty for the root."""
        labels = []
        key: int | None = id(value)
        while key is not None:
            key, label = self._labels[key]
            labels.append(label)
        return ".".join(label for label in reversed(labels) if label)

    def _add(self, value: object, parent: object, label: str) -> bool:
        if id(value) in self.found:
            return False
        self.found[id(value)] = value
        self._labels[id(value)] = (None if parent is None else id(parent), label)
        return True

    def _explore(self) -> None:
        queue = list(self.found.values())
        weak: list[tuple[Any, Any]] = []
        for value in queue:  # grows while it is read
            kind = self.kind(value)
            holds_state = issubclass(type(value), nn.Module) or id(value) in self._own
            for label, part, is_weak in kind.parts(value) if kind else ():
                cls = type(part)
                copied_tensor = self.copy_tensors and issubclass(cls, Tensor)
                if self.kind(part) is None and not copied_tensor and not issubclass(cls, torch.jit.ScriptModule):
                    continue
                self._readers.setdefault(id(part), []).append(id(value))
                if is_weak:
                    weak.append((value, part))
                    continue
                # A module's plain containers are its state: a forward of the copy must not write into the original's.
                if holds_state and (cls in _PLAIN or label in _TABLES):
                    self._own.add(id(part))
                if self._add(part, value, "" if label in _TABLES else label):
                    queue.append(part)
        self.strays = [(holder, part) for holder, part in weak if id(part) not in self.found]

    def _closure(self) -> set[int]:
        """Ids of modules, their containers (and tensors, if those are copied), and of all that leads to one of them."""
        seeds = (key for key, value in self.found.items() if issubclass(type(value), nn.Module | Tensor))
        own = (key for key in self._own if isinstance(self.kind(self.found[key]), _Mutable))
        stack = [*seeds, *own]
        needed = set(stack)
        while stack:
            for reader in self._readers.get(stack.pop(), ()):
                if reader not in needed:
                    needed.add(reader)
                    stack.append(reader)
        return needed


def _registered(model: nn.Module) -> Iterator[tuple[nn.Module | None, str, nn.Module]]:
    """``(parent, name, module)`` in the order of ``named_modules``, each module once."""
    stack: list[tuple[nn.Module | None, str, nn.Module]] = [(None, "", model)]
    seen: set[int] = set()
    while stack:
        parent, name, module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield parent, name, module
            if not isinstance(module, torch.jit.ScriptModule):
                children = [(module, n, child) for n, child in module.__dict__["_modules"].items() if child is not None]
                stack.extend(reversed(children))


# --- the copies -----------------------------------------------------------------------------------------------------


def _build(scan: _Scan) -> tuple[dict[int, Any], list[str]]:
    """The copies by ``id`` of what they are copies of, and notes on what had to be shared."""
    memo: dict[int, Any] = {}
    notes: list[str] = []
    shells: list[tuple[_Mutable, Any, Any]] = []
    storages: dict[int, torch.UntypedStorage] = {}
    for key, value in scan.found.items():
        kind = scan.kind(value)
        if key not in scan.needed or isinstance(kind, _Immutable):
            continue
        if issubclass(type(value), torch.jit.ScriptModule):
            memo[key] = value
            notes.append(f"{scan.path(value) or '(root)'}: a ScriptModule cannot be copied and is shared")
        elif kind is None:
            memo[key] = _clone(value, storages)
        else:
            try:
                memo[key] = kind.shell(value)
                shells.append((kind, value, memo[key]))
            except TypeError as error:
                memo[key] = value
                notes.append(f"{scan.path(value)}: cannot be copied and still refers to the given model ({error})")

    def resolve(value: Any) -> Any:
        key = id(value)
        if key in scan.needed and key not in memo:
            kind = scan.kind(value)
            assert isinstance(kind, _Immutable)
            memo[key] = kind.build(value, resolve)
        return memo.get(key, value)

    # Hashed containers last: by then whatever computes its hash from its attributes has them.
    for kind, value, new in sorted(shells, key=lambda shell: isinstance(shell[1], dict | set)):
        kind.fill(value, new, resolve)
    for module in scan.modules:
        notes += [f"{scan.path(module) or '(root)'}: {note}" for note in _finish(module, memo[id(module)])]
    for holder, stray in scan.strays:
        if issubclass(type(stray), nn.Module):
            notes.append(f"{scan.path(holder)}: refers weakly to a module outside of the model, which is not copied")
    return memo, notes


def _finish(module: nn.Module, new: nn.Module) -> Iterator[str]:
    """Make good what attributes alone do not carry over."""
    if isinstance(module, fx.GraphModule) and isinstance(new, fx.GraphModule):
        new.graph = copy.deepcopy(module.graph)
    if module.__dict__.get("_compiled_call_impl") is not None:
        yield "the compiled call was dropped; type .compile() on the result"
    if _is_compiled(module):
        new._initialize()  # type: ignore[operator]


def _clone(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """``tensor`` on a clone of its storage, made once for all tensors on that storage."""
    if tensor.grad_fn is not None:
        return tensor
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return copy.deepcopy(tensor)
    storage = tensor.untyped_storage()
    if storage._cdata not in storages:
        storages[storage._cdata] = storage.clone()
    with torch.no_grad():
        new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        new.set_(storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
    new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    new.requires_grad_(tensor.requires_grad)
    new.__dict__.update(tensor.__dict__)
    return new
