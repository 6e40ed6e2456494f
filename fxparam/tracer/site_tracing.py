"""The graph of one site, traced by ``make_fx`` with the tensors it has now.

Shapes, dtypes, devices and options are baked into the graph, so a plan of a runtime is for these only. A site that cannot be
traced faithfully becomes a single ``call_module``, with the reason: it writes its buffers, applies an autograd Function,
switches grad mode, has hooks, draws random numbers once per step, or its graph gives other values or gradients than it does
itself, which is checked for each.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from fxparam.program.effects import effect_of
from fxparam.program.program import Fragment
from fxparam.spec.names import join
from fxparam.tracer.hazards import Hazard, no_autograd_functions, nodes_behind
from fxparam.tracer.looking import looking
from fxparam.tracer.memory import return_freed_memory
from fxparam.tracer.site import Link, SiteModule

_LARGE = 2**24
"""Bytes of weights from which on the C library is asked for what a trace leaves of its memory."""

_MODE_SWITCHES = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
)


@dataclass(frozen=True, eq=False)
class _Probe:
    """What a site does when it runs once as it is: its weights, their gradients, and whether it wrote or drew anything.

    The weights are without their graph, which may be many times as large as they are. ``own_backward`` is the name of a Python
    autograd Function in it.
    """

    weights: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    own_backward: str
    writes: str
    draws: bool


@dataclass(frozen=True, eq=False)
class _Traced:
    """What a fragment consists of, for any site with the same maps."""

    graph: fx.Graph
    opaque: str | None = None
    volatile: bool = False
    stateful: bool = False
    captured: Mapping[str, Tensor] = field(default_factory=dict)


class SiteTracer:
    """Traces the sites of one model, equal ones once.

    Args:
        names: the dotted name of each registered tensor of the model, by ``id``.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        self._shared: dict[Hashable, _Traced] = {}

    def trace(self, site: SiteModule, home: str, reads: Mapping[str, Tensor]) -> Fragment:
        """The fragment of a site.

        Args:
            site: the site.
            home: its dotted name.
            reads: the weights it reads, by name, with their present values.
        """
        local = {**dict(site.named_parameters()), **dict(site.named_buffers())}
        inputs = (*(self.names.get(id(tensor), join(home, name)) for name, tensor in local.items()), *reads)
        key = _key(site, local, reads)
        if key is not None and key in self._shared:
            traced = self._shared[key]
        else:
            traced = _trace(site, local, tuple(reads.values()))
            if key is not None and traced.opaque is None:
                self._shared[key] = traced
        named = {f"{home}.{name}": tensor for name, tensor in traced.captured.items()}
        return Fragment(
            graph=traced.graph if traced.opaque is None else _call(home, len(inputs), site.n_weights),
            inputs=(*inputs, *named),
            opaque=traced.opaque,
            volatile=traced.volatile,
            stateful=traced.stateful,
            captured=named,
        )


class OpaqueSite(nn.Module):
    """A site as one call of the prologue: tensors in, weights out.

    The site is not a child: it belongs to the model. Parameters are swapped for what is passed; buffers are the site's own,
    so that maps with a state keep it.
    """

    def __init__(self, site: SiteModule) -> None:
        super().__init__()
        self.__dict__["site"] = site

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The weights for these parameters, (ignored) buffers and reads, in the order of the fragment's inputs."""
        site: SiteModule = self.__dict__["site"]
        parameters = dict(site.named_parameters())
        skipped = len(parameters) + sum(1 for _ in site.buffers())
        reads = tensors[skipped:]
        if all(own is given for own, given in zip(parameters.values(), tensors, strict=False)):
            return site(*reads)
        return functional_call(site, dict(zip(parameters, tensors, strict=False)), reads)


def _trace(site: SiteModule, local: Mapping[str, Tensor], reads: Sequence[Tensor]) -> _Traced:
    tensors = [_leaf(tensor) for tensor in (*local.values(), *reads)]

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        result = functional_call(site, dict(zip(local, flat, strict=False)), tuple(flat[len(local) :]))
        return result if isinstance(result, tuple) else (result,)

    probe = _probe(site, local, run, tensors)
    opaque = _Traced(
        fx.Graph(), _obstacle(site, probe), probe.draws and not site.resamples_per_step, probe.draws or bool(probe.writes)
    )
    if opaque.opaque:
        return opaque
    # Numbers that it draws from a generator of its own are not seen: its values differ, and that may be why.
    opaque = replace(opaque, stateful=site.resamples_per_step)
    try:
        with looking(site), torch.enable_grad(), no_autograd_functions(), _quiet():
            module = make_fx(run, pre_dispatch=True, tracing_mode="real")(*tensors)
    except Hazard as hazard:
        return replace(opaque, opaque=str(hazard))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return replace(opaque, opaque=f"tracing it raised {type(error).__name__}: {first}")
    if sum(weight.nbytes for weight in probe.weights) >= _LARGE:
        return_freed_memory()
    if reason := _unfaithful(module, tensors, probe):
        return replace(opaque, opaque=reason)
    graph, captured = _without_captures(module)
    return _Traced(graph, captured=captured)


def _obstacle(site: SiteModule, probe: _Probe) -> str | None:
    """The reason why this site cannot be a graph, as far as running it tells."""
    if reason := _hooks(site):
        return reason
    if probe.draws:
        return "draws random numbers, once per step" if site.resamples_per_step else "draws random numbers"
    if name := probe.own_backward:
        return f"torch.autograd.Function {name} has a backward of its own, which a trace loses"
    return f"writes {probe.writes} in this mode" if probe.writes else None


