"""The body of a model as one FX graph, by symbolic tracing, where that is exact.

Different from the stock tracer: modules with computed weights are looked into; a weight is one ``get_attr`` under its dotted
name; operations on parameters, buffers and nothing at all (``torch.arange(5)``) become nodes instead of baked tensors; in-place
operators stay in place; and whatever a graph cannot show raises ``Hazard``: an autograd Function,
a switch of grad mode or autocast, ``isinstance`` on a traced value, hooks, random numbers of Python, attributes written.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxparam.errors import TraceError
from fxparam.spec.names import first_names
from fxparam.tracer.audit import Audit
from fxparam.tracer.delivery import binding_of, weights_read_by
from fxparam.tracer.hazards import (
    Hazard,
    ambient_modes,
    error_line,
    no_autograd_functions,
    preserved_generators,
)
from fxparam.tracer.looking import contents_kept
from fxparam.tracer.outside import Members, classes_of
from fxparam.tracer.watch import Watch

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# torch.nn modules whose forward is one operation on their weights: looked into when a weight of theirs is computed.
_TRANSPARENT = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.PReLU,
)
_OF_GRAPH_MODULES = frozenset(dir(fx.GraphModule)) - frozenset(dir(nn.Module))
_PLAIN_CONTAINERS = (dict, list, tuple, torch.Size, immutable_dict, immutable_list)
_MACHINERY = ("torch.fx", "torch.overrides", "torch.utils._pytree", "torch._jit_internal", "fxparam.")
_FACTORIES = frozenset(
    getattr(torch, name)
    for name in """arange bartlett_window blackman_window empty empty_strided eye full hamming_window hann_window kaiser_window
    linspace logspace ones rand randint randn randperm tensor tril_indices triu_indices zeros scalar_tensor complex
    normal""".split()
)


@dataclass(frozen=True, eq=False)
class TracedBody:
    """A traced model.

    Attributes:
        graph: the graph; placeholders are the required arguments, in order.
        tensors: what its ``get_attr`` nodes name, apart from computed weights.
        modules: what its ``call_module`` nodes name.
        watch: the Python state the graph took for granted.
        arguments: the names of the required arguments.
        asked: the tensors whose shape, dtype or device the code asked for, with what it was told.
    """

    graph: fx.Graph
    tensors: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]
    watch: Watch
    arguments: tuple[str, ...]
    asked: Mapping[str, tuple[Any, ...]]


def trace_body(root: nn.Module, weights: Mapping[str, Tensor]) -> TracedBody:
    """Trace a model without inputs: the required arguments of ``forward`` are tensors, all others at their defaults.

    Args:
        root: the live module tree; computed weights appear as ``get_attr`` under their dotted names.
        weights: the present values of the computed weights, by name: their shapes are known to the trace.

    Raises:
        TraceError: the model cannot be traced, or not exactly; the message gives the reason and the source line.
    """
    tracer = _Tracer(root, weights)
    try:
        with (
            contents_kept(root),
            preserved_generators() as used,
            no_autograd_functions(),
            weights_read_by(tracer),
            _EagerCalls(tracer),
            tracer.audit.watching(),
        ):
            graph = tracer.trace(root)
            wrote = "" if tracer.watch.holds() else tracer.watch.first_change()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        reason = first if isinstance(error, Hazard) else f"{type(error).__name__}: {first}"
        line = error_line(error)
        raise TraceError(reason if not line or line in reason else f"{reason} at {line}") from error
    if used[0]:
        raise TraceError("the forward draws random numbers that are not PyTorch's, or draws them while it is traced")
    if wrote:
        raise TraceError(f"the forward writes {wrote}")
    # Lists of modules are never called, and what is in them decides.
    looked_into: dict[int, nn.Module] = {id(module): module for module in root.modules() if isinstance(module, _CONTAINERS)}
    looked_into |= {id(module): module for module in tracer.looked_into}
    names = tracer.audit.names | {"training", "forward"}
    watch = Watch(
        looked_into.values(),
        others=[module for module in root.modules() if id(module) not in looked_into],
        names=names,
        places=(*tracer.audit.globals, *_methods(root, names), *tracer.registries()),
    )
    return TracedBody(graph, tracer.tensors, tracer.leaves, watch, tuple(tracer.arguments), tracer.asked())


def _methods(root: nn.Module, names: Collection[str]) -> Iterator[tuple[Any, str]]:
    """The functions of these names that the classes of a model's modules define."""
    for members in map(Members, classes_of(root)):
        for name, value in vars(members.holder).items():
            if name in names and isinstance(value, FunctionType):
                yield members, name


