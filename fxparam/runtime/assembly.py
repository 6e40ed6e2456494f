"""From a live module tree to a plan: trace the sites and the model, run the passes, compile what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn

from fxparam.errors import PassError, TraceError
from fxparam.pipeline import training_pipeline
from fxparam.program import Fragment, Program, Record, Site, run
from fxparam.program.line import CONSTANTS
from fxparam.program.parts import joined, part_of
from fxparam.runtime.body import CAPTURED, body_module
from fxparam.runtime.evaluation import Compiler, Evaluation
from fxparam.runtime.groups import Component
from fxparam.runtime.plan import Plan, Recorded
from fxparam.spec.names import first_names, named_tensors, split
from fxparam.tracer.cutting import RecordedBody
from fxparam.tracer.delivery import Inline, WeightReader
from fxparam.tracer.looking import present_values
from fxparam.tracer.lowering import lowered_in
from fxparam.tracer.site import SiteModule
from fxparam.tracer.site_tracing import OpaqueSite, SiteTracer
from fxparam.tracer.statistics import mark_written, running_statistics
from fxparam.tracer.symbolic import TracedBody, trace_body
from fxparam.tracer.watch import Watch


@dataclass(frozen=True, eq=False)
class Options:
    """What a plan is to be like.

    Attributes:
        trace: whether to look for a graph of the body.
        why_live: if not, why.
        reader: what hoisted values are asked of when the body runs.
        inline: where they are instead while a compiler runs it.
        recompute: names of weights that keep nothing for their backward, where that is possible.
        compiler: compiles the prologue; None: it runs as it is.
        bodies: what was recorded and is to be run in place of its modules, where there is no graph of the whole body.
    """

    trace: bool
    why_live: str
    reader: WeightReader
    inline: Inline
    recompute: frozenset[str] = frozenset()
    compiler: Compiler | None = None
    bodies: tuple[RecordedBody, ...] = ()


def make_plan(root: nn.Module, sites: Sequence[Site], options: Options) -> Plan:
    """The plan for the present state.

    Args:
        root: the live module tree.
        sites: its sites, each after those it reads.
        options: what the plan is to be like.
    """
    return _Assembly(root, sites, options).plan()


class _Assembly:
    """A plan in the making."""

    def __init__(self, root: nn.Module, sites: Sequence[Site], options: Options) -> None:
        self.root, self.options = root, options
        self.fragments, self.weights = _fragments(root, sites)
        self.volatile = frozenset(home for home, fragment in self.fragments.items() if fragment.volatile)
        self.sites = tuple(site for site in sites if site.home not in self.volatile)
        self.opaque = {site.home: OpaqueSite(self._home(site.home)) for site in self.sites if self.fragments[site.home].opaque}
        self.traced: TracedBody | None = None
        self.bodies: tuple[RecordedBody, ...] = ()
        self.held: dict[str, Tensor] = {}
        self.notes: tuple[Record, ...] = ()
        self.why_live = options.why_live
        alone = self._with_body()
        self.program = self._with_recorded() or alone or self._without_body()
        self.program = self.program.noting(*self.notes)
        self.components = _components(self.program)
        self.component_of = self._component_of()
        self.constants = {name: t for name, t in self.program.tensors.items() if name.startswith(f"{CONSTANTS}.")}

    def plan(self) -> Plan:
        """All of it together."""
        program, traced, prologue = self.program, self.traced, self._prologue()
        held = {**self.constants, **self.held}
        body = None if traced is None else self._module(self._part(0) if self.bodies else program.body, held)
        recorded = self._recorded(held)
        graphs = [graph for graph in (body, *(one.module for ones in recorded.values() for one in ones)) if graph is not None]
        fleeting = self._within(home for home, fragment in self.fragments.items() if fragment.stateful)
        asked = traced.asked if traced is not None else {}
        return Plan(
            program=program,
            prologue=prologue,
            sources=program.sources,
            slots=tuple(_slot(self.root, name, program.tensors) for name in program.sources),
            values=program.values,
            components=self.components,
            component_of=self.component_of,
            body=body,
            traced=traced,
            why_live="" if traced is not None else self.why_live,
            volatile=self.volatile,
            watch=self._watch(),
            asked=tuple(
                (*_slot(self.root, name, program.tensors), kind) for name, kind in asked.items() if name in program.tensors
            ),
            evaluation=self._evaluation(prologue),
            lowered={type(module).forward.__code__: lowered_in(module.graph) for module in graphs},
            recorded=recorded,
            fragments=self.fragments,
            draws=any(self._home(home).resamples_per_step for home in self.opaque),
            repeatable=tuple(number for number in range(len(self.components)) if number not in fleeting),
        )

    # --- the program

    def _with_body(self) -> Program | None:
        """The program of weights and model; None where the model stays Python, and ``why_live`` says why."""
        if not self.options.trace:
            return None
        if self.volatile:
            self.why_live = f"{sorted(self.volatile)[0]} draws random numbers"
            return None
        try:
            traced = trace_body(self.root, self.weights)
            start = self._start(traced.graph, traced.tensors, traced.modules)
            program = run(start, training_pipeline(self.fragments, self.weights, model=True))
        except (TraceError, PassError) as error:
            self.why_live = str(error)
            return None
        self.traced, self.held = traced, dict(traced.tensors)
        return program

    def _with_recorded(self) -> Program | None:
        """The program of weights, of the traced model if there is one, and of recorded bodies; None where there are none."""
        bodies = self.options.bodies
        if not bodies:
            return None
        traced = () if self.traced is None else (self.traced,)
        parts = (*traced, *bodies)
        names: dict[int, str] = {}
        held: dict[str, Tensor] = {}
        for part in parts:
            for name, tensor in part.tensors.items():
                if split(name)[0] == CAPTURED:
                    held[names.setdefault(id(tensor), f"{CAPTURED}.{len(names)}")] = tensor

        def rename(number: int, name: str) -> str:
            return names[id(parts[number].tensors[name])] if split(name)[0] == CAPTURED else name

        graph = joined([part.graph for part in parts], rename)
        modules = {name: module for part in parts for name, module in part.modules.items()}
        start = self._start(graph, held, modules)
        try:
            program = run(start, training_pipeline(self.fragments, self.weights, model=True))
        except (TraceError, PassError) as error:
            # Each of them was fine by itself; together they are not, and all modules stay Python.
            self.notes = (Record("record", "run recorded graphs", str(error), refused=True),)
            return None
        self.bodies, self.held = bodies, held
        return program

    def _without_body(self) -> Program:
        empty = fx.Graph()
        empty.output(())
        return run(self._start(empty, {}, {}), training_pipeline(self.fragments, self.weights, model=False))

    def _start(self, graph: fx.Graph, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> Program:
        mark_written(graph, running_statistics(self.root))
        registered = {name: row.tensor for row in named_tensors(self.root) for name in row.aliases}
        captured = {name: tensor for fragment in self.fragments.values() for name, tensor in fragment.captured.items()}
        trail = tuple(
            Record("trace", f"hoist {home}", str(self.fragments[home].opaque), refused=True)
            for home in self.fragments
            if home in self.volatile
        )
        return Program(graph, {**registered, **captured, **tensors}, {**modules, **self.opaque}, self.sites, trail=trail)

    # --- what it becomes

    def _module(self, graph: fx.Graph | None, held: Mapping[str, Tensor]) -> fx.GraphModule:
        assert graph is not None
        return body_module(self.root, graph, self.program.values, held, self.options.reader, self.options.inline)

    def _part(self, number: int) -> fx.Graph:
        assert self.program.body is not None
        return part_of(self.program.body, number)

    def _recorded(self, held: Mapping[str, Tensor]) -> dict[str, tuple[Recorded, ...]]:
        found: dict[str, tuple[Recorded, ...]] = {}
        for number, body in enumerate(self.bodies, 0 if self.traced is None else 1):
            module = self._module(self._part(number), held)
            found[body.path] = (*found.get(body.path, ()), Recorded(body, module, number))
        return found

    def _home(self, name: str) -> SiteModule:
        return self.root.get_submodule(name)  # type: ignore[return-value]

    def _prologue(self) -> fx.GraphModule:
        assert self.program.prologue is not None
        needed = {str(node.target) for node in self.program.prologue.nodes if node.op in ("call_module", "get_attr")}
        held = {name: one for name, one in {**self.opaque, **self.constants}.items() if name in needed}
        return fx.GraphModule(held, self.program.prologue, "Prologue")

    def _component_of(self) -> dict[str, tuple[int, int]]:
        values = self.program.values
        result = {values[at]: (number, at) for number, part in enumerate(self.components) for at in part.values}
        for site in self.program.sites:
            for name, aliases in zip(site.names, site.aliases, strict=True):
                result |= dict.fromkeys(aliases, result[name])
        return result

    def _within(self, homes: Iterable[str]) -> set[int]:
        """The components that these sites are part of."""
        chosen = set(homes)
        return {self.component_of[site.names[0]][0] for site in self.program.sites if site.home in chosen}

    def _evaluation(self, prologue: fx.GraphModule) -> Evaluation:
        wanted = {number for name, (number, _) in self.component_of.items() if name in self.options.recompute}
        # What no trace shows may draw or write something: it is computed once.
        return Evaluation(prologue, self.components, wanted - self._within(self.opaque), self.options.compiler)

    def _watch(self) -> Watch:
        # Of volatile sites as well, which are no part of the prologue as long as they are what they are.
        homes = (*(site.home for site in self.program.sites), *sorted(self.volatile))
        maps = [module for home in homes for module in self._home(home).modules()]
        return Watch(
            [module for module in maps if type(module) is not SiteModule],
            fixed=[module for module in maps if type(module) is SiteModule],
            functions=[function for function in map(_forward_of, maps) if function is not None],
        )


def _forward_of(module: nn.Module) -> FunctionType | None:
    function = type(module).forward
    return function if isinstance(function, FunctionType) else None


def _fragments(root: nn.Module, sites: Sequence[Site]) -> tuple[dict[str, Fragment], dict[str, Tensor]]:
    """The fragment of each site and the present value of each weight, under all its names."""
    tracer = SiteTracer(first_names(root))
    tensors = {name: row.tensor for row in named_tensors(root) for name in row.aliases}
    fragments: dict[str, Fragment] = {}
    weights: dict[str, Tensor] = {}
    random: set[str] = set()
    for site in sites:
        module: Any = root.get_submodule(site.home)
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


def _components(program: Program) -> tuple[Component, ...]:
    """The connected components of the prologue: tensors that train apart from each other get autograd nodes of their own."""
    assert program.prologue is not None
    import networkx as nx

    graph: nx.Graph = nx.Graph()
    nodes = list(program.prologue.nodes)
    for node in nodes[:-1]:
        if node.op != "get_attr":
            graph.add_node(node)
            graph.add_edges_from((other, node) for other in node.all_input_nodes if other.op != "get_attr")
    part_of = {node: number for number, part in enumerate(nx.connected_components(graph)) for node in part}
    sources: dict[int, list[int]] = {}
    values: dict[int, list[int]] = {}
    for at, node in enumerate(node for node in nodes if node.op == "placeholder"):
        sources.setdefault(part_of[node], []).append(at)
    for at, node in enumerate(nodes[-1].args[0]):
        # A value that is a constant by itself belongs to no component of nodes.
        values.setdefault(part_of.get(node, -1), []).append(at)
    parts = (Component(tuple(sources.get(number, ())), tuple(found)) for number, found in values.items())
    return tuple(sorted(parts, key=lambda part: part.values))


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
