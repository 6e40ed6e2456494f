"""Split a graph at the line between binding times ``step`` and ``call``.

    before   w = matrix_exp(skew(p)); deliver('w', w); n = normalize(q); y = linear(x, w) + n
    after    prologue(p, q):  w = matrix_exp(skew(p)); n = normalize(q); return w, n
             body(x):         y = linear(x, get_attr('w')) + get_attr('hoisted.normalize')

Every node counts, not only those a spec brought. What stays in the body although it depends on parameters only, and why:
see ``fxparam.program.binding``; besides, values that are no tensors, views at the line (they cost nothing per call, and an
``expand`` hoisted would turn its gradient into a large one), and values far larger than what they are computed from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor

from fxparam.errors import PassError
from fxparam.program import Pass, Program
from fxparam.program.line import Line


@final
@dataclass(frozen=True, eq=False)
class Hoist(Pass):
    """Split the graph into a prologue and a body.

    Args:
        weights: the present values of the weights, by name: the shapes of what is computed from them.
        max_growth: the largest ratio of bytes kept to bytes read at which weight arithmetic is hoisted.
        model: whether the graph is that of a model; without one there is no body.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    max_growth: float = 4.0
    model: bool = True
    name: ClassVar[str] = "hoist"
    gives: ClassVar[frozenset[str]] = frozenset({"hoisted"})

    def rewrite(self, program: Program) -> Program:
        line = Line(program, self.weights, max_growth=self.max_growth, sink_views=True)
        prologue, sources = line.prologue()
        return program.evolve(
            prologue=prologue,
            sources=sources,
            values=tuple(line.cuts),
            body=line.body() if self.model else None,
            tensors={**program.tensors, **line.constants},
        ).noting(*line.records(self.name))

    def verify(self, before: Program, after: Program) -> None:
        assert after.prologue is not None
        sites = {name for site in after.sites for name in site.names}
        if missing := sites - set(after.values):
            raise PassError(f"the prologue does not yield {', '.join(sorted(missing))}")
        for node in after.body.nodes if after.body is not None else ():
            if "site" in node.meta:
                raise PassError(f"{node} computes a weight in the body")
