"""Structural differences of graphs: ``diff(a, b)``, the ``GraphDiff`` it returns, and ``apply``."""

from __future__ import annotations

from fxparam.graphdiff.graph import Edge, Graph, GraphDiffError, Node, parse
from fxparam.graphdiff.patching import apply
from fxparam.graphdiff.reading import Model, Trace, read, read_pair
from fxparam.graphdiff.result import Added, Changed, GraphDiff, Moved, Removed, compare

__all__ = [
    "Added",
    "Changed",
    "Edge",
    "Graph",
    "GraphDiff",
    "GraphDiffError",
    "Model",
    "Moved",
    "Node",
    "Removed",
    "apply",
    "diff",
    "parse",
    "read",
]


def diff(a: Model, b: Model, *, values: bool = False, trace: Trace | None = None) -> GraphDiff:
    """The structural difference of two models; empty (falsy) if their graphs are isomorphic.

    Operators, attributes, argument order, dotted names of parameters and modules, shapes and dtypes count. Names of
    nodes and of inputs, the order of independent nodes and the values of tensors do not. Inputs and outputs are
    compared by position. In-place and random operations count with their order. ``add(x, y)`` and ``add(y, x)``
    differ.

    Args:
        a: a ``torch.fx.GraphModule``, an ``nn.Module`` (traced symbolically), a ``torch.export.ExportedProgram``, an
            ``onnx.ModelProto``, a ``torch.onnx.ONNXProgram``, or a path to an ``.onnx`` or ``.pt2`` file.
        b: the same.
        values: whether tensors have to be equal bit for bit as well.
        trace: how to get a ``GraphModule`` from a plain module; ``torch.fx.symbolic_trace`` if not given.

    Raises:
        GraphDiffError: a model is of no known kind, or the two use different operator sets (fx and ONNX).
        TraceError: a plain module cannot be traced symbolically.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> print(diff(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Sequential(nn.Linear(2, 3), nn.Tanh())))
        1 difference: 1 changed
        ~ _1: op torch.nn.ReLU -> torch.nn.Tanh
    """
    return compare(*read_pair(a, b, values=values, trace=trace))
