"""Binding times: the earliest moment at which the value of a node is known.

    constant    depends on nothing that trains          once, at transform
    step        depends on parameters, latents, buffers once per change of these
    call        depends on an input or on randomness    at each forward

A node's time is the latest of its inputs' times, and ``call`` for everything that must stay where it is: random nodes,
nodes with effects, alias sets any member of which is written, and what the model returns. Nodes that a site brought
(``node.meta["site"]``) run at ``step`` by declaration; reads of what the model writes where no graph shows it
(``node.meta["written"]``) are of a call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Times:
    """When the nodes of a graph are known.

    Attributes:
        times: the binding time of each node.
        reasons: for each node kept at ``call`` in spite of its inputs, why.
        sealed: the nodes up to the last write to memory that is made from parameters and constants and written by nobody else:
            they stay together, in order. For each the nodes that write to its memory.
    """

    times: dict[fx.Node, BindingTime]
    reasons: dict[fx.Node, str]
    sealed: dict[fx.Node, tuple[fx.Node, ...]]


def binding_times(graph: fx.Graph, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> Times:
    """The binding time of each node.

    Args:
        graph: any graph.
        modules: the targets of its ``call_module`` nodes.
        tensors: what its ``get_attr`` nodes name.
    """
    effects = {node: effect_of(node, modules.get(str(node.target))) for node in graph.nodes}
    written = _written_sets(graph, modules, tensors)
    returned = dict.fromkeys(returned_memory(graph, modules), "the model returns it")
    # Sets that nothing from outside shares may be filled ahead; which of them depend on a call, only the times tell.
    own = [
        members
        for members in written
        if not any(map(_shared, members.sealed)) and not any(node in returned for node in members.nodes)
    ]
    while True:
        held = returned | {
            node: f"its memory is written by {target_name(members.writers[-1])}"
            for members in written
            if members not in own
            for node in members.nodes
        }
        sealed = {node: members.writers for members in own for node in members.sealed}
        times, reasons = _times(graph, effects, held, sealed)
        late = [members for members in own if not members.can_be_ahead(times)]
        if not late:
            return Times(times, reasons, sealed)
        own = [members for members in own if members not in late]


def _times(
    graph: fx.Graph, effects: Mapping[fx.Node, Effect], held: Mapping[fx.Node, str], sealed: Collection[fx.Node]
) -> tuple[dict[fx.Node, BindingTime], dict[fx.Node, str]]:
    times: dict[fx.Node, BindingTime] = {}
    reasons: dict[fx.Node, str] = {}
    for node in graph.nodes:
        time = max((times[other] for other in node.all_input_nodes), default=BindingTime.constant)
        if node.op in ("placeholder", "output") or node.target is deliver:
            time = BindingTime.call
        elif node.op == "get_attr":
            time = BindingTime.call if "written" in node.meta else BindingTime.step
        if time is BindingTime.constant and (node in sealed or not effects[node].pure):
            time = BindingTime.step
        fixed = "site" in node.meta or (node in sealed and effects[node].known and not effects[node].random)
        reason = held.get(node) or ("" if fixed else _why_call(node, effects[node]))
        if reason and time < BindingTime.call:
            reasons[node] = reason
            time = BindingTime.call
        times[node] = time
    return times, reasons


def _shared(node: fx.Node) -> bool:
    """Whether somebody else may hold the memory of this node: a caller, a module, a map of a weight."""
    return node.op in ("placeholder", "get_attr", "call_module") or "site" in node.meta


def _why_call(node: fx.Node, effect: Effect) -> str:
    if effect.random and effect.known:
        return "draws random numbers at each call"
    if not effect.pure:
        return f"{target_name(node)} is not known to be pure"
    return ""


@dataclass(frozen=True, eq=False)
class _Written:
    """Nodes that may share memory, some of which write to it, in order."""

    nodes: tuple[fx.Node, ...]
    writers: tuple[fx.Node, ...]

    @property
    def sealed(self) -> tuple[fx.Node, ...]:
        """Those up to the last write, the writers included."""
        return (*self.nodes[: self.nodes.index(self.writers[-1])], *self.writers)

    def can_be_ahead(self, times: Mapping[fx.Node, BindingTime]) -> bool:
        """Whether all writes are known ahead, and nobody at call time looks at the memory between two of them."""
        if any(times[node] is BindingTime.call for node in (*self.sealed, *self.writers)):
            return False
        order = {node: at for at, node in enumerate(self.nodes[0].graph.nodes)}
        last = order[self.writers[-1]]
        early = (user for node in self.nodes for user in node.users if order[user] < last)
        return all(times[user] is not BindingTime.call for user in early)


def written_memory(graph: fx.Graph, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> dict[fx.Node, fx.Node]:
    """The nodes that may share memory with one that is written, and for each a node that writes.

    Args:
        graph: any graph.
        modules: the targets of its ``call_module`` nodes.
        tensors: what its ``get_attr`` nodes name; two names may be one memory.
    """
    sets = _written_sets(graph, modules, tensors)
    return {node: members.writers[-1] for members in sets for node in members.nodes}


def _written_sets(graph: fx.Graph, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> list[_Written]:
    """The sets of nodes that may share memory to which one of them, or another node, writes."""
    effects = {node: effect_of(node, modules.get(str(node.target))) for node in graph.nodes}
    # An opaque map of a weight may return its latent unchanged, but it never writes to it.
    opaque = {node for node in graph.nodes if node.op == "call_module" and "site" in node.meta}
    writes = [(other, node) for node in graph.nodes if node not in opaque for other in effects[node].writes]
    writes += _own_state(graph, modules).items()
    if not writes:
        return []
    # Slow to import, and only needed where something writes.
    from networkx.utils import UnionFind

    alias: UnionFind = UnionFind(graph.nodes)
    first_read: dict[object, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            alias.union(first_read.setdefault(_memory(str(node.target), tensors), node), node)
        elif effects[node].aliases and node not in opaque:
            alias.union(node, *node.all_input_nodes)
    order = {node: at for at, node in enumerate(graph.nodes)}
    writers: dict[fx.Node, list[fx.Node]] = {}
    for other, node in writes:
        writers.setdefault(alias[other], []).append(node)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if alias[node] in writers:
            members.setdefault(alias[node], []).append(node)
    # A writer that yields nothing of that memory (x[i] = y) is none of its nodes, but it belongs to them.
    return [
        _Written(
            tuple(sorted({*found, *writers[root]}, key=order.__getitem__)),
            tuple(sorted(set(writers[root]), key=order.__getitem__)),
        )
        for root, found in members.items()
    ]


def _own_state(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, fx.Node]:
    """Reads of what belongs to a module that is called as a whole and may write it: buffers, renormalized embeddings."""
    owned: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module" and "site" not in node.meta and node.target in modules:
            for path, module in modules[str(node.target)].named_modules(prefix=str(node.target)):
                registries = [module._buffers, *([module._parameters] if getattr(module, "max_norm", None) is not None else [])]
                # Those of TorchScript's modules can only be asked for their items.
                names = [name for registry in registries for name, _ in registry.items()]
                owned |= {f"{path}.{name}": node for name in names}
    # What the map of a weight reads is the map's, although it lives below the module that owns the weight.
    reads = (node for node in graph.nodes if node.op == "get_attr" and "latent" not in node.meta)
    return {node: owned[str(node.target)] for node in reads if node.target in owned}


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
