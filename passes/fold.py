"""Replace everything that depends on parameters and constants only by its value.

    before   s = exp(get_attr('log_scale')); w = div(get_attr('conv.weight'), s); y = conv2d(x, w)
    after    y = conv2d(x, get_attr('hoisted.div'))

What a model returns, draws, or writes stays as it is. Values that are no tensors (sizes) become literals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from fxparam.errors import PassError
from fxparam.program import Pass, Program, binding_times, copy_graph
from fxparam.program.binding import BindingTime
from fxparam.program.line import Line


@final
@dataclass(frozen=True)
class Fold(Pass):
    """Evaluate weight arithmetic now.

    Args:
        compute_dtype: the dtype to compute in; results are rounded once, to the dtype they would have had.
        views: whether views of parameters are folded as well; they cost nothing, and the parameter keeps its name.
        constants: whether what depends on nothing at all is folded as well.
    """

    compute_dtype: torch.dtype | None = None
    views: bool = True
    constants: bool = True
    name: ClassVar[str] = "fold"
    gives: ClassVar[frozenset[str]] = frozenset({"folded"})

    def rewrite(self, program: Program) -> Program:
        line = Line(program, {}, max_growth=float("inf"), sink_views=not self.views, sink_constants=not self.constants)
        folded = {name: line.values[node].detach().clone() for name, node in line.cuts.items()} | dict(line.constants)
        if self.compute_dtype is not None:
            folded |= self._recomputed(program, line, folded)
        body = line.body()
        used = {str(node.target) for node in body.nodes if node.op == "get_attr"}
        if not any(name in used for name in folded):
            return program
        graph, _ = copy_graph(body)
        tensors = {**program.tensors, **{name: value.contiguous() for name, value in folded.items() if name in used}}
        return program.evolve(graph=graph, tensors=tensors).noting(*line.records(self.name))

    def _recomputed(self, program: Program, line: Line, folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same values computed in another dtype and rounded at the end."""
        graph, sources = line.prologue()
        module = fx.GraphModule(dict(line.constants), graph)
        wide = [_widened(program.tensors[name], self.compute_dtype) for name in sources]
        with torch.no_grad():
            values = module(*wide)
        return {name: value.to(folded[name].dtype) for name, value in zip(line.cuts, values, strict=True)}

    def verify(self, before: Program, after: Program) -> None:
        if not (self.views and self.constants):
            return
        found = binding_times(after.graph, after.modules, after.tensors)
        for node, time in found.times.items():
            if node.op != "get_attr" and time is BindingTime.step and node not in found.reasons and not _is_size(node):
                raise PassError(f"{node} depends on parameters only and was not folded")


def _widened(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()


def _is_size(node: fx.Node) -> bool:
    return str(node.target) in ("size", "dim", "numel") or (
        node.target is getattr and node.args[1] in ("shape", "dtype", "device")
    )