def check_names(root: nn.Module) -> None:
    """Check that a graph module can hold what this module holds.

    Raises:
        TraceError: a name is one that it needs for itself.
    """
    taken = (_OF_GRAPH_MODULES | {"hoisted", "constants", "captured"}).intersection(
        (*root._modules, *root._parameters, *root._buffers)
    )
    if taken:
        raise TraceError(f"{type(root).__name__}.{sorted(taken)[0]} has a name that a graph module needs for itself")


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """What code may ask of a parameter without looking at its values."""
    return tensor.shape, tensor.dtype, tensor.device


class _Proxy(fx.Proxy):
    """A traced value that stays in place under ``+=`` and refuses to be asked for its type."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        frame = sys._getframe(1)
        # isinstance(x, nn.Parameter) asks by way of a metaclass.
        while frame.f_back is not None and frame.f_globals.get("__name__") == "torch.nn.parameter":
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith(_MACHINERY):
            return type(self)
        raise Hazard("isinstance on a traced value: a graph cannot tell what the value will be")

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise Hazard(f"asks a tensor for {name!r}, which only the caller can have given it")
        return super().__getattr__(name)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _TensorProxy(_Proxy):
    """A parameter, buffer or computed weight: its shape, dtype and device are known, and the plan is for these only."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, value: Tensor) -> None:
        super().__init__(node, tracer)
        self.__dict__["known"] = value

    known: Any

    @property
    def kind(self) -> Tensor:
        """The tensor, of which only shape, dtype and device may be used; that they were is remembered."""
        self.__dict__["asked"] = True
        return self.known

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one of its sizes."""
        return self.kind.shape if dim is None else self.kind.shape[dim]

    def dim(self) -> int:
        """The number of dimensions."""
        return self.kind.dim()

    def numel(self) -> int:
        """The number of elements."""
        return self.kind.numel()

    def __len__(self) -> int:
        return len(self.kind)


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    target = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))
for _name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "itemsize", "is_sparse"):
    setattr(_TensorProxy, _name, property(lambda self, name=_name: getattr(self.kind, name)))  # type: ignore[misc]


class _Tracer(fx.Tracer):
    def __init__(self, root: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.weights = weights
        self.audit = Audit(root)
        self.proxy_buffer_attributes = True
        self.modes = ambient_modes()
        self.looked_into: list[nn.Module] = [root]
        self.leaves: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.arguments: list[str] = []
        self.names = first_names(root)
        self.held = {id(value) for module in root.modules() for value in _tensors_in(module.__dict__)}
        self.reads: dict[str, _TensorProxy] = {}
        self.watch = Watch(module for module in root.modules() if not _is_torch(module))
        if type(root).__call__ is not nn.Module.__call__:
            raise TraceError(f"{type(root).__name__} has a __call__ of its own")
        if reason := _hooks(root) or _rebuilds(root) or ("forward" in root.__dict__ and "its forward is set on the instance"):
            raise TraceError(f"{type(root).__name__}: {reason}")
        check_names(root)

    # --- weights, parameters, buffers

    def read_weight(self, name: str) -> _TensorProxy:
        """A computed weight, asked for by the property of its owner."""
        return self._read(name, self.weights[name])

    def lowered(self, name: str, value: Any, reader: CodeType) -> Any:
        """A trace shows no casts of autocast."""
        return value

    def write_weight(self, name: str, value: Tensor) -> None:
        """Assigning weights inside a forward is nothing a graph can show."""
        raise Hazard(f"the forward assigns the computed weight {name}")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Every registered tensor becomes one ``get_attr``, found by identity."""
        return self._tensor(attr_val) if isinstance(attr_val, Tensor) and id(attr_val) in self.names else attr_val

    def _tensor(self, value: Tensor) -> _TensorProxy:
        name = self.names.get(id(value))
        if name is None:
            if id(value) not in self.held:
                raise Hazard("the forward makes a tensor in a way that cannot be recorded")
            # Held by a module without being registered: read by reference, under a name of its own.
            name = f"captured.{len(self.tensors)}"
            self.names[id(value)] = name
        self.tensors[name] = value
        return self._read(name, value)

    def _read(self, name: str, value: Tensor) -> _TensorProxy:
        if name not in self.reads:
            node = self.create_node("get_attr", name, (), {})
            self.reads[name] = _TensorProxy(node, self, value)
        return self.reads[name]

    def create_arg(self, a: Any) -> Any:
        """Tensors that reach a node as they are become reads."""
        if isinstance(a, Tensor):
            return self._tensor(a).node
        if isinstance(a, dict | list | tuple) and type(a) not in _PLAIN_CONTAINERS and not hasattr(a, "_fields"):
            raise Hazard(f"a {type(a).__name__} in a graph would become a plain container")
        return super().create_arg(a)

    def registries(self) -> Iterator[tuple[Any, str]]:
        """Where registered tensors are that modules hold elsewhere too: another one may be put into one of the places."""
        held = {id(value) for module in self.root.modules() for value in _tensors_in(_plain_attributes(module))}
        for module in self.root.modules():
            for registry in (module._parameters, module._buffers):
                yield from ((registry, name) for name, tensor in registry.items() if id(tensor) in held)

    def asked(self) -> dict[str, tuple[Any, ...]]:
        """The tensors whose kind the code asked for, and what they were."""
        return {name: kind_of(proxy.known) for name, proxy in self.reads.items() if proxy.__dict__.get("asked")}

    # --- calls

    def proxy(self, node: fx.Node) -> _Proxy:
        """Every traced value refuses what a graph cannot answer."""
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node, if it runs under the modes of the whole forward."""
        if ambient_modes() != self.modes:
            raise Hazard("the forward switches grad mode or autocast")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules of torch.nn, unless they compute a weight that can be seen."""
        if isinstance(m, nn.RNNBase) and type(m).forward.__module__ == "torch.nn.modules.rnn":
            return True
        if not _is_torch(m) or isinstance(m, _CONTAINERS):
            return False
        return not (binding_of(m) is not None and isinstance(m, _TRANSPARENT))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that is looked into, or one node."""
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path) or self._is_arithmetic(m, args, kwargs):
            if reason := _hooks(m) or _rebuilds(m) or ("forward" in m.__dict__ and "its forward is set on the instance"):
                raise Hazard(f"{path} ({type(m).__name__}): {reason}")
            if not any(m is known for known in self.looked_into):
                self.looked_into.append(m)
            return forward(*args, **kwargs)
        self.leaves[path] = m
        result: Any = self.create_proxy("call_module", path, args, kwargs)
        if isinstance(m, nn.MultiheadAttention):
            bound = inspect.signature(type(m).forward).bind(m, *args, **kwargs)
            return (result[0], result[1] if bound.arguments.get("need_weights", True) else None)
        return result

    def _is_arithmetic(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether one operation of PyTorch's is applied to nothing that depends on an input: that is weight arithmetic."""
        if not isinstance(m, _TRANSPARENT) or _hooks(m) or "forward" in m.__dict__:
            return False
        todo = [leaf.node for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node.op == "placeholder":
                return False
            todo += [other for other in node.all_input_nodes if other not in seen]
            seen.update(todo)
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders for the required arguments; Python fills in the defaults of the others."""
        required = []
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind is parameter.VAR_POSITIONAL or parameter.kind is parameter.VAR_KEYWORD:
                continue
            if parameter.default is not parameter.empty:
                continue
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise Hazard(f"the required argument {parameter.name} can only be given by keyword")
            required.append(parameter.name)
        self.arguments = required
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in required)]


class _EagerCalls(TorchFunctionMode):
    """Turns operations that would run while the model is traced into nodes."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if any(type(leaf).__mro__[-2] is fx.Proxy or issubclass(type(leaf), fx.Proxy) for leaf in leaves):
            return func(*args, **kwargs)
        if func in _FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":
            value = func(*args, **kwargs)
            return value if not isinstance(value, Tensor) else getattr(self.tracer._tensor(args[0]), func.__self__.__name__)
        args, kwargs = pytree.tree_map(
            lambda leaf: self.tracer._tensor(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        return func(*args, **kwargs)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in ("_parameters", "_buffers", "_modules")}


def _tensors_in(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """The tensors in attributes and containers of a module."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item, depth - 1)


def _is_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")) or isinstance(module, torch.jit.ScriptModule)


def _rebuilds(module: nn.Module) -> str:
    return "gathers its weights in a list at each call" if isinstance(module, nn.RNNBase) else ""


def _hooks(module: nn.Module) -> str:
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    everywhere = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
    )
    return "has hooks, which a graph would run once" if any(own) or any(everywhere) else ""
