"""Binding times: the earliest moment at which the value of a node is known.

    constant    depends on nothing that trains          once, at transform
    step        depends on parameters, latents, buffers once per change of these
    call        depends on an input or on randomness    at each forward

A node's time is the latest of its inputs' times, and ``call`` for everything that must stay where it is: random nodes,
nodes with effects, alias sets any member of which is written, and what the model returns. Nodes that a site brought
(``node.meta["site"]``) run at ``step`` by declaration.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from networkx.utils import UnionFind
from torch import fx, nn

from fxparam.program.effects import Effect, effect_of
from fxparam.program.program import deliver, output_of


class BindingTime(IntEnum):
    """Ordered: the time of a node is the maximum over its inputs."""

    constant = 0
    step = 1
    call = 2


def binding_times(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> tuple[dict[fx.Node, BindingTime], dict[fx.Node, str]]:
    """The binding time of each node, and for each node kept at ``call`` in spite of its inputs, the reason.

    Args:
        graph: any graph.
        modules: the targets of its ``call_module`` nodes.
    """
    effects = {node: effect_of(node, modules.get(str(node.target))) for node in graph.nodes}
    held = _held(graph, effects, modules)
    unsteady = written_memory(graph, modules, by_sites=True)
    times: dict[fx.Node, BindingTime] = {}
    reasons: dict[fx.Node, str] = {}
    for node in graph.nodes:
        time = max((times[other] for other in node.all_input_nodes), default=BindingTime.constant)
        if node.op in ("placeholder", "output") or node.target is deliver:
            time = BindingTime.call
        elif node.op == "get_attr":
            time = BindingTime.step
        if time is BindingTime.constant and (node in unsteady or not effects[node].pure):
            time = BindingTime.step
        reason = held.get(node) or ("" if "site" in node.meta else _why_call(node, effects[node]))
        if reason and time < BindingTime.call:
            reasons[node] = reason
            time = BindingTime.call
        times[node] = time
    return times, reasons


def _why_call(node: fx.Node, effect: Effect) -> str:
    if effect.random and effect.known:
        return "draws random numbers at each call"
    if not effect.pure:
        return f"{target_name(node)} is not known to be pure"
    return ""


def _held(graph: fx.Graph, effects: Mapping[fx.Node, Effect], modules: Mapping[str, nn.Module]) -> dict[fx.Node, str]:
    """The nodes whose memory is written at call time or handed to the caller, with the reason."""
    written = written_memory(graph, modules)
    owned = {
        f"{node.target}.{name}"
        for node in graph.nodes
        if node.op == "call_module" and "site" not in node.meta and node.target in modules
        for name, _ in modules[str(node.target)].named_buffers()
    }
    held = dict.fromkeys(_returned(graph, effects), "the model returns it")
    for node in graph.nodes:
        if node in written:
            held[node] = f"its memory is written by {target_name(written[node])}"
        elif node.op == "get_attr" and node.target in owned and "site" not in node.meta:
            held[node] = f"the buffer {node.target} belongs to a module that may write it"
    return held


def written_memory(graph: fx.Graph, modules: Mapping[str, nn.Module], *, by_sites: bool = False) -> dict[fx.Node, fx.Node]:
    """The nodes that may share memory with one that is written, and for each a node that writes.

    Args:
        graph: any graph.
        modules: the targets of its ``call_module`` nodes.
        by_sites: whether what sites do inside their own graphs counts as well.
    """
    effects = {node: effect_of(node, modules.get(str(node.target))) for node in graph.nodes}
    # An opaque map of a weight may return its latent unchanged, but it never writes to it.
    opaque = {node for node in graph.nodes if node.op == "call_module" and "site" in node.meta}
    writers = {
        other: node
        for node in graph.nodes
        if node not in opaque and (by_sites or "site" not in node.meta)
        for other in effects[node].writes
    }
    if not writers:
        return {}
    alias: UnionFind = UnionFind(graph.nodes)
    first_read: dict[object, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            alias.union(first_read.setdefault(node.target, node), node)
        elif effects[node].aliases and node not in opaque:
            alias.union(node, *node.all_input_nodes)
    sets = {alias[other]: node for other, node in writers.items()}
    return {node: sets[alias[node]] for node in graph.nodes if alias[node] in sets}


def _returned(graph: fx.Graph, effects: Mapping[fx.Node, Effect]) -> set[fx.Node]:
    """The nodes whose memory the caller gets: computed per call, so that a caller's write reaches nobody else.

    Weights are exempt: a write to a delivered weight moves its version, and the cache sees that.
    """
    delivered = {node.args[1] for node in graph.nodes if node.target is deliver}
    found: set[fx.Node] = set()
    todo = list(output_of(graph).all_input_nodes)
    while todo:
        node = todo.pop()
        if node in found or node in delivered or node.op in ("placeholder", "get_attr"):
            continue
        found.add(node)
        if effects[node].aliases:
            todo.extend(node.all_input_nodes)
    return found


def target_name(node: fx.Node) -> str:
    """What a node calls, as a user would write it."""
    return str(getattr(node.target, "__name__", node.target))
