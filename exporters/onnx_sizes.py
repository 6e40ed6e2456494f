"""Names of dynamic sizes: a file says ``batch`` where the user said ``Dim("batch")``, and not ``s28``.

``torch.export`` keeps symbols of its own; which is whose follows from the places of the inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram


def name_sizes(model: ir.Model, names: Mapping[str, str]) -> None:
    """Replace symbols in the shapes of a model, in place, also inside of expressions (``2*s28``).

    Args:
        model: an exported model.
        names: symbol -> name.
    """
    import onnx_ir as ir

    if not names:
        return
    symbols = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape(
                symbols.sub(lambda found: names[found[1]], dim.value) if isinstance(dim, ir.SymbolicDim) and dim.value else dim
                for dim in value.shape
            )


def size_names(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any, parameters: Sequence[str]
) -> dict[str, str]:
    """The user's name for each symbol of a program that has one.

    Args:
        program: the exported model.
        args: the positional inputs it was exported with.
        kwargs: the keyword inputs.
        dynamic_shapes: as it was given to ``torch.export.export``.
        parameters: the names of the forward's positional parameters, for ``dynamic_shapes`` by name.
    """
    if not dynamic_shapes:
        return {}
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [spec.arg for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    leaves, _ = pytree.tree_flatten_with_path((args, dict(kwargs)))
    found: dict[str, str] = {}
    for (path, leaf), arg in zip(leaves, inputs, strict=False):
        value = values.get(getattr(arg, "name", ""))
        if not isinstance(leaf, Tensor) or not isinstance(value, Tensor):
            continue
        for dim, name in _named(_at(dynamic_shapes, path, parameters)):
            symbol = _symbol(value.shape[dim])
            if symbol is not None:
                found.setdefault(symbol, name)
    return found


def _at(spec: Any, path: Sequence[Any], parameters: Sequence[str]) -> Any:
    """The part of ``dynamic_shapes`` for the input at a path of ``(args, kwargs)``."""
    (part, first), rest = (getattr(key, "idx", getattr(key, "key", None)) for key in path[:2]), path[2:]
    if isinstance(spec, Mapping) and part == 0 and isinstance(first, int) and first < len(parameters):
        first = parameters[first]
    for key in (first, *(getattr(key, "idx", getattr(key, "key", None)) for key in rest)):
        if isinstance(spec, Mapping):
            spec = spec.get(key)
        elif isinstance(spec, Sequence) and isinstance(key, int) and key < len(spec):
            spec = spec[key]
        else:
            return None
    return spec


def _named(sizes: Any) -> Iterator[tuple[int, str]]:
    """The dimensions of one input that have a name, by what ``dynamic_shapes`` says of it."""
    pairs = sizes.items() if isinstance(sizes, Mapping) else enumerate(sizes) if isinstance(sizes, tuple | list) else ()
    for dim, size in pairs:
        name = getattr(size, "__name__", "")
        # Of derived ones (2*batch) the root is named where it is an input's size itself; hints (Dim.AUTO) have no name.
        if isinstance(dim, int) and isinstance(name, str) and name.isidentifier():
            yield dim, name


def _symbol(size: Any) -> str | None:
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return str(expression) if expression is not None and expression.is_Symbol else None


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from (*graph.inputs, *graph.initializers.values())
        for node in graph:
            yield from node.outputs
    for function in model.functions.values():
        yield from function.inputs
        for node in function:
            yield from node.outputs
