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

import torch
from torch import Tensor, fx, nn

from fxparam.program.effects import Effect, effect_of
from fxparam.program.program import deliver, output_of


class BindingTime(IntEnum):
    """Ordered: the time of a node is the maximum over its inputs."""

    constant = 0
    step = 1
    call = 2


def binding_times(
    graph: fx.Graph, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> tuple[dict[fx.Node, BindingTime], dict[fx.Node, str]]:
    """The binding time of each node, and for each node kept at ``call`` in spite of its inputs, the reason.

    Args:
        graph: any graph.
        modules: the targets of its ``call_module`` nodes.
        tensors: what its ``get_attr`` nodes name.
    """
    effects = {node: effect_of(node, modules.get(str(node.target))) for node in graph.nodes}
    held = _held(graph, modules, tensors)
    times: dict[fx.Node, BindingTime] = {}
    reasons: dict[fx.Node, str] = {}
    for node in graph.nodes:
        time = max((times[other] for other in node.all_input_nodes), default=BindingTime.constant)
        if node.op in ("placeholder", "output") or node.target is deliver:
            time = BindingTime.call
        elif node.op == "get_attr":
            time = BindingTime.step
        if time is BindingTime.constant and not effects[node].pure:
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


def _held(graph: fx.Graph, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> dict[fx.Node, str]:
    """The nodes whose memory is written at call time or handed to the caller, with the reason."""
    held = dict.fromkeys(returned_memory(graph, modules), "the model returns it")
    for node, writer in written_memory(graph, modules, tensors).items():
        held[node] = f"its memory is written by {target_name(writer)}"
    return held


def written_memory(graph: fx.Graph, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> dict[fx.Node, fx.Node]:
    """The nodes that may share memory with one that is written, and for each a node that writes.

    Args:
        graph: any graph.
        modules: the targets of its ``call_module`` nodes.
        tensors: what its ``get_attr`` nodes name; two names may be one memory.
    """
    effects = {node: effect_of(node, modules.get(str(node.target))) for node in graph.nodes}
    # An opaque map of a weight may return its latent unchanged, but it never writes to it.
    opaque = {node for node in graph.nodes if node.op == "call_module" and "site" in node.meta}
    writers = {other: node for node in graph.nodes if node not in opaque for other in effects[node].writes}
    writers |= _own_state(graph, modules)
    if not writers:
        return {}
    # Slow to import, and only needed where something writes.
    from networkx.utils import UnionFind

    alias: UnionFind = UnionFind(graph.nodes)
    first_read: dict[object, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            alias.union(first_read.setdefault(_memory(str(node.target), tensors), node), node)
        elif effects[node].aliases and node not in opaque:
            alias.union(node, *node.all_input_nodes)
    sets = {alias[other]: node for other, node in writers.items()}
    return {node: sets[alias[node]] for node in graph.nodes if alias[node] in sets}


def _own_state(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, fx.Node]:
    """Reads of what belongs to a module that is called as a whole and may write it: buffers, renormalized embeddings."""
    owned: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module" and "site" not in node.meta and node.target in modules:
            for path, module in modules[str(node.target)].named_modules(prefix=str(node.target)):
                names = [*module._buffers, *(module._parameters if getattr(module, "max_norm", None) is not None else ())]
                owned |= {f"{path}.{name}": node for name in names}
    return {node: owned[str(node.target)] for node in graph.nodes if node.op == "get_attr" and node.target in owned}


def _memory(name: str, tensors: Mapping[str, Tensor]) -> object:
    tensor = tensors.get(name)
    if tensor is None or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return name
    return (tensor.device, tensor.untyped_storage().data_ptr())


def returned_memory(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> set[fx.Node]:
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
        if effect_of(node, modules.get(str(node.target))).aliases:
            todo.extend(node.all_input_nodes)
    return found


def target_name(node: fx.Node) -> str:
    """What a node calls, as a user would write it."""
    return str(getattr(node.target, "__name__", node.target))
