"""Cutting one call out of a recording: a graph from the tensors it is given to those it returns."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxparam.errors import TraceError
from fxparam.program import effect_of
from fxparam.tracer.recording import Call, Recording
from fxparam.tracer.signature import Signature, Structure, flatten, signature_of, unflatten
from fxparam.tracer.tape import Op, Ref
from fxparam.tracer.watch import Watch


@dataclass(frozen=True, eq=False)
class RecordedBody:
    """The graph of one module for calls of one signature.

    Attributes:
        path: the dotted name of the module; empty for the model itself.
        module: the module.
        graph: placeholders are the tensors among the leaves of its arguments, in order; the output is a tuple of tensors.
        signature: what calls must have in common.
        shapes: whether the shapes of tensors are part of it.
        tensors: what its ``get_attr`` nodes name that is registered nowhere.
        modules: what its ``call_module`` nodes name.
        outputs: for each leaf of what the module returns, the position in the output of the graph, or a plain value.
        structure: how these leaves make up what it returns.
        watch: the Python state the graph took for granted.
    """

    path: str
    module: nn.Module
    graph: fx.Graph
    signature: Signature
    shapes: bool
    tensors: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]
    outputs: tuple[Leaf, ...]
    structure: Structure
    watch: Watch

    def result(self, values: Sequence[Tensor]) -> Any:
        """What the module returns, from the values of the graph."""
        leaves = [leaf.value if leaf.position is None else values[leaf.position] for leaf in self.outputs]
        return unflatten(leaves, self.structure)


@dataclass(frozen=True)
class Leaf:
    """A leaf of what a module returns: a position in the output of its graph, or a plain value."""

    position: int | None
    value: Any = None


def cut(recording: Recording, call: Call) -> RecordedBody:
    """The graph of a call.

    Raises:
        TraceError: no graph shows all of it; the message says why and where.
    """
    if call.reason:
        raise TraceError(call.reason)
    assert call.path is not None
    if call.modes[2:] != recording.root.modes[2:]:
        raise TraceError("it is called under another autocast state or default dtype than the model")
    _check_given(recording, call)
    signature = call.signature()
    builder = _Builder(recording, call)
    for op in recording.ops[call.start : call.stop]:
        builder.add(op)
    outputs, structure = builder.finish()
    held = {name: recording.held[name] for name in builder.names if name in recording.held}
    return RecordedBody(
        call.path,
        call.module,
        builder.graph,
        signature,
        call.asked,
        held,
        builder.modules,
        outputs,
        structure,
        recording.watch(call, builder.names.keys()),
    )


def _check_given(recording: Recording, call: Call) -> None:
    """A tensor that the module reads by itself as well is two things at once: which of them a later call means is unknown.

    Raises:
        TraceError: it is given one.
    """
    path = f"{call.path}." if call.path else ""
    for leaf in call.leaves:
        name = recording.names.get(id(leaf), "") if isinstance(leaf, Tensor) else ""
        if name and name.startswith((path, "captured.")):
            raise TraceError(f"it is given {name}, which it holds itself")


def _containers_in(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor | nn.Module | type | str):
        return
    if isinstance(value, dict | list) or (hasattr(value, "__dict__") and not callable(value)):
        yield id(value)
    inner = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else ()
    for item in inner:
        yield from _containers_in(item)


class _Builder:
    """A graph in the making."""

    def __init__(self, recording: Recording, call: Call) -> None:
        self.recording, self.call = recording, call
        self.graph = fx.Graph()
        self.names: dict[str, fx.Node] = {}
        self.modules: dict[str, nn.Module] = {}
        self._known = {recording.numbers[key]: name for key, name in recording.names.items() if key in recording.numbers}
        self._nodes: dict[int, fx.Node] = {}
        for leaf in call.leaves:
            if isinstance(leaf, Tensor):
                node = self.graph.placeholder(f"given_{len(self.graph.nodes)}")
                # One tensor given twice is one value; calls that give two have another signature.
                self._nodes.setdefault(recording.numbers[id(leaf)], node)

    def add(self, op: Op) -> None:
        """One more operation."""
        args, kwargs = self._arguments(op.args, op.line), self._arguments(op.kwargs, op.line)
        without_grad = self.call.modes[0] and not op.grad
        if without_grad:
            args, kwargs = fx.map_arg((args, kwargs), lambda node: self.graph.call_method("detach", (node,)))
        node = self.graph.create_node(op.op, op.target, args, kwargs)
        node.meta["line"] = op.line
        effect = effect_of(node)
        if without_grad and (effect.writes or not effect.known):
            raise TraceError(f"{op.target} in a block without gradients may write to its arguments at {op.line}")
        if op.op == "call_module":
            self.modules[str(op.target)] = self.recording.root.module.get_submodule(str(op.target))
        self._bind(op.output, node)

    def finish(self) -> tuple[tuple[Leaf, ...], Structure]:
        """The output node; returns what becomes of its values."""
        known = self.recording.containers.union(*map(_containers_in, (self.call.given[0], self.call.given[1])))
        if not known.isdisjoint(_containers_in(self.call.output)):
            raise TraceError("it returns a container that it is given or holds, to which its caller may write")
        leaves, structure = flatten(self.call.output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # Refuses what is neither a tensor nor a plain value.
        signature_of([leaf for leaf in leaves if not isinstance(leaf, Tensor)], structure, shapes=False)
        nodes = [self._returned(tensor) for tensor in tensors]
        if named := next((tensor for tensor in tensors if vars(tensor)), None):
            raise TraceError(f"it returns a tensor with attributes of its own: {', '.join(vars(named))}")
        self.graph.output(tuple(nodes))
        position = iter(range(len(tensors)))
        found = tuple(Leaf(next(position)) if isinstance(leaf, Tensor) else Leaf(None, leaf) for leaf in leaves)
        return found, structure

    def _returned(self, tensor: Tensor) -> fx.Node:
        number = self.recording.numbers.get(id(tensor))
        if number is None and id(tensor) in self.recording.names:
            # No operation took part: the tensor itself is returned.
            name = self.recording.names[id(tensor)]
            return self.names.setdefault(name, self.graph.get_attr(name))
        return self._node(-1 if number is None else number, "")

    def _bind(self, output: Any, node: fx.Node) -> None:
        if isinstance(output, Ref):
            self._nodes[output.number] = node
        elif isinstance(output, tuple | list):
            for at, item in enumerate(output):
                if isinstance(item, Ref | tuple | list):
                    self._bind(item, self.graph.call_function(operator.getitem, (node, at)))

    def _arguments(self, value: Any, line: str) -> Any:
        if isinstance(value, Ref):
            return self._node(value.number, line)
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return slice(*(self._arguments(part, line) for part in parts))
        if isinstance(value, list | tuple):
            return type(value)(self._arguments(item, line) for item in value)
        if isinstance(value, dict):
            return {key: self._arguments(item, line) for key, item in value.items()}
        return value

    def _node(self, number: int, line: str) -> fx.Node:
        if number in self._nodes:
            return self._nodes[number]
        name = self._known.get(number)
        if name is None:
            raise TraceError(
                f"{self.call.path or type(self.call.module).__name__} uses a tensor that was made elsewhere, or in a way that "
                f"cannot be recorded{f' at {line}' if line else ''}"
            )
        if name not in self.names:
            self.names[name] = self.graph.get_attr(name)
            if name in self.recording.written:
                self.names[name].meta["written"] = "the model writes to it in its forward"
        self._nodes[number] = self.names[name]
        return self.names[name]
