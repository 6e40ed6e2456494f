"""ONNX files for the tests of what TensorRT takes: one node or a few, written by hand, and small exported models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper
from torch import Tensor, nn

from fxparam.exporters import tensorrt

INSTALLED = bool(importlib.util.find_spec("tensorrt_rtx_bindings"))
needs_rtx = pytest.mark.skipif(not INSTALLED, reason=f"TensorRT-RTX is not installed; type: {tensorrt.INSTALL}")


def info(name: str, dtype: int = T.FLOAT, shape: Any = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto] | None = None,
    *,
    opset: int = 21,
    functions: list[onnx.FunctionProto] | None = None,
) -> Path:
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("my", 1)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights or [])
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=functions or [])
    model = onnx.shape_inference.infer_shapes(model)
    for output in model.graph.output:
        output.type.tensor_type.shape.SetInParent()  # the checker wants one, if nothing is known
    path.write_bytes(model.SerializeToString())
    return path


def node(op: str, inputs: str = "x", outputs: str = "y", name: str = "n", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(" "), outputs.split(" "), name=name, **attributes)


def const(name: str, dtype: int, shape: list[int], values: list[float]) -> onnx.TensorProto:
    return helper.make_tensor(name, dtype, shape, values)


def one(path: Path, op: str, *, dtype: int = T.FLOAT, shape: Any = (2, 3), out: int | None = None, **options: Any) -> Path:
    """A file of one node on the input ``x``."""
    weights, opset = options.pop("weights", []), options.pop("opset", 21)
    names = " ".join(["x", *(w.name for w in weights)])
    return save(path, [node(op, names, **options)], [info("x", dtype, shape)], [info("y", out or dtype)], weights, opset=opset)


def dequantized(path: Path, dtype: int, zero: float | None = None) -> Path:
    """``x @ dequantize(w)``."""
    point = [] if zero is None else [const("z", dtype, [], [zero])]
    weights = [const("w", dtype, [2, 2], [1, 2, 3, 1]), const("s", T.FLOAT, [], [0.5]), *point]
    nodes = [node("DequantizeLinear", "w s z" if point else "w s", "d", "dq"), node("MatMul", "x d", "y", "mm")]
    return save(path, nodes, [info("x", T.FLOAT, [2, 2])], [info("y", T.FLOAT, [2, 2])], weights)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (ConvNet, (2, 2, 6, 6)),
    "lstm": (Recurrent, (2, 5, 4)),
    "attention": (attention, (2, 5, 16)),
}
