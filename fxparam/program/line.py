"""The line between binding times ``step`` and ``call`` in one graph: what crosses it, and what that is worth now.

The line starts where binding times put it and is moved until it crosses only tensors worth keeping: weights, and values of
weight arithmetic. Hoisting keeps what is before the line as a graph of its own; folding keeps its values.
"""

from __future__ import annotations

import keyword
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxparam.errors import PassError, TraceError
from fxparam.program.binding import BindingTime, binding_times, target_name
from fxparam.program.effects import effect_of
from fxparam.program.program import Program, Record, deliver, keep_signature

HOISTED = "hoisted"
"""The first part of the names of values that cross the line and are no weights."""
CONSTANTS = "constants"
"""The first part of the names of constants."""


class Line:
    """The line of one program.

    Args:
        program: the program.
        weights: the present values of its computed weights, by name.
        max_growth: values larger than this many times what they are computed from stay after the line.
        sink_views: whether views at the line stay after it.
        sink_constants: whether what depends on nothing stays after it, where only the body needs it.

    Raises:
        TraceError: a weight depends on an input, or the body writes to it.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        *,
        max_growth: float,
        sink_views: bool,
        sink_constants: bool = False,
    ) -> None:
        self.program, self.weights = program, weights
        self.max_growth, self.sink_views, self.sink_constants = max_growth, sink_views, sink_constants
        self.nodes = list(program.graph.nodes)
        found = binding_times(program.graph, program.modules, program.tensors)
        self.times, self.reasons, self.sealed = found.times, found.reasons, found.sealed
        self.names = {node.args[1]: str(node.args[0]) for node in reversed(self.nodes) if node.target is deliver}
        self._check_weights()
        self.values = self._evaluate()
        self.read_bytes = self._bytes_read()
        self.literals: dict[fx.Node, Any] = {}
        self.cuts: dict[str, fx.Node] = {str(node.args[0]): node.args[1] for node in self.nodes if node.target is deliver}
        self._settle()
        self.constants = {
            f"{CONSTANTS}.{_attribute(node)}": self.values[node]
            for node in self.nodes
            if self.times[node] is BindingTime.constant and isinstance(self.values.get(node), Tensor)
        }

    def _check_weights(self) -> None:
        for node, name in self.names.items():
            if self.times[node] is BindingTime.call:
                raise TraceError(f"the weight {name} cannot be computed ahead: {self._blame(node)}")

    def _blame(self, node: fx.Node) -> str:
        """The reason at the root of a weight's lateness."""
        todo = [node]
        for late in todo:
            if late in self.reasons:
                return f"{late}: {self.reasons[late]}"
            todo += [other for other in late.all_input_nodes if self.times[other] is BindingTime.call]
        return "it depends on an input"

    def _evaluate(self) -> dict[fx.Node, Any]:
        """The present values of what does not depend on an input, weights as given, apart from the sites' insides."""
        values: dict[fx.Node, Any] = {}
        interpreter = fx.Interpreter(torch.nn.Module(), graph=self.program.graph)
        for node in self.nodes:
            if node in self.names and self.names[node] in self.weights:
                values[node] = self.weights[self.names[node]].detach()
            elif node.op == "get_attr" and node.target in self.program.tensors:
                values[node] = self.program.tensors[str(node.target)].detach()
            elif self._evaluable(node, values):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    # What the model's operations warn of, they warn of when it is called.
                    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                        values[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
                except Exception as error:
                    if node in self.sealed:
                        raise TraceError(f"evaluating {node} ahead raised {type(error).__name__}: {error}") from error
                    self._sink(node, f"evaluating it ahead raised {type(error).__name__}: {error}")
        return values

    def _evaluable(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
        if node.op not in ("call_function", "call_method") or self.times[node] is BindingTime.call:
            return False
        inside = "site" in node.meta and self.times[node] is not BindingTime.constant
        return not inside and all(other in values for other in node.all_input_nodes)

    def _bytes_read(self) -> dict[fx.Node, int]:
        """For each node, the bytes of all tensors it is computed from."""
        sources: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.nodes:
            own = frozenset([node]) if node.op == "get_attr" or node in self.names else frozenset()
            # What depends on an input is never weighed, and would gather every parameter of a deep model.
            inputs = () if self.times[node] is BindingTime.call and node not in self.reasons else node.all_input_nodes
            sources[node] = own or frozenset().union(*(sources[other] for other in inputs))
        return {node: sum(_bytes(self.values.get(source)) for source in found) for node, found in sources.items()}

    def _settle(self) -> None:
        """Sink what is not worth a cut, until every value that crosses the line is a weight, a constant or a cut."""
        for node in reversed(self.nodes):
            if self.times[node] is BindingTime.call or node.op == "get_attr" or node in self.names:
                continue
            if not any(self.times[user] is BindingTime.call and user.target is not deliver for user in node.users):
                continue
            if "site" in node.meta and self.times[node] is not BindingTime.constant:
                raise PassError(f"{node} inside a site is read from outside")
            if node in self.sealed:
                # Part of it after the line would be written again at each call.
                self._cut(node)
            elif reason := self._not_worth(node):
                self._sink(node, reason)
            elif self.times[node] is BindingTime.step:
                self._cut(node)

    def _cut(self, node: fx.Node) -> None:
        self.cuts[f"{HOISTED}.{_attribute(node)}"] = node

    def _sink(self, node: fx.Node, reason: str) -> None:
        self.times[node] = BindingTime.call
        self.reasons[node] = reason

    def _not_worth(self, node: fx.Node) -> str:
        value = self.values.get(node)
        if not isinstance(value, Tensor):
            return "not a tensor"
        if self.sink_constants and self.times[node] is BindingTime.constant:
            return "depends on nothing"
        if (
            self.sink_views
            and effect_of(node).aliases
            and all(isinstance(self.values.get(other), Tensor) for other in node.all_input_nodes)
        ):
            return "a view costs nothing per call"
        read = self.read_bytes[node]
        if self.times[node] is BindingTime.step and _bytes(value) > self.max_growth * read:
            return f"would keep {_bytes(value):,} bytes computed from {read:,}"
        return ""

    def prologue(self) -> tuple[fx.Graph, tuple[str, ...]]:
        """The graph of everything before the line that the cuts need, and the names of its placeholders."""
        needed = self._behind(self.cuts.values())
        reads = dict.fromkeys(str(node.target) for node in self.nodes if node.op == "get_attr" and node in needed)
        graph = fx.Graph()
        placeholders = dict(zip(reads, map(graph.placeholder, _identifiers(reads)), strict=True))
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if node not in needed:
                continue
            if node.op == "get_attr":
                mapping[node] = placeholders[str(node.target)]
            elif f"{CONSTANTS}.{_attribute(node)}" in self.constants:
                mapping[node] = graph.get_attr(f"{CONSTANTS}.{_attribute(node)}")
            else:
                mapping[node] = graph.node_copy(node, mapping.__getitem__)
        graph.output(tuple(mapping[node] for node in self.cuts.values()))
        _drop_unused(graph)
        return graph, tuple(reads)

    def _behind(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """These nodes, all they are computed from, and what writes to their memory."""
        found: set[fx.Node] = set()
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += [*node.all_input_nodes, *self.sealed.get(node, ())]
        return found

    def body(self) -> fx.Graph:
        """The graph of everything after the line, with ``get_attr`` where it read something before it."""
        crossing = {node: name for name, node in reversed(self.cuts.items())}
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}

        def fetch(node: fx.Node) -> fx.Node:
            if node not in mapping:
                mapping[node] = graph.get_attr(crossing.get(node) or f"{CONSTANTS}.{_attribute(node)}")
            return mapping[node]

        for node in self.nodes:
            reread = node.op == "get_attr" and any(self.times[user] is BindingTime.call for user in node.users)
            if (self.times[node] is BindingTime.call or reread) and node.target is not deliver:
                mapping[node] = graph.node_copy(node, fetch)
        keep_signature(graph, self.program.graph)
        return graph

    def records(self, by: str) -> Iterable[Record]:
        """What crosses the line besides weights, and what stays after it although it depends on parameters only."""
        cut = [name for name in self.cuts if name.startswith(f"{HOISTED}.")]
        if cut:
            yield Record(by, f"moved {len(cut)} values of weight arithmetic out of the call: {', '.join(cut)}")
        for node, reason in self.reasons.items():
            if node.op != "get_attr" and self.read_bytes[node] and reason != "not a tensor":
                yield Record(by, f"move {node.name} = {target_name(node)} out of the call", reason, refused=True)


def _attribute(node: fx.Node) -> str:
    """The name of an attribute for the value of a node: one that no module has already (``to``, ``float``, ``half``)."""
    return f"{node.name}_" if hasattr(torch.nn.Module, node.name) else node.name


def _identifiers(names: Iterable[str]) -> list[str]:
    """Python names for dotted names, each different."""
    found: list[str] = []
    for name in names:
        word = re.sub(r"\W", "_", name)
        word = f"_{word}" if word[0].isdigit() or keyword.iskeyword(word) else word
        found.append(word if word not in found else f"{word}_{len(found)}")
    return found


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _drop_unused(graph: fx.Graph) -> None:
    # What only fed a constant is no longer needed.
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "call_method", "get_attr") and not node.users and effect_of(node).pure:
            graph.erase_node(node)
