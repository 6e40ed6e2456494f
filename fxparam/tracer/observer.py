"""Watching the Python of a forward while it runs: which modules are called, and what it does that no graph shows.

A recording runs the real code, so nothing can go wrong while it is made. Wrong would be to run the graph later in place of code
that did more than compute tensors: wrote attributes, printed, asked a clock, drew Python's random numbers, entered a transform
of PyTorch's. Each function is looked at when it is called for the first time; what it reads from outside is remembered, to be
watched from then on.
"""

from __future__ import annotations

import dis
import functools
import gc
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn

from fxparam.tracer.outside import Cell, Members, Reads, classes_of, functions_of, is_torchs_or_standard, same, snapshot
from fxparam.tracer.watch import is_watchable

_CALL = nn.Module._wrapped_call_impl.__code__
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_CONTAINERS = (list, dict, set)
# Python of PyTorch that does something besides operations on tensors.
_INTERVENES = (
    *("torch.autograd.", "torch.func.", "torch._functorch.", "torch.utils.checkpoint.", "torch.random.", "torch.distributed."),
    *("torch.nn.utils.parametrize.", "torch.nn.utils.weight_norm.", "torch.nn.utils.spectral_norm.", "torch.nn.utils.prune."),
    *("torch.nn.parallel.", "torch.jit.", "torch.cuda.", "torch.multiprocessing.", "torch.hub.", "torch.serialization."),
)
_HARMLESS = ("torch.autograd.grad_mode.", "torch.jit._trace.", "torch.jit.annotations.", "torch.jit._script.")
_QUESTIONS = frozenset({"is_tracing", "is_scripting", "is_available", "is_initialized", "is_current_stream_capturing"})
# Functions written in C that act on the world, or ask it.
_OUTSIDE = frozenset(
    "time _io posix nt _random random _socket _posixsubprocess _ctypes _warnings datetime _contextvars".split()
)
_ASKS = frozenset({"now", "today", "utcnow", "get"})
_OUTSIDE_PYTHON = ("random", "secrets", "uuid", "subprocess", "threading", "socket", "multiprocessing")
_WRITES = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME")
# Objects of these packages and kinds may be read from outside although changes of theirs cannot be seen.
_TRUSTED = "torch fxparam logging typing re functools types abc enum weakref dataclasses inspect operator pathlib".split()
_DYNAMIC = frozenset({"getattr", "hasattr", "attrgetter", "vars", "__dict__", "__getattribute__"})
_DECORATORS = ("torch._compile", "torch._dynamo.", "torch.utils._contextlib", "contextlib", "collections.abc", "os")
_DEPTH = 6


