"""Refreshing: one evaluation of the prologue becomes an entry of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fxparam.errors import StaleWeightsError
from fxparam.runtime.alarms import Alarms
from fxparam.runtime.bridge import PrivateGraph, Published, private_aliases
from fxparam.runtime.deferral import refuse_shards
from fxparam.runtime.draws import Draws
from fxparam.runtime.entry import Entry, requires_grad_of, versions_of
from fxparam.runtime.groups import grouped
from fxparam.runtime.hooks import Stamp, gradient_stamp
from fxparam.runtime.modes import undisturbed
from fxparam.runtime.plan import Plan
from fxparam.runtime.planner import Planner
from fxparam.runtime.stats import Stats


class Refresher:
    """Evaluates the prologue of one model.

    Args:
        planner: says which prologue.
        alarms: look at the latents.
        stats: counts.
        reached: receives the names of the weights and latents that backward passes bring gradients to.
        always_look: whether the alarms are to look at each evaluation.
    """

    def __init__(self, planner: Planner, alarms: Alarms, stats: Stats, reached: set[str], *, always_look: bool) -> None:
        self.planner, self.alarms, self.stats, self.reached = planner, alarms, stats, reached
        self.always_look = always_look

    def refresh(self, other: Entry | None, modes: tuple[object, ...], generation: int, *, stepped: bool) -> Entry:
        """A new entry.

        Args:
            other: another entry in use, for another autocast state: it shares what has received a gradient, and what was drawn.
            modes: autocast state and train or eval now.
            generation: that of the runtime at the beginning.
            stepped: whether an optimizer step is what made it necessary.
        """
        maps = self.planner.maps
        refuse_shards(tensor for module in maps for tensor in module._parameters.values() if tensor is not None)
        plan = self.planner.plan
        sources = [registry[name] for registry, name in plan.slots]
        refuse_shards(sources)
        versions = versions_of(sources)
        training = self.planner.root.training or any(module.training for module in self.planner.homes)
        graph = any(map(requires_grad_of, sources)) and (torch.is_grad_enabled() or training)
        drawing = Draws.around(None if other is None else other.draws) if plan.draws else nullcontext()
        with drawing as draws:
            values, edges = self._evaluate(plan, sources, graph=graph, look=not stepped)
        # A map with a state may have written buffers, or put new ones in their place; what is written to a latent meanwhile is
        # another thread's doing, and not in the weights.
        sources = [registry[name] for registry, name in plan.slots]
        after = versions_of(sources)
        versions = [v if isinstance(s, nn.Parameter) else w for s, v, w in zip(sources, versions, after, strict=True)]
        trainable = list(map(requires_grad_of, sources))
        kind = (graph, modes, *trainable)
        if kind not in plan.groups:
            plan.groups[kind] = grouped(plan.components, values)
        received = {} if other is None else other.received
        private = PrivateGraph(edges, sources, self._on_backward(plan, received))
        return Entry(
            plan=plan,
            published=Published(private, values, plan.components, plan.groups[kind], sources),
            sources=sources,
            modes=modes,
            generation=generation,
            graph=graph,
            addresses=list(map(Tensor.data_ptr, sources)),
            versions=versions,
            trainable=trainable,
            weight_versions=versions_of(values),
            storages=[source.untyped_storage() for source in sources],
            received=received,
            draws=draws,
            snapshots={at: source.detach().clone() for at, source in enumerate(sources) if _is_part(source)},
        )

    def _on_backward(self, plan: Plan, received: dict[int, tuple[Tensor, Stamp]]) -> Any:
        # Neither the runtime nor the entry: autograd nodes hold this, and the garbage collector cannot see through them.
        stats, reached, value_names, source_names = self.stats, self.reached, plan.values, plan.sources

        def on_backward(components: int, values: Sequence[int], given: Sequence[Tensor], at: Sequence[int]) -> None:
            stats.backwards += components
            # At the end of the pass: until then gradients are on their way, and a forward of another thread must not miss them.
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: received.update({id(one): (one, gradient_stamp(one)) for one in given})
            )
            reached.update([value_names[one] for one in values], [source_names[one] for one in at])

        return on_backward

    def _evaluate(self, plan: Plan, sources: Sequence[Tensor], *, graph: bool, look: bool) -> Any:
        """Run the prologue; returns its values and the gradient edges of the sources' private aliases."""
        self.stats.refreshes += 1
        sites = self.planner.sites
        with undisturbed(graph=graph):
            aliases, edges = private_aliases(sources, graph=graph)
            try:
                values = plan.evaluation(aliases)
            except Exception as error:
                if explained := self.alarms.explain(sites, error, plan.sources, sources):
                    raise explained from error
                raise
            if len(plan.repeatable) < len(plan.components):
                # A map that counts its evaluations is not to be evaluated again for that.
                plan.watch.renew()
            if look or self.always_look or self.alarms.due(self.stats.refreshes):
                # Of frozen ones only where nothing trains: the weights under an adapter are large, and stay what they are.
                named = [
                    (name, source)
                    for name, source in zip(plan.sources, sources, strict=True)
                    if isinstance(source, nn.Parameter) and (source.requires_grad or not graph)
                ]
                self.alarms.look(sites, [name for name, _ in named], [source for _, source in named])
        return values, edges


def compare(entry: Entry) -> None:
    """Compute the weights of an entry again, where that has no effect, and compare.

    Raises:
        StaleWeightsError: its latents give other values now.
    """
    plan = entry.plan
    part = plan.evaluation.part(plan.repeatable)
    with undisturbed(graph=False):
        sources = [registry[name].detach() for registry, name in plan.slots]
        now = part.module(*(sources[at] for at in part.sources))
    for at, new in zip(part.values, now, strict=True):
        old = entry.published.values[at].detach().nan_to_num()
        if not (
            torch.equal(old, new.nan_to_num()) if plan.evaluation.exact else torch.allclose(old, new.nan_to_num(), 1e-3, 1e-5)
        ):
            raise StaleWeightsError(
                f"{plan.values[at]} was cached, and its latents give another value now: they, or the weight itself, were "
                "written in a way that moves neither version nor storage (p.data.add_, weight.data.clamp_, a numpy view); call "
                "model.invalidate() after such a write"
            )


def _is_part(source: Tensor) -> bool:
    """Whether a latent is a view into a larger storage: a flat buffer of all parameters, say."""
    if not isinstance(source, nn.Parameter) or source.is_meta or source.is_sparse:
        return False
    return source.untyped_storage().nbytes() > source.numel() * source.element_size()
