"""The report of a transform: what was parametrized, which layer each module got and why, what was hoisted and refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxparam.errors import missing_extra
from fxparam.program import Record, Site
from fxparam.runtime.choosing import Layer
from fxparam.runtime.plan import Plan
from fxparam.runtime.stats import Stats


@dataclass(frozen=True)
class SiteRow:
    """One site in the report.

    Attributes:
        weights: the names of its weights.
        declaration: what computes them.
        origin: who declared it.
        start: how the latents got their first value.
        layer: ``"graph"`` where the prologue shows its operations, ``"call"`` where it is one opaque call, ``"per read"``
            where it draws random numbers.
        reason: why it is not a graph.
        kept: bytes of its latents.
        nodes: operations in the prologue.
        recomputed: whether its backward computes it again, and nothing is kept for that.
        reached: whether a backward has brought a gradient to it; None before the first backward, and where nothing trains.
    """

    weights: tuple[str, ...]
    declaration: str
    origin: str
    start: str
    layer: str
    reason: str
    kept: int
    nodes: int
    recomputed: bool
    reached: bool | None

    @property
    def notes(self) -> str:
        """What is worth saying about the row."""
        notes = [self.layer if not self.reason else f"{self.layer} ({self.reason})"]
        if self.recomputed:
            notes.append("recomputed in backward")
        if self.reached is False:
            notes.append("no loss has reached it")
        return "; ".join(notes)


@dataclass(frozen=True)
class Report:
    """What ``transform`` did. ``print(report)`` shows it; the fields are the same as data.

    Attributes:
        sites: one row for each parametrized weight.
        body: ``"graph"``, ``"regions"`` where graphs are run in place of some modules, or ``"live"``.
        why_live: why the body is not a graph.
        layers: how each module runs that was looked at: the model, and where it is not a graph the modules in it.
        prologue_nodes: operations that run once per step.
        body_nodes: operations that run per call (of a graph).
        hoisted: names of hoisted values that are no weights.
        trail: what every pass did.
        stats: refreshes and hits so far.
    """

    sites: tuple[SiteRow, ...]
    body: str
    why_live: str
    layers: tuple[Layer, ...]
    prologue_nodes: int
    body_nodes: int
    hoisted: tuple[str, ...]
    trail: tuple[Record, ...]
    stats: Stats

    def layer_of(self, path: str) -> Layer:
        """How the module with this dotted name runs: as part of the innermost module that was looked at."""
        inside = [layer for layer in self.layers if layer.path in ("", path) or path.startswith(f"{layer.path}.")]
        return max(inside, key=lambda layer: len(layer.path))

    @property
    def refusals(self) -> tuple[Record, ...]:
        """What passes declined to do, each with the reason."""
        return tuple(record for record in self.trail if record.refused)

    def __str__(self) -> str:
        lines = [
            f"{len(self.sites)} sites; the prologue has {self.prologue_nodes} operations and ran {self.stats.refreshes} times",
            {
                "graph": f"the body is a graph of {self.body_nodes} operations",
                "regions": f"the body is live Python with graphs of {self.body_nodes} operations in it: {self.why_live}",
                "live": f"the body is live Python: {self.why_live}",
            }[self.body],
        ]
        for row in self.sites:
            names = row.weights[0] + (f" and {len(row.weights) - 1} more" if len(row.weights) > 1 else "")
            lines.append(f"  {names}: {row.declaration} [{row.origin}]; {row.start}; {row.notes}")
        lines += [f"  {layer}" for layer in self.layers if layer.path or layer.reason]
        lines += [f"  hoisted {name}" for name in self.hoisted]
        lines += [f"  {record}" for record in self.refusals]
        return "\n".join(lines)

    def __rich__(self) -> Any:
        """A table for ``rich.print``."""
        try:
            from rich.console import Group
            from rich.table import Table
            from rich.text import Text
        except ImportError as error:
            raise missing_extra("rich", "report", "to print reports as tables") from error
        table = Table("weight", "declaration", "origin", "start", "layer", title=Text(str(self).split("\n")[0]))
        for row in self.sites:
            names = row.weights[0] + (f" (+{len(row.weights) - 1})" if len(row.weights) > 1 else "")
            table.add_row(*map(Text, (names, row.declaration, row.origin, row.start, row.notes)))
        layers = (Text(str(layer)) for layer in self.layers if layer.path or layer.reason)
        rest = [Text(str(self).split("\n")[1]), *layers, *(Text(f"hoisted {name}") for name in self.hoisted)]
        return Group(table, *rest, *(Text(str(record)) for record in self.refusals))

    @property
    def unreached(self) -> tuple[str, ...]:
        """The weights that no loss has reached, although there has been a backward: forgotten, or left out by the model."""
        return tuple(name for row in self.sites if row.reached is False for name in row.weights)


def make_report(
    live: nn.Module,
    sites: Sequence[Site],
    plan: Plan,
    records: Mapping[str, Layer],
    stats: Stats,
    reached: AbstractSet[str],
    notes: Sequence[str] = (),
) -> Report:
    """The report of a model with this plan.

    Args:
        live: the live module tree.
        sites: its sites.
        plan: the present plan.
        records: what each module got that was recorded, by its name.
        stats: the counts so far.
        reached: the names of the weights and latents that a backward has brought a gradient to.
        notes: what of the given model was not taken over: dotted names, each with the reason.
    """
    counts: dict[str, int] = {}
    opaque: set[str] = set()
    for node in plan.prologue.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            home = node.meta.get("site", "")
            counts[home] = counts.get(home, 0) + 1
            if node.op == "call_module":
                opaque.add(home)
    reasons = {
        record.did.removeprefix("look into ").removeprefix("hoist "): record.why
        for record in plan.program.trail
        if record.refused
    }
    rows = []
    any_backward = bool(reached) or any(parameter.grad is not None for parameter in live.parameters())
    for site in sites:
        layer = "per read" if site.home in plan.volatile else "call" if site.home in opaque else "graph"
        tensors = list(live.get_submodule(site.home).parameters())
        # Compiled into a graph, or drawn at each read: then only the gradients themselves tell.
        touched = not reached.isdisjoint((*site.names, *site.latents)) or any(t.grad is not None for t in tensors)
        rows.append(
            SiteRow(
                weights=site.names,
                declaration=site.declaration,
                origin=site.origin,
                start=site.start,
                layer=layer,
                reason=reasons.get(site.home, "") if layer != "graph" else "",
                kept=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                nodes=counts.get(site.home, 0),
                recomputed=any(plan.component_of.get(name, (-1, 0))[0] in plan.evaluation.recomputed for name in site.names),
                reached=touched if any_backward and any(t.requires_grad for t in tensors) else None,
            )
        )
    graphs = [graph for graph in (plan.body, *(one.module for ones in plan.recorded.values() for one in ones[:1])) if graph]
    body_nodes = sum(n.op not in ("placeholder", "get_attr", "output") for graph in graphs for n in graph.graph.nodes)
    found = _layers(live, plan, records)
    return Report(
        sites=tuple(rows),
        body="graph" if plan.body is not None or "" in plan.recorded else "regions" if plan.recorded else "live",
        why_live=_why_live(plan, found[0]),
        layers=found,
        prologue_nodes=sum(counts.values()),
        body_nodes=body_nodes,
        hoisted=tuple(name for name in plan.values if name.startswith("hoisted.")),
        trail=(*(_declined(note) for note in notes), *plan.program.trail),
        stats=stats,
    )


def _layers(live: nn.Module, plan: Plan, records: Mapping[str, Layer]) -> tuple[Layer, ...]:
    """The model first, then its modules by name."""
    if plan.body is not None:
        # Calls with other arguments than the required ones may have been recorded besides.
        return (Layer("", type(live).__name__, "symbolic"), *(records[path] for path in sorted(records)))
    if "" not in records:
        return (Layer("", type(live).__name__, "live", plan.why_live),)
    return tuple(records[path] for path in sorted(records))


def _why_live(plan: Plan, model: Layer) -> str:
    if plan.body is not None or "" in plan.recorded:
        return ""
    return plan.why_live if model.reason in ("", plan.why_live) else f"{plan.why_live}; recorded: {model.reason}"


def _declined(note: str) -> Record:
    name, _, why = note.partition(": ")
    return Record("adopt", f"take over {name}", why, refused=True)
