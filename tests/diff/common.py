"""Graphs and models that the tests of differences compare."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

UNARY: list[Callable[..., Any]] = [torch.relu, torch.sin, torch.neg]


BINARY: list[Callable[..., Any]] = [torch.add, torch.sub, operator.mul]


def graph_of(function: Callable[..., Any]) -> fx.GraphModule:
    return fx.symbolic_trace(function)


def chain(length: int, extra: tuple[int, ...] = ()) -> fx.GraphModule:
    graph = fx.Graph()
    value = graph.placeholder("x")
    for k in range(length):
        if k in extra:
            value = graph.call_function(torch.tanh, (value,))
        value = graph.call_function(UNARY[k % 3], (value,))
    graph.output(value)
    return fx.GraphModule({}, graph)


def branches(count: int, without: tuple[int, ...] = (), last: Callable[..., Any] = torch.cat) -> fx.GraphModule:
    graph, values = fx.Graph(), []
    x = graph.placeholder("x")
    for k in range(count):
        value = graph.call_function(torch.relu, (x,))
        values.append(value if k in without else graph.call_function(torch.mul, (value, 2.0)))
    graph.output(graph.call_function(last, (values,)))
    return fx.GraphModule({}, graph)


class Net(nn.Module):
    def __init__(self, size: int = 4, dtype: torch.dtype = torch.float32, shift: float = 2.0, heads: int = 2) -> None:
        super().__init__()
        self.fc = nn.Linear(3, size, dtype=dtype)
        self.attention = nn.MultiheadAttention(size, heads, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(size, dtype=dtype))
        self.shift = shift

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.fc(x) * self.scale + torch.tensor([1.0, self.shift, 3.0, 4.0])
        return self.attention(y, y, y)[0]


def exported(module: nn.Module, *inputs: Tensor, **options: Any) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|copyreg")
        return torch.export.export(module, inputs, **options)


def onnx_model(
    *,
    names: str = "",
    weight: str = "w",
    values: tuple[float, ...] = (1.0, 2.0),
    constant: float = 1.0,
    alpha: float = 0.5,
    opset: int = 18,
    then: str = "Relu",
    body: str = "Neg",
    batch: str = "batch",
    swap: bool = False,
) -> onnx.ModelProto:
    """Each feature once: initializer, tensor attribute, subgraphs with captures, local function, symbolic size."""

    def branch(op: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"r{names}", TensorProto.FLOAT, ["n", 2])
        return helper.make_graph([helper.make_node(op, [f"h{names}"], [f"r{names}"])], f"g{names}", [], [output])

    scale = helper.make_tensor("anything" + names, TensorProto.FLOAT, [1], [constant])
    nodes = [
        helper.make_node("Mul", [f"x{names}", weight], [f"m{names}"], name=f"n{names}"),
        helper.make_node("Constant", [], [f"k{names}"], value=scale),
        helper.make_node("LeakyRelu", [f"m{names}"], [f"h{names}"], alpha=alpha),
        helper.make_node("If", [f"c{names}"], [f"i{names}"], then_branch=branch(then), else_branch=branch("Abs")),
        helper.make_node("twice", [f"i{names}"], [f"f{names}"], domain="local"),
        helper.make_node("Sub", [f"f{names}", f"k{names}"][:: -1 if swap else 1], [f"y{names}"]),
    ]
    if names:  # an order as good as the first
        nodes.insert(0, nodes.pop(1))
    graph = helper.make_graph(
        nodes,
        f"graph{names}",
        [
            helper.make_tensor_value_info(f"x{names}", TensorProto.FLOAT, [batch, 2]),
            helper.make_tensor_value_info(f"c{names}", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info(f"y{names}", TensorProto.FLOAT, ["n", 2])],
        [onnx.numpy_helper.from_array(np.array(values, np.float32), weight)],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    steps = [helper.make_node(body, ["a"], ["b"]), helper.make_node("Add", ["b", "b"], ["out"])]
    function = helper.make_function("local", "twice", ["a"], ["out"], steps, opsets)
    model = helper.make_model(graph, opset_imports=opsets, functions=[function])
    onnx.checker.check_model(model)
    return model
