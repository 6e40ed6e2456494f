"""An ONNX graph against the published rules of TensorRT's parser: no TensorRT, no GPU, no execution.

Each node is looked up in ``fxparam.exporters.tensorrt_rules``: is the operator supported, does it accept this type, are
inputs that must be known at build time constant, do the restrictions that the table states in words hold. Nodes of the
bodies of If, Loop and Scan and of local functions are checked like all others. What cannot be told from the file (a rank
that shape inference does not find, an operator of another domain, which a plugin may provide) is reported as unknown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

from fxparam.exporters import tensorrt_rules as rules
from fxparam.exporters.tensorrt_restrictions import RESTRICTIONS, NodeView

if TYPE_CHECKING:
    import onnx_ir as ir

Level = Literal["error", "unknown", "warning"]

_FLOAT_MAX = 3.4028234663852886e38


@final
@dataclass(frozen=True)
class Finding:
    """Something TensorRT refuses, changes, or may refuse.

    Attributes:
        level: ``"error"``: refused, or other numbers; ``"unknown"``: cannot be told; ``"warning"``: works, with a difference.
        node: the node's name, after the nodes whose bodies it lies in; of an input or a weight its own; ``""``: the file.
        op: the operator, or what else it is (``"input"``, ``"weight"``).
        what: what was found and what was expected.
        remedy: what to do about it.
        source: who says so: the operator table, or the parser that was asked.
    """

    level: Level
    node: str
    op: str
    what: str
    remedy: str
    source: str = rules.SOURCE

    def __str__(self) -> str:
        where = f"{self.node or 'file'}{f' ({self.op})' if self.op else ''}"
        return f"{self.level}: {where}: {self.what}. {self.remedy} [{self.source}]"


def check_graph(model: ir.Model) -> tuple[Finding, ...]:
    """What the published rules say about a model, errors first.

    Args:
        model: a model read by ``files.read_model``. Types and shapes found by shape inference are written into it.
    """
    _infer(model)
    findings = [*_opset(model), *_interface(model)]
    untyped: list[str] = []
    for where, view in node_views(model):
        findings += _node(model, view, where, untyped)
    if untyped:
        names = ", ".join(untyped[:3]) + (", ..." if len(untyped) > 3 else "")
        what = f"the type of the data of {len(untyped)} nodes cannot be inferred ({names})"
        findings.append(
            Finding("unknown", "", "", what, 'Their operators were checked, their types were not; rung="parse" does')
        )
    return by_level(findings)


def by_level(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then what is unknown, then warnings."""
    order = ("error", "unknown", "warning")
    return tuple(sorted(findings, key=lambda finding: order.index(finding.level)))


def _infer(model: ir.Model) -> None:
    from onnx_ir.passes import common

    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a failure leaves types unknown, which is reported as such
    try:
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    finally:
        logger.setLevel(level)


def _opset(model: ir.Model) -> Iterator[Finding]:
    opset = model.opset_imports.get("", rules.OPSETS[-1])
    if opset not in rules.OPSETS:
        what = f"opset {opset}; expected {rules.OPSETS[0]} to {rules.OPSETS[-1]}"
        yield Finding("error", "", "", what, f"Export it again with opset={rules.OPSETS[-1]} or less")


# ---- inputs, outputs, weights ----------------------------------------------------------------------------------------


def _interface(model: ir.Model) -> Iterator[Finding]:
    """The types of everything that has a name outside of the graph, and sizes that are not fixed."""
    graph = model.graph
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    initializers = [value for owner in model.graphs() for value in owner.initializers.values()]
    named: tuple[tuple[str, Iterable[ir.Value]], ...] = (
        ("input", inputs),
        ("output", graph.outputs),
        ("weight", initializers),
    )
    for kind, values in named:
        doubles = []
        for value in values:
            dtype = value.dtype.name if value.dtype is not None else None
            if dtype == "DOUBLE":
                doubles.append(str(value.name))
                if kind == "weight":
                    yield from _clamped(value)
            elif dtype is not None and dtype not in rules.DTYPES:
                what = f"type {dtype}, which TensorRT does not have"
                yield Finding("error", str(value.name), kind, what, "Convert the model to a type it has before the export")
        if doubles:
            what = f"DOUBLE becomes FLOAT in TensorRT ({len(doubles)} {kind}s)"
            remedy = "Export the model in float32 (model.float()) to see the numbers that it will give"
            yield Finding("warning", ", ".join(doubles[:3]) + (", ..." if len(doubles) > 3 else ""), kind, what, remedy)
    for value in inputs:
        if sizes := dynamic_sizes(value):
            what = f"sizes {', '.join(sizes)} are not fixed; an engine needs an optimization profile for them"
            remedy = "Give the smallest, the usual and the largest, as in sizes={'" + sizes[0] + "': (1, 8, 64)}"
            yield Finding("warning", str(value.name), "input", what, remedy)


def dynamic_sizes(value: ir.Value) -> list[str]:
    """The names of the sizes of an input that the file leaves open: ``batch``, or ``x[0]`` where it has no name."""
    sizes = value.shape if value.shape is not None else ()
    return [_size_name(value, i, size) for i, size in enumerate(sizes) if not isinstance(size, int)]


