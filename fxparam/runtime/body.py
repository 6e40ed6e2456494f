"""The body of a plan: what is left of a traced model, as a module that runs on the live tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxparam.program.line import CONSTANTS, HOISTED
from fxparam.program.program import copy_graph
from fxparam.spec.names import split
from fxparam.tracer.delivery import Inline, WeightReader, binding_of

CAPTURED = "captured"
"""The first part of the names of tensors that the model's code holds without registering them."""


def body_module(
    root: nn.Module, graph: fx.Graph, values: Iterable[str], held: Mapping[str, Tensor], reader: WeightReader, inline: Inline
) -> fx.GraphModule:
    """A graph as a module that shares the live modules: weights arrive through the properties of their owners.

    Args:
        root: the live module tree.
        graph: the body of a model, or of a part of it.
        values: the names of what the prologue yields.
        held: constants, and tensors that the model's code holds without registering them, by the names in the graph.
        reader: what hoisted values are asked of.
        inline: where they are instead while a compiler runs the body.
    """
    body = fx.GraphModule(nn.Module(), fx.Graph(), type(root).__name__)
    hoisted = frozenset(local for path, local in map(split, values) if path == HOISTED)
    body._modules = {**root._modules, HOISTED: _Reader(reader, inline, HOISTED, hoisted)}
    body._parameters, body._buffers = root._parameters, root._buffers
    for name, tensor in held.items():
        path, local = split(name)
        if path in (CONSTANTS, CAPTURED):
            holder = body._modules.setdefault(path, nn.Module())
            holder.__dict__[local] = tensor
    binding = binding_of(root)
    for local in binding.names if binding is not None else ():
        setattr(type(body), local, getattr(type(root), local))
        body.__dict__["_fxparam_binding"] = binding
    body.training = root.training
    body.graph = _reading_late(graph)
    return body


def _reading_late(graph: fx.Graph) -> fx.Graph:
    """Each read directly before its use: a module that the graph only calls may have hooks, which may write what is read."""
    if not any(node.op == "call_module" for node in graph.nodes):
        return graph
    late, _ = copy_graph(graph)
    for node in [node for node in late.nodes if node.op == "get_attr"]:
        for user in list(node.users):
            with late.inserting_before(user):
                user.replace_input_with(node, late.node_copy(node))
        late.erase_node(node)
    return late


class _Reader(nn.Module):
    """Stands in a body for the values that were hoisted out of it: ``hoisted.<name>``."""

    def __init__(self, reader: WeightReader, inline: Inline, prefix: str, names: frozenset[str]) -> None:
        super().__init__()
        self.__dict__.update(reader=reader, inline=inline, prefix=prefix, names=names)

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__["names"]:
            raise AttributeError(f"nothing was hoisted under the name {name!r}")
        if torch.compiler.is_compiling():
            return self.inline.values[f"{self.prefix}.{name}"]
        value = self.reader.read_weight(f"{self.prefix}.{name}")
        if torch._C._is_any_autocast_enabled():
            return self.reader.lowered(f"{self.prefix}.{name}", value, sys._getframe(1).f_code)
        return value
