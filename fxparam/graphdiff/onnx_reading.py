"""ONNX models as neutral graphs.

Initializer names, attributes (tensors among them by value), subgraphs, local functions and opset versions count; names
of nodes, of intermediate values, of inputs and outputs and of symbolic sizes do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxparam.errors import missing_extra
from fxparam.graphdiff.graph import Edge, Graph, GraphDiffError, Node
from fxparam.graphdiff.values import bytes_text, fill, safe_text, size_text

if TYPE_CHECKING:
    import onnx

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
_SMALL = 8
Functions = dict[tuple[str, str, str], "onnx.FunctionProto"]


def load(path: Path) -> onnx.ModelProto:
    """The model in a file, with the tensors it keeps in other files.

    Raises:
        MissingExtraError: the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing_extra("onnx", "onnx", "to read ONNX files") from error
    return onnx.load(path)


def read_onnx(model: onnx.ModelProto, *, values: bool = False) -> Graph:
    """The neutral graph of an ONNX model.

    Raises:
        GraphDiffError: a node reads a value that nothing before it produces.
    """
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    reader = _Reader(functions, values)
    reader.opsets(model.opset_import)
    reader.graph(model.graph)
    return reader.result()


class _Reader:
    """Reads one graph, subgraph or function body."""

    def __init__(self, functions: Functions, values: bool, nested: bool = False) -> None:
        self.functions, self.values, self.nested = functions, values, nested
        self.nodes: list[Node] = []
        self.env: dict[str, Edge] = {}
        self.symbols: dict[str, str] = {}
        self.bodies: dict[int, str] = {}

    def result(self) -> Graph:
        return Graph(tuple(self.nodes), "ONNX model", frozenset({"onnx"}), self.values)

    def add(self, node: Node, outputs: list[str]) -> None:
        for position, name in enumerate(outputs):
            if name:
                self.env[name] = Edge(len(self.nodes), position)
        self.nodes.append(node)

    def opsets(self, imports: Any) -> None:
        versions = sorted({(entry.domain or "ai.onnx", entry.version) for entry in imports})
        for domain, version in versions:
            self.add(Node(domain, "opset", "opset", domain, f"({version})", arguments=f"({version})"), [])

    def graph(self, graph: onnx.GraphProto) -> None:
        initializers = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
        inputs = (value for value in graph.input if value.name not in initializers)
        for position, value in enumerate(inputs):
            detail = _type_detail(value.type, self.symbols)
            self.add(Node(value.name, "input", "input", str(position), detail=detail), [value.name])
        for tensor in graph.initializer:
            detail = (("type", _tensor_type(tensor)),)
            if self.values:
                detail = (*detail, ("value", _tensor_value(tensor)))
            self.add(Node(tensor.name, "tensor", "tensor", tensor.name, detail=detail), [tensor.name])
        for sparse in graph.sparse_initializer:
            detail = (("type", f"sparse {_tensor_type(sparse.values)} of {list(sparse.dims)}"),)
            if self.values:
                detail = (*detail, ("value", _sparse_value(sparse)))
            self.add(Node(sparse.values.name, "tensor", "tensor", sparse.values.name, detail=detail), [sparse.values.name])
        self.body(graph.node, [value.name for value in graph.output])

    def function(self, function: onnx.FunctionProto) -> None:
        self.opsets(function.opset_import)
        for position, name in enumerate(function.input):
            self.add(Node(name, "input", "input", str(position)), [name])
        defaults = [self.attribute(a, []) for a in sorted(function.attribute_proto, key=_by_name)]
        template = f"({', '.join([*function.attribute, *defaults])})"
        self.add(Node("attributes", "opset", "attributes", template=template, arguments=template), [])
        self.body(function.node, list(function.output))

    def body(self, nodes: Any, outputs: list[str]) -> None:
        for node in nodes:
            self.call(node)
        used = [self.value(name, "the output") for name in outputs]
        template = f"({', '.join('%' for _ in used)})"
        arguments = fill(template, outputs)
        self.add(Node("output", "output", "output", template=template, inputs=tuple(used), arguments=arguments), [])

    def call(self, node: onnx.NodeProto) -> None:
        given = list(node.input)
        while given and not given[-1]:  # a trailing empty name and none are the same
            given.pop()
        used = [name for name in given if name]
        parts = ["%" if name else "_" for name in given]
        parts += [self.attribute(a, used) for a in sorted(node.attribute, key=_by_name)]
        template = f"({', '.join(parts)})"
        outputs = list(node.output)
        while outputs and not outputs[-1]:
            outputs.pop()
        if outputs and (len(outputs) > 1 or not outputs[0]):
            template += " -> " + ", ".join("value" if name else "_" for name in outputs)
        domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}::"
        called = f"{domain}{node.op_type}" + (f":{node.overload}" if node.overload else "")
        name = next((name for name in outputs if name), node.name or node.op_type)
        edges = tuple(self.value(value, f"{node.op_type} node {name!r}") for value in used)
        body = self.functions.get((node.domain, node.op_type, node.overload))
        self.add(
            Node(
                name,
                "call",
                called,
                template=template,
                detail=() if body is None else (("function", self.function_digest(body)),),
                inputs=edges,
                effect=domain == "" and node.op_type in _RANDOM,
                arguments=fill(template, used),
            ),
            outputs,
        )

    def value(self, name: str, reader: str) -> Edge:
        if name not in self.env:
            if not self.nested:
                raise GraphDiffError(
                    f"{reader} reads {name!r}, which nothing before it produces; expected a valid model with its "
                    "nodes in topological order: seeonnx.checker.check_model(model)"
                )
            self.add(Node(name, "outer", "outer"), [name])
        return self.env[name]

    def function_digest(self, function: onnx.FunctionProto) -> str:
        if id(function) not in self.bodies:
            reader = _Reader(self.functions, self.values)
            reader.function(function)
            self.bodies[id(function)] = reader.result().digest
        return self.bodies[id(function)]

    def attribute(self, attribute: onnx.AttributeProto, used: list[str]) -> str:
        """``name=value``; values of the surrounding graph that a subgraph reads are appended to ``used``."""
        if attribute.ref_attr_name:
            return f"{attribute.name}=@{attribute.ref_attr_name}"
        return f"{attribute.name}={self.attribute_value(attribute, used)}"

    def attribute_value(self, attribute: onnx.AttributeProto, used: list[str]) -> str:
        import onnx

        value = onnx.helper.get_attribute_value(attribute)
        kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
        forms: dict[str, Callable[[Any], str]] = {
            "TENSOR": lambda v: f"{_tensor_type(v)} {_tensor_value(v)}",
            "SPARSE_TENSOR": _sparse_value,
            "GRAPH": lambda v: self.subgraph(v, used),
            "TYPE_PROTO": lambda v: _type_text(v, self.symbols),
        }
        one = forms.get(kind.removesuffix("S"), lambda v: repr(v).replace("%", r"\x25"))
        if kind.endswith("S"):
            return f"[{', '.join(map(one, value))}]"
        return one(value)

    def subgraph(self, graph: onnx.GraphProto, used: list[str]) -> str:
        reader = _Reader(self.functions, self.values, nested=True)
        reader.graph(graph)
        result = reader.result()
        # The canonical order does not depend on names, and so neither does the order of what is captured.
        captured = [result.nodes[i].name for i in result.order if result.nodes[i].kind == "outer"]
        used += captured
        return f"graph {result.digest}({', '.join('%' for _ in captured)})"


