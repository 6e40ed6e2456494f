"""A plan: the prologue and body for one kind of state (shapes, dtypes, devices, train or eval), compiled to Python.

Everything that a trace bakes in is part of the kind; a runtime keeps one plan for each kind it has met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import Tensor, fx, nn

from fxparam.errors import TraceError
from fxparam.program import Fragment, Program
from fxparam.runtime.evaluation import Evaluation
from fxparam.runtime.groups import Component, Group
from fxparam.tracer.cutting import RecordedBody
from fxparam.tracer.signature import flatten, signature_of
from fxparam.tracer.symbolic import TracedBody, kind_of
from fxparam.tracer.watch import Watch


@dataclass(frozen=True, eq=False)
class Recorded:
    """A recorded body in a plan.

    Attributes:
        body: what was recorded.
        module: what is left of its graph per call.
        number: which part of the program it is.
    """

    body: RecordedBody
    module: fx.GraphModule
    number: int

    def run(self, leaves: Sequence[Any]) -> Any:
        """What the module returns for arguments with these leaves."""
        return self.body.result(self.module(*(leaf for leaf in leaves if isinstance(leaf, Tensor))))


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
        lowered: by the code of each body, the names of the weights that it uses only where autocast casts them.
        recorded: the recorded bodies by the path of their module, each with the graph that is left of it.
        fragments: the graph of each site, by its home.
        groups: the groups of components that train, by what trains and autocast: found out at the first refresh of its kind.
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
    lowered: Mapping[CodeType, frozenset[str]]
    recorded: Mapping[str, tuple[Recorded, ...]]
    fragments: Mapping[str, Fragment]
    groups: dict[object, Mapping[int, Group]] = field(default_factory=dict)

    def holds(self) -> bool:
        """Whether the Python state that was baked in is still the same."""
        if not self.watch.holds():
            return False
        if self.traced is None:
            return True
        return self.traced.watch.holds() and all(kind_of(registry[name]) == kind for registry, name, kind in self.asked)

    def yields_the_same(self, other: Plan) -> bool:
        """Whether another plan computes the same values, in the same order, from the same sources."""
        same = (self.values, self.sources, self.component_of) == (other.values, other.sources, other.component_of)
        return same and str(self.prologue.graph) == str(other.prologue.graph)

    def by_all_names(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the prologue yielded, by the names of values and all aliases of weights."""
        return {name: values[at].detach() for name, (_, at) in self.component_of.items()}

    def match(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Recorded, list[Any]] | None:
        """The recorded body that is right for this call of a module, with the leaves of its arguments; or None."""
        candidates = self.recorded.get(path)
        if not candidates:
            return None
        leaves, structure = flatten((args, kwargs))
        try:
            signatures = {shapes: signature_of(leaves, structure, shapes=shapes) for shapes in (False, True)}
        except TraceError:
            return None
        for one in candidates:
            if one.body.signature == signatures[one.body.shapes] and one.body.watch.holds():
                return one, leaves
        return None

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """The arguments for the traced body: the required ones, all tensors, by position or name. None: these are others."""
        if self.body is None or self.traced is None:
            return None
        names = self.traced.arguments
        if len(args) + len(kwargs) != len(names) or not set(kwargs) <= set(names[len(args) :]):
            return None
        given = (*args, *(kwargs[name] for name in names[len(args) :]))
        return given if all(type(value) in (Tensor, nn.Parameter) for value in given) else None
