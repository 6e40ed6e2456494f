"""torch.fx graphs as neutral graphs."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import _get_qualified_name, map_aggregate

from fxparam.graphdiff.graph import Edge, Graph, Node
from fxparam.graphdiff.memory import Memory
from fxparam.graphdiff.values import constant_text, fill, safe_text, tensor_detail, type_text

# Tensors that a tracer lifted out of the code carry generated names: their value counts instead.
_LIFTED = re.compile(r"(.*\.)?_?(tensor_constant|lifted_tensor_|lifted_tensor_constant)\d*$")
# Where tracers note the type of an input.
_TYPES = ("val", "tensor_meta")


@dataclass(frozen=True)
class Ref:
    """Stands in stored arguments for the value of another node of the same neutral graph."""

    node: int


@dataclass(frozen=True)
class Payload:
    """What is needed to create an fx node again: its opcode, target, arguments, and the module or tensor it names."""

    op: str
    target: Any
    args: Any
    kwargs: Any
    attribute: Any = None
    meta: dict[str, Any] = field(default_factory=dict)


def read_fx(module: fx.GraphModule, source: str = "graph module", *, values: bool = False) -> Graph:
    """The neutral graph of a ``GraphModule``.

    Reads of one attribute are one node: reading a parameter twice is not another computation. Generated names of lifted
    constants are replaced by their values. Guards that ``torch.export`` puts before a program are left out.

    Args:
        module: the graph and the modules and tensors it names.
        source: what it came from, for messages.
        values: whether the values of tensors count.
    """
    return _Reader(module, values).read(source)


class _Reader:
    def __init__(self, module: fx.GraphModule, values: bool) -> None:
        self.module, self.values = module, values
        self.nodes: list[Node] = []
        self.position: dict[fx.Node, int] = {}
        self.attributes: dict[str, int] = {}
        self.memory = Memory(module)
        self.symbols: dict[str, str] = {}
        self.dialects: set[str] = set()
        self.inputs = 0

    def read(self, source: str) -> Graph:
        readers: dict[str, Callable[[fx.Node], None]] = {
            "placeholder": self.placeholder,
            "get_attr": self.get_attr,
            "call_function": self.call_function,
            "call_method": self.call_method,
            "call_module": self.call_module,
            "output": self.output,
        }
        for node in self.module.graph.nodes:
            readers[node.op](node)
        return Graph(tuple(self.nodes), source, frozenset(self.dialects), self.values, self.module.graph._codegen)

    def placeholder(self, node: fx.Node) -> None:
        known = next((node.meta[key] for key in _TYPES if node.meta.get(key) is not None), None)
        detail = () if known is None else (("type", type_text(known, self.symbols)),)
        stars = re.match(r"\**", str(node.target))
        op = "input" + (stars.group() if stars else "")
        self.add(node, "input", op, str(self.inputs), detail)
        self.inputs += 1

    def get_attr(self, node: fx.Node) -> None:
        target = str(node.target)
        if target in self.attributes:
            self.position[node] = self.attributes[target]
            return
        value = operator.attrgetter(target)(self.module)
        if isinstance(value, fx.GraphModule):
            self.add(node, "graph", "graph", "", (("graph", read_fx(value, values=self.values).digest),), value)
        elif isinstance(value, Tensor):
            lifted = _LIFTED.match(target) is not None
            detail = tensor_detail(value, values=self.values or lifted)
            self.add(node, "tensor", "tensor", "" if lifted else target, detail, value)
        else:
            self.add(node, "tensor", type(value).__qualname__, target, (("value", constant_text(value)),), value)
        self.attributes[target] = self.position[node]

    def call_function(self, node: fx.Node) -> None:
        name = function_name(node.target)
        if isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
            self.dialects.add("aten")
        elif getattr(node.target, "__module__", "") not in {"_operator", "operator", "math"}:
            self.dialects.add("torch")
        self.add(node, "call", name)

    def call_method(self, node: fx.Node) -> None:
        self.dialects.add("torch")
        self.add(node, "call", f".{node.target}")

    def call_module(self, node: fx.Node) -> None:
        child = self.module.get_submodule(str(node.target))
        if type(child).__name__ == "GuardsFn" and not node.users:
            return
        self.dialects.add("torch")
        if isinstance(child, fx.GraphModule):
            detail: tuple[tuple[str, str], ...] = (("graph", read_fx(child, values=self.values).digest),)
            self.add(node, "call", "graph", str(node.target), detail, child)
        else:
            self.add(node, "call", module_name(child), str(node.target), module_detail(child, values=self.values), child)

    def output(self, node: fx.Node) -> None:
        info = getattr(self.module.graph._codegen, "pytree_info", None)
        structure = "" if info is None or info.out_spec is None else safe_text(info.out_spec)
        self.add(node, "output", "output", detail=(("structure", structure),) if structure else ())

    def add(
        self,
        node: fx.Node,
        kind: str,
        op: str,
        target: str = "",
        detail: tuple[tuple[str, str], ...] = (),
        value: Any = None,
    ) -> None:
        used: list[fx.Node] = []
        parts = [constant_text(a, used) for a in node.args]
        parts += [f"{key}={constant_text(node.kwargs[key], used)}" for key in sorted(node.kwargs)]
        template = f"({', '.join(parts)})"
        inputs = tuple(Edge(self.position[n]) for n in used)
        effect, writes = self.memory.visit(node)
        after = {self.position[w] for w in writes} - {e.node for e in inputs}
        arguments = fill(template, [n.name for n in used])
        self.position[node] = len(self.nodes)
        self.nodes.append(
            Node(
                name=node.name,
                kind=kind,
                op=op,
                target=target,
                template=template,
                detail=detail,
                inputs=inputs,
                after=tuple(sorted(after)),
                effect=effect,
                arguments=arguments,
                payload=self.payload(node, value),
            )
        )

    def payload(self, node: fx.Node, value: Any) -> Payload:
        def stored(leaf: Any) -> Any:
            return Ref(self.position[leaf]) if isinstance(leaf, fx.Node) else leaf

        args, kwargs = map_aggregate(node.args, stored), map_aggregate(dict(node.kwargs), stored)
        return Payload(node.op, node.target, args, kwargs, value, {k: node.meta[k] for k in _TYPES if k in node.meta})


def function_name(target: Any) -> str:
    """The qualified name by which functions are compared, so that one created again is equal."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.HigherOrderOperator | torch._ops.OpOverloadPacket):
        return str(target)
    if not hasattr(target, "__name__"):
        return f"{type(target).__module__}.{type(target).__qualname__}"
    if inspect.isfunction(target) or inspect.isclass(target):
        return f"{target.__module__}.{target.__qualname__}"
    return re.sub(r"^_operator\.", "operator.", _get_qualified_name(target))