def _by_name(attribute: onnx.AttributeProto) -> str:
    return attribute.name


def _type_detail(proto: onnx.TypeProto, symbols: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return (("type", _type_text(proto, symbols)),) if proto.WhichOneof("value") else ()


def _type_text(proto: onnx.TypeProto, symbols: dict[str, str]) -> str:
    import onnx

    kind = proto.WhichOneof("value")
    if kind not in {"tensor_type", "sparse_tensor_type"}:
        return safe_text(proto)
    tensor = getattr(proto, kind)
    name: str = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return name + (f"[{', '.join(_sizes(tensor.shape, symbols))}]" if tensor.HasField("shape") else "")


def _sizes(shape: onnx.TensorShapeProto, symbols: dict[str, str]) -> Iterator[str]:
    for dim in shape.dim:
        field = dim.WhichOneof("value")
        yield "?" if field is None else size_text(getattr(dim, field), symbols)


def _tensor_type(tensor: onnx.TensorProto) -> str:
    import onnx

    return f"{onnx.TensorProto.DataType.Name(tensor.data_type).lower()}{list(tensor.dims)}"


def _tensor_value(tensor: onnx.TensorProto) -> str:
    import onnx

    if onnx.external_data_helper.uses_external_data(tensor):
        raise GraphDiffError(
            f"the values of {tensor.name!r} are in another file, {tensor.external_data[0].value!r}, and not loaded; "
            "pass the path of the model instead, or load it with onnx.load(path)"
        )
    array = onnx.numpy_helper.to_array(tensor)
    raw = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
    return bytes_text(raw, array.tolist() if array.size <= _SMALL else None)


def _sparse_value(sparse: onnx.SparseTensorProto) -> str:
    return f"sparse {list(sparse.dims)} {_tensor_value(sparse.values)} at {_tensor_value(sparse.indices)}"