def _size_name(value: ir.Value, index: int, size: Any) -> str:
    return str(size.value) if getattr(size, "value", None) else f"{value.name}[{index}]"


def _clamped(value: ir.Value) -> Iterator[Finding]:
    import numpy as np

    if value.const_value is None:
        return
    numbers = np.abs(value.const_value.numpy())
    if np.any(np.isfinite(numbers) & (numbers > _FLOAT_MAX)):
        what = "DOUBLE values beyond the range of FLOAT; TensorRT clamps them to it, without an error"
        yield Finding("error", str(value.name), "weight", what, "Rescale the weight so that it fits float32")


# ---- nodes -----------------------------------------------------------------------------------------------------------


def node_views(model: ir.Model) -> Iterator[tuple[str, NodeView]]:
    """Every node of a model with its name, those of bodies and of local functions included."""
    for where, node in _walk(model.graph, ""):
        yield where, NodeView(node)
    for function in model.functions.values():
        for where, node in _walk(function, f"{function.domain}.{function.name}/"):
            yield where, NodeView(node, in_function=True)


def _walk(graph: Any, where: str) -> Iterator[tuple[str, ir.Node]]:
    """Every node with its name, nodes in bodies after the node they belong to."""
    import onnx_ir as ir

    for node in graph:
        name = where + label(node)
        yield name, node
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _walk(attribute.as_graph(), f"{name}/{attribute.name}/")
            elif attribute.type == ir.AttributeType.GRAPHS:
                for i, body in enumerate(attribute.as_graphs()):
                    yield from _walk(body, f"{name}/{attribute.name}[{i}]/")


def label(node: ir.Node) -> str:
    """A node's name, or how to find it where it has none."""
    return node.name or f"node of {node.outputs[0].name!r}"


def _node(model: ir.Model, view: NodeView, where: str, untyped: list[str]) -> Iterator[Finding]:
    node, op = view.node, view.node.op_type
    if node.domain not in ("", "ai.onnx"):
        if (node.domain, op, node.overload) not in model.functions:
            what = f"an operator of the domain {node.domain!r}: TensorRT takes it only if a plugin of that name is loaded"
            yield Finding("unknown", where, op, what, "Load the plugin, or write the model with operators of ONNX itself")
        return
    if op in rules.UNSUPPORTED:
        what = "TensorRT does not support this operator"
        remedy = "Write the model without it, or compute its part outside of the engine"
        yield Finding("error", where, op, what, remedy)
        return
    if op not in rules.OPERATORS:
        what = "the table does not know this operator"
        yield Finding("unknown", where, op, what, 'Ask the parser of your release (rung="parse")')
        return
    yield from _types(view, where, untyped)
    yield from _constants(view, where)
    if op in RESTRICTIONS and any(attribute.is_ref() for attribute in node.attributes.values()):
        what = "some attributes come from the caller of the function; the restrictions on them were not checked"
        yield Finding("unknown", where, op, what, 'Ask the parser (rung="parse")')
    for problem in RESTRICTIONS.get(op, lambda _: ())(view):
        yield Finding(problem.level, where, op, problem.what, problem.remedy)


def _types(view: NodeView, where: str, untyped: list[str]) -> Iterator[Finding]:
    op, accepted = view.node.op_type, rules.OPERATORS[view.node.op_type]
    if op in rules.BODIES:
        return
    values = [] if op in rules.DATA_OUTPUT else [view.input(rules.DATA_INPUT.get(op, 0))]
    if op in rules.DATA_OUTPUT or op in ("Cast", "CastLike"):
        values.append(view.node.outputs[0])
    for value in values:
        if value is None:
            continue
        if value.dtype is None:
            untyped.append(where)
            continue
        dtype = "FLOAT" if value.dtype.name == "DOUBLE" else value.dtype.name
        if dtype not in accepted:
            what = f"{value.name!r} is {dtype}; expected {', '.join(sorted(accepted))}"
            yield Finding("error", where, op, what, _type_remedy(dtype))


def _type_remedy(dtype: str) -> str:
    if dtype in rules.QUANTIZED:
        return "Put a DequantizeLinear before it: quantized types are for storage, computing is in floating point"
    if dtype == "UINT8":
        return "Cast it first: UINT8 is for inputs and outputs of the network only"
    return "Cast it to one of these first"


def _constants(view: NodeView, where: str) -> Iterator[Finding]:
    for index, name in rules.CONSTANT_INPUTS.get(view.node.op_type, ()):
        known = view.is_constant(index)
        if known is False:
            what = f"{name} must be known when the engine is built, and is computed from the inputs of the model"
            remedy = f"Make {name} a constant: fold the model for fixed sizes, or export it with a Python number there"
            yield Finding("error", where, view.node.op_type, what, remedy)
        elif known is None:
            what = f"{name} must be known when the engine is built; here it comes into a function from outside"
            yield Finding("unknown", where, view.node.op_type, what, "Make it a constant")
