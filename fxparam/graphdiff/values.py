"""Constants, types and tensors as text: the same for equal values in any process."""

from __future__ import annotations

import enum
import hashlib
import inspect
import re
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata

_SMALL = 8  # tensors up to this size are written out, larger ones are hashed


def fill(template: str, names: list[str]) -> str:
    """``template`` with its ``%`` replaced by ``names`` in turn."""
    rest = iter(names)
    return re.sub("%", lambda _: next(rest), template)


def safe_text(value: Any) -> str:
    """``str(value)`` on one line, without memory addresses and ``%`` (which stands for values of nodes)."""
    return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))).strip().replace("%", r"\x25")


def constant_text(value: Any, nodes: list[fx.Node] | None = None) -> str:
    """An argument in source form. Each fx node in it becomes ``%`` and is appended to ``nodes``."""
    if isinstance(value, fx.Node):
        if nodes is None:
            raise TypeError(f"a node ({value.name}) where a constant was expected")
        nodes.append(value)
        return "%"
    if isinstance(value, tuple):
        items = ", ".join(constant_text(v, nodes) for v in value)
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, list):
        return f"[{', '.join(constant_text(v, nodes) for v in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{safe_text(repr(k))}: {constant_text(v, nodes)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(constant_text(v, nodes) for v in (value.start, value.stop, value.step))})"
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, str | bytes):
        # Tabs and line breaks are escaped by repr; % would be taken for a node's value.
        return repr(value).replace("%", r"\x25")
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return safe_text(repr(value))


def type_text(value: Any, symbols: dict[str, str] | None = None) -> str:
    """``float32[2, s0]`` for a tensor. Symbolic sizes are numbered by first appearance: their names do not count."""
    if isinstance(value, Tensor | TensorMetadata):
        sizes = ", ".join(size_text(size, symbols) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(type_text(v, symbols) for v in value)})"
    return type(value).__name__


def size_text(size: Any, symbols: dict[str, str] | None = None) -> str:
    """One size of a shape; free symbols in it are renamed through ``symbols``."""
    if isinstance(size, int):
        return str(size)
    names = {} if symbols is None else symbols
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.setdefault(m.group(), f"s{len(names)}"), str(size))


def tensor_detail(tensor: Tensor, *, values: bool) -> tuple[tuple[str, str], ...]:
    """Type of a tensor and, on request, its value bit for bit (a tensor without storage has none)."""
    if torch.nn.parameter.is_lazy(tensor):
        return (("type", "uninitialized"),)
    kind = (("type", type_text(tensor)),)
    if not values or tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return kind
    dense = tensor.detach().cpu().to_dense() if tensor.layout != torch.strided else tensor.detach().cpu()
    raw = dense.contiguous().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (*kind, ("value", bytes_text(raw, dense.tolist() if dense.numel() <= _SMALL else None)))


def bytes_text(raw: bytes, small: Any = None) -> str:
    """A value: written out where it is small and says all (no NaN), else as a hash of its bytes."""
    readable = safe_text(repr(small))
    return f"sha256:{hashlib.sha256(raw).hexdigest()[:16]}" if small is None or "nan" in readable else readable
