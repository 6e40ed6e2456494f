"""The autograd bridge between latents and weights.

One *entry* holds the weights of one refresh with a private graph  latents -> weights  that no user code sees. Two autograd
functions carry gradients over it:

    latents --Refresh--> weights of the entry --Lease--> weights of one forward --> the user's graph

``Refresh`` is one node for each connected component of the prologue and lives as long as its entry is current; its backward
runs the private graph, once per backward pass however many forwards that pass covers. ``Lease`` is a fresh node for each
root forward; it behaves, errors included, like the graph plain PyTorch would have built there: a second backward without
``retain_graph`` is refused, and what it held is released.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fxparam.tracer.hazards import nodes_behind

AGAIN = (
    "Trying to backward through the graph a second time (or directly access saved tensors after they have already been "
    "freed). Saved intermediate values of the graph are freed when you call .backward() or autograd.grad(). Specify "
    "retain_graph=True if you need to backward through the graph a second time or if you need to access saved tensors "
    "after calling backward."
)


# By identity: a lease looks itself up by its component, and there are thousands of leases.
@dataclass(frozen=True, eq=False)
class Component:
    """A connected part of the prologue: no other part shares a source or a value with it.

    Attributes:
        sources: positions of the tensors it reads.
        values: positions of the values it yields.
    """

    sources: tuple[int, ...]
    values: tuple[int, ...]


class Values:
    """The values of one refresh with their private graph. Who holds this keeps them: the entry while it is current, and each
    forward's lease until its backward.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors


