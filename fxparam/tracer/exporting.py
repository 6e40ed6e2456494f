"""The export layer: one flat graph of a plain model by ``torch.export``, on given inputs."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxparam.errors import TraceError
from fxparam.tracer.cutting import Leaf, RecordedBody
from fxparam.tracer.hazards import error_line, no_autograd_functions, python_random_states
from fxparam.tracer.looking import looking
from fxparam.tracer.signature import Structure, flatten, signature_of
from fxparam.tracer.watch import Watch


def export_program(
    plain: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    grad: bool = False,
) -> ExportedProgram:
    """Export a model without computed weights.

    Args:
        plain: the model.
        args: positional inputs.
        kwargs: keyword inputs.
        dynamic_shapes: as for ``torch.export.export``.
        grad: whether the graph is to be trained. Without gradients, blocks of the model's own without any leave no mark in it.

    Raises:
        TraceError: ``torch.export`` refuses it; the message is its first line with the source line.
    """
    args, named = _apart(args, dict(kwargs or {}))

    def export() -> ExportedProgram:
        with torch.set_grad_enabled(grad):
            return _export(plain, args, named, dynamic_shapes)

    with warnings.catch_warnings():
        # Recurrent layers keep their weights in a list besides; the tracer warns that it does not see writes to it.
        warnings.filterwarnings("ignore", message=".*_flat_weights.*", category=UserWarning)
        before = python_random_states()
        exported = export()
        if before != python_random_states() and not all(_same(exported, export()) for _ in range(_TRIALS)):
            raise TraceError("the forward draws random numbers that are not PyTorch's, and an exported graph would repeat them")
    return exported


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a copy of each tensor that is given again: ``torch.export`` takes equal objects for one input."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    seen: set[int] = set()
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and id(leaf) in seen:
            leaves[at] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        seen.add(id(leaf))
    return pytree.tree_unflatten(leaves, spec)


@torch.no_grad()
def _registered_data_classes(plain: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Make data classes known to ``torch.export`` that the model takes or returns, as a user would; whether there were any."""
    with looking(plain):
        output = plain(*args, **kwargs)
    found = _data_classes(flatten((args, kwargs, output))[1])
    new = [cls for cls in found if dataclasses.is_dataclass(cls) and cls not in pytree.SUPPORTED_NODES]
    for cls in new:
        torch.export.register_dataclass(cls)
    return bool(new)


def _data_classes(structure: Structure) -> set[type]:
    inner = [part for part in structure.inner if part is not None]
    return {part.cls for part in inner if part.cls is not None}.union(*map(_data_classes, inner))


_TRIALS = 4
"""How often a model that draws random numbers of Python's is exported again to see whether they matter."""


def _export(plain: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    try:
        return torch.export.export(plain, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        if "Found <class" in str(error) and _registered_data_classes(plain, args, kwargs):
            return _export(plain, args, kwargs, dynamic_shapes)
        if found := re.search(r"Found <class '(.*?)'>", str(error)):
            raise TraceError(
                f"the model takes or returns a {found[1]}, which torch.export does not know; give inputs with which it does "
                "not (use_cache=False), or register the class with PyTorch (torch.export.register_dataclass)"
            ) from error
        first = (str(error).strip().splitlines() or [""])[0]
        reason = f"torch.export raised {type(error).__name__}: {first}"
        raise TraceError(" at ".join(filter(None, (reason, error_line(error))))) from error


def _same(one: ExportedProgram, other: ExportedProgram) -> bool:
    """Whether two exports of one model, on other random numbers, are the same: operations, literals and constants."""
    if str(one.graph) != str(other.graph) or one.constants.keys() != other.constants.keys():
        return False
    pairs = [(value, other.constants[name]) for name, value in one.constants.items()]
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def exported_body(root: nn.Module, plain: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedBody:
    """The graph of a model by ``torch.export``, for calls like the given one, in the mode it is in.

    Args:
        root: the live module tree, whose tensors the graph reads by their names.
        plain: the same model with plain parameters in place of computed weights.
        args: positional inputs.
        kwargs: keyword inputs.

    Raises:
        TraceError: ``torch.export`` refuses it, or loses something of it.
    """
    with no_autograd_functions():
        module: Any = export_program(plain, args, kwargs, grad=True).module()
    leaves, structure = flatten((args, kwargs))
    given = [node for node in module.graph.nodes if node.op == "placeholder"]
    known = {name for name, _ in (*plain.named_parameters(), *plain.named_buffers())}
    held: dict[str, Tensor] = {}
    graph = fx.Graph()
    nodes: dict[fx.Node, Any] = {
        node: graph.placeholder(node.name) if isinstance(leaf, Tensor) else leaf
        for node, leaf in zip(given, leaves, strict=True)
    }
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in known:
            value = attrgetter(str(node.target))(module)
            if not isinstance(value, Tensor):
                raise TraceError("the forward switches grad mode or autocast, or has branches of its own")
            held[f"captured.{len(held)}"] = value
            nodes[node] = graph.get_attr(f"captured.{len(held) - 1}")
        elif node.op not in ("placeholder", "output", "call_module"):
            nodes[node] = graph.node_copy(node, nodes.__getitem__)
    results = next(node for node in module.graph.nodes if node.op == "output").args[0]
    tensors = [nodes[leaf] for leaf in results if isinstance(leaf, fx.Node)]
    position = iter(range(len(tensors)))
    outputs = tuple(Leaf(next(position)) if isinstance(leaf, fx.Node) else Leaf(None, leaf) for leaf in results)
    graph.output(tuple(tensors))
    return RecordedBody(
        path="",
        module=root,
        graph=graph,
        signature=signature_of(leaves, structure, shapes=True),
        shapes=True,
        tensors=held,
        modules={},
        outputs=outputs,
        structure=Structure(module._out_spec, (None,) * len(results)),
        watch=Watch(root.modules()),
    )