def _probe(site: SiteModule, local: Mapping[str, Tensor], run: Any, tensors: Sequence[Tensor]) -> _Probe:
    """Run the site once, as it is, on copies of its tensors."""
    replaced: list[bool] = []
    watched = [tensor for tensor, name in zip(tensors, local, strict=False) if name not in dict(site.named_parameters())]
    versions = [tensor._version for tensor in watched]
    handle = site.register_forward_hook(
        lambda module, args, out: replaced.append(any(b is not w for b, w in zip(site.buffers(), watched, strict=False)))
    )
    try:
        with looking(site) as look, torch.enable_grad():
            weights = run(*tensors)
    finally:
        handle.remove()
    writes = "its buffers" if any(replaced) or versions != [tensor._version for tensor in watched] else ""
    plain = tuple(weight.detach() for weight in weights)
    writes = writes or ("its attributes" if look.wrote else "")
    return _Probe(plain, _gradients(weights, tensors), _own_backward(weights), writes, look.drew)


def _own_backward(weights: Sequence[Tensor]) -> str:
    """The name of a Python autograd Function behind these tensors, however it was called (``apply`` may have been kept)."""
    own = (node for node in nodes_behind(weights) if isinstance(node, torch.autograd.function.BackwardCFunction))
    return next((type(node).__name__.removesuffix("Backward") for node in own), "")


def _gradients(weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of a fixed linear functional of the weights, with respect to every trainable tensor."""
    outputs = [weight for weight in weights if weight.requires_grad]
    inputs = [tensor for tensor in tensors if tensor.requires_grad]
    if not outputs or not inputs:
        return ()
    # An arbitrary direction without symmetry: a wrong gradient does not hide in it.
    directions = [
        torch.cos(torch.arange(w.numel(), device=w.device, dtype=torch.float32)).reshape(w.shape).to(w.dtype) for w in outputs
    ]
    return torch.autograd.grad(outputs, inputs, directions, allow_unused=True)


def _unfaithful(module: fx.GraphModule, tensors: Sequence[Tensor], probe: _Probe) -> str:
    """Why a traced graph must not be used, or ``""``."""
    for node in module.graph.nodes:
        if getattr(node.target, "__name__", "") in _MODE_SWITCHES:
            return "switches grad mode or autocast inside"
        if effect_of(node).writes:
            return "writes in place inside"
    with torch.enable_grad():
        weights = module.forward(*tensors)
    if not all(map(_close, weights, probe.weights)):
        return "its graph gives other values"
    gradients = _gradients(weights, tensors)
    del weights
    same = len(gradients) == len(probe.gradients) and all(map(_close, gradients, probe.gradients))
    return "" if same else "its graph gives other gradients"


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta:
        return b.is_meta
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    eps = torch.finfo(a.dtype).eps
    scale = float(b.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
    return torch.allclose(a.detach(), b.detach(), rtol=64 * eps, atol=64 * eps * scale, equal_nan=True)


def _without_captures(module: fx.GraphModule) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph with a placeholder, after all others, for each tensor that it held by itself."""
    graph = module.graph
    captured: dict[str, Tensor] = {}
    placeholders: dict[str, fx.Node] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        name = str(node.target).replace(".", "_")
        if name not in placeholders:
            captured[name] = getattr(module, str(node.target))
            with graph.inserting_after(last[0]) if last else graph.inserting_before(next(iter(graph.nodes))):
                placeholders[name] = graph.placeholder(name)
            last = [placeholders[name]]
        node.replace_all_uses_with(placeholders[name])
        graph.erase_node(node)
    return graph, captured


def _call(home: str, n_inputs: int, n_weights: int) -> fx.Graph:
    """A graph that calls the module ``home`` on all its placeholders."""
    graph = fx.Graph()
    args = tuple(graph.placeholder(f"input_{number}") for number in range(n_inputs))
    result = graph.call_module(home, args)
    if n_weights == 1:
        graph.output((result,))
    else:
        import operator

        graph.output(tuple(graph.call_function(operator.getitem, (result, number)) for number in range(n_weights)))
    return graph


def _leaf(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return copy.requires_grad_(tensor.requires_grad)


def _hooks(site: SiteModule) -> str:
    for name, module in site.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name or 'it'} has hooks"
    return ""


def _quiet() -> Any:
    # make_fx logs and warns about tensors it bakes in; these are found and turned into inputs here.
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    return warnings.catch_warnings(action="ignore")


def _key(site: SiteModule, local: Mapping[str, Tensor], reads: Mapping[str, Tensor]) -> Hashable | None:
    """Equal for sites whose graphs are equal: same maps with the same options on tensors of the same kind. None: unknown."""
    described = [describe(module) for module in site.modules()]
    if any(part is None for part in described):
        return None
    kinds = tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in (*local.values(), *reads.values()))
    return (tuple(described), tuple(local), kinds, len(reads), site.n_weights)


def describe(module: nn.Module) -> Hashable | None:
    """The type and options of a module as a hashable value, or None where an attribute cannot be compared."""
    parts: list[Any] = [type(module)]
    for name, value in module.__dict__.items():
        if isinstance(value, Link):
            continue
        if name in ("_parameters", "_buffers", "_modules"):
            parts.append((name, tuple(value)))
        elif isinstance(value, str | int | float | bool | type(None) | torch.dtype | tuple | set):
            plain = tuple(value) if isinstance(value, tuple) else frozenset(value) if isinstance(value, set) else value
            try:
                hash(plain)
            except TypeError:
                return None
            parts.append((name, type(value), plain))
        elif callable(value) and not isinstance(value, nn.Module):
            parts.append((name, id(value)))
        elif name.startswith("_") and not value:
            continue
        else:
            return None
    return tuple(parts)
