"""The plan a model runs by: one for each kind of state it has been in, and a new one where what a trace baked in changes."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxparam.program import Site
from fxparam.runtime.assembly import Options, make_plan
from fxparam.runtime.choosing import Chooser
from fxparam.runtime.evaluation import Compiler
from fxparam.runtime.modes import autocast_state, undisturbed, without_autocast_cache
from fxparam.runtime.plan import Plan
from fxparam.runtime.records import Records
from fxparam.tracer.cutting import RecordedBody
from fxparam.tracer.delivery import Inline, WeightReader
from fxparam.tracer.site import SiteModule

_MAX_PLANS = 16
_MAX_RETRACES = 4


class Planner:
    """The plans of one live module tree.

    Args:
        reader: what bodies ask for weights.
        inline: where these wait for compilers.
        root: the live module tree.
        sites: its sites, each after those it reads.
        trace: whether the body is to be a graph where symbolic tracing is exact.
        why_live: if not, why.
        recompute: names of weights that keep nothing for their backward and are computed again in it.
        record: what is recorded of a body that is no graph: ``"nothing"``, what is ``"useful"``, or ``"everything"``.

    Attributes:
        homes: the modules of the sites.
        maps: these and all modules in them.
        site_of: the site of a weight, by each of its names.
        volatile: the homes of sites that are computed at each read.
        parameters: where the plan's sources live that are registered parameters.
        compiler: compiles prologues; None: they run as they are.
    """

    def __init__(
        self,
        reader: WeightReader,
        inline: Inline,
        root: nn.Module,
        sites: Sequence[Site],
        *,
        trace: bool,
        why_live: str,
        recompute: frozenset[str],
        record: str = "nothing",
    ) -> None:
        self.reader, self.inline, self.root = reader, inline, root
        self.trace, self.why_live, self.recompute, self.record = trace, why_live, recompute, record
        self.compiler: Compiler | None = None
        self.volatile: frozenset[str] = frozenset()
        self.parameters: tuple[tuple[dict[str, Any], str], ...] = ()
        self._plans: dict[object, Plan] = {}
        self._records: dict[object, Records] = {}
        self._flat: tuple[list[nn.Module], list[dict[str, Any]]] | None = None
        self._retraces = 0
        self._lock = threading.RLock()
        self._take(sites, [root.get_submodule(site.home) for site in sites])  # type: ignore[misc]

    def _take(self, sites: Sequence[Site], homes: Sequence[SiteModule]) -> None:
        self.sites, self.homes = tuple(sites), tuple(homes)
        self.maps = [module for home in homes for module in home.modules()]
        self.site_of = {alias: site for site in sites for aliases in site.aliases for alias in aliases}

    @property
    def plan(self) -> Plan:
        """The plan for the present kind of state."""
        kind = self._kind()
        plan = self._plans.get(kind)
        if plan is None or not plan.holds():
            self._flat = None
            kind = self._kind()
            with self._lock:
                plan = self._plans[kind] = self._made(plan)
        return plan

    @property
    def records(self) -> Records:
        """What was recorded in the present kind of state."""
        return self._records.setdefault(self._kind(), Records())

    def clear(self) -> None:
        """Forget what traces took for granted."""
        self._plans.clear()
        self._records.clear()

    def choosing(self, plan: Plan, weights: Mapping[str, Tensor]) -> Chooser:
        """What chooses among the parts of a recording made under this plan.

        Args:
            plan: the plan.
            weights: present values of the computed weights, by all their names.
        """
        sites = [site for site in self.sites if site.home not in plan.volatile]
        return Chooser(self.root, sites, plan.fragments, weights, everything=self.record == "everything")

    def add(self, body: RecordedBody) -> None:
        """Run this graph of the model in the present kind of state."""
        self.records.add(body)
        with self._lock:
            self._plans[self._kind()] = self._made(None)

    def extend(self, chooser: Chooser) -> bool:
        """Take what was chosen into the plan; returns whether the plan is another one now."""
        records = self.records
        if not records.take(chooser):
            return False
        with self._lock:
            self._plans[self._kind()] = self._made(None)
        return True

    def after_fork(self) -> None:
        """In a forked child: the thread that held the lock does not exist here."""
        self._lock = threading.RLock()

    def forget_replaced(self) -> bool:
        """Forget sites whose owner was replaced by another module of the user's; returns whether there were any."""
        pairs = zip(self.sites, self.homes, strict=True)
        there = [(site, home) for site, home in pairs if _submodule(self.root, site.home) is home]
        if len(there) == len(self.sites):
            return False
        self._take([site for site, _ in there], [home for _, home in there])
        return True

    def _kind(self) -> object:
        """Everything that traces bake in and that changes back and forth: modes of modules, kinds of tensors."""
        if self._flat is None:
            looked_into = self.trace or self.record != "nothing"
            modules = list(self.root.modules()) if looked_into else self.maps
            self._flat = (
                modules,
                [registry for module in modules for registry in (module._parameters, module._buffers) if registry],
            )
        modules, registries = self._flat
        tensors = (tensor for registry in registries for tensor in registry.values() if tensor is not None)
        flags = tuple(module.training for module in modules)
        kinds = tuple(None if is_lazy(t) else (t.shape, t.dtype, t.device) for t in tensors)
        return (self.trace, self.record, torch.get_default_dtype(), autocast_state(), flags, kinds)

    def _made(self, before: Plan | None) -> Plan:
        if before is not None and before.traced is not None:
            # An attribute that a schedule moves all the time is cheaper to read than to bake in.
            self._retraces += 1
            if self._retraces > _MAX_RETRACES:
                change = before.traced.watch.first_change()
                self.trace, self.why_live = False, f"{change} keeps changing between forwards"
        if len(self._plans) >= _MAX_PLANS:
            self.clear()
        if self.forget_replaced():
            self.clear()
        bodies = self.records.bodies
        with undisturbed(graph=torch.is_grad_enabled()), without_autocast_cache():
            plan = make_plan(
                self.root,
                self.sites,
                Options(self.trace, self.why_live, self.reader, self.inline, self.recompute, self.compiler, bodies),
            )
        self.volatile = plan.volatile
        self.parameters = tuple((registry, name) for registry, name in plan.slots if isinstance(registry[name], nn.Parameter))
        return plan


def _submodule(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None
