"""A plan: the prologue and body for one kind of state (shapes, dtypes, devices, train or eval), compiled to Python.

Everything that a trace bakes in is part of the kind; a runtime keeps one plan for each kind it has met.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxparam.errors import PassError, TraceError
from fxparam.pipeline import training_pipeline
from fxparam.program import Fragment, Program, Record, Site, run
from fxparam.program.line import CONSTANTS, HOISTED
from fxparam.runtime.bridge import Component, Group
from fxparam.runtime.evaluation import Compiler, Evaluation
from fxparam.spec.names import named_tensors, split
from fxparam.tracer.delivery import Inline, WeightReader, binding_of
from fxparam.tracer.looking import present_values
from fxparam.tracer.lowering import lowered_in
from fxparam.tracer.site import SiteModule
from fxparam.tracer.site_tracing import OpaqueSite, SiteTracer
from fxparam.tracer.symbolic import TracedBody, kind_of, trace_body
from fxparam.tracer.watch import Watch


@dataclass(frozen=True, eq=False)
class Plan:
    """What to run.

    Attributes:
        program: the program after all passes.
        prologue: sources -> values.
        sources: the names of the tensors the prologue reads.
        slots: where each source lives: a registry of a module and the local name.
        values: the names of what it yields.
        components: its independent parts.
        component_of: for each value's name (and every alias of a weight), its component and position.
        body: the rest of the model as a graph, or None where it stays Python.
        traced: the trace behind ``body``.
        why_live: why there is no graph of the body.
        volatile: homes of the sites that draw random numbers and are computed at each read.
        watch: the options of the maps, which the prologue has baked in.
        asked: the registered tensors whose kind the body's code asked for, and what it was.
        evaluation: what runs the prologue.
        repeatable: the components that may be computed again at any time without any effect.
        draws: whether the prologue may draw random numbers.
        lowered: the names of weights that the body uses only where autocast casts them.
        body_code: the code that reads them.
    """

    program: Program
    prologue: fx.GraphModule
    sources: tuple[str, ...]
    slots: tuple[tuple[dict[str, Any], str], ...]
    values: tuple[str, ...]
    components: tuple[Component, ...]
    component_of: Mapping[str, tuple[int, int]]
    body: fx.GraphModule | None
    traced: TracedBody | None
    why_live: str
    volatile: frozenset[str]
    watch: Watch
    asked: tuple[tuple[dict[str, Any], str, tuple[Any, ...]], ...]
    evaluation: Evaluation
    repeatable: tuple[int, ...]
    draws: bool
    lowered: frozenset[str]
    body_code: CodeType | None
    # Found out at the first refresh of its kind (what trains, autocast), and the same at every other.
    groups: dict[object, Mapping[int, Group]] = field(default_factory=dict)

    def holds(self) -> bool:
        """Whether the Python state that was baked in is still the same."""
        if not self.watch.holds():
            return False
        if self.traced is None:
            return True
        return self.traced.watch.holds() and all(kind_of(registry[name]) == kind for registry, name, kind in self.asked)

    def takes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether there is a graph for these arguments: the required ones, by position, all tensors."""
        if self.body is None or self.traced is None or kwargs or len(args) != len(self.traced.arguments):
            return False
        return all(type(value) in (Tensor, nn.Parameter) for value in args)


