"""The runtime of one live module tree: its plans, its cache, and the delivery of weights to their readers.

What makes a cached entry current is in ``fxparam.runtime.entry``; how gradients cross it in ``fxparam.runtime.bridge``.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from fxparam.errors import DeferralError, ImageError
from fxparam.program import Site
from fxparam.program.line import HOISTED
from fxparam.runtime import steps
from fxparam.runtime.alarms import Alarms
from fxparam.runtime.deferral import Block, refuse_sharded
from fxparam.runtime.entry import Entry, Frame, InlineFrame
from fxparam.runtime.evaluation import Compiler
from fxparam.runtime.modes import autocast_state, in_functorch, under_a_transform
from fxparam.runtime.plan import Plan
from fxparam.runtime.planner import Planner
from fxparam.runtime.rebasing import Rebasing
from fxparam.runtime.refreshing import Refresher, compare
from fxparam.runtime.regions import Regions
from fxparam.runtime.stats import Stats
from fxparam.tracer.delivery import Inline, binding_of
from fxparam.tracer.looking import present_values
from fxparam.tracer.lowering import LOWERING_CODE
from fxparam.tracer.site import SiteModule


class Runtime:
    """Plans, cache and delivery for one live module tree.

    Args:
        root: the live module tree.
        sites: its sites, each after those it reads.
        trace: whether the body is to be a graph where that is exact.
        why_live: if not, why.
        recompute: names of weights that keep nothing for their backward and are computed again in it.
        record: what is recorded of a body that is no graph: ``"nothing"``, what is ``"useful"``, or ``"everything"``.
    """

    def __init__(
        self,
        root: nn.Module,
        sites: Sequence[Site],
        *,
        trace: bool,
        why_live: str = "",
        recompute: frozenset[str] = frozenset(),
        record: str = "nothing",
    ) -> None:
        self.root = root
        self.stats = Stats()
        self.inline = Inline()
        self.reached: set[str] = set()
        self._alarms = Alarms()
        self._checking = os.environ.get("FXPARAM_CHECK", "") not in ("", "0")
        self._planner = Planner(
            self, self.inline, root, sites, trace=trace, why_live=why_live, recompute=recompute, record=record
        )
        self.regions = Regions(self, self._planner)
        self._refresher = Refresher(self._planner, self._alarms, self.stats, self.reached, always_look=self._checking)
        self._rebasing = Rebasing(self._planner.homes)
        # By autocast state: a forward that switches autocast inside reads two of them.
        self._entries: dict[object, Entry] = {}
        # Moves where weights must be computed anew though nothing about the latents tells.
        self._generation = 0
        self._has_optimizer = False
        self._foreign: frozenset[int] = frozenset()
        self._lock = threading.RLock()
        self._local = threading.local()
        self._blocks: weakref.WeakSet[Block] = weakref.WeakSet()
        for module in root.modules():
            binding = binding_of(module)
            if binding is not None:
                binding.bind(self, self.inline)
        for home in self._planner.homes:
            home.link.bind(self)
        # Made now, while the tensors are the model's own: later a forward may run under a transform of PyTorch's.
        _ = self.plan
        steps.listen(self)

    # --- reading

    @contextmanager
    def forward(self) -> Iterator[Plan | None]:
        """One root forward: the weights are checked once, at the beginning. None: computed in place, run the live modules."""
        outer = getattr(self._local, "frame", None)
        frame = self._frame()
        self._local.frame = frame
        try:
            yield frame.entry.plan if isinstance(frame, Frame) else None
        finally:
            self._local.frame = outer

    def running_entry(self) -> Entry | None:
        """What the forward reads that is running in this thread; None outside of one, and where it computes in place."""
        frame = getattr(self._local, "frame", None)
        return frame.entry if isinstance(frame, Frame) else None

    def read_weight(self, name: str) -> Tensor:
        """The weight (or hoisted value) with this dotted name; several reads within one forward share one evaluation."""
        outer: Frame | InlineFrame | None = getattr(self._local, "frame", None)
        frame = self._frame() if outer is None else self._fitting(outer) if isinstance(outer, Frame) else outer
        if isinstance(frame, InlineFrame):
            return self._read_inline(frame, name)
        if isinstance(outer, Frame) and not _same_name(name, outer, frame):
            return self._read_of(outer.entry.plan, name)
        if name not in frame.entry.plan.component_of:
            # Random, and drawn anew at each read. Another thread may be tracing, with other tensors in place of the latents.
            with self._lock:
                return self._compute(name)[name]
        value = frame.read(name)
        if value is None:
            # The weight, or a latent behind it, was written since: in the middle of a forward, perhaps.
            renewed = self._frame()
            if isinstance(outer, Frame) and isinstance(renewed, Frame):
                outer.others[renewed.entry.modes] = renewed
            if isinstance(outer, Frame) and isinstance(renewed, Frame) and not _same_name(name, outer, renewed):
                return self._read_of(outer.entry.plan, name)
            value = renewed.read(name) if isinstance(renewed, Frame) else self._read_inline(renewed, name)
        return value if value is not None else self._compute(name)[name]

    def _read_of(self, plan: Plan, name: str) -> Tensor:
        """A value of a plan that was replaced while a forward runs by it, computed in place."""
        number, at = plan.component_of[name]
        part = plan.evaluation.part([number])
        sources = [registry[local] for registry, local in plan.slots]
        return part.module(*(sources[one] for one in part.sources))[part.values.index(at)]

    def lowered(self, name: str, value: Tensor, reader: CodeType) -> Tensor:
        """The cast of a weight, made once for a forward, if this reader uses it only where autocast would cast it anyway."""
        frame = getattr(self._local, "frame", None)
        if not isinstance(frame, Frame) or not torch.is_autocast_cache_enabled():
            return value
        if reader in LOWERING_CODE or name in frame.entry.plan.lowered.get(reader, ()):
            return frame.cast(value)
        return value

    def _fitting(self, frame: Frame) -> Frame | InlineFrame:
        """What to read of in the middle of a forward: autocast may have been switched since its beginning, or a step taken."""
        if in_functorch():
            return self._frame()
        modes = self._modes()
        fitting = frame.others.get(modes, frame) if frame.others else frame
        if fitting.entry.modes == modes and fitting.entry.generation == self._generation:
            return fitting
        other = self._frame()
        if isinstance(other, Frame):
            frame.others[modes] = other
        return other

    def _read_inline(self, frame: InlineFrame, name: str) -> Tensor:
        if frame.level != torch._C._functorch.maybe_current_level():
            # What is computed inside of a transform of the forward's own is dead after it.
            return self._compute(name)[name]
        values = frame.values.setdefault((torch.is_grad_enabled(), self._modes()), {})
        if name not in values:
            values |= self._compute(name)
        return values[name]

    def _compute(self, name: str) -> dict[str, Tensor]:
        """The weights of the site of this one by all their names, computed now as ``torch.nn.utils.parametrize`` does."""
        return compute_site(self.root, self._planner.site_of[name], self.tensor)

    def read_all(self, plan: Plan) -> dict[str, Tensor]:
        """All weights and hoisted values of the current forward, by name."""
        random = (site for site in self.sites if site.home in plan.volatile and not site.is_alone)
        return {name: self.read_weight(name) for name in (*plan.values, *(name for site in random for name in site.names))}

    def compute_all(self) -> dict[str, Tensor]:
        """All weights, computed in place: for compilers, which put the computation into their own graph."""
        values: dict[str, Tensor] = {}
        for site, module in zip(self.sites, self._planner.homes, strict=True):
            if site.home in self._planner.volatile and site.is_alone:
                # Drawn anew at each read, by the module that owns it.
                continue
            result = module(*[values[read] if read in values else self.tensor(read) for read in site.reads])
            for name, value in zip(site.names, result if isinstance(result, tuple) else (result,), strict=True):
                values[name] = value
        return values

    def tensor(self, name: str) -> Tensor:
        """A weight or a registered tensor, by its dotted name."""
        return self.read_weight(name) if name in self._planner.site_of else self.registered(name)

    def registered(self, name: str) -> Tensor:
        """A parameter or buffer, by its dotted name."""
        path, _, local = name.rpartition(".")
        return getattr(self.root.get_submodule(path), local)

    def write_weight(self, name: str, value: Tensor, *, project: bool = False) -> None:
        """Set a weight through the right inverse of its site; the other weights of a joint site stay.

        Raises:
            ImageError: it is not in the image; nothing was changed.
        """
        site = self._planner.site_of[name]
        module: SiteModule = self.root.get_submodule(site.home)  # type: ignore[assignment]
        position = next(at for at, aliases in enumerate(site.aliases) if name in aliases)
        with torch.no_grad():
            values = self.steady_values(site)
            target = values[position]
            if value.shape != target.shape:
                raise ValueError(f"got a tensor of shape {tuple(value.shape)} for {name}, expected {tuple(target.shape)}")
            new = (*values[:position], value.to(target), *values[position + 1 :])
            try:
                module.set_latents(module.right_inverse(new if len(new) > 1 else new[0], project=project))
            except ImageError as error:
                raise ImageError(f"{name}: {error}") from error
        self.drop_entries()

    def steady_values(self, site: Site) -> tuple[Tensor, ...]:
        """Copies of the weights of one site; of a site that draws random numbers, those without a draw (of eval mode)."""
        module: SiteModule = self.root.get_submodule(site.home)  # type: ignore[assignment]
        if site.home in self._planner.volatile or module.resamples_per_step:
            return present_values(module, tuple(self.tensor(read).detach() for read in site.reads))
        return tuple(self.tensor(name).detach().clone() for name in site.names)

    # --- the cache

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the model, each after those it reads."""
        return self._planner.sites

    @property
    def plan(self) -> Plan:
        """The plan for the present kind of state."""
        return self._planner.plan

    def present_sites(self) -> tuple[Site, ...]:
        """The sites, without those whose owner was replaced by another module of the user's."""
        if self._planner.forget_replaced():
            self.invalidate()
        return self.sites

    def invalidate(self, *, traces: bool = True) -> None:
        """Compute the weights anew at the next read, and look at what traces took for granted as well."""
        if traces:
            self._planner.clear()
        self.drop_entries()

    def drop_entries(self) -> None:
        """Compute the weights anew at the next read."""
        self._generation += 1
        entries, self._entries = self._entries, {}
        for entry in entries.values():
            self._alarms.lost_writes(self.sites, entry.written())

    def follow_plan(self, plan: Plan) -> bool:
        """Read what was computed by a plan that yields the same, with other graphs around it; False: there is none."""
        entry = self._entries.get(self._modes())
        if entry is None or not entry.plan.yields_the_same(plan):
            return False
        self._entries = {**self._entries, entry.modes: replace(entry, plan=plan)}
        return True

    def compile_prologue(self, compiler: Compiler | None) -> None:
        """Evaluate prologues through ``compiler`` from now on; None: as they are."""
        if compiler is not self._planner.compiler:
            self._planner.compiler = compiler
            self.invalidate()

    def known(self, held: frozenset[int]) -> frozenset[int]:
        """Which of these ids are of parameters of the model or of tensors behind its weights."""
        own = {id(source) for entry in self._entries.values() for source in entry.sources}
        return held & (own | set(map(id, self.root.parameters())))

    def after_step(self, held: frozenset[int], *, unknown: bool) -> None:
        """An optimizer stepped; see ``fxparam.runtime.steps``.

        Maps that change their base do so now. It may be that latents have been written which it does not hold: unknown tensors
        may be flat or master copies of ours, and a model that no optimizer has trained so far may follow another one (target
        networks, averages).
        """
        self._rebasing.after_step(held)
        own = any(not held.isdisjoint(map(id, entry.sources)) for entry in self._entries.values())
        if not self._has_optimizer and held != self._foreign:
            self._has_optimizer, self._foreign = bool(self.known(held)), held
        # Without an entry one is being computed, perhaps, in another thread.
        if own or unknown or not self._has_optimizer or not self._entries:
            self._generation += 1

    def after_fork(self) -> None:
        """In a forked child: another thread may have held the lock, and it does not exist here."""
        self._lock = threading.RLock()
        self._planner.after_fork()
        for entry in self._entries.values():
            entry.published.after_fork()

    def _frame(self) -> Frame | InlineFrame:
        if under_a_transform():
            self.stats.inlined += 1
            return InlineFrame()
        entry = self._entries.get(self._modes())
        if entry is not None and entry.is_current(self._modes(), self._generation):
            self.stats.hits += 1
            if entry.draws is not None and torch._C._current_graph_task_id() != -1:
                entry.draws.replay()
            if self._checking:
                compare(entry)
            return Frame(entry, self._block())
        if self._swapped():
            self.stats.inlined += 1
            return InlineFrame()
        # Let go of it now: the old weights should not be there beside the new ones.
        del entry
        with self._lock:
            return Frame(self._renewed(), self._block())

    def _swapped(self) -> bool:
        """Whether other tensors are in place of the parameters for a while: functional_call and replicas do that."""

        def swapped() -> bool:
            return any(not isinstance(registry.get(name), nn.Parameter) for registry, name in self._planner.parameters)

        if not swapped():
            return False
        # So does a trace of the prologue, in another thread perhaps; it is done under the lock.
        with self._lock:
            return swapped()

    def _renewed(self) -> Entry:
        """The current entry for the present modes, evaluated now unless another thread has just done so."""
        modes = self._modes()
        entry = self._entries.get(modes)
        if entry is not None and entry.is_current(modes, self._generation):
            return entry
        stepped = entry is not None and entry.generation != self._generation
        if entry is not None:
            self._alarms.lost_writes(self.sites, entry.written())
            del entry
        # Weights swapped in for evaluation by a write nobody sees: only the change of mode tells.
        kept = {
            key: other
            for key, other in self._entries.items()
            if other.modes[-1] == modes[-1] and other.is_current(other.modes, self._generation)
        }
        self._entries = kept
        new = self._refresher.refresh(next(iter(kept.values()), None), modes, self._generation, stepped=stepped)
        self._entries = {**kept, modes: new}
        return new

    def _block(self) -> Block | None:
        blocks = getattr(self._local, "blocks", None)
        return blocks[-1] if blocks else None

    @contextmanager
    def defer_backward(self) -> Iterator[None]:
        """See ``fxparam.ParametrizedModule.defer_backward``."""
        refuse_sharded(tensor for module in self._planner.homes for tensor in module.parameters())
        blocks: list[Block] = self._local.__dict__.setdefault("blocks", [])
        block = Block()
        blocks.append(block)
        self._blocks.add(block)
        try:
            yield
        except BaseException:
            block.discard()
            raise
        finally:
            block.open = False
            blocks.remove(block)
        block.flush()

    def discard_deferred(self) -> None:
        """Forget all sums that have not passed the prologue."""
        for block in list(self._blocks):
            block.discard()

    def before_step(self, held: frozenset[int]) -> None:
        """An optimizer is about to step.

        Raises:
            DeferralError: it holds latents whose gradient is still deferred.
        """
        if any(not held.isdisjoint(block.pending()) for block in list(self._blocks)):
            raise DeferralError(
                "optimizer.step() while gradients are deferred: leave the block of model.defer_backward() first"
            )

    def _modes(self) -> tuple[object, ...]:
        return (*autocast_state(), self.root.training)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a runtime is rebuilt, not copied")


def _same_name(name: str, outer: Frame, frame: Frame) -> bool:
    """Whether a name means in one frame what it means in another: each plan names hoisted values in its own way."""
    one, other = outer.entry.plan, frame.entry.plan
    return one is other or not name.startswith(f"{HOISTED}.") or one.yields_the_same(other)


def compute_site(root: nn.Module, site: Site, tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The weights of one site by all their names, computed in place.

    Args:
        root: the live module tree.
        site: the site.
        tensor: yields what the site reads, by name.
    """
    module: SiteModule = root.get_submodule(site.home)  # type: ignore[assignment]
    value = module(*map(tensor, site.reads))
    values = value if isinstance(value, tuple) else (value,)
    return {alias: one for aliases, one in zip(site.aliases, values, strict=True) for alias in aliases}
