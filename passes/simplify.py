"""Common subexpressions, masks of masks, double transposes and dead code.

    before   a = exp(p); b = exp(p); c = tanh(x); return a + b
    after    a = exp(p); return a + a

    before   w = mul(mul(p, mask_0), mask_1); return transpose(transpose(w, 0, 1), 0, 1)
    after    w = mul(p, mul(mask_0, mask_1)); return w

Two nodes are the same expression if both are pure, do the same to the same values, and nothing writes to the memory of
either. Constants are compared with their type: ``mul(x, 1)`` and ``mul(x, 1.0)`` differ. The product of two masks needs no
gradient, so that the backward has one multiplication less; only zeros and ones are exact in any order.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from fxparam.program import Pass, Program, Record, copy_graph, effect_of
from fxparam.program.binding import returned_memory, written_memory


@final
@dataclass(frozen=True)
class Simplify(Pass):
    """Merge common subexpressions and masks, cancel transposes, then drop what nobody uses."""

    name: ClassVar[str] = "simplify"
    gives: ClassVar[frozenset[str]] = frozenset({"simplified"})

    def rewrite(self, program: Program) -> Program:
        graph, _ = copy_graph(program.graph)
        written = written_memory(graph, program.modules, program.tensors).keys()
        merged = _merge(graph, program)
        masks = _merge_masks(graph, program.tensors, written)
        transposes = _cancel_transposes(graph, written | returned_memory(graph, program.modules))
        dropped = _drop(graph, program)
        if not (merged or masks or transposes or dropped):
            return program
        rare = [f"merged {masks} masks of masks"] * bool(masks) + [f"cancelled {transposes} double transposes"] * bool(
            transposes
        )
        done = [f"merged {merged} common subexpressions", *rare, f"dropped {dropped} dead nodes"]
        return program.evolve(graph=graph).noting(Record(self.name, ", ".join(done)))


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


_PRODUCTS = (torch.ops.aten.mul.Tensor, torch.mul, operator.mul)
_TRANSPOSES = (torch.ops.aten.transpose.int, torch.ops.aten.t.default, torch.ops.aten.mT.default, torch.transpose, torch.t)


def _merge_masks(graph: fx.Graph, tensors: Mapping[str, Tensor], written: Set[fx.Node]) -> int:
    """``mul(mul(x, a), b)`` with masks ``a`` and ``b`` becomes ``mul(x, mul(a, b))``, one pair after the other."""
    count = 0
    for outer in list(graph.nodes):
        if not _is_product(outer, written) or not _is_mask(outer.args[1], tensors, written):
            continue
        inner, second = outer.args
        if not _is_product(inner, written) or len(inner.users) != 1 or not _is_mask(inner.args[1], tensors, written):
            continue
        value, first = inner.args
        with graph.inserting_before(outer):
            mask = graph.call_function(outer.target, (first, second))
        outer.args = (value, mask)
        graph.erase_node(inner)
        count += 1
    return count


def _is_product(node: Any, written: Set[fx.Node]) -> bool:
    called = isinstance(node, fx.Node) and node.op == "call_function" and node.target in _PRODUCTS and node not in written
    return called and len(node.args) == 2 and not node.kwargs


def _is_mask(value: Any, tensors: Mapping[str, Tensor], written: Set[fx.Node]) -> bool:
    """Whether a value is a buffer of zeros and ones, or a product of such."""
    if _is_product(value, written):
        return all(_is_mask(factor, tensors, written) for factor in value.args)
    if not isinstance(value, fx.Node) or value.op != "get_attr" or value in written:
        return False
    tensor = tensors.get(str(value.target))
    if tensor is None or tensor.requires_grad or tensor.is_meta or not tensor.is_floating_point():
        return False
    return bool(((tensor == 0) | (tensor == 1)).all())


def _cancel_transposes(graph: fx.Graph, kept: Set[fx.Node]) -> int:
    """A transpose of the same transpose is what it was before both."""
    count = 0
    for outer in list(graph.nodes):
        inner = outer.args[0] if outer.args else None
        if not isinstance(inner, fx.Node) or outer in kept or inner in kept:
            continue
        same = outer.target is inner.target and outer.op == inner.op == "call_function" and outer.target in _TRANSPOSES
        if same and outer.args[1:] == inner.args[1:] and not outer.kwargs and not inner.kwargs:
            outer.replace_all_uses_with(inner.args[0])
            graph.erase_node(outer)
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
