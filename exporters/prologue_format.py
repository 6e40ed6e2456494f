"""A straight line of PyTorch operators as JSON, and back, without executing anything of it.

Registers are numbered: inputs first, then steps. A step is ``{"op", "args", "kwargs", "site"}``; an argument is a JSON value,
or an object with one key: ``register``, ``dtype``, ``layout``, ``memory_format``, ``complex``, or ``device`` (always the CPU).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxparam.errors import ExportError

_GETITEM = "getitem"
_OPENS_FILES = frozenset({"from_file"})
_KINDS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def refusal(node: fx.Node) -> str | None:
    """Why a node cannot be a step; None: it can."""
    target = node.target
    if target is not operator.getitem:
        if not isinstance(target, OpOverload) or target.namespace != "aten" or target._opname in _OPENS_FILES:
            return f"it calls {target}, which is no operator of PyTorch's own"
        if torch.Tag.nondeterministic_seeded in target.tags:
            return f"it draws random numbers ({target})"
    try:
        _encoded((node.args, node.kwargs), dict.fromkeys(node.all_input_nodes, 0))
    except TypeError as error:
        return f"{target} takes a {error}"
    return None


def encode_steps(graph: fx.Graph) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The steps of a graph whose nodes ``refusal`` lets pass, and the register of each result by its name."""
    registers: dict[fx.Node, int] = {}
    steps = []
    for node in graph.nodes:
        if node.op == "output":
            break
        registers[node] = len(registers)
        if node.op == "call_function":
            op = _GETITEM if node.target is operator.getitem else str(node.target)
            args, kwargs = _encoded(node.args, registers), _encoded(node.kwargs, registers)
            steps.append({"op": op, "args": args, "kwargs": kwargs, "site": node.meta.get("site", "")})
    return steps, {name: registers[node] for name, node in results(graph).items()}


def decode_steps(inputs: int, steps: Sequence[Mapping[str, Any]], outputs: Mapping[str, int]) -> fx.Graph:
    """The graph of steps, with a placeholder for each input; it returns a dictionary. It is to be interpreted, not compiled.

    Raises:
        ExportError: a step is no operator of PyTorch's own, or this version of PyTorch does not have it.
        ValueError, TypeError, LookupError, AttributeError: the steps are malformed.
    """
    graph = fx.Graph()
    registers = [graph.placeholder(f"register_{at}") for at in range(inputs)]
    for step in steps:
        kwargs = {str(key): _decoded(one, registers) for key, one in step["kwargs"].items()}
        function = operator.getitem if step["op"] == _GETITEM else _operator(step["op"])
        node = graph.call_function(function, tuple(_decoded(one, registers) for one in step["args"]), kwargs)
        node.meta["site"] = str(step["site"])
        registers.append(node)
    graph.output({str(name): registers[at] for name, at in outputs.items()})
    return graph


def results(graph: fx.Graph) -> dict[str, fx.Node]:
    """What a graph returns, by name."""
    found: Any = next(iter(reversed(graph.nodes))).args[0]
    return found


def word(constant: object) -> str:
    """``torch.float32`` as ``"float32"``."""
    return str(constant).removeprefix("torch.")


def constant(kind: str, name: str) -> Any:
    """``"float32"`` as ``torch.float32``, if it is of this kind.

    Raises:
        ValueError: it is not.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, _KINDS[kind]):
        raise ValueError(f"{name!r} is no {kind}")
    return found


def _encoded(value: Any, registers: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"register": registers[value]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [_encoded(one, registers) for one in value]
    if isinstance(value, Mapping):  # keyword arguments
        return {str(key): _encoded(one, registers) for key, one in value.items()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    for kind, cls in _KINDS.items():
        if isinstance(value, cls):
            return {kind: word(value)}
    raise TypeError(type(value).__name__)


def _decoded(value: Any, registers: Sequence[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(one, registers) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "register":
        return registers[inner]
    if kind == "complex":
        return complex(*inner)
    return torch.device("cpu") if kind == "device" else constant(kind, inner)


def _operator(name: str) -> OpOverload:
    """An operator of PyTorch's own by its name, ``aten.mul.Tensor``; nothing else can be named."""
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if namespace == "aten" and packet not in _OPENS_FILES:
        found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if isinstance(found, OpOverload) and str(found) == name:
            return found
    raise ExportError(f"names the operator {name!r}, which torch {torch.__version__} does not have or a prologue may not call")
