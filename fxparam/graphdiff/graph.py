"""The neutral graph that every input of ``fxparam.graphdiff.diff`` is read into.

A graph is a list of nodes in an order of execution. What counts about a node is its ``Node.label`` (kind,
operator, dotted name, constants, types) and its edges, which are ordered and say which output of the producer they
read. The node's own name is kept for display only.

**Canonical order.** An isomorphism has to map inputs to inputs by position, effects to effects in sequence, and output
to output. Argument order then forces the image of everything these reach backwards, so a depth-first postorder from
those roots numbers two graphs alike if and only if their reachable parts are isomorphic: linear time, no search. Only
dead pure nodes are left; they are ordered by a Merkle hash of their computation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from fxparam.errors import FxparamError

_REHASHED = 200  # dead nodes up to which they are hashed again after each step


class GraphDiffError(FxparamError, ValueError):
    """Two graphs cannot be compared, or a difference cannot be applied; the message says what to pass."""


def shorten(text: str, width: int = 100) -> str:
    """``text``, or its two ends if it is longer than ``width``."""
    return text if len(text) <= width else f"{text[: width - 24]} ... {text[-19:]}"


class Edge(NamedTuple):
    """A value: which node produces it, and which of its outputs it is."""

    node: int
    output: int = 0


@dataclass(frozen=True)
class Node:
    """One operation, input, tensor or output.

    Attributes:
        name: the name in its own graph, for display; it does not count.
        kind: ``"input"``, ``"tensor"``, ``"call"``, ``"graph"``, ``"outer"``, ``"opset"`` or ``"output"``.
        op: the operator: ``"torch.add"``, ``".view"`` (method), ``"torch.nn.Linear"``, ``"Conv"``.
        target: the dotted name of a module or tensor, the position of an input.
        template: the arguments in source form, with ``%`` where another node's value stands.
        detail: further properties that count (types, module options), by name.
        inputs: the values that fill the ``%`` of the template, in order.
        after: writes to memory that this node reads and that precede it without being its inputs.
        effect: whether its order among other such nodes counts (in-place, random).
        payload: what ``fxparam.graphdiff.apply`` needs to build the node again.
    """

    name: str
    kind: str
    op: str
    target: str = ""
    template: str = "()"
    detail: tuple[tuple[str, str], ...] = ()
    inputs: tuple[Edge, ...] = ()
    after: tuple[int, ...] = ()
    effect: bool = False
    arguments: str = field(default="", compare=False)
    payload: Any = field(default=None, compare=False, repr=False)

    @cached_property
    def label(self) -> tuple[str, str, str, str, tuple[tuple[str, str], ...]]:
        """Everything about the node that counts, but its edges."""
        return self.kind, self.op, self.target, self.template, self.detail

    @property
    def title(self) -> str:
        """What to call it in messages: a tensor goes by its dotted name."""
        return self.target if self.kind == "tensor" and self.target else self.name

    def __str__(self) -> str:
        if self.kind in {"input", "tensor", "graph"}:
            return f"{self.title}: {' '.join([self.op, *(text for _, text in self.detail)])}"
        called = self.op + (f"[{self.target}]" if self.target else "")
        return f"{self.name} = {called}{shorten(self.arguments)}"


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in an order of execution (every edge points backwards).

    Attributes:
        nodes: the nodes; edges are positions in this tuple.
        source: what it was read from: ``"module"``, ``"graph module"``, ``"exported program"``, ``"ONNX model"``,
            ``"snapshot"``.
        dialects: which operator sets occur: ``"torch"``, ``"aten"``, ``"onnx"``.
        values: whether the values of tensors are part of the labels.
        codegen: the calling convention of a torch.fx graph.
    """

    nodes: tuple[Node, ...]
    source: str
    dialects: frozenset[str] = frozenset()
    values: bool = False
    codegen: Any = None

    @cached_property
    def effects(self) -> tuple[int, ...]:
        """The nodes whose mutual order counts, in that order."""
        return tuple(i for i, node in enumerate(self.nodes) if node.effect)

    @cached_property
    def users(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each node its uses as (user, argument position), in order of the users."""
        uses: list[list[tuple[int, int]]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            for position, edge in enumerate(node.inputs):
                uses[edge.node].append((i, position))
        return tuple(map(tuple, uses))

    @cached_property
    def live(self) -> int:
        """How many nodes of the canonical order are reachable from inputs, effects and output."""
        return len(self._reachable)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The canonical order (see the module docstring)."""
        order = list(self._reachable)
        used = {e.node for n in self.nodes for e in n.inputs} | {i for n in self.nodes for i in n.after}
        sinks = set(range(len(self.nodes))) - used - set(order)
        # Numbering one dead computation tells others apart that looked alike, so they are hashed again; in large dead
        # parts, where this would be quadratic, they are hashed once.
        large = len(self.nodes) - len(order) > _REHASHED
        while sinks:
            hashes = merkle(self, {n: k for k, n in enumerate(order)})
            ranked = sorted(sinks, key=hashes.__getitem__)
            chosen = ranked if large else ranked[:1]
            self._visit(chosen, order)
            sinks.difference_update(chosen)
        return tuple(order)

    @cached_property
    def _reachable(self) -> tuple[int, ...]:
        inputs = sorted((i for i, n in enumerate(self.nodes) if n.kind == "input"), key=lambda i: int(self.nodes[i].target))
        outputs = [i for i, n in enumerate(self.nodes) if n.kind == "output"]
        order: list[int] = []
        self._visit([*inputs, *self.effects, *outputs], order)
        return tuple(order)

    def _visit(self, roots: list[int], order: list[int]) -> None:
        """Append what ``roots`` reach and ``order`` lacks, in postorder (iterative: graphs are thousands deep)."""
        seen = set(order)
        for root in roots:
            stack: list[tuple[int, Iterator[int]]] = [] if root in seen else [(root, self.sources(root))]
            seen.add(root)
            while stack:
                _, rest = stack[-1]
                following = next((i for i in rest if i not in seen), None)
                if following is None:
                    order.append(stack.pop()[0])
                else:
                    seen.add(following)
                    stack.append((following, self.sources(following)))

    def sources(self, index: int) -> Iterator[int]:
        """The nodes that a node depends on: its inputs in order, then the writes it comes after."""
        yield from (edge.node for edge in self.nodes[index].inputs)
        yield from self.nodes[index].after

    @cached_property
    def text(self) -> str:
        """The canonical listing, one line a node: equal for isomorphic graphs, whatever their names and order."""
        number = {old: new for new, old in enumerate(self.order)}

        def line(index: int) -> str:
            node = self.nodes[index]
            refs = iter(f"%{number[e.node]}" + (f".{e.output}" if e.output else "") for e in node.inputs)
            arguments = re.sub("%", lambda _: next(refs), node.template)
            after = " ".join(f"%{n}" for n in sorted(number[i] for i in node.after))
            detail = json.dumps(dict(node.detail)) if node.detail else ""
            mark = "!" if node.effect else ""
            return "\t".join((f"%{number[index]}{mark}", node.kind, node.op, node.target, arguments, after, detail)).rstrip()

        return "".join(line(i) + "\n" for i in self.order)

    @cached_property
    def digest(self) -> str:
        """A short hash of ``text``."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def merkle(graph: Graph, numbers: dict[int, int]) -> list[str]:
    """For each node a hash of its whole computation: its number if it has one, else its label and, recursively, its
    inputs.
    """
    hashes: list[str] = []
    for i, node in enumerate(graph.nodes):
        if i in numbers:
            hashes.append(f"%{numbers[i]}")
            continue
        edges = [(hashes[e.node], e.output) for e in node.inputs]
        content = repr((node.label, edges, sorted(hashes[i] for i in node.after)))
        hashes.append(hashlib.sha256(content.encode()).hexdigest())
    return hashes


def parse(text: str) -> Graph:
    """The graph whose ``Graph.text`` is ``text``.

    Raises:
        GraphDiffError: a line is not of that form.
    """
    return Graph(tuple(_parse_line(line, i) for i, line in enumerate(text.splitlines())), "snapshot")


def _parse_line(line: str, index: int) -> Node:
    fields = (line.split("\t") + [""] * 7)[:7]
    mark, kind, op, target, arguments, after, detail = fields
    if mark.rstrip("!") != f"%{index}":
        raise GraphDiffError(f"line {index + 1} of a graph listing: got {line!r}; expected it to start with '%{index}'")
    refs = re.findall(r"%(\d+)(?:\.(\d+))?", arguments)
    return Node(
        name=f"%{index}",
        kind=kind,
        op=op,
        target=target,
        template=re.sub(r"%\d+(\.\d+)?", "%", arguments),
        detail=tuple(json.loads(detail).items()) if detail else (),
        inputs=tuple(Edge(int(node), int(output or 0)) for node, output in refs),
        after=tuple(int(i) for i in re.findall(r"%(\d+)", after)),
        effect=mark.endswith("!"),
        arguments=arguments,
    )
