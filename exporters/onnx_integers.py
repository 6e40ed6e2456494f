"""Weights on a grid of integers, stored as these integers: ``W = (q - z) · s``.

    w (float) -> layer    becomes    w, w.scale, w.zero_point -> DequantizeLinear -> w.dequantized -> layer

``w`` keeps its name and shape and holds ``q``; ``w.scale`` is float32, a scalar or one number for each index of ``axis``, and
``w.zero_point`` has its shape and the dtype of ``q``. It is all zeros for symmetric grids: TensorRT takes no other, and ONNX
Runtime has integer kernels only where it is written out. A half-precision weight is dequantized in float32 and cast, as it
was computed.

``q`` is int4 up to 4 bits (from opset 21 on, and with an even number of elements, which TensorRT asks for), int8 up to 8 and
int16 up to 16 bits (from opset 21 on). Only what gives the weight's own bits is replaced.

ONNX Runtime's default options compute ``DequantizeLinear`` and ``MatMul`` (a linear layer on three and more dimensions) as one
kernel that rounds the *activations* to 8 bits as well. The session option ``session.qdq_matmulnbits_accuracy_level`` set to
``"1"`` keeps them in float32; ``session.disable_quant_qdq`` set to ``"1"`` dequantizes at load and computes everything in
floating point, and is what the exporter's own check runs with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx_ir as ir

SCALE, ZERO_POINT, DEQUANTIZED = ".scale", ".zero_point", ".dequantized"
"""What the names of a weight's step, zero point and floating-point value end in."""

_NARROW_OPSET = 21  # the first whose DequantizeLinear takes int4 and int16


@final
@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight as integers.

    Attributes:
        values: ``q``, int8 or int16, of the weight's shape.
        scale: ``s``, a scalar, or of the size of dimension ``axis``.
        zero_point: ``z``, of the scale's shape.
        axis: the dimension with a scale for each index, counted from the front; None: one scale.
        bits: how many bits an integer needs.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    bits: int

    def weight(self, dtype: torch.dtype) -> Tensor:
        """``(q - z) · s`` computed in the scale's dtype, as ``dtype``."""
        shape = [-1 if d == self.axis else 1 for d in range(self.values.ndim)] if self.axis is not None else []
        scale, zero = self.scale.reshape(shape), self.zero_point.reshape(shape)
        return ((self.values.to(scale.dtype) - zero.to(scale.dtype)) * scale).to(dtype)

    def gives(self, tensor: Tensor) -> bool:
        """Whether these integers are a floating-point tensor, bit for bit."""
        if tensor.shape != self.values.shape or not tensor.is_floating_point():
            return False
        pairs = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (self.weight(tensor.dtype), tensor))
        return torch.equal(*pairs)

    def named(self, name: str) -> dict[str, Tensor]:
        """Its tensors under the names that a file gives them."""
        return {name: self.values, name + SCALE: self.scale, name + ZERO_POINT: self.zero_point}


@final
@dataclass(frozen=True)
class StoredIntegers:
    """How a file stores a weight as integers.

    Attributes:
        bits: how many bits an integer needs.
        dtype: the dtype in the file: ``"INT4"``, ``"INT8"`` or ``"INT16"``.
        axis: the dimension with a scale for each index; None: one scale.
        bytes_before: the size of the weight as floating-point numbers.
        bytes_after: the size of integers, scale and zero point.
    """

    bits: int
    dtype: str
    axis: int | None
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        grid = "one scale" if self.axis is None else f"a scale for each index of dimension {self.axis}"
        return f"{self.bits} bits as {self.dtype}, {grid}, {self.bytes_before:,} -> {self.bytes_after:,} bytes"


def store_integers(model: ir.Model, weights: Mapping[str, IntegerWeight]) -> tuple[dict[str, StoredIntegers], list[str]]:
    """Replace floating-point initializers by integers that dequantize to them, in place.

    Args:
        model: an exported model; its initializers hold torch tensors.
        weights: by the names of initializers; other names are passed over.

    Returns:
        What was replaced, by name, and a note on each weight that stays floating-point.
    """
    opset = model.opset_imports[""]
    stored, notes = {}, []
    for name, value in list(model.graph.initializers.items()):
        weight = weights.get(name)
        if weight is None:
            continue
        if why := _obstacle(value, weight, opset):
            notes.append(f"{name} stays floating-point: {why}")
        else:
            stored[name] = _replace(model.graph, value, weight, opset)
    return stored, notes


