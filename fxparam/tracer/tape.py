"""The tape of a forward: every operation on tensors that real execution went through, in order.

A ``TorchFunctionMode`` sees each call of PyTorch's Python API once, at the level at which the model made it. Tensors are told
apart by identity, so the tape keeps all of them alive while it is made. What the code asked a tensor for besides computing with
it (its shape, its value) is noted as well: a graph bakes the answer in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxparam.program.effects import is_pure_operator
from fxparam.tracer.hazards import ambient_modes, user_line

_KIND_QUESTIONS = frozenset(
    """dtype device is_floating_point is_complex is_cuda is_cpu is_meta is_sparse is_quantized is_nested is_mps is_xpu layout
    itemsize element_size get_device is_inference is_signed is_conj is_neg ndim dim ndimension type names has_names
    is_mkldnn is_xla is_mtia is_maia is_hpu is_ipu is_vulkan is_sparse_csr""".split()
)
_SHAPE_QUESTIONS = frozenset("size shape numel nelement nbytes stride is_contiguous storage_offset __len__".split())
_SHAPE_QUESTIONS |= {"is_same_size", "is_non_overlapping_and_dense", "dim_order"}
_DATA_DEPENDENT = frozenset(
    """nonzero argwhere masked_select unique unique_consecutive bincount nonzero_static _pack_padded_sequence
    _pad_packed_sequence combinations histogram histogramdd masked_select segment_reduce to_sparse coalesce""".split()
)
_STATE = frozenset(
    """requires_grad_ register_hook register_post_accumulate_grad_hook backward retain_grad set_ resize_ resize_as_ detach_
    share_memory_ pin_memory numpy __array__ __dlpack__ data_ptr as_subclass rename rename_ to_dense apply_ map_ map2_
    share_memory_ untyped_storage storage""".split()
)
_FACTORIES = frozenset(
    """arange bartlett_window blackman_window empty eye full hamming_window hann_window kaiser_window linspace logspace ones
    tensor tril_indices triu_indices zeros scalar_tensor as_tensor""".split()
)
_SWAPPED = {
    "__rsub__": operator.sub,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rpow__": operator.pow,
    "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod,
    "__rmatmul__": operator.matmul,
    "__rlshift__": operator.lshift,
    "__rrshift__": operator.rshift,
}
_DUNDERS = {
    f"__{name}__": getattr(operator, name)
    for name in "getitem setitem eq ne lt le gt ge add sub mul truediv floordiv mod pow matmul neg pos abs invert".split()
} | {f"__{name}__": getattr(operator, f"{name}_" if name in ("and", "or") else name) for name in ("and", "or", "xor")}


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor on a tape, by its number."""

    number: int


