"""Anything that holds a graph, as a neutral graph."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxparam.errors import TraceError
from fxparam.graphdiff.fx_reading import read_fx
from fxparam.graphdiff.graph import Graph, GraphDiffError, Node

Model = Any
"""A ``GraphModule``, ``nn.Module``, ``ExportedProgram``, ``onnx.ModelProto``, ``torch.onnx.ONNXProgram`` or a path."""
Trace = Callable[[nn.Module], fx.GraphModule]

_ACCEPTED = (
    "a torch.fx.GraphModule, an nn.Module, a torch.export.ExportedProgram, an onnx.ModelProto, "
    "or a path to a .onnx or .pt2 file"
)


def read(model: Model, *, values: bool = False, trace: Trace | None = None) -> Graph:
    """The neutral graph of a model.

    Raises:
        GraphDiffError: ``model`` is of no known kind.
        TraceError: it is a plain module that symbolic tracing does not take.
    """
    if isinstance(model, Graph):
        return model
    if isinstance(model, str | os.PathLike):
        return _read_path(Path(model), values)
    if isinstance(model, fx.GraphModule):
        return read_fx(model, values=values)
    if isinstance(model, torch.export.ExportedProgram):
        # The unlifted module names parameters as the user does, and holds mutations as nodes.
        return read_fx(model.module(check_guards=False), "exported program", values=values)
    if isinstance(model, nn.Module):
        return read_fx(_traced(model, trace), "module", values=values)
    if isinstance(model, torch.onnx.ONNXProgram):
        model = model.model_proto
    if type(model).__name__ == "ModelProto":
        from fxparam.graphdiff.onnx_reading import read_onnx

        return read_onnx(model, values=values)
    raise GraphDiffError(f"got a {type(model).__qualname__} to compare; expected {_ACCEPTED}")


def read_pair(a: Model, b: Model, *, values: bool = False, trace: Trace | None = None) -> tuple[Graph, Graph]:
    """The neutral graphs of two models that can be compared.

    Raises:
        GraphDiffError: the two use different operator sets, so that every node would differ.
    """
    x, y = read(a, values=values, trace=trace), read(b, values=values, trace=trace)
    if x.source != y.source and x.dialects and y.dialects and not x.dialects & y.dialects:
        raise GraphDiffError(
            f"cannot compare {_described(x)} with {_described(y)}: every node would differ; pass both in one form: "
            + (
                "export both with torch.onnx.export"
                if "onnx" in x.dialects | y.dialects
                else "torch.export.export(model, inputs) for both"
            )
        )
    return agree_on_inputs(x, y)


def agree_on_inputs(a: Graph, b: Graph) -> tuple[Graph, Graph]:
    """Both graphs, without the types of those inputs whose type only one of them knows."""
    types = [{n.target: bool(n.detail) for n in graph.nodes if n.kind == "input"} for graph in (a, b)]
    both = {position for position, known in types[0].items() if known == types[1].get(position, known)}

    def blank(graph: Graph) -> Graph:
        if all(n.target in both or not n.detail for n in graph.nodes if n.kind == "input"):
            return graph

        def untyped(node: Node) -> Node:
            return replace(node, detail=()) if node.kind == "input" and node.target not in both else node

        return replace(graph, nodes=tuple(map(untyped, graph.nodes)))

    return blank(a), blank(b)


def _described(graph: Graph) -> str:
    sets = {"torch": "torch functions and modules", "aten": "aten operators", "onnx": "ONNX operators"}
    article = "an" if graph.source[0] in "aeioO" else "a"
    return f"{article} {graph.source} ({' and '.join(sets[d] for d in sorted(graph.dialects))})"


def _read_path(path: Path, values: bool) -> Graph:
    if path.suffix == ".onnx":
        from fxparam.graphdiff.onnx_reading import load

        return read(load(path), values=values)
    if path.suffix == ".pt2":
        return read(torch.export.load(path), values=values)
    raise GraphDiffError(f"got the path {str(path)!r}; expected a file ending in .onnx or .pt2")


def _traced(module: nn.Module, trace: Trace | None) -> fx.GraphModule:
    try:
        return (trace or fx.symbolic_trace)(module)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(module).__qualname__} cannot be traced symbolically ({type(error).__name__}: {error}); "
            "pass torch.export.export(model, inputs) instead"
        ) from error