def _obstacle(value: ir.Value, weight: IntegerWeight, opset: int) -> str | None:
    """Why a weight cannot be stored as integers."""
    tensor: Any = getattr(value.const_value, "raw", None)
    if weight.scale.dtype != torch.float32:
        return f"its scale is {weight.scale.dtype}, and DequantizeLinear computes in float32"
    if weight.bits > 8 and opset < _NARROW_OPSET:
        return f"{weight.bits} bits need opset {_NARROW_OPSET} (int16); got {opset}; pass opset={_NARROW_OPSET}"
    if not isinstance(tensor, Tensor) or not weight.gives(tensor):
        return "its integers do not give the exported values bit for bit"
    return None


def _replace(graph: ir.Graph, value: ir.Value, weight: IntegerWeight, opset: int) -> StoredIntegers:
    import onnx_ir as ir

    assert value.name and value.const_value is not None
    name, dtype, before = value.name, value.const_value.dtype, value.const_value.nbytes
    integer = _dtype(weight, opset)
    dequantize = ir.node("DequantizeLinear", [value], {"axis": weight.axis or 0}, name=f"node_{name}{DEQUANTIZED}")
    nodes, output = [dequantize], dequantize.outputs[0]
    output.shape, output.type = value.shape, ir.TensorType(ir.DataType.FLOAT)
    if dtype != ir.DataType.FLOAT:
        output.name = f"{name}{DEQUANTIZED}_float"
        cast = ir.node("Cast", [output], {"to": dtype}, name=f"node_{name}{DEQUANTIZED}_cast")
        nodes, output = [*nodes, cast], cast.outputs[0]
        output.shape, output.type = value.shape, ir.TensorType(dtype)
    output.name = name + DEQUANTIZED
    # Its other uses, which leaves the one by the new node itself.
    for node, index in [use for use in value.uses() if use.node is not dequantize]:
        node.replace_input_with(index, output)
    dequantize.resize_inputs(3)
    size = 0
    for index, (part, tensor) in enumerate(weight.named(name).items()):
        const = as_tensor(tensor, part, ir.DataType.FLOAT if part == name + SCALE else integer)
        initializer = value if index == 0 else ir.Value(name=part)
        initializer.const_value, initializer.type = const, ir.TensorType(const.dtype)
        initializer.shape = ir.Shape(tensor.shape)
        if index:
            graph.register_initializer(initializer)
            dequantize.replace_input_with(index, initializer)
        size += const.nbytes
    graph.insert_before(graph[0], nodes)
    return StoredIntegers(weight.bits, integer.name, weight.axis, before, size)


def _dtype(weight: IntegerWeight, opset: int) -> ir.DataType:
    import onnx_ir as ir

    if weight.bits <= 4 and opset >= _NARROW_OPSET and weight.values.numel() % 2 == 0:
        return ir.DataType.INT4
    return ir.DataType.INT8 if weight.bits <= 8 else ir.DataType.INT16


def as_tensor(tensor: Tensor, name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    """A torch tensor for a file; int4, which PyTorch lacks, is made of int8."""
    import onnx_ir as ir
    from onnx_ir import tensor_adapters

    tensor = tensor.detach().cpu().contiguous()
    if dtype == ir.DataType.INT4:
        return ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
    return tensor_adapters.TorchTensor(tensor, name)


def stored_axes(graph: ir.Graph) -> dict[str, int | None]:
    """The weights that a file stores as integers in the way of this module, each with the dimension of its scales."""
    axes: dict[str, int | None] = {}
    for node in graph:
        names = [value.name if value is not None and value.is_initializer() else None for value in node.inputs]
        if node.op_type == "DequantizeLinear" and names[0] and names[1:] == [names[0] + SCALE, names[0] + ZERO_POINT]:
            scale = graph.initializers[names[0] + SCALE].const_value
            axes[names[0]] = node.attributes.get_int("axis", 1) if scale is not None and scale.shape else None
    return axes
