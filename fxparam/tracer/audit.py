"""Which Python a symbolic trace may run: only code whose effect the graph shows completely.

A trace runs the model's Python once and keeps what it did to traced values. Everything else that code does or looks at is
lost or baked in. So each function is looked at *before* it runs for the first time in a trace, as bytecode, and refused if it

- writes anything but local variables: attributes, globals, closures, or items of containers that outlive the call;
- catches errors or enters contexts (``try``, ``with``): they could swallow a refusal, or switch modes;
- asks what a graph cannot answer: the type, identity, hash or text of a value, the modes it runs under;
- reads what cannot be watched for changes: global state, iterators, random generators, arrays, objects with slots.

What it does read and what can be watched (numbers, strings, containers of such, plain objects) is collected for a
``Watch``. Refusing costs speed; accepting wrongly would cost a right result. Functions of PyTorch
itself are trusted, apart from those that reach into autograd.
"""

from __future__ import annotations

import builtins
import dis
import gc
import itertools
import math
import operator
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxparam.tracer.hazards import Hazard, outside_call
from fxparam.tracer.outside import cells_of
from fxparam.tracer.watch import ClassItems, is_watchable

_WRITES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "DELETE_SUBSCR", "IMPORT_NAME", "STORE_NAME")
_MUTATORS = frozenset(
    "append appendleft extend insert update setdefault pop popitem popleft clear remove discard sort reverse".split()
)
_BUILTINS = frozenset(
    """abs all any bool dict divmod enumerate filter float frozenset getattr int isinstance len list map max min pow range
    reversed round set slice sorted sum super tuple zip AssertionError Exception IndexError KeyError NotImplementedError
    RuntimeError TypeError ValueError True False None NotImplemented Ellipsis __build_class__ print""".split()
) - {"print"}
_QUESTIONS = frozenset(
    """is_grad_enabled is_inference_mode_enabled is_autocast_enabled is_compiling is_tracing is_scripting requires_grad
    grad_fn grad data_ptr _version __dict__ __class__ current_device initial_seed get_rng_state get_default_dtype
    get_num_threads""".split()
)
# PyTorch's Python that does something a graph of operations does not show.
_MODE_SWITCHES = frozenset({"no_grad", "enable_grad", "set_grad_enabled", "inference_mode", "autocast"})
_INTERVENES = (
    *("torch.autograd.", "torch.func.", "torch._functorch.", "torch.utils.checkpoint."),
    *("torch.random.", "torch.distributed."),
)
_OF_MODULES = frozenset(
    """__call__ _wrapped_call_impl _call_impl __getattr__ children named_children modules named_modules parameters
    named_parameters buffers named_buffers get_submodule get_parameter get_buffer extra_repr""".split()
)
_MODULES = (torch, math, operator)
_STANDARD = frozenset({"typing", "operator", "math", "collections", "functools", "enum", "abc", "numbers", "types"})