def module_name(module: nn.Module) -> str:
    """The qualified class name, ``torch.nn.modules`` shortened; a parametrized module goes by its own class."""
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    return re.sub(r"^torch\.nn\.modules\.\w+\.", "torch.nn.", f"{kind.__module__}.{kind.__qualname__}")


def module_detail(module: nn.Module, *, values: bool) -> tuple[tuple[str, str], ...]:
    """What counts about a module that is called as a whole: options, plain public attributes, tensors, children.

    ``extra_repr`` alone would not do: it is empty for ``MultiheadAttention``. ``training`` does not count.
    """

    def of(prefix: str, child: nn.Module) -> Iterator[tuple[str, str]]:
        if prefix:
            yield prefix, module_name(child)
        options = safe_text(child.extra_repr())
        if options:
            yield f"{prefix} options".strip(), options
        for key, value in sorted(vars(child).items()):
            plain = isinstance(value, int | float | str | torch.dtype | tuple) and not key.startswith("_")
            if plain and key != "training" and f"{key}=" not in options:
                yield f"{prefix}.{key}".removeprefix("."), constant_text(value)

    detail = [item for prefix, child in module.named_modules(remove_duplicate=False) for item in of(prefix, child)]
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    # By name: the order in which parameters were registered changes nothing a module computes.
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        (_, kind), *digest = tensor_detail(tensor, values=values)
        detail += [(name, kind), *((f"{name} value", text) for _, text in digest)]
    return tuple(detail)
