"""The difference of two graphs as data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from fxparam.graphdiff.graph import Edge, Graph, Node, shorten
from fxparam.graphdiff.matching import Pairs, match
from fxparam.graphdiff.myers import increasing_subsequence

_SHOWN = 20
_USERS_SHOWN = 4


@dataclass(frozen=True)
class Added:
    """A node of ``b`` that ``a`` has not."""

    node: Node

    def __str__(self) -> str:
        return f"+ {self.node}"


@dataclass(frozen=True)
class Removed:
    """A node of ``a`` that ``b`` has not."""

    node: Node

    def __str__(self) -> str:
        return f"- {self.node}"


@dataclass(frozen=True)
class Changed:
    """A node at the same place with another label: operator, dotted name, constants or types.

    Attributes:
        before: the node in ``a``.
        after: the node in ``b``.
        fields: what differs, as (name, before, after). ``"inputs"`` is among them where it reads other values as well.
    """

    before: Node
    after: Node
    fields: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        # Another operator has other options: only what both have is worth a line.
        other = self.before.op != self.after.op
        fields = [(key, shorten(x), shorten(y)) for key, x, y in self.fields if (x and y) or not other]
        return f"~ {self.after.title}: " + "; ".join(f"{key} {x or '(none)'} -> {y or '(none)'}" for key, x, y in fields)


@dataclass(frozen=True)
class Moved:
    """The same nodes at another place in the graph.

    Attributes:
        reason: ``"inputs"``: the nodes read other values than before. ``"order"``: an in-place or random operation runs
            earlier or later relative to the others. ``"after"``: the nodes read memory before or after a write, and
            this changed.
        nodes: the nodes, as they are in ``b``. A value whose uses all went to one other value gives one entry, however
            many nodes use it.
        before: what they read (or ran after) in ``a``.
        after: the same in ``b``.
    """

    reason: str
    nodes: tuple[Node, ...]
    before: str
    after: str

    def __str__(self) -> str:
        names = ", ".join(node.title for node in self.nodes[:_USERS_SHOWN])
        more = f" and {len(self.nodes) - _USERS_SHOWN} more" if len(self.nodes) > _USERS_SHOWN else ""
        verb = {"inputs": "reads", "order": "runs after", "after": "reads memory written by"}[self.reason]
        return f"> {names}{more}: {verb} {shorten(self.after)}, was {shorten(self.before)}"


Entry = Added | Removed | Changed | Moved


@dataclass(frozen=True, eq=False)
class GraphDiff:
    """The structural difference of two graphs. Empty (false, length 0) means isomorphic.

    Attributes:
        a: the first graph, in neutral form.
        b: the second.
        pairs: which node of ``a`` (position) is which node of ``b``.
    """

    a: Graph
    b: Graph
    pairs: Pairs

    @property
    def added(self) -> tuple[Added, ...]:
        """Nodes that only ``b`` has."""
        return tuple(e for e in self.entries if isinstance(e, Added))

    @property
    def removed(self) -> tuple[Removed, ...]:
        """Nodes that only ``a`` has."""
        return tuple(e for e in self.entries if isinstance(e, Removed))

    @property
    def changed(self) -> tuple[Changed, ...]:
        """Nodes whose operator, name, constants or types changed."""
        return tuple(e for e in self.entries if isinstance(e, Changed))

    @property
    def moved(self) -> tuple[Moved, ...]:
        """Nodes that read other values, or run in another order, than before."""
        return tuple(e for e in self.entries if isinstance(e, Moved))

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All differences: removed, added, changed, moved."""
        kept = set(self.pairs.values())
        rewired = {(i, j): list(_rewired(self, i, j)) for i, j in self.pairs.items()}
        removed = [Removed(n) for i, n in enumerate(self.a.nodes) if i not in self.pairs]
        added = [Added(n) for j, n in enumerate(self.b.nodes) if j not in kept]
        changed: dict[tuple[int, int], Changed] = {}
        for (i, j), edges in rewired.items():
            x, y = self.a.nodes[i], self.b.nodes[j]
            if x.label != y.label:
                changed[i, j] = Changed(x, y, tuple(_fields(x, y, _texts(self, edges))))
        moves = [(pair, edges) for pair, edges in rewired.items() if edges and pair not in changed]
        moved = (*_inputs_moved(self, moves), *_after_moved(self), *_order_moved(self))
        return (*removed, *added, *changed.values(), *moved)

    def __len__(self) -> int:
        return len(self.entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __str__(self) -> str:
        if not self:
            return f"no difference ({len(self.a.nodes)} nodes)"
        counts = {"removed": self.removed, "added": self.added, "changed": self.changed, "moved": self.moved}
        head = ", ".join(f"{len(entries)} {name}" for name, entries in counts.items() if entries)
        lines = [f"{len(self)} difference{'s' if len(self) > 1 else ''}: {head}", *map(str, self.entries[:_SHOWN])]
        if len(self) > _SHOWN:
            lines.append(f"... and {len(self) - _SHOWN} more")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<GraphDiff: {str(self).splitlines()[0]}>"

    def to_html(self) -> str:
        """A self-contained page: the entries, and the two listings side by side around each of them."""
        from fxparam.graphdiff.render import to_html

        return to_html(self)

    def to_dot(self, context: int | None = 1) -> str:
        """Both graphs in one, in Graphviz' language.

        Args:
            context: how many edges around a difference to show; ``None`` shows everything.
        """
        from fxparam.graphdiff.render import to_dot

        return to_dot(self, context)


def compare(a: Graph, b: Graph) -> GraphDiff:
    """The difference of two neutral graphs."""
    return GraphDiff(a, b, match(a, b))


def _value(graph: Graph, edge: Edge) -> str:
    return graph.nodes[edge.node].title + (f".{edge.output}" if edge.output else "")


def _rewired(diff: GraphDiff, i: int, j: int) -> Iterator[tuple[Edge, Edge]]:
    """The inputs of a linked pair that are not linked to each other."""
    for old, new in zip(diff.a.nodes[i].inputs, diff.b.nodes[j].inputs, strict=False):
        if diff.pairs.get(old.node) != new.node or old.output != new.output:
            yield old, new


def _texts(diff: GraphDiff, edges: list[tuple[Edge, Edge]]) -> tuple[str, str]:
    """The values read before and after."""
    return ", ".join(_value(diff.a, old) for old, _ in edges), ", ".join(_value(diff.b, new) for _, new in edges)


def _fields(x: Node, y: Node, rewired: tuple[str, str]) -> Iterator[tuple[str, str, str]]:
    if x.op != y.op:
        yield "op", x.op, y.op
    if x.target != y.target:
        yield "position" if x.kind == "input" else "name", x.target, y.target
    if x.template != y.template:
        yield "arguments", x.arguments, y.arguments
    elif any(rewired):
        yield "inputs", *rewired
    old, new = dict(x.detail), dict(y.detail)
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield key, old.get(key, ""), new.get(key, "")


def _inputs_moved(diff: GraphDiff, moves: list[tuple[tuple[int, int], list[tuple[Edge, Edge]]]]) -> Iterator[Moved]:
    """One entry for each replacement of a value that several nodes follow, one for each remaining node."""
    users: dict[tuple[Edge, Edge], dict[int, None]] = defaultdict(dict)
    for (_, j), edges in moves:
        for edge in edges:
            users[edge][j] = None
    for (old, new), nodes in users.items():
        if len(nodes) > 1:
            yield Moved("inputs", tuple(diff.b.nodes[j] for j in nodes), _value(diff.a, old), _value(diff.b, new))
    for (_, j), edges in moves:
        if any(len(users[edge]) == 1 for edge in edges):
            yield Moved("inputs", (diff.b.nodes[j],), *_texts(diff, edges))


def _after_moved(diff: GraphDiff) -> Iterator[Moved]:
    groups: dict[tuple[str, str], list[Node]] = defaultdict(list)
    for i, j in diff.pairs.items():
        x, y = diff.a.nodes[i], diff.b.nodes[j]
        if {diff.pairs.get(n) for n in x.after} != set(y.after):
            before = ", ".join(diff.a.nodes[k].name for k in x.after) or "nothing"
            after = ", ".join(diff.b.nodes[k].name for k in y.after) or "nothing"
            groups[before, after].append(y)
    return (Moved("after", tuple(nodes), *texts) for texts, nodes in groups.items())


def _order_moved(diff: GraphDiff) -> Iterator[Moved]:
    """The effects outside a longest sequence that both graphs run in the same order."""
    rank = {j: k for k, j in enumerate(diff.b.effects)}
    both = [i for i in diff.a.effects if diff.pairs.get(i) in rank]
    kept = {both[k] for k in increasing_subsequence([rank[diff.pairs[i]] for i in both])}
    for i in both:
        if i not in kept:
            j = diff.pairs[i]
            texts = (_previous(diff.a, i), _previous(diff.b, j))
            yield Moved("order", (diff.b.nodes[j],), *texts)


def _previous(graph: Graph, index: int) -> str:
    at = graph.effects.index(index)
    return graph.nodes[graph.effects[at - 1]].name if at else "nothing"