def make_plan(
    root: nn.Module,
    sites: Sequence[Site],
    *,
    trace: bool,
    why_live: str,
    reader: WeightReader,
    inline: Inline,
    tracer: SiteTracer,
    recompute: frozenset[str] = frozenset(),
    compiler: Compiler | None = None,
) -> Plan:
    """Trace, transform and compile.

    Args:
        root: the live module tree.
        sites: its sites, each after those it reads.
        trace: whether to look for a graph of the body.
        why_live: if not, why.
        reader: what hoisted values are asked of when the body runs.
        inline: where they are instead while a compiler runs it.
        tracer: traces the sites.
        recompute: names of weights that keep nothing for their backward, where that is possible.
        compiler: compiles the prologue; None: it runs as it is.
    """
    fragments, weights = _fragments(root, sites, tracer)
    volatile = frozenset(home for home, fragment in fragments.items() if fragment.volatile)
    steady = tuple(site for site in sites if site.home not in volatile)
    tensors = {name: row.tensor for row in named_tensors(root) for name in row.aliases}
    tensors |= {name: tensor for fragment in fragments.values() for name, tensor in fragment.captured.items()}
    opaque = {site.home: OpaqueSite(_module(root, site.home)) for site in steady if fragments[site.home].opaque}
    traced, program = None, None
    if trace and volatile:
        trace, why_live = False, f"{sorted(volatile)[0]} draws random numbers"
    if trace:
        try:
            traced = trace_body(root, weights)
            start = Program(
                traced.graph,
                {**tensors, **traced.tensors},
                {**traced.modules, **opaque},
                steady,
                trail=_notes(fragments),
            )
            program = run(start, training_pipeline(fragments, weights, model=True))
        except (TraceError, PassError) as error:
            traced, why_live = None, str(error)
    if program is None:
        empty = fx.Graph()
        empty.output(())
        program = run(
            Program(empty, tensors, opaque, steady, trail=_notes(fragments)),
            training_pipeline(fragments, weights, model=False),
        )
    effects = {home for home, fragment in fragments.items() if fragment.stateful}
    body = None if program.body is None or traced is None else traced
    return _compile(root, program, body, why_live, volatile, opaque, effects, reader, inline, recompute, compiler)


def _fragments(root: nn.Module, sites: Sequence[Site], tracer: SiteTracer) -> tuple[dict[str, Fragment], dict[str, Tensor]]:
    """The fragment of each site and the present value of each weight, under all its names."""
    tensors = {name: row.tensor for row in named_tensors(root) for name in row.aliases}
    fragments: dict[str, Fragment] = {}
    weights: dict[str, Tensor] = {}
    random: set[str] = set()
    for site in sites:
        module = _module(root, site.home)
        reads = {name: weights[name] if name in weights else tensors[name] for name in site.reads}
        fragment = tracer.trace(module, site.home, reads)
        if not random.isdisjoint(site.reads):
            why = fragment.opaque if fragment.volatile else "reads a random weight"
            fragment = replace(fragment, opaque=why, volatile=True)
        fragments[site.home] = fragment
        if fragment.volatile:
            random.update(site.names)
        for aliases, value in zip(site.aliases, present_values(module, tuple(reads.values())), strict=True):
            weights |= dict.fromkeys(aliases, value)
    return fragments, weights


def _notes(fragments: Mapping[str, Fragment]) -> tuple[Record, ...]:
    return tuple(
        Record("trace", f"hoist {home}", str(fragment.opaque), refused=True)
        for home, fragment in fragments.items()
        if fragment.volatile
    )


def _compile(
    root: nn.Module,
    program: Program,
    traced: TracedBody | None,
    why_live: str,
    volatile: frozenset[str],
    opaque: Mapping[str, nn.Module],
    effects: Collection[str],
    reader: WeightReader,
    inline: Inline,
    recompute: frozenset[str],
    compiler: Compiler | None,
) -> Plan:
    assert program.prologue is not None
    constants = {name: tensor for name, tensor in program.tensors.items() if name.startswith(f"{CONSTANTS}.")}
    needed = {str(node.target) for node in program.prologue.nodes if node.op in ("call_module", "get_attr")}
    prologue = fx.GraphModule({k: v for k, v in {**opaque, **constants}.items() if k in needed}, program.prologue, "Prologue")
    components = _components(program)
    component_of: dict[str, tuple[int, int]] = {}
    for number, component in enumerate(components):
        for at in component.values:
            component_of[program.values[at]] = (number, at)
    for site in program.sites:
        for name, aliases in zip(site.names, site.aliases, strict=True):
            component_of |= dict.fromkeys(aliases, component_of[name])
    asked = traced.asked if traced is not None else {}
    body = None if traced is None else _body_module(root, program, constants, traced, reader, inline)
    fleeting = {component_of[site.names[0]][0] for site in program.sites if site.home in effects}
    # Those of volatile sites as well, which are no part of the prologue as long as they are what they are.
    homes = (*(site.home for site in program.sites), *sorted(volatile))
    maps = [module for home in homes for module in _module(root, home).modules()]
    return Plan(
        program=program,
        prologue=prologue,
        sources=program.sources,
        slots=tuple(_slot(root, name, program.tensors) for name in program.sources),
        values=program.values,
        components=components,
        component_of=component_of,
        body=body,
        traced=traced,
        why_live=why_live,
        volatile=volatile,
        watch=Watch(
            [module for module in maps if type(module) is not SiteModule],
            fixed=[module for module in maps if type(module) is SiteModule],
            functions=[f for f in map(_forward_of, maps) if f is not None],
        ),
        asked=tuple((*_slot(root, name, program.tensors), kind) for name, kind in asked.items() if name in program.tensors),
        evaluation=_evaluation(program, prologue, components, component_of, opaque, recompute, compiler),
        lowered=frozenset() if program.body is None else lowered_in(program.body),
        body_code=None if body is None else type(body).forward.__code__,
        draws=any(_module(root, home).resamples_per_step for home in opaque),
        repeatable=tuple(number for number in range(len(components)) if number not in fleeting),
    )


