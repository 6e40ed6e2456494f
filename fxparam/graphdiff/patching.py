"""Carry a difference over to a graph: ``apply(diff(a, b), a)`` is isomorphic to ``b``."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from fxparam.graphdiff.fx_reading import Payload, Ref
from fxparam.graphdiff.graph import Graph, GraphDiffError, Node
from fxparam.graphdiff.matching import isomorphism
from fxparam.graphdiff.reading import Model, Trace, agree_on_inputs, read
from fxparam.graphdiff.result import GraphDiff, compare


def apply(diff: GraphDiff, a: Model, *, trace: Trace | None = None) -> fx.GraphModule:
    """The graph that ``diff`` turns ``a`` into: isomorphic to the second graph of ``diff``.

    What both graphs have is taken from ``a``, with its modules and tensors (by reference, so with its values); what
    was added or changed comes from the difference. ``a`` is not changed.

    Args:
        diff: a difference between torch.fx graphs.
        a: a graph isomorphic to the first graph of ``diff`` (other names and other parameter values are fine).
        trace: how to trace a plain module, as for ``diff``.

    Raises:
        GraphDiffError: ``a`` is not isomorphic to that graph, or ``diff`` is not between torch.fx graphs.
    """
    if any(not isinstance(n.payload, Payload) for graph in (diff.a, diff.b) for n in graph.nodes):
        raise GraphDiffError(
            f"apply builds torch.fx graphs; got a difference between {diff.a.source} and {diff.b.source}; "
            "pass a difference of two GraphModules (for ONNX, take the second model itself)"
        )
    origin, base = agree_on_inputs(diff.a, read(a, values=diff.a.values, trace=trace))
    found = isomorphism(origin, base)
    if found is None:
        raise GraphDiffError(
            f"this difference starts from another graph than the one given: {compare(origin, base)}\n"
            "pass the graph that was the first argument of diff"
        )
    kept = {j: base.nodes[found[i]] for i, j in diff.pairs.items() if diff.a.nodes[i].label == diff.b.nodes[j].label}
    result = _build(diff.b, kept)
    result.training = getattr(a, "training", True)
    return result


def _build(b: Graph, kept: dict[int, Node]) -> fx.GraphModule:
    """A module with the nodes of ``b``; modules and tensors of the nodes in ``kept`` are theirs."""
    graph = fx.Graph()
    graph.set_codegen(copy.copy(b.codegen))
    made: list[fx.Node] = []
    attributes: dict[str, Any] = {}
    for j, node in enumerate(b.nodes):
        payload = node.payload
        args, kwargs = map_aggregate(
            (payload.args, payload.kwargs), lambda leaf: made[leaf.node] if isinstance(leaf, Ref) else leaf
        )
        made.append(graph.create_node(payload.op, payload.target, args, kwargs, name=node.name))
        made[-1].meta.update(payload.meta)
        if payload.op in {"get_attr", "call_module"}:
            attributes[str(payload.target)] = kept[j].payload.attribute if j in kept else payload.attribute
    return fx.GraphModule(_own_only(attributes), graph)


def _own_only(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes without those that a module among them holds already: assigning these would write into that module."""

    def holder(name: str) -> nn.Module | None:
        parts = name.split(".")
        prefixes = (".".join(parts[:k]) for k in range(1, len(parts)))
        return next((attributes[p] for p in prefixes if isinstance(attributes.get(p), nn.Module)), None)

    return {name: value for name, value in attributes.items() if holder(name) is None}
