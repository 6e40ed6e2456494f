"""Several graphs as one, and each of them again.

Passes see one graph, so that what two parts of a model compute from the same parameters is computed once. A part never reads a
value that another part computes per call: its nodes depend on its own placeholders, or on nothing that is per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fxparam.program.program import output_of

_PART = "part"


def joined(graphs: Sequence[fx.Graph], rename: Callable[[int, str], str]) -> fx.Graph:
    """One graph with the nodes of all, in order; its output is the tuple of their outputs.

    Args:
        graphs: the parts.
        rename: the name in the whole for what a part, by its number, reads under some name.
    """
    whole = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for number, graph in enumerate(graphs):
        for node in graph.nodes:
            if node.op == "placeholder":
                mapping[node] = whole.placeholder(f"part{number}_{node.target}")
                mapping[node].meta = {_PART: number}
    outputs = []
    for number, graph in enumerate(graphs):
        for node in graph.nodes:
            if node.op == "output":
                outputs.append(fx.map_arg(node.args[0], mapping.__getitem__))
            elif node.op != "placeholder":
                mapping[node] = whole.node_copy(node, mapping.__getitem__)
                mapping[node].meta[_PART] = number
                if node.op == "get_attr":
                    mapping[node].target = rename(number, str(node.target))
    whole.output(tuple(outputs))
    return whole


def part_of(whole: fx.Graph, number: int) -> fx.Graph:
    """The nodes of one part of a joined graph that was rewritten meanwhile, with what they read."""
    output = output_of(whole)
    result = output.args[0][number]  # type: ignore[index]
    own = [node for node in whole.nodes if node.meta.get(_PART) == number and node.op != "output"]
    needed = set(own)
    todo = [*own, *_nodes_in(result)]
    while todo:
        node = todo.pop()
        needed.add(node)
        todo += [other for other in node.all_input_nodes if other not in needed]
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in whole.nodes:
        if node in needed:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(fx.map_arg(result, mapping.__getitem__))
    return graph


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.map_arg(value, note)
    return found
