"""What a call is called with: its structure, its plain values, and the kinds of its tensors.

A recorded graph is right for calls of the signature it was recorded with, and for no other. Two calls have the same one if
their arguments have the same structure, equal values where they are no tensors, and tensors of the same kind in the same
places, under the same grad mode and autocast state.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxparam.errors import TraceError
from fxparam.tracer.hazards import ambient_modes

_PLAIN = (int, float, complex, bool, str, bytes, type(None), type(...), enum.Enum)
_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_LEAF = pytree.tree_flatten(0)[1]
_BY_IDENTITY: tuple[type, ...] = (type, types.FunctionType, types.BuiltinFunctionType, nn.Module)


@dataclasses.dataclass(frozen=True)
class Structure:
    """How leaves make up a value: a tree of PyTorch's containers, whose leaves may be objects with fields of their own.

    Attributes:
        tree: the tree of containers.
        inner: for each of its leaves, how an object there is made up; None for a leaf.
        cls: the class of such an object.
        names: the names of its attributes; empty for a tuple.
    """

    tree: pytree.TreeSpec
    inner: tuple[Structure | None, ...]
    cls: type | None = None
    names: tuple[str, ...] = ()


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """The leaves of a value and its structure: containers, data classes and named tuples are taken apart.

    What contains itself is one leaf.
    """
    try:
        return _flatten(value)
    except RecursionError:
        return [value], Structure(_LEAF, (None,))


def _flatten(value: Any) -> tuple[list[Any], Structure]:
    leaves, tree = pytree.tree_flatten(value, is_leaf=lambda part: isinstance(part, torch.Size))
    found: list[Any] = []
    inner: list[Structure | None] = []
    for leaf in leaves:
        fields = _fields(leaf)
        if fields is None:
            found.append(leaf)
            inner.append(None)
        else:
            parts, structure = _flatten(list(fields.values()))
            found += parts
            names = () if isinstance(leaf, tuple) else tuple(fields)
            inner.append(dataclasses.replace(structure, cls=type(leaf), names=names))
    return found, Structure(tree, tuple(inner))


def unflatten(leaves: Sequence[Any], structure: Structure) -> Any:
    """The value with these leaves. Objects are made without their constructor, as copies are."""
    value, rest = _unflatten(list(leaves), structure)
    assert not rest
    return value


def _unflatten(leaves: list[Any], structure: Structure) -> tuple[Any, list[Any]]:
    parts: list[Any] = []
    for inner in structure.inner:
        if inner is None:
            parts.append(leaves[0])
            leaves = leaves[1:]
        else:
            values, leaves = _unflatten(leaves, inner)
            parts.append(_object(inner, values))
    return pytree.tree_unflatten(parts, structure.tree), leaves


def _object(structure: Structure, values: Sequence[Any]) -> Any:
    assert structure.cls is not None
    if issubclass(structure.cls, tuple):
        return tuple.__new__(structure.cls, values)
    made = SimpleNamespace() if structure.cls is SimpleNamespace else object.__new__(structure.cls)
    made.__dict__.update(zip(structure.names, values, strict=True))
    return made


def _fields(leaf: Any) -> dict[str, Any] | None:
    """The parts of an object that is nothing but its parts; None for any other."""
    if isinstance(leaf, tuple) and hasattr(leaf, "_fields"):
        # PackedSequence: a subclass of a named tuple, which PyTorch's trees take for a leaf.
        return dict(zip(leaf._fields, leaf, strict=True))
    if isinstance(leaf, type) or type(leaf).__module__.startswith("torch."):
        return None
    cls: Any = type(leaf)
    if not (dataclasses.is_dataclass(leaf) or cls is SimpleNamespace) or isinstance(leaf, dict | list | nn.Module):
        return None
    slots = any(getattr(base, "__slots__", ()) for base in cls.__mro__)
    return None if slots or not hasattr(leaf, "__dict__") else dict(vars(leaf))


@dataclasses.dataclass(frozen=True)
class Signature:
    """What calls of one kind have in common. Equal and hashable by value.

    Attributes:
        structure: how the arguments are made up.
        leaves: for each leaf what must be the same.
        modes: grad mode, inference mode, autocast and default dtype.
    """

    structure: Structure
    leaves: tuple[object, ...]
    modes: tuple[object, ...]

    def __hash__(self) -> int:
        return hash((self.leaves, self.modes[:2]))


def signature_of(leaves: Sequence[Any], structure: Structure, *, shapes: bool) -> Signature:
    """The signature of a call.

    Args:
        leaves: of its arguments.
        structure: of its arguments.
        shapes: whether the shapes and strides of tensors are part of it.

    Raises:
        TraceError: an argument is something that no graph can be guarded for; the message names its type.
    """
    first: dict[int, int] = {}
    keys = tuple(
        _tensor_key(leaf, first.setdefault(id(leaf), at), shapes=shapes) if isinstance(leaf, Tensor) else _plain_key(leaf)
        for at, leaf in enumerate(leaves)
    )
    return Signature(structure, keys, ambient_modes())


def _tensor_key(tensor: Tensor, first: int, *, shapes: bool) -> object:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        raise TraceError(f"an argument is a {type(tensor).__name__} of its own kind ({tensor.layout})")
    if tensor.is_nested:
        raise TraceError("an argument is a nested tensor")
    if tensor.__dict__:
        raise TraceError(f"an argument is a tensor with attributes of its own: {', '.join(tensor.__dict__)}")
    lazy = (tensor.is_conj(), tensor.is_neg(), tensor.is_inference())
    kind = (first, type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.dim(), lazy)
    return (*kind, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()) if shapes else kind


def _plain_key(value: Any) -> object:
    if isinstance(value, (*_PLAIN, *_OF_TORCH, torch.Size)):
        # 1, 1.0 and True are equal, and not the same to a model.
        return (type(value), repr(value) if isinstance(value, float | complex) else value)
    if isinstance(value, _BY_IDENTITY):
        return ("is", _Same(value))
    if isinstance(value, slice):
        return (slice, _plain_key(value.start), _plain_key(value.stop), _plain_key(value.step))
    raise TraceError(f"an argument is a {type(value).__module__}.{type(value).__name__}, which a graph cannot be guarded for")


class _Same:
    """Equal to another one only if both hold the very same object, which stays alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