class Observer:
    """Looks at the Python that runs in one thread.

    Args:
        root: the model.
        entered: called with a module and its arguments when it is called.
        left: called with what a module returned.
        hazard: called with what happened that no graph shows.
        operations: how many operations there have been.
        ran: called with the code of a function when it is called.

    Attributes:
        reads: what each function reads from outside.
        held: tensors that it finds there, each with its version then.
        lost: what it wrote outside of the model; empty if nothing.
    """

    def __init__(
        self,
        root: nn.Module,
        entered: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
        left: Callable[[Any], None],
        hazard: Callable[[str], None],
        operations: Callable[[], int],
        ran: Callable[[types.CodeType], None],
    ) -> None:
        self.entered, self.left, self.hazard, self.operations, self.ran = entered, left, hazard, operations, ran
        self.reads: dict[types.CodeType, Reads] = {}
        self._reading = Reads()
        self.held: dict[int, tuple[Tensor, int]] = {}
        self.lost = ""
        self._seen: dict[types.CodeType, str] = {}
        self._closures: dict[tuple[Any, ...], str] = {}
        self._cached: set[types.CodeType] = set()
        # Functions that handle errors, and how many operations came before each call of one that runs.
        self._handling: dict[types.CodeType, bool] = {}
        self._before: dict[types.FrameType, int] = {}
        self._outside: list[tuple[str, Callable[[], Any], list[Any]]] = []
        self._known: dict[tuple[int, str], tuple[Any, str]] = {}
        self._unwatchable = dict(_unwatchable(root))
        for cls in classes_of(root):
            self._outside.append((f"the class {cls.__name__}", functools.partial(_members, cls), snapshot(_members(cls))))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at everything that runs inside the block in this thread."""
        # The garbage collector runs code of others in between.
        collecting = gc.isenabled()
        gc.disable()
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(None)
            if collecting:
                gc.enable()
        for what, get, then in self._outside:
            if not same(snapshot(get()), then):
                self.lost = self.lost or f"the forward writes {what}"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away inside the block."""
        sys.setprofile(None)
        try:
            yield
        finally:
            sys.setprofile(self._on_event)

    def _on_event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "return":
            if code is _CALL:
                self.left(arg)
            elif code in self._cached and _has_tensor(arg):
                self.hazard(f"{code.co_name} fills a cache with tensors")
            if self._before and self._before.pop(frame, None) not in (None, self.operations()):
                self.hazard(f"{code.co_name} may handle errors of operations")
        elif event == "call":
            if code is _CALL:
                given = frame.f_locals
                self.entered(given["self"], given["args"], given["kwargs"])
            else:
                self._called(frame)
        elif event == "c_call" and _is_users(frame):
            owner = getattr(arg, "__self__", None)
            home = getattr(arg, "__module__", None) or (owner if isinstance(owner, type) else type(owner)).__module__
            name = getattr(arg, "__name__", "")
            if home in ("datetime", "_contextvars") and name not in _ASKS:
                return
            if home in _OUTSIDE or (home == "builtins" and name in ("print", "input", "open", "exec", "eval")):
                self.hazard(f"{code.co_name} calls {'' if home == 'builtins' else f'{home}.'}{name}()")

    def _called(self, frame: types.FrameType) -> None:
        home = frame.f_globals.get("__name__", "")
        package = home.split(".")[0]
        if package in ("torch", "fxparam"):
            full, name = f"{home}.", frame.f_code.co_name
            intervenes = full.startswith(_INTERVENES) and not full.startswith(_HARMLESS) and name not in _QUESTIONS
            if intervenes and _is_users(_caller(frame)):
                self.hazard(f"the forward calls {home}.{name}, which a graph of operations does not show")
            return
        if home == "os" and frame.f_code.co_name in ("__getitem__", "__contains__") and _is_users(_caller(frame)):
            self.hazard("the forward reads the environment")
        if package in _OUTSIDE_PYTHON and _is_users(frame.f_back):
            self.hazard(f"the forward calls {home}.{frame.f_code.co_name}")
        if home == "logging" and _is_users(frame.f_back) and not _says_once(frame):
            # Nothing is written now; another level, and it is.
            self.hazard("the forward writes to a log")
        if package in sys.stdlib_module_names and home != "__main__":
            return
        code = frame.f_code
        self._reading = self.reads.setdefault(code, Reads())
        self.ran(code)
        reason = self._seen.get(code)
        if reason is None:
            reason = self._seen[code] = self._look(code, frame.f_globals)
        if code not in self._handling:
            self._handling[code] = _handles_errors(code)
        if self._handling[code]:
            self._before[frame] = self.operations()
        local = code.co_freevars and _is_inside_its_encloser(frame)
        if not local and (code.co_freevars or any(type(value) in _CONTAINERS for value in frame.f_locals.values())):
            reason = reason or self._look_at_function(code, frame.f_locals)
        if reason:
            self.hazard(reason)

    def _look(self, code: types.CodeType, namespace: dict[str, Any]) -> str:
        """Why calls of this function are nothing for a graph, or ''."""
        names = set(code.co_names)
        if not _DYNAMIC.isdisjoint(names):
            self._reading.dynamic = True
            names |= {const for const in code.co_consts if isinstance(const, str)}
        self._reading.names |= names
        if lost := names & self._unwatchable.keys():
            return f"{code.co_name} reads {self._unwatchable[sorted(lost)[0]]}, which cannot be watched for changes"
        for instruction in dis.get_instructions(code):
            if instruction.opname in _WRITES:
                return f"{code.co_name} writes the global {instruction.argval!r}"
            if instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars:
                return f"{code.co_name} writes {instruction.argval!r} of an enclosing function"
            if instruction.opname == "LOAD_GLOBAL" and instruction.argval in namespace:
                name = str(instruction.argval)
                if reason := self._read(f"the global {name!r}", namespace, name, names):
                    return f"{code.co_name} reads {reason}"
        return ""

    def _look_at_function(self, code: types.CodeType, local: Mapping[str, Any]) -> str:
        """The same for what belongs to one function with this code: its closure, and defaults that it may write to."""
        free = [name for name in code.co_freevars if name != "__class__" and name in local]
        containers = [name for name, value in local.items() if type(value) in _CONTAINERS and name not in free]
        if not free and code in self._closures:
            return self._closures[code]  # type: ignore[index]
        key: Any = (code, *(id(local[name]) for name in free)) if free else code
        if key not in self._closures:
            self._closures[key] = self._look_into(code, local, free, containers)
        return self._closures[key]

    def _look_into(self, code: types.CodeType, local: Mapping[str, Any], free: Sequence[str], containers: Sequence[str]) -> str:
        steady = types.FunctionType | types.BuiltinFunctionType | types.ModuleType | type
        risky = [name for name in free if not isinstance(local[name], steady)]
        for function in functions_of(code) if risky or containers else ():
            cells = dict(zip(code.co_freevars, map(Cell, function.__closure__ or ()), strict=False))
            if any(not cells[name].holds(local[name]) for name in free):
                continue
            for name in risky:
                if reason := self._read(f"{name!r} of an enclosing function", cells[name], "cell_contents", code.co_names):
                    return f"{code.co_name} reads {reason}"
            if function.__defaults__ or function.__kwdefaults__:
                defaults = {"defaults": function.__defaults__, "keywords": function.__kwdefaults__}
                for kind in defaults:
                    self._read(f"a default of {code.co_name}", defaults, kind, ())
        return ""

    def _read(self, what: str, container: Any, key: str, names: Any, depth: int = 3) -> str:
        """Remember something that is read from outside; returns it if it cannot be watched."""
        value = container[key]
        if isinstance(value, type | types.ModuleType):
            self._read_members(what, value, names, depth)
        elif (id(container), key) not in self._known or isinstance(container, Cell):
            # With the container, whose id must not be used again.
            self._known[id(container), key] = (container, self._read_value(what, container, key, value))
        self._reading.note(container, key)
        return self._known.get((id(container), key), (None, ""))[1]

    def _read_value(self, what: str, container: Any, key: str, value: Any) -> str:
        if isinstance(value, Tensor):
            with torch._C.DisableTorchFunction():
                self.held.setdefault(id(value), (value, -1 if value.is_inference() else value._version))
        elif isinstance(value, functools._lru_cache_wrapper):
            self._cached.add(value.__wrapped__.__code__)
        elif isinstance(value, types.FunctionType):
            if vars(value).keys() - {"__wrapped__"}:
                self._remember(f"attributes of {what}", functools.partial(vars, value))
                for name in vars(value):
                    self._reading.note(vars(value), name)
        elif not is_watchable(value) and not _is_trusted(value):
            return f"{what}, a {type(value).__module__}.{type(value).__name__}, which cannot be watched for changes"
        elif not isinstance(value, nn.Module):
            self._remember(what, functools.partial(getitem, container, key))
        return ""

    def _read_members(self, what: str, value: Any, names: Any, depth: int) -> None:
        """What the code may read of a class or a module of a user's."""
        home = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
        if depth == 0 or is_torchs_or_standard(home):
            return
        holders = value.__mro__[:-1] if isinstance(value, type) else (value,)
        for holder in holders:
            items = Members(holder)
            for name in set(names) & vars(holder).keys():
                self._read(f"{name!r} of {what}", items, name, names, depth - 1)

    def _remember(self, what: str, get: Callable[[], Any]) -> None:
        self._outside.append((what, get, snapshot(get())))