class PrivateGraph:
    """The way from gradients of the values of one refresh to gradients of its sources.

    It holds the values weakly: kept losses keep their ``Refresh`` nodes, and through these this object, but no weights.

    Args:
        values: what the prologue yielded, with its private graph.
        edges: for each source, where its gradient arrives; None for sources without gradient.
        sources: the sources themselves.
        on_backward: called with the positions of the sources that received a gradient. Must not hold the entry.
        saves: whether the graph of a component saves tensors, as far as that was found out before.
    """

    def __init__(
        self,
        values: Values,
        edges: Sequence[GradientEdge | None],
        sources: Sequence[Tensor],
        on_backward: Callable[[Sequence[int]], None],
        saves: dict[Component, bool],
    ) -> None:
        self._values = weakref.ref(values)
        self.edges, self.sources = edges, sources
        self.on_backward = on_backward
        # What leases hand over that a backward pass has just consumed, by pass and component.
        self._handed: dict[tuple[int, Component], Values] = {}
        self._saves = saves

    def frees(self, component: Component, values: Values) -> bool:
        """Whether a backward would free anything: PyTorch lets a graph that saved nothing run again."""
        saves = self._saves.get(component)
        if saves is None:
            saves = self._saves[component] = _saves([values.tensors[at] for at in component.values])
        return saves

    def hand(self, component: Component, values: Values) -> None:
        """A backward pass went through a forward's lease and keeps no graph: the values are needed once more, in this pass."""
        self._handed[torch._C._current_graph_task_id(), component] = values

    def backward(self, component: Component, gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of the component's sources from gradients of its values.

        Raises:
            RuntimeError: all forwards that used this graph had their backward, and it was released.
        """
        values = self._handed.pop((torch._C._current_graph_task_id(), component), None) or self._values()
        if values is None:
            raise RuntimeError(AGAIN)
        pairs = [
            (values.tensors[at], gradient)
            for at, gradient in zip(component.values, gradients, strict=True)
            if gradient is not None and values.tensors[at].requires_grad
        ]
        wanted = [at for at, need in zip(component.sources, needed, strict=True) if need]
        if not pairs or not wanted:
            return [None] * len(needed)
        found = iter(
            _differentiated(
                [value for value, _ in pairs],
                [gradient for _, gradient in pairs],
                [self.edges[at] for at in wanted],
                [self.sources[at] for at in wanted],
            )
        )
        result = [next(found) if need else None for need in needed]
        self.on_backward([at for at, gradient in zip(component.sources, result, strict=True) if gradient is not None])
        return result


def _differentiated(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    edges: Sequence[GradientEdge | None],
    inputs: Sequence[Tensor],
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` of private values to private edges, connected to the public tensors behind these."""
    if torch.is_grad_enabled():
        return Derivative.apply(values, edges, len(gradients), *gradients, *inputs)
    return torch.autograd.grad(values, edges, gradients, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]


class Derivative(torch.autograd.Function):
    """Gradients that are differentiated again. Arguments: the values, the edges, how many gradients, these, and the tensors
    behind the edges.

    A second-order backward goes through the graph of the first order as well, and frees it if it is not to keep it. That graph
    is shared with other forwards; so the second order is private, too, and the third.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Sequence[Tensor], edges: Sequence[GradientEdge], number: int, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients, without their graph."""
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            given = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors[:number]]
            found = torch.autograd.grad(values, edges, given, create_graph=True, allow_unused=True)
        ctx.found, ctx.tensors = found, tensors
        ctx.edges = (*(get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in given), *edges)
        results = tuple(None if gradient is None else gradient.detach() for gradient in found)
        fixed = (result for result, one in zip(results, found, strict=True) if one is not None and not one.requires_grad)
        ctx.mark_non_differentiable(*fixed)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Runs the private graph of the second order."""
        if ctx.found is None:
            raise RuntimeError(AGAIN)
        pairs = [
            (one, gradient)
            for one, gradient in zip(ctx.found, gradients, strict=True)
            if one is not None and one.requires_grad and gradient is not None
        ]
        needed = ctx.needs_input_grad[3:]
        wanted = [at for at, need in enumerate(needed) if need]
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.found = None
        if not pairs or not wanted:
            return (None, None, None, *(None for _ in needed))
        found = iter(
            _differentiated(
                [one for one, _ in pairs],
                [gradient for _, gradient in pairs],
                [ctx.edges[at] for at in wanted],
                [ctx.tensors[at] for at in wanted],
            )
        )
        return (None, None, None, *(next(found) if need else None for need in needed))


class Refresh(torch.autograd.Function):
    """latents -> the weights of an entry. Arguments: the graph, the component, the component's sources."""

    @staticmethod
    def forward(ctx: Any, graph: PrivateGraph, values: Values, component: Component, *sources: Tensor) -> tuple[Tensor, ...]:
        """Aliases of the values that share their version counters."""
        ctx.graph, ctx.component = graph, component
        ctx.set_materialize_grads(False)
        own = [values.tensors[at] for at in component.values]
        aliases = tuple(value.detach() for value in own)
        ctx.mark_non_differentiable(*(alias for alias, value in zip(aliases, own, strict=True) if not value.requires_grad))
        return aliases

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Runs the private graph."""
        return (None, None, None, *ctx.graph.backward(ctx.component, gradients, ctx.needs_input_grad[3:]))


class Lease(torch.autograd.Function):
    """The weights of an entry -> the weights of one forward. Arguments: the graph, the values."""

    @staticmethod
    def forward(ctx: Any, graph: PrivateGraph, held: Values, component: Component, *values: Tensor) -> tuple[Tensor, ...]:
        """Aliases once more, of a node of their own."""
        ctx.graph, ctx.held, ctx.component = graph, held, component
        ctx.frees = graph.frees(component, held)
        ctx.set_materialize_grads(False)
        aliases = tuple([value.detach() for value in values])
        if fixed := [alias for alias, value in zip(aliases, values, strict=True) if not value.requires_grad]:
            ctx.mark_non_differentiable(*fixed)
        return aliases

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """The gradients as they are; refuses a second time, as a graph freed by its backward does."""
        if ctx.held is None:
            raise RuntimeError(AGAIN)
        if ctx.frees and not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.graph.hand(ctx.component, ctx.held)
            ctx.held = None
        return (None, None, None, *gradients)


def _saves(values: Sequence[Tensor]) -> bool:
    """Whether any node behind these values saved a tensor for its backward; nodes of Python functions are taken to."""
    return any(
        isinstance(node, torch.autograd.function.BackwardCFunction) or any(name.startswith("_raw_saved_") for name in dir(node))
        for node in nodes_behind(values)
    )


def private_aliases(sources: Sequence[Tensor], *, graph: bool) -> tuple[list[Tensor], list[GradientEdge | None]]:
    """Views of the sources for a private graph, and where their gradients arrive.

    Views and not the tensors themselves, whose hooks would fire twice; not detached ones, which have no second order.
    """
    if not graph:
        return [source.detach() for source in sources], [None] * len(sources)
    aliases = [source.view_as(source) if source.requires_grad else source.detach() for source in sources]
    return aliases, [get_gradient_edge(alias) if alias.requires_grad else None for alias in aliases]


class Published:
    """An entry in use: its private graph, and what the components hand out.

    Immutable but for the lazily made ``Refresh`` nodes; the graph does not know it, so there is no reference cycle through
    autograd nodes.

    Args:
        graph: the private graph.
        held: its values.
        components: the parts of the prologue.
        sources: the tensors behind it.
    """

    def __init__(self, graph: PrivateGraph, held: Values, components: Sequence[Component], sources: Sequence[Tensor]) -> None:
        self.graph, self.held, self.components, self.sources = graph, held, components, sources
        self.values: Sequence[Tensor] = held.tensors
        self._outputs: list[tuple[Tensor, ...] | None] = [None] * len(components)
        self._trainable = [any(self.values[at].requires_grad for at in component.values) for component in components]

    def lease(self, number: int) -> dict[int, Tensor]:
        """Fresh aliases of the values of one component, by position: with gradient if grad mode is on, else without."""
        component = self.components[number]
        if not self.trains(number):
            return {at: self.values[at].detach() for at in component.values}
        return dict(zip(component.values, Lease.apply(self.graph, self.held, component, *self.outputs(number)), strict=True))

    def trains(self, number: int) -> bool:
        """Whether a forward under the present grad mode needs gradients for this component."""
        return self._trainable[number] and torch.is_grad_enabled()

    def outputs(self, number: int) -> tuple[Tensor, ...]:
        """The values of one component behind their ``Refresh`` node, in the order of its values."""
        outputs = self._outputs[number]
        if outputs is None:
            component = self.components[number]
            outputs = Refresh.apply(self.graph, self.held, component, *(self.sources[at] for at in component.sources))
            self._outputs[number] = outputs
        return outputs
