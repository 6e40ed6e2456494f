"""Common subexpressions and dead code.

    before   a = exp(p); b = exp(p); c = tanh(x); return a + b
    after    a = exp(p); return a + a

Two nodes are the same expression if both are pure, do the same to the same values, and nothing writes to the memory of
either. Constants are compared with their type: ``mul(x, 1)`` and ``mul(x, 1.0)`` differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx

from fxparam.program import Pass, Program, Record, copy_graph, effect_of
from fxparam.program.binding import returned_memory, written_memory


@final
@dataclass(frozen=True)
class Simplify(Pass):
    """Merge common subexpressions, then drop what nobody uses."""

    name: ClassVar[str] = "simplify"
    gives: ClassVar[frozenset[str]] = frozenset({"simplified"})

    def rewrite(self, program: Program) -> Program:
        graph, _ = copy_graph(program.graph)
        merged = _merge(graph, program)
        dropped = _drop(graph, program)
        if not merged and not dropped:
            return program
        return program.evolve(graph=graph).noting(
            Record(self.name, f"merged {merged} common subexpressions, dropped {dropped} dead nodes")
        )


def _merge(graph: fx.Graph, program: Program) -> int:
    written = written_memory(graph, program.modules, program.tensors)
    returned = returned_memory(graph, program.modules)
    seen: dict[object, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        # Neither what is written nor what is computed from it: before and after the write are two values.
        steady = written.keys().isdisjoint((node, *node.all_input_nodes))
        # Two values that the caller gets stay two: it may write to one of them.
        single = node.op in ("get_attr", "call_function", "call_method") and node not in returned
        if not single or not steady or not effect_of(node).pure:
            continue
        key = (node.op, node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            count += 1
    return count


def _drop(graph: fx.Graph, program: Program) -> int:
    count = 0
    for node in reversed(list(graph.nodes)):
        removable = node.op not in ("placeholder", "output") and not node.users
        if removable and effect_of(node, program.modules.get(str(node.target))).pure:
            graph.erase_node(node)
            count += 1
    return count


def _key(value: Any) -> object:
    """A hashable stand-in for an argument that tells 1 from 1.0 from True and 0.0 from -0.0."""
    if isinstance(value, fx.Node):
        return ("node", value)
    if isinstance(value, tuple | list):
        return (type(value).__name__, *map(_key, value))
    if isinstance(value, dict):
        return ("dict", *((key, _key(item)) for key, item in value.items()))
    if isinstance(value, slice):
        return ("slice", _key(value.start), _key(value.stop), _key(value.step))
    if isinstance(value, str | torch.dtype | torch.device | torch.layout | torch.memory_format | type(None)):
        return value
    return (type(value), repr(value))