def _handles_errors(code: types.CodeType) -> bool:
    """Whether a function goes another way after an error: it has an ``except``, which ``with`` and ``finally`` are not."""
    names = [instruction.opname for instruction in dis.get_instructions(code)]
    bare = any(pair == ("PUSH_EXC_INFO", "POP_TOP") for pair in pairwise(names))
    return bare or "CHECK_EXC_MATCH" in names


def _members(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith(("__", "_abc_"))}


def _is_trusted(value: Any) -> bool:
    return type(value).__module__.split(".")[0] in _TRUSTED or type(value).__name__ in ("ufunc", "TypeVar")


def _has_tensor(value: Any, depth: int = 3) -> bool:
    if isinstance(value, dict | list | tuple) and depth:
        return any(_has_tensor(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def _unwatchable(root: nn.Module) -> Iterator[tuple[str, str]]:
    for path, module in root.named_modules():
        for name, value in module.__dict__.items():
            if name not in _OF_EVERY_MODULE and not is_watchable(value):
                yield name, f"{path + '.' if path else ''}{name}, a {type(value).__module__}.{type(value).__name__}"


def _is_users(frame: types.FrameType | None) -> bool:
    home = frame.f_globals.get("__name__", "") if frame is not None else "torch"
    return home.split(".")[0] not in ("torch", "fxparam", *(() if home == "__main__" else sys.stdlib_module_names))


def _caller(frame: types.FrameType) -> types.FrameType | None:
    """Who called a function of PyTorch's: past its own decorators."""
    caller = frame.f_back
    while caller is not None and str(caller.f_globals.get("__name__", "")).startswith(_DECORATORS):
        caller = caller.f_back
    return caller


def _is_inside_its_encloser(frame: types.FrameType) -> bool:
    """Whether the function that defines this one is running: its variables are those of this forward, and nothing outside."""
    encloser = frame.f_back
    while encloser is not None and encloser.f_code is not _CALL:
        if frame.f_code in encloser.f_code.co_consts:
            return True
        encloser = encloser.f_back
    return False


def _says_once(frame: types.FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name.endswith("_once"):
            return True
        frame = frame.f_back
    return False