def _evaluation(
    program: Program,
    prologue: fx.GraphModule,
    components: Sequence[Component],
    component_of: Mapping[str, tuple[int, int]],
    opaque: Collection[str],
    recompute: frozenset[str],
    compiler: Compiler | None,
) -> Evaluation:
    """What runs the prologue; parts that no trace shows may draw or write something and are computed once."""
    hidden = {component_of[site.names[0]][0] for site in program.sites if site.home in opaque}
    wanted = {number for name, (number, _) in component_of.items() if name in recompute}
    return Evaluation(prologue, components, wanted - hidden, compiler)


def _components(program: Program) -> tuple[Component, ...]:
    """The connected components of the prologue: tensors that train apart from each other get autograd nodes of their own."""
    prologue = program.prologue
    assert prologue is not None
    import networkx as nx

    graph: nx.Graph = nx.Graph()
    placeholders = [node for node in prologue.nodes if node.op == "placeholder"]
    outputs = list(next(iter(reversed(prologue.nodes))).args[0])
    for node in prologue.nodes:
        if node.op not in ("output", "get_attr"):
            graph.add_node(node)
            graph.add_edges_from((other, node) for other in node.all_input_nodes if other.op != "get_attr")
    parts = []
    for nodes in nx.connected_components(graph):
        sources = tuple(at for at, node in enumerate(placeholders) if node in nodes)
        values = tuple(at for at, node in enumerate(outputs) if node in nodes)
        if values:
            parts.append(Component(sources, values))
    # A value that is a constant by itself belongs to no component of nodes.
    loose = tuple(at for at, node in enumerate(outputs) if node not in graph)
    if loose:
        parts.append(Component((), loose))
    return tuple(sorted(parts, key=lambda part: part.values))


def _body_module(
    root: nn.Module,
    program: Program,
    constants: Mapping[str, Tensor],
    traced: TracedBody,
    reader: WeightReader,
    inline: Inline,
) -> fx.GraphModule:
    """The body as a module that shares the live modules: weights arrive through the properties of their owners."""
    assert program.body is not None
    body = fx.GraphModule(nn.Module(), fx.Graph(), type(root).__name__)
    hoisted = frozenset(local for path, local in map(split, program.values) if path == HOISTED)
    body._modules = {**root._modules, HOISTED: _Reader(reader, inline, HOISTED, hoisted)}
    body._parameters, body._buffers = root._parameters, root._buffers
    for name, tensor in {**constants, **traced.tensors}.items():
        path, local = split(name)
        if path in (CONSTANTS, "captured"):
            holder = body._modules.setdefault(path, nn.Module())
            holder.__dict__[local] = tensor
    binding = binding_of(root)
    for local in binding.names if binding is not None else ():
        setattr(type(body), local, getattr(type(root), local))
        body.__dict__["_fxparam_binding"] = binding
    body.training = root.training
    body.graph = program.body
    return body


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


def _forward_of(module: nn.Module) -> FunctionType | None:
    function = type(module).forward
    return function if isinstance(function, FunctionType) else None


def _module(root: nn.Module, name: str) -> SiteModule:
    return root.get_submodule(name)  # type: ignore[return-value]


def _slot(root: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
    path, local = split(name)
    try:
        owner = root.get_submodule(path)
    except AttributeError:
        # Held by a map or by the model's code without being registered: it stays the tensor it is.
        return {name: tensors[name]}, name
    for registry in (owner._parameters, owner._buffers):
        if local in registry:
            return registry, local
    return {name: tensors[name]}, name
