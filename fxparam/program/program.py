"""``Program``: the value that passes turn into another value.

The graph names tensors and modules by dotted names (``get_attr``, ``call_module``); the program holds them by reference and
never copies one. ``deliver(name, value)`` nodes mark the weights that must reach the modules which own them, because Python
that no graph shows may read them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from fxparam.errors import PassError


@dataclass(frozen=True)
class Site:
    """One parametrized weight of a model (several, for a joint declaration).

    Attributes:
        names: the weights it computes, by their first dotted name.
        aliases: for each weight, all its dotted names.
        home: the dotted name of the module that holds the latents and the maps.
        latents: dotted names of the latents, in the order in which the first map takes them.
        reads: the other weights or latents it reads.
        declaration: what was declared, as text.
        origin: who declared it: ``"spec"``, or what was adopted (``"parametrize"``, ``"weight_norm hook"``, ...).
        start: how the latents got their first value.
    """

    names: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]
    home: str
    latents: tuple[str, ...]
    reads: tuple[str, ...]
    declaration: str
    origin: str
    start: str

    @property
    def is_alone(self) -> bool:
        """Whether the owner of its one weight can compute it without any other module."""
        return len(self.names) == 1 and not self.reads


@dataclass(frozen=True, eq=False)
class Fragment:
    """The graph of one site: placeholders for ``inputs`` (dotted names), one output for each of its weights.

    Attributes:
        graph: the graph; its output is a tuple.
        inputs: what each placeholder stands for: a latent, a buffer, another weight.
        opaque: the reason why the graph is a single ``call_module``, or None where it shows the operations.
        volatile: whether each evaluation draws random numbers, so that no value may be kept.
        captured: tensors that the maps hold without registering them, by the names that ``inputs`` uses.
        stateful: whether evaluating it again gives another value or changes a state: it writes buffers or attributes, or draws.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    opaque: str | None = None
    volatile: bool = False
    captured: Mapping[str, Tensor] = field(default_factory=dict)
    stateful: bool = False


@dataclass(frozen=True)
class Record:
    """One line of a program's trail: what a pass did, or what it declined to do and why."""

    by: str
    did: str
    why: str = ""
    refused: bool = False

    def __str__(self) -> str:
        return f"{self.by}: {'refused: ' if self.refused else ''}{self.did}{f' ({self.why})' if self.why else ''}"


@dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A traced model (or only its weights) on its way through the passes.

    Attributes:
        graph: the whole graph. Treated as immutable: a pass builds a new one.
        tensors: what ``get_attr`` nodes name: parameters, buffers, constants.
        modules: what ``call_module`` nodes name.
        sites: the parametrized weights, each after those it reads.
        facts: what has been established (``"substituted"``, ``"hoisted"``, ...).
        trail: what each pass did and refused.
        prologue: after hoisting, the graph from ``sources`` (its placeholders) to a tuple of ``values``.
        sources: dotted names of the tensors the prologue reads.
        values: names of what the prologue yields: weights by dotted name, then hoisted values.
        body: after hoisting, the graph that is left, reading ``values`` by ``get_attr``. None if no model was traced.
    """

    graph: fx.Graph
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()
    facts: frozenset[str] = frozenset()
    trail: tuple[Record, ...] = ()
    prologue: fx.Graph | None = None
    sources: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    body: fx.Graph | None = None

    def __repr__(self) -> str:
        nodes = len(self.graph.nodes)
        return f"Program({nodes} nodes, {len(self.tensors)} tensors, {len(self.sites)} sites, facts {sorted(self.facts)})"

    @property
    def weights(self) -> dict[str, Site]:
        """The site behind each weight, by every dotted name of that weight."""
        return {alias: site for site in self.sites for aliases in site.aliases for alias in aliases}

    def evolve(self, **changes: Any) -> Program:
        """A program with these fields replaced."""
        return replace(self, **changes)

    def noting(self, *records: Record) -> Program:
        """A program with these lines added to its trail."""
        return replace(self, trail=(*self.trail, *records)) if records else self

    def verify(self) -> None:
        """Check what holds for every program.

        Raises:
            PassError: the graph is ill-formed or names a tensor or module that does not exist. Shows the nodes around.
        """
        known = {*self.tensors, *self.weights, *self.values, *self.modules}
        for graph in filter(None, (self.graph, self.prologue, self.body)):
            try:
                graph.lint()
            except RuntimeError as error:
                raise PassError(f"the graph is ill-formed: {error}") from error
            for node in graph.nodes:
                if node.op == "get_attr" and node.target not in known:
                    raise PassError(f"no tensor is named {node.target!r}; {around(node)}")
                if node.op == "call_module" and node.target not in self.modules:
                    raise PassError(f"no module is named {node.target!r}; {around(node)}")
        if self.prologue is not None and len([n for n in self.prologue.nodes if n.op == "placeholder"]) != len(self.sources):
            raise PassError(f"the prologue has {len(self.sources)} sources and another number of placeholders")


def deliver(name: str, value: Tensor) -> None:
    """Marks ``value`` as the weight ``name`` in a graph; executing it does nothing."""


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph and the map from old nodes to new ones. Tensors are shared."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, mapping.__getitem__)
    keep_signature(new, graph)
    return new, mapping


def keep_signature(new: fx.Graph, old: fx.Graph) -> None:
    """Give ``new`` the calling convention of ``old``: exported graphs take and return trees."""
    new.set_codegen(old._codegen)


def output_of(graph: fx.Graph) -> fx.Node:
    """The output node of a graph."""
    return next(iter(reversed(graph.nodes)))


def around(node: fx.Node, span: int = 3) -> str:
    """The lines of a graph around a node, for error messages."""
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    lines = [
        f"{'-->' if other is node else '   '} {other.format_node() or other}"
        for other in nodes[max(0, at - span) : at + span + 1]
    ]
    return "around the fault:\n" + "\n".join(lines)