class Audit:
    """Looks at every function that a trace is about to run.

    Args:
        root: the model.

    Attributes:
        names: every attribute name that the code looked at mentions.
        functions: the functions and classes it reads by name, to be watched.
    """

    def __init__(self, root: nn.Module) -> None:
        self.names: set[str] = set()
        self.globals: list[tuple[Any, str]] = []
        self.functions: list[types.FunctionType] = []
        self._seen: set[types.CodeType] = set()
        self._with_defaults: set[types.CodeType] = set()
        self._unwatchable: dict[str, str] = {}
        self._containers: dict[str, str] = {}
        for path, module in root.named_modules():
            for name, value in module.__dict__.items():
                if name in _OF_EVERY_MODULE:
                    continue
                where = f"{path + '.' if path else ''}{name}"
                if not is_watchable(value):
                    self._unwatchable[name] = f"{where}, a {type(value).__module__}.{type(value).__name__}"
                elif isinstance(value, list | dict | set):
                    self._containers[name] = where
        self._classes = {type(module) for module in root.modules() if not type(module).__module__.startswith("torch.")}
        for cls in self._classes:
            self._look_at_class(cls)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at everything that runs inside the block in this thread."""
        before, collecting = sys.getprofile(), gc.isenabled()
        # The garbage collector runs code of others in between.
        gc.disable()
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(before)
            if collecting:
                gc.enable()

    def _on_event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and _is_users(frame) and (called := outside_call(arg)):
            raise Hazard(f"{frame.f_code.co_name} calls {called}")
        if event != "call" or frame.f_code in self._seen:
            return
        home = frame.f_globals.get("__name__", "")
        if home.startswith(("torch", "fxparam")) and home.split(".")[0] in ("torch", "fxparam"):
            if f"{home}.".startswith(_INTERVENES) and _is_users(frame.f_back):
                raise Hazard(f"the forward calls {home}.{frame.f_code.co_name}, which a graph of operations does not show")
            if home == "torch.nn.modules.module" and frame.f_code.co_name not in _OF_MODULES and _is_users(frame.f_back):
                raise Hazard(f"the forward calls {frame.f_code.co_name}() of a module, which changes it")
            return
        if home.split(".")[0] in sys.stdlib_module_names and home != "__main__":
            if _is_users(frame.f_back) and home.split(".")[0] not in _STANDARD:
                raise Hazard(f"the forward calls {home}.{frame.f_code.co_name}")
            return
        self._look(frame.f_code, frame.f_globals, frame.f_locals)
        self._seen.add(frame.f_code)

    # --- one function

    def _look(self, code: types.CodeType, namespace: dict[str, Any], local: dict[str, Any]) -> None:
        at = f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}"
        names = set(code.co_names)
        if code.co_exceptiontable:
            what = "switches grad mode or autocast" if names & _MODE_SWITCHES else "has a try or with statement"
            raise Hazard(f"{code.co_name} {what} ({at})")
        if code in self._with_defaults:
            raise Hazard(f"{code.co_name} has a default that outlives the call ({at})")
        if asked := names & _QUESTIONS:
            raise Hazard(f"{code.co_name} asks for {sorted(asked)[0]} ({at})")
        if lost := names & self._unwatchable.keys():
            raise Hazard(
                f"{code.co_name} reads {self._unwatchable[sorted(lost)[0]]}, which cannot be watched for changes ({at})"
            )
        instructions = list(dis.get_instructions(code))
        self._check_writes(code, names, instructions, at)
        self._check_questions(code, instructions, at)
        for number, instruction in enumerate(instructions):
            if instruction.opname == "LOAD_GLOBAL":
                self._check_global(code, instructions, number, namespace, at)
        for name in code.co_freevars:
            if name != "__class__" and name in local:
                self._check_value(local[name], f"{code.co_name} reads {name} of an enclosing function", at)
                self.globals += [(cell, name) for cell in cells_of(code, name) if cell.holds(local[name])]
        self.names |= names

    def _check_writes(self, code: types.CodeType, names: set[str], instructions: list[dis.Instruction], at: str) -> None:
        stores = False
        for instruction in instructions:
            if instruction.opname in _WRITES:
                raise Hazard(f"{code.co_name} writes {instruction.argval!r} ({at})")
            if instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars:
                raise Hazard(f"{code.co_name} writes {instruction.argval} of an enclosing function ({at})")
            stores = stores or instruction.opname == "STORE_SUBSCR"
        if (stores or names & _MUTATORS) and (kept := names & self._containers.keys()):
            raise Hazard(f"{code.co_name} may write into {self._containers[sorted(kept)[0]]} ({at})")

    def _check_questions(self, code: types.CodeType, instructions: list[dis.Instruction], at: str) -> None:
        for before, instruction in itertools.pairwise(instructions):
            constant = before.opname == "LOAD_CONST" and not isinstance(before.argval, types.CodeType)
            if instruction.opname in ("IS_OP", "CONTAINS_OP") and not constant:
                raise Hazard(f"{code.co_name} asks for the identity of a value ({at})")
            if instruction.opname in ("FORMAT_VALUE", "FORMAT_SIMPLE") and not _raises(instructions, instruction):
                raise Hazard(f"{code.co_name} makes a text of a value ({at})")

    # --- what it reads

    def _check_global(
        self, code: types.CodeType, instructions: list[dis.Instruction], number: int, namespace: dict[str, Any], at: str
    ) -> None:
        name = str(instructions[number].argval)
        if name not in namespace:
            if name not in _BUILTINS and hasattr(builtins, name):
                raise Hazard(f"{code.co_name} calls {name}() ({at})")
            return
        value = namespace[name]
        self.globals.append((namespace, name))
        for following in instructions[number + 1 :]:
            if not isinstance(value, types.ModuleType) or following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            owner, name = value, str(following.argval)
            if not hasattr(owner, name):
                break
            value = getattr(owner, name)
            if owner not in _MODULES and not owner.__name__.startswith("torch."):
                self.globals.append((owner.__dict__, name))
        self._check_value(value, f"{code.co_name} reads the global {name}", at)

    def _check_value(self, value: Any, what: str, at: str) -> None:
        if (getattr(value, "__module__", None) or "").split(".")[0] in ("random", "numpy"):
            raise Hazard(f"{what}: random numbers and arrays that are not PyTorch's are baked in ({at})")
        if isinstance(value, types.FunctionType):
            self._look_at_function(value, at)
        elif isinstance(value, type):
            trusted = value.__module__.startswith(("torch", "builtins", "collections", "typing", "enum"))
            if not trusted and not issubclass(value, nn.Module | tuple):
                # Made by a constructor of its own: that is looked at when it runs.
                self._look_at_class(value)
        elif isinstance(value, types.BuiltinFunctionType):
            owner = getattr(value, "__self__", None)
            # Of a method of a class written in C (datetime.now) only the class knows where it is from.
            home = value.__module__ or getattr(owner, "__module__", None) or type(owner).__module__
            if home.startswith(("_random", "random", "numpy")):
                raise Hazard(f"{what}: random numbers that are not PyTorch's are baked in ({at})")
            if not (home.startswith(("torch", "math", "_operator", "builtins")) or owner in (torch, math)):
                raise Hazard(f"{what}, a function of {home} ({at})")
        elif isinstance(value, types.ModuleType | nn.Module) or _is_of_torch(value):
            return
        elif isinstance(value, list | dict | set) or not is_watchable(value):
            raise Hazard(f"{what}, a {type(value).__name__} that outlives the call ({at})")

    def _look_at_function(self, function: types.FunctionType, at: str) -> None:
        if function in self.functions or (function.__module__ or "").startswith("torch"):
            return
        self.functions.append(function)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if isinstance(default, list | dict | set) or not (is_watchable(default) or _is_of_torch(default)):
                raise Hazard(f"{function.__name__} has a default that outlives the call ({at})")

    def _look_at_class(self, cls: type) -> None:
        """Note the attributes of a class that its code may read or write through an instance."""
        for base in cls.__mro__:
            if base.__module__.startswith(("torch", "builtins", "typing", "abc")):
                continue
            for name, value in vars(base).items():
                if name.startswith("__") and name.endswith("__"):
                    continue
                if isinstance(value, types.FunctionType):
                    for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                        if isinstance(default, list | dict | set) or not (is_watchable(default) or _is_of_torch(default)):
                            self._with_defaults.add(value.__code__)
                elif isinstance(value, property | classmethod | staticmethod | types.MemberDescriptorType):
                    continue
                elif isinstance(value, list | dict | set) or not is_watchable(value):
                    self._unwatchable[name] = f"{base.__name__}.{name}, a {type(value).__name__}"
                else:
                    self.globals.append((ClassItems(base), name))


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _is_users(frame: types.FrameType | None) -> bool:
    home = frame.f_globals.get("__name__", "") if frame is not None else "torch"
    return home.split(".")[0] not in ("torch", "fxparam", *(() if home == "__main__" else sys.stdlib_module_names))


def _is_of_torch(value: Any) -> bool:
    return (
        type(value).__module__.startswith("torch") and isinstance(value, torch.dtype | torch.device | torch.Size | torch.layout)
    ) or isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket | torch.memory_format)


def _raises(instructions: list[dis.Instruction], instruction: dis.Instruction) -> bool:
    """Whether what is formatted here goes into an error: nothing but a raise follows before the next jump."""
    after = instructions[instructions.index(instruction) :]
    for following in after:
        if following.opname == "RAISE_VARARGS":
            return True
        if following.opname.startswith(("RETURN", "STORE", "POP_JUMP", "JUMP", "POP_TOP")):
            return False
    return False
