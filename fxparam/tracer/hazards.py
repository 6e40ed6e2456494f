"""What every tracer loses without a word, and how to notice: watches around a trace.

A trace in which a watch fired is not used; what was traced stays Python.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fxparam.errors import TraceError


class Hazard(TraceError):
    """Something happened during a trace that the graph would not show."""


_OUTSIDE = frozenset(
    """time datetime _datetime _contextvars _io posix nt _random _socket _posixsubprocess _ctypes random numpy
    numpy.random""".split()
)
_BUILTINS_OUTSIDE = frozenset({"print", "input", "open", "exec", "eval"})


def outside_call(function: Any) -> str:
    """The name of a function written in C that acts on the world or asks it (clocks, files, output, chance), or ``""``."""
    owner = getattr(function, "__self__", None)
    home = getattr(function, "__module__", None) or getattr(owner, "__module__", None) or type(owner).__module__
    name = getattr(function, "__name__", "")
    if home == "builtins":
        return f"{name}()" if name in _BUILTINS_OUTSIDE else ""
    return f"{home}.{name}()" if home in _OUTSIDE else ""


class _Refusal(threading.local):
    """How many traces of this thread refuse autograd functions."""

    depth = 0


_refusal = _Refusal()
_apply: Any = torch.autograd.Function.__dict__["apply"]
_patching = threading.Lock()
_patched = 0


def _apply_or_refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
    if _refusal.depth:
        raise Hazard(f"torch.autograd.Function {cls.__name__} has a backward of its own, which a trace loses")
    return _apply.__get__(None, cls)(*args, **kwargs)


@contextmanager
def no_autograd_functions() -> Iterator[None]:
    """Raise ``Hazard`` when a ``torch.autograd.Function`` is applied: a trace keeps its forward and loses its backward.

    Other threads, which see the same class, are not concerned.
    """
    _patch(1)
    _refusal.depth += 1
    try:
        yield
    finally:
        _refusal.depth -= 1
        _patch(-1)


def _patch(change: int) -> None:
    global _patched
    with _patching:
        _patched += change
        torch.autograd.Function.apply = classmethod(_apply_or_refuse) if _patched else _apply  # type: ignore[method-assign]


def ambient_modes() -> tuple[object, ...]:
    """The modes under which an operation runs: grad, inference, autocast per device type, default dtype."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, torch.get_default_dtype())


def generator_states() -> tuple[Tensor, ...]:
    """The states of PyTorch's default generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return (torch.get_rng_state(), *cuda)


def python_random_states() -> tuple[object, ...]:
    """The states of the generators of Python and, if it is loaded, of NumPy, as values to compare."""
    numpy = sys.modules.get("numpy")
    legacy = numpy.random.get_state(legacy=False) if numpy is not None else None
    return (random.getstate(), (legacy["state"]["key"].tobytes(), legacy["state"]["pos"]) if legacy else None)


@contextmanager
def preserved_generators() -> Iterator[list[bool]]:
    """Put every generator back at the end. Yields a list that then holds whether any of them was used."""
    torch_before, python_before = generator_states(), python_random_states()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    used: list[bool] = []
    try:
        yield used
    finally:
        same = all(map(torch.equal, torch_before, generator_states())) and python_before == python_random_states()
        used.append(not same)
        if not same:
            torch.set_rng_state(torch_before[0])
            for device, state in enumerate(torch_before[1:]):
                torch.cuda.set_rng_state(state, device)
            random.setstate(python_before[0])  # type: ignore[arg-type]
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def user_line(frame: FrameType | None = None) -> str:
    """``file.py:12`` of the innermost frame that belongs neither to PyTorch nor to fxparam, or ``""``."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "fxparam", "contextlib"):
            return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def error_line(error: BaseException) -> str:
    """``file.py:12`` of the innermost frame of an error that belongs neither to PyTorch nor to fxparam, or ``""``."""
    found = ""
    traceback = error.__traceback__
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "fxparam", "contextlib"):
            found = f"{traceback.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


def nodes_behind(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graph behind these tensors, each once."""
    todo: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [following for following, _ in node.next_functions]
