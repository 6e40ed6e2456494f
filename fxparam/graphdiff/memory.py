"""What an fx graph does to memory and to random generators: where the order of nodes counts.

Data flow orders a node after its inputs. A node that reads memory which an earlier node wrote in place depends on that
write as well, though no edge says so: ``y = x + 1`` before and after ``x.add_(1)`` are two graphs. Memory is followed
through views; an operation that may return a view (``reshape``) counts as one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

_VIEWS = re.compile(
    r"(getitem|getattr|view(_as)?|_?reshape(_as)?|_unsafe_view|t|transpose|permute|movedim|moveaxis|swap(axes|dims)|expand(_as)?"
    r"|squeeze|unsqueeze|(un)?flatten|ravel|detach|alias|narrow|select|chunk|(tensor_|[hvd]?)split(_with_sizes)?|unbind|unfold"
    r"|diagonal|real|imag|view_as_(real|complex)|as_strided|contiguous|to|type|float|double|half|bfloat16|cpu|cuda"
    r"|broadcast_to|adjoint|identity|positive|requires_grad_|[mM]?[TH])"
)
_RANDOM = re.compile(
    r"_?((feature_)?(alpha_)?dropout[123]?d?|native_dropout|rand(n|int|perm)?(_like)?|rrelu|bernoulli|multinomial|poisson|normal"
    r"|gumbel_softmax|fractional_max_pool[23]d(_with_indices)?)"
)
_RANDOM_MODULES = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
# In-place forms of Python's operators: iadd(x, y) writes x.
_OPERATORS = re.compile(r"(setitem|delitem|i(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift))")


class Memory:
    """Follows writes through one graph, node by node in order of execution."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.root: dict[fx.Node, Any] = {}
        self.written: dict[Any, fx.Node] = {}

    def visit(self, node: fx.Node) -> tuple[bool, list[fx.Node]]:
        """Whether the node's order counts, and the writes whose result it reads."""
        after = [self.written[r] for r in map(self._root, node.all_input_nodes) if r in self.written]
        writes = list(self._writes(node))
        if node.op == "get_attr":
            self.root[node] = str(node.target)
        elif node.all_input_nodes and (writes or self._is_view(node)):
            self.root[node] = self._root(writes[0] if writes else node.all_input_nodes[0])
        for value in writes:
            self.written[self._root(value)] = node
        return bool(writes) or self._is_effect(node), after

    def _root(self, node: fx.Node) -> Any:
        return self.root.get(node, node)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def _writes(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes whose value this node changes in place."""
        if node.op not in {"call_function", "call_method", "call_module"}:
            return
        yield from _nodes(node.kwargs.get("out"))
        name = _name(node)
        if isinstance(node.target, torch._ops.OpOverload):
            for position, argument in enumerate(node.target._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                    yield from _nodes(given) if argument.name != "out" else ()
        elif node.op == "call_module":
            if getattr(self._module(node), "inplace", False) is True:
                yield from node.all_input_nodes[:1]
        elif _inplace_flag(node) or _is_inplace(node, name):
            yield from node.all_input_nodes[:1]

    def _is_view(self, node: fx.Node) -> bool:
        if isinstance(node.target, torch._ops.OpOverload):
            return any(a.alias_info is not None for a in node.target._schema.arguments)
        if node.op == "call_module":
            return isinstance(self._module(node), _VIEW_MODULES)
        return _VIEWS.fullmatch(_name(node)) is not None

    def _is_effect(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._module(node), _RANDOM_MODULES)
        if node.op == "call_function" and node.is_impure():
            return True
        return node.op in {"call_function", "call_method"} and _RANDOM.fullmatch(_name(node)) is not None


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return str(getattr(node.target, "__name__", node.target))


def _is_inplace(node: fx.Node, name: str) -> bool:
    if getattr(node.target, "__module__", "") in {"_operator", "operator"}:
        return _OPERATORS.fullmatch(name) is not None
    return (name.endswith("_") and not name.endswith("__") and name != "requires_grad_") or name in {"__setitem__"}


def _inplace_flag(node: fx.Node) -> bool:
    """Whether the call sets ``inplace=True``, by keyword or (``F.relu(x, True)``) by position."""
    if node.kwargs.get("inplace") is True:
        return True
    if node.op != "call_function" or not any(a is True for a in node.args) or not inspect.isfunction(node.target):
        return False
    names = list(inspect.signature(node.target).parameters)
    return "inplace" in names[: len(node.args)] and node.args[names.index("inplace")] is True


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _nodes(item)
