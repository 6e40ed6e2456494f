"""A plan: the prologue and body for one kind of state (shapes, dtypes, devices, train or eval), compiled to Python.

Everything that a trace bakes in is part of the kind; a runtime keeps one plan for each kind it has met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import Tensor, fx, nn

from fxparam.program import Program
from fxparam.runtime.evaluation import Evaluation
from fxparam.runtime.groups import Component, Group
from fxparam.tracer.symbolic import TracedBody, kind_of
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
    lowered: frozenset[str]
    body_code: CodeType | None
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