def refs_in(value: Any) -> Iterator[Ref]:
    """The tensors among the arguments or in the result of an operation."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from refs_in(item)


@dataclass(frozen=True, eq=False, slots=True)
class Op:
    """One operation.

    Attributes:
        op: ``"call_function"``, ``"call_method"`` or ``"call_module"``, as in a graph.
        target: what is called.
        args: its arguments, tensors as ``Ref``.
        kwargs: its keyword arguments.
        output: its result, tensors as ``Ref``.
        line: the source line.
        grad: whether grad mode was on.
    """

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    line: str
    grad: bool


class Tape(TorchFunctionMode):
    """Records while it is active, in one thread.

    Args:
        hazard: called with what happened that a graph would not show.
        asked: called when the code asked for the shape of a tensor.
        ran: called after each operation, with the modes it ran under.

    Attributes:
        tensors: every tensor met, by number.
        ops: the operations.
        numbers: the number of each tensor, by ``id``.
        exposed: the tensors whose ``data`` was taken, to be written without a trace, perhaps.
    """

    def __init__(
        self, hazard: Callable[[str], None], asked: Callable[[], None], ran: Callable[[tuple[object, ...]], None]
    ) -> None:
        super().__init__()
        self.hazard, self.asked, self.ran = hazard, asked, ran
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.numbers: dict[int, int] = {}
        self.exposed: list[Tensor] = []
        # Tensors that follow from nothing but literals: their values may be asked for.
        self._literal: set[int] = set()

    def ref(self, tensor: Tensor) -> Ref:
        """The number of a tensor; a new one if it has not been met."""
        number = self.numbers.get(id(tensor))
        if number is None:
            number = self.numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return Ref(number)

    def refs(self, value: Any) -> Any:
        """A value with its tensors as ``Ref``; arguments that a graph cannot hold are a hazard."""
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return tuple(self.refs(item) for item in value)
        if isinstance(value, list | tuple):
            return type(value)(self.refs(item) for item in value)
        if isinstance(value, dict):
            return {key: self.refs(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self.refs(value.start), self.refs(value.stop), self.refs(value.step))
        if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
            return value.item()
        if value is not None and not isinstance(value, _ARGUMENTS):
            self.hazard(f"an operation takes a {type(value).__module__}.{type(value).__name__}")
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        if name == "_set_grad_enabled":
            return func(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in given):
            self.hazard(f"{name} is given a tensor of a class of its own")
        # Before it runs: it may write to its arguments.
        taken = (self.refs(tuple(args)), self.refs(dict(kwargs)))
        result = func(*args, **kwargs)
        produced = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if produced or name == "__setitem__":
            self._record(func, name, taken, given, result, produced)
        else:
            self._question(name, given)
        return result

    def _record(
        self, func: Any, name: str, taken: tuple[Any, Any], given: list[Tensor], result: Any, produced: list[Tensor]
    ) -> None:
        if name in _STATE or name == "grad":
            self.hazard(f"{name} changes or shows more of a tensor than its values")
        if _shape_follows_data(name, given, taken):
            self.hazard(f"the shape of what {name} yields depends on values")
        if not isinstance(result, Tensor) and not hasattr(result, "_fields"):
            # How many there are follows from a shape.
            self.asked()
        for tensor in produced:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
                self.hazard(f"{name} yields a {type(tensor).__name__} ({tensor.layout})")
        if name == "data":
            self.exposed += given
        op, target, args, kwargs = _call_of(func, name, *taken)
        self.ops.append(Op(op, target, args, kwargs, self.refs(result), user_line(), torch.is_grad_enabled()))
        self._note_literals(name, given, produced)
        self.ran(ambient_modes())

    def _note_literals(self, name: str, given: list[Tensor], produced: list[Tensor]) -> None:
        numbers = {self.ref(tensor).number for tensor in given}
        literal = numbers <= self._literal
        if literal and (name in _FACTORIES if not numbers else is_pure_operator(name) or name in ("__getitem__", "__get__")):
            self._literal |= {self.ref(tensor).number for tensor in produced}
        elif numbers & self._literal and (name == "__setitem__" or not is_pure_operator(name)):
            # It may have been written, and with it what it is a view of.
            self._literal.clear()

    def note_module(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A module that was called as a whole, with nothing of it on the tape."""
        self.ops.append(
            Op("call_module", path, self.refs(args), self.refs(kwargs), self.refs(output), user_line(), torch.is_grad_enabled())
        )
        self._literal.clear()
        self.ran(ambient_modes())

    def _question(self, name: str, given: list[Tensor]) -> None:
        if name in _SHAPE_QUESTIONS:
            self.asked()
        elif name.endswith(" ="):
            self.hazard(f"it assigns an attribute of a tensor: {name} ...")
        elif name in _KIND_QUESTIONS or (name == "_assert" and not given):
            return
        elif name in _STATE or not given or not {self.ref(tensor).number for tensor in given} <= self._literal:
            self.hazard(f"it asks a tensor for {name.strip('_')}, which a graph cannot know ahead")


_ARGUMENTS = (
    *(int, float, complex, bool, str, bytes, type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def _name_of(func: Any) -> str:
    name = getattr(func, "__name__", "") or str(func)
    if name in ("__get__", "__set__"):
        accessed = getattr(func.__self__, "__name__", "") or getattr(getattr(func.__self__, "fget", None), "__name__", "")
        return str(accessed) if name == "__get__" else f"{accessed} ="
    return name


def _call_of(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, Any, Any]:
    """The same call as a node of a graph has it."""
    if getattr(func, "__name__", "") == "__get__":
        return "call_function", getattr, (args[0], name), {}
    if _is_method(func):
        if name in _SWAPPED:
            return "call_function", _SWAPPED[name], (args[1], args[0]), {}
        if name in _DUNDERS and not kwargs:
            return "call_function", _DUNDERS[name], args, {}
        return "call_method", name, args, kwargs
    return "call_function", func, args, kwargs


def _is_method(func: Any) -> bool:
    if type(func).__name__ in ("method_descriptor", "wrapper_descriptor"):
        return True
    return str(getattr(func, "__qualname__", "")).startswith(("Tensor.", "TensorBase."))


def _shape_follows_data(name: str, given: list[Tensor], taken: tuple[Any, Any]) -> bool:
    if name in _DATA_DEPENDENT or (name == "where" and len(given) == 1):
        return True
    if name == "__getitem__":
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
    if name == "repeat_interleave":
        return len(given) > 1 and taken[1].get("output_size") is None
    if name == "one_hot":
        return len(taken[0]) < 2 and taken[1].get("num_classes", -1) == -1
    return name in ("tensor_split", "split_with_sizes") and len(given) > 1
