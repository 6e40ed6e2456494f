"""How a prologue is evaluated: as one graph, with parts that keep nothing for their backward, compiled, or in part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch._functorch.config
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from fxparam.runtime.groups import Component
from fxparam.runtime.modes import written_in_place

Compiler = Callable[[fx.GraphModule], Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class Part:
    """Some components of a prologue by themselves.

    Attributes:
        module: sources of these components -> their values.
        sources: positions of the sources among those of the whole prologue.
        values: positions of the values.
    """

    module: Callable[..., Any]
    sources: tuple[int, ...]
    values: tuple[int, ...]


class Evaluation:
    """What runs a prologue.

    Args:
        prologue: sources -> values.
        components: its independent parts.
        recomputed: the components whose backward computes them again from their sources, and which keep nothing for it.
        compiler: compiles the others together; None: they run as they are.
    """

    def __init__(
        self,
        prologue: fx.GraphModule,
        components: Sequence[Component],
        recomputed: Iterable[int] = (),
        compiler: Compiler | None = None,
    ) -> None:
        self.prologue, self.components = prologue, components
        self.recomputed = frozenset(recomputed)
        parts = [self.part([number]) for number in sorted(self.recomputed)]
        rest = (
            self.part([number for number in range(len(components)) if number not in self.recomputed])
            if parts
            else self._whole()
        )
        if compiler is not None:
            rest = Part(_compiled(rest.module, compiler), rest.sources, rest.values)
        self._parts = (rest, *(Part(_recomputing(part.module), part.sources, part.values) for part in parts))
        # Compiled operations round in other ways than the same one by one.
        self.exact = compiler is None
        self._size = sum(len(component.values) for component in components)

    def __call__(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        """The values for these sources, in order."""
        if len(self._parts) == 1:
            return self._parts[0].module(*sources)
        values: list[Any] = [None] * self._size
        for part in self._parts:
            for at, value in zip(part.values, part.module(*(sources[at] for at in part.sources)), strict=True):
                values[at] = value
        return values

    def part(self, numbers: Iterable[int]) -> Part:
        """The graph of some components."""
        chosen = [self.components[number] for number in numbers]
        values = tuple(sorted(at for component in chosen for at in component.values))
        sources = tuple(sorted(at for component in chosen for at in component.sources))
        nodes = list(self.prologue.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        outputs = [nodes[-1].args[0][at] for at in values]
        needed = {placeholders[at] for at in sources}
        todo = list(outputs)
        for node in todo:
            if node not in needed or node.op == "placeholder":
                needed.add(node)
                todo += [other for other in node.all_input_nodes if other not in needed]
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in outputs))
        return Part(fx.GraphModule(self.prologue, graph, "Part"), sources, values)

    def _whole(self) -> Part:
        values = tuple(range(len(list(self.prologue.graph.nodes)[-1].args[0])))
        n_sources = sum(node.op == "placeholder" for node in self.prologue.graph.nodes)
        return Part(self.prologue, tuple(range(n_sources)), values)


def _recomputing(module: Callable[..., Any]) -> Callable[..., Any]:
    def run(*sources: Tensor) -> Any:
        versions = [source._version for source in sources]

        def compute(*same: Tensor) -> Any:
            for source, version in zip(same, versions, strict=True):
                if source._version != version:
                    raise written_in_place(source, version)
            return module(*same)

        # What may have a state or draw random numbers is never recomputed, so there is no generator to put back.
        return checkpoint(compute, *sources, use_reentrant=False, preserve_rng_state=False)

    return run


def _compiled(module: Any, compiler: Compiler) -> Callable[..., Any]:
    compiled = compiler(module)

    def run(*sources: Tensor) -> Any:
        # Several backwards go through one evaluation: the compiled backward must not take over its inputs.
        with torch._functorch.config.patch(donated_buffer=False):
            return compiled(*sources)

    return run
