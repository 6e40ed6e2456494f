"""The autograd bridge between latents and weights.

One *entry* holds the weights of one refresh with a private graph  latents -> weights  that no user code sees. Two autograd
functions carry gradients over it:

    latents --Refresh--> weights of the entry --Lease--> weights of one forward --> the user's graph

``Refresh`` lives as long as its entry is current; its backward runs the private graph, once per backward pass however many
forwards that pass covers. ``Lease`` is a fresh node for each root forward; it behaves, errors included, like the graph plain
PyTorch would have built there: a second backward without ``retain_graph`` is refused, and what it held is released.

Connected components of the prologue train apart from each other. A node of Python costs as much as a small weight does, so
components of little size share their nodes, as a *group* that still keeps account of each: what a loss does not reach gets
no gradient and is not released.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fxparam.runtime.groups import Component, Group
from fxparam.runtime.hooks import keep_hooks_quiet
from fxparam.runtime.second_order import AGAIN, differentiated


class Values:
    """The values of one group of one refresh, by position, with their private graph. Who holds this keeps them: the entry while
    it is current, and each forward's lease until its backward.
    """

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        self.tensors = tensors


class PrivateGraph:
    """The way from gradients of the values of one refresh to gradients of its sources.

    It holds the values weakly: kept losses keep their ``Refresh`` nodes, and through these this object, but no weights.

    Args:
        edges: for each source, where its gradient arrives; None for sources without gradient.
        sources: the sources themselves.
        on_backward: called with the number of components that a backward ran through, the positions of the values that had a
            gradient, the sources that received one, and their positions. Must not hold the entry.
    """

    def __init__(
        self,
        edges: Sequence[GradientEdge | None],
        sources: Sequence[Tensor],
        on_backward: Callable[[int, Sequence[int], Sequence[Tensor], Sequence[int]], None],
    ) -> None:
        self.edges, self.sources = edges, sources
        self.on_backward = on_backward
        self._values: dict[Group, weakref.ref[Values]] = {}
        # What leases hand over that a backward pass has just consumed, by pass and group.
        self._handed: dict[tuple[int, Group], Values] = {}

    def lead_from(self, group: Group, values: Values) -> None:
        """From now on gradients of this group may come."""
        self._values[group] = weakref.ref(values)

    def hand(self, group: Group, values: Values) -> None:
        """A backward pass went through a forward's lease and keeps no graph: the values are needed once more, in this pass."""
        self._handed[torch._C._current_graph_task_id(), group] = values

    def backward(self, group: Group, gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of the group's sources from gradients of its values.

        Raises:
            RuntimeError: all forwards that used this graph had their backward, and it was released.
        """
        values = self._handed.pop((torch._C._current_graph_task_id(), group), None) or self._values[group]()
        if values is None:
            raise RuntimeError(AGAIN)
        pairs = [
            (values.tensors[at], gradient)
            for at, gradient in zip(group.values, gradients, strict=True)
            if gradient is not None and values.tensors[at].requires_grad
        ]
        reached = group.reached(gradients)
        behind = {at for number in reached for at in group.components[number].sources}
        wanted = [at for at, need in zip(group.sources, needed, strict=True) if need and at in behind]
        if not pairs or not wanted:
            return [None] * len(needed)
        found = differentiated(
            [value for value, _ in pairs],
            [gradient for _, gradient in pairs],
            [self.edges[at] for at in wanted],
            [self.sources[at] for at in wanted],
        )
        given = {at: gradient for at, gradient in zip(wanted, found, strict=True) if gradient is not None}
        came = [at for at, gradient in zip(group.values, gradients, strict=True) if gradient is not None]
        self.on_backward(len(reached), came, [self.sources[at] for at in given], list(given))
        for at in group.sources:
            if at not in given:
                keep_hooks_quiet(self.sources[at])
        return [given.get(at) if need else None for at, need in zip(group.sources, needed, strict=True)]


class Refresh(torch.autograd.Function):
    """latents -> the weights of an entry. Arguments: the graph, the values, the group, the group's sources."""

    @staticmethod
    def forward(ctx: Any, graph: PrivateGraph, values: Values, group: Group, *sources: Tensor) -> tuple[Tensor, ...]:
        """Aliases of the values that share their version counters."""
        ctx.graph, ctx.group = graph, group
        graph.lead_from(group, values)
        return aliases_of([values.tensors[at] for at in group.values], ctx)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Runs the private graph."""
        return (None, None, None, *ctx.graph.backward(ctx.group, gradients, ctx.needs_input_grad[3:]))


class Account:
    """What one forward holds of a refresh, shared by the node in its graph and the frame that reads.

    Attributes:
        held: the values; None once a backward has been through everything that was read.
        read: the components that the forward has read; no gradient can come for any other.
        released: those that a backward which kept no graph has been through.
    """

    def __init__(self, held: Values) -> None:
        self.held: Values | None = held
        self.read: set[int] = set()
        self.released: set[int] = set()

    def is_open(self, number: int) -> bool:
        """Whether this component can still be read: no backward has released it."""
        return self.held is not None and number not in self.released

    def settle(self, reached: set[int], *, frees: bool) -> None:
        """A backward went through these components.

        Raises:
            RuntimeError: one of them has been released.
        """
        if not self.released.isdisjoint(reached):
            raise RuntimeError(AGAIN)
        if frees and not torch._C._autograd._get_current_graph_task_keep_graph():
            self.released |= reached
            if self.read <= self.released:
                # A loss that is kept keeps this, and must not keep the weights.
                self.held = None


class Lease(torch.autograd.Function):
    """The weights of an entry -> the weights of one forward. Arguments: the graph, the account, the group, the weights."""

    @staticmethod
    def forward(ctx: Any, graph: PrivateGraph, account: Account, group: Group, *values: Tensor) -> tuple[Tensor, ...]:
        """Aliases once more, of a node of their own."""
        ctx.graph, ctx.account, ctx.group = graph, account, group
        return aliases_of(values, ctx)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """The gradients as they are; refuses a second time, as a graph freed by its backward does."""
        held = ctx.account.held
        ctx.account.settle(ctx.group.reached(gradients), frees=ctx.group.frees)
        if held is not None and ctx.account.held is None:
            ctx.graph.hand(ctx.group, held)
        return (None, None, None, *gradients)


def aliases_of(values: Sequence[Tensor], ctx: Any) -> tuple[Tensor, ...]:
    """What a node of this bridge hands out for values: aliases that share the version counter."""
    ctx.set_materialize_grads(False)
    aliases = tuple([value.detach() for value in values])
    if fixed := [alias for alias, value in zip(aliases, values, strict=True) if not value.requires_grad]:
        ctx.mark_non_differentiable(*fixed)
    return aliases


def private_aliases(sources: Sequence[Tensor], *, graph: bool) -> tuple[list[Tensor], list[GradientEdge | None]]:
    """Views of the sources for a private graph, and where their gradients arrive.

    Views and not the tensors themselves, whose hooks would fire twice; not detached ones, which have no second order.
    """
    if not graph:
        return [source.detach() for source in sources], [None] * len(sources)
    aliases = [source.view_as(source) if source.requires_grad else source.detach() for source in sources]
    # Every view has a node of its own, and is the first and only output of it.
    return aliases, [GradientEdge(alias.grad_fn, 0) if alias.requires_grad else None for alias in aliases]  # type: ignore[arg-type]


class Published:
    """An entry in use: its private graph, and what the components hand out.

    Immutable but for the lazily made ``Refresh`` nodes; the graph does not know it, so there is no reference cycle through
    autograd nodes.

    Args:
        graph: the private graph.
        values: what the prologue yielded, with that graph.
        components: the parts of the prologue.
        groups: by the number of the component, the group it trains in; none for those that do not train.
        sources: the tensors behind it.
    """

    def __init__(
        self,
        graph: PrivateGraph,
        values: Sequence[Tensor],
        components: Sequence[Component],
        groups: Mapping[int, Group],
        sources: Sequence[Tensor],
    ) -> None:
        self.graph, self.values, self.components, self.sources = graph, values, components, sources
        self._groups = groups
        # Threads may be the first to read at once; and there must be one node.
        self._lock = threading.Lock()
        self._outputs: dict[Group, tuple[Values, tuple[Tensor, ...]]] = {}

    def after_fork(self) -> None:
        """In a forked child: the thread that held the lock does not exist here."""
        self._lock = threading.Lock()

    def trains(self, number: int) -> bool:
        """Whether a forward under the present grad mode needs gradients for this component."""
        return number in self._groups and torch.is_grad_enabled()

    def detached(self, number: int) -> dict[int, Tensor]:
        """Aliases of the values of one component without gradient, by position."""
        return {at: self.values[at].detach() for at in self.components[number].values}

    def lease(self, number: int) -> Leased:
        """Fresh aliases with gradient of the values of one component, and of those that share its nodes."""
        group = self.group(number)
        held, outputs = self.outputs(group)
        account = Account(held)
        return Leased(group, account, dict(zip(group.values, Lease.apply(self.graph, account, group, *outputs), strict=True)))

    def groups(self) -> list[Group]:
        """All groups that train."""
        return list(dict.fromkeys(self._groups.values()))

    def group(self, number: int) -> Group:
        """The group of a component that trains."""
        return self._groups[number]

    def outputs(self, group: Group) -> tuple[Values, tuple[Tensor, ...]]:
        """The values of one group, and the same behind their ``Refresh`` node, in the order of the group."""
        outputs = self._outputs.get(group)
        if outputs is not None:
            return outputs
        with self._lock:
            if group not in self._outputs:
                held = Values({at: self.values[at] for at in group.values})
                refreshed = Refresh.apply(self.graph, held, group, *(self.sources[at] for at in group.sources))
                self._outputs[group] = (held, refreshed)
            return self._outputs[group]


@dataclass(frozen=True)
class Leased:
    """What one forward reads: the weights of one group by position, and what becomes of them."""

    group: Group
    account: Account
    values: Mapping[int, Tensor]
