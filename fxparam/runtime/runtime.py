"""The runtime of one live module tree: its plans, its cache, and the delivery of weights to their readers.

What makes a cached entry current is in ``fxparam.runtime.entry``; how gradients cross it in ``fxparam.runtime.bridge``.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from fxparam.errors import DeferralError, StaleWeightsError
from fxparam.program import Site
from fxparam.runtime import steps
from fxparam.runtime.bridge import PrivateGraph, Published, grouped, private_aliases
from fxparam.runtime.deferral import Block, refuse_sharded, refuse_shards
from fxparam.runtime.entry import Entry, Frame, InlineFrame, requires_grad_of, version_of
from fxparam.runtime.plan import Plan, make_plan
from fxparam.spec.names import first_names
from fxparam.tracer.delivery import Inline, binding_of
from fxparam.tracer.site import SiteModule
from fxparam.tracer.site_tracing import SiteTracer

_MAX_PLANS = 16
_MAX_RETRACES = 4


@dataclass
class Stats:
    """Counts since the transform.

    Attributes:
        refreshes: evaluations of the prologue.
        hits: root forwards, and reads outside one, that found the weights current.
        backwards: evaluations of the prologue's backward (of a connected component).
        inlined: forwards that computed the prologue in place (compilation, functorch, replaced latents).
    """

    refreshes: int = 0
    hits: int = 0
    backwards: int = 0
    inlined: int = 0

    def __getitem__(self, name: str) -> int:
        return int(getattr(self, name))


class Runtime:
    """Plans, cache and delivery for one live module tree.

    Args:
        root: the live module tree.
        sites: its sites, each after those it reads.
        trace: whether the body is to be a graph where that is exact.
        why_live: if not, why.
    """

    def __init__(self, root: nn.Module, sites: Sequence[Site], *, trace: bool, why_live: str = "") -> None:
        self.root, self.sites = root, tuple(sites)
        self.trace, self.why_live = trace, why_live
        self.stats = Stats()
        self.inline = Inline()
        self._site_of = {alias: site for site in self.sites for aliases in site.aliases for alias in aliases}
        self._modules: tuple[SiteModule, ...] = tuple(root.get_submodule(site.home) for site in self.sites)  # type: ignore[misc]
        self._maps = [module for site in self._modules for module in site.modules()]
        self._plans: dict[object, Plan] = {}
        # By autocast state: a forward that switches autocast inside reads two of them.
        self._entries: dict[object, Entry] = {}
        self._steps = 0
        self._retraces = 0
        self._checking = os.environ.get("FXPARAM_CHECK", "") not in ("", "0")
        self._lock = threading.RLock()
        self._local = threading.local()
        self._blocks: weakref.WeakSet[Block] = weakref.WeakSet()
        for module in root.modules():
            binding = binding_of(module)
            if binding is not None:
                binding.bind(self, self.inline)
        self._random: frozenset[str] = frozenset()
        self._flat: tuple[list[nn.Module], list[dict[str, Any]]] | None = None
        self._parameters: tuple[tuple[dict[str, Any], str], ...] = ()
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

    def read_weight(self, name: str) -> Tensor:
        """The weight (or hoisted value) with this dotted name; several reads within one forward share one evaluation."""
        frame: Frame | InlineFrame | None = getattr(self._local, "frame", None)
        if frame is None or (isinstance(frame, Frame) and (frame.entry.modes != self._modes() or _in_functorch())):
            frame = self._frame()
        if isinstance(frame, InlineFrame):
            if frame.level != torch._C._functorch.maybe_current_level():
                # What is computed inside of a transform of the forward's own is dead after it.
                return self._compute(name)[name]
            mode = (torch.is_grad_enabled(), self._modes())
            values = frame.values.setdefault(mode, {})
            if name not in values:
                values |= self._compute(name)
            return values[name]
        if name not in frame.entry.plan.component_of:
            # Random, and drawn anew at each read.
            return self._compute(name)[name]
        value = frame.read(name)
        if value is not None:
            return value
        # Written in place since the beginning of this forward.
        frame = self._frame()
        if getattr(self._local, "frame", None) is not None:
            self._local.frame = frame
        return self.read_weight(name)

    def _compute(self, name: str) -> dict[str, Tensor]:
        """The weights of one site by all their names, computed now as ``torch.nn.utils.parametrize`` does."""
        site = self._site_of[name]
        module: SiteModule = self.root.get_submodule(site.home)  # type: ignore[assignment]
        value = module(*(self.tensor(read) for read in site.reads))
        values = value if isinstance(value, tuple) else (value,)
        return {alias: one for aliases, one in zip(site.aliases, values, strict=True) for alias in aliases}

    def read_all(self, plan: Plan) -> dict[str, Tensor]:
        """All weights and hoisted values of the current forward, by name."""
        random = (site for site in self.sites if site.home in plan.volatile and not site.is_alone)
        return {name: self.read_weight(name) for name in (*plan.values, *(name for site in random for name in site.names))}

    def compute_all(self) -> dict[str, Tensor]:
        """All weights, computed in place: for compilers, which put the computation into their own graph."""
        values: dict[str, Tensor] = {}
        for site, module in zip(self.sites, self._modules, strict=True):
            if site.home in self._random and site.is_alone:
                # Drawn anew at each read, by the module that owns it.
                continue
            result = module(*[values[read] if read in values else self.tensor(read) for read in site.reads])
            for name, value in zip(site.names, result if isinstance(result, tuple) else (result,), strict=True):
                values[name] = value
        return values

    def tensor(self, name: str) -> Tensor:
        """A weight or a registered tensor, by its dotted name."""
        if name in self._site_of:
            return self.read_weight(name)
        path, _, local = name.rpartition(".")
        return getattr(self.root.get_submodule(path), local)

    def write_weight(self, name: str, value: Tensor, *, project: bool = False) -> None:
        """Set a weight through the right inverse of its site; the other weights of a joint site stay.

        Raises:
            ImageError: it is not in the image; nothing was changed.
        """
        site = self._site_of[name]
        module: SiteModule = self.root.get_submodule(site.home)  # type: ignore[assignment]
        position = next(at for at, aliases in enumerate(site.aliases) if name in aliases)
        with torch.no_grad():
            values = tuple(self.tensor(other).clone() for other in site.names)
            target = values[position]
            if value.shape != target.shape:
                raise ValueError(f"got a tensor of shape {tuple(value.shape)} for {name}, expected {tuple(target.shape)}")
            new = (*values[:position], value.to(target), *values[position + 1 :])
            module.set_latents(module.right_inverse(new if len(new) > 1 else new[0], project=project))
        self._entries = {}

    # --- the cache

    @property
    def plan(self) -> Plan:
        """The plan for the present kind of state."""
        kind = self._kind()
        plan = self._plans.get(kind)
        if plan is None or not plan.holds():
            self._flat = None
            kind = self._kind()
            with self._lock:
                plan = self._plans[kind] = self._new_plan(plan)
        return plan

    def _new_plan(self, before: Plan | None) -> Plan:
        if before is not None and before.traced is not None:
            # An attribute that a schedule moves all the time is cheaper to read than to bake in.
            self._retraces += 1
            if self._retraces > _MAX_RETRACES:
                change = before.traced.watch.first_change()
                self.trace, self.why_live = False, f"the attribute {change!r} keeps changing between forwards"
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        self.present_sites()
        with (
            torch.inference_mode(False),
            _disable_current_modes(),
            _without_saved_tensor_hooks(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext(),
        ):
            tracer = SiteTracer(first_names(self.root))
            plan = make_plan(
                self.root, self.sites, trace=self.trace, why_live=self.why_live, reader=self, inline=self.inline, tracer=tracer
            )
        self._random = plan.volatile
        self._parameters = tuple((registry, name) for registry, name in plan.slots if isinstance(registry[name], nn.Parameter))
        return plan

    def present_sites(self) -> tuple[Site, ...]:
        """The sites, without those whose owner was replaced by another module of the user's."""
        there = [
            (site, module)
            for site, module in zip(self.sites, self._modules, strict=True)
            if _submodule(self.root, site.home) is module
        ]
        if len(there) < len(self.sites):
            self.sites, self._modules = tuple(site for site, _ in there), tuple(module for _, module in there)
            self._maps = [module for site in self._modules for module in site.modules()]
            self._site_of = {alias: site for site in self.sites for aliases in site.aliases for alias in aliases}
            self.invalidate()
        return self.sites

    def invalidate(self) -> None:
        """Look at everything anew at the next read: weights, and what traces took for granted."""
        self._plans.clear()
        self.drop_entries()

    def drop_entries(self) -> None:
        """Compute the weights anew at the next read."""
        self._entries = {}

    def after_step(self, held: frozenset[int]) -> bool:
        """An optimizer stepped; see ``fxparam.runtime.steps``."""
        touched = any(not held.isdisjoint(map(id, entry.sources)) for entry in self._entries.values())
        if touched:
            self._steps += 1
        return touched or not held.isdisjoint(map(id, self.root.parameters()))

    def unknown_step(self) -> None:
        """An optimizer of tensors nobody here knows stepped: they may be flat or master copies of ours."""
        self._steps += 1

    def after_fork(self) -> None:
        """In a forked child: another thread may have held the lock, and it does not exist here."""
        self._lock = threading.RLock()

    def _frame(self) -> Frame | InlineFrame:
        if _under_a_transform():
            self.stats.inlined += 1
            return InlineFrame()
        entry = self._entries.get(self._modes())
        if entry is not None and entry.is_current(self._modes(), self._steps):
            self.stats.hits += 1
            if self._checking:
                self._recompute_and_compare(entry)
            return Frame(entry, self._block())
        if any(not isinstance(registry.get(name), nn.Parameter) for registry, name in self._parameters):
            # functional_call and replicas put other tensors in place of the parameters for a while.
            self.stats.inlined += 1
            return InlineFrame()
        with self._lock:
            modes = self._modes()
            entry = self._entries.get(modes)
            if entry is None or not entry.is_current(self._modes(), self._steps):
                entry = self._refresh()
                # Weights swapped in for evaluation by a write nobody sees: only the change of mode tells.
                kept = {key: other for key, other in self._entries.items() if other.modes[-1] == modes[-1]}
                self._entries = {**kept, modes: entry}
            return Frame(entry, self._block())

    def _block(self) -> Block | None:
        blocks = getattr(self._local, "blocks", None)
        return blocks[-1] if blocks else None

    @contextmanager
    def defer_backward(self) -> Iterator[None]:
        """See ``fxparam.ParametrizedModule.defer_backward``."""
        refuse_sharded(tensor for module in self._modules for tensor in module.parameters())
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
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        gpu = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        return (autocast, gpu, self.root.training)

    def _kind(self) -> object:
        """Everything that traces bake in and that changes back and forth: modes of modules, kinds of tensors."""
        if self._flat is None:
            modules = list(self.root.modules()) if self.trace else self._maps
            self._flat = (
                modules,
                [registry for module in modules for registry in (module._parameters, module._buffers) if registry],
            )
        modules, registries = self._flat
        tensors = (tensor for registry in registries for tensor in registry.values() if tensor is not None)
        flags = tuple(module.training for module in modules)
        return (self.trace, torch.get_default_dtype(), flags, tuple((t.shape, t.dtype, t.device) for t in tensors))

    def _refresh(self) -> Entry:
        refuse_shards(tensor for module in self._maps for tensor in module._parameters.values() if tensor is not None)
        plan = self.plan
        sources = [registry[name] for registry, name in plan.slots]
        refuse_shards(sources)
        training = self.root.training or any(module.training for module in self._modules)
        graph = any(map(requires_grad_of, sources)) and (torch.is_grad_enabled() or training)
        received: set[int] = set()
        stats = self.stats

        # Neither the runtime nor the entry: autograd nodes hold this, and the garbage collector cannot see through them.
        def on_backward(components: int, positions: Sequence[int]) -> None:
            stats.backwards += components
            received.update(positions)

        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(graph),
            _disable_current_modes(),
            _without_saved_tensor_hooks(),
        ):
            aliases, edges = private_aliases(sources, graph=graph)
            values = plan.prologue(*aliases)
        # A map with a state may have put new buffers in the place of those it read.
        sources = [registry[name] for registry, name in plan.slots]
        self.stats.refreshes += 1
        modes, trainable = self._modes(), list(map(requires_grad_of, sources))
        kind = (graph, modes, *trainable)
        if kind not in plan.groups:
            plan.groups[kind] = grouped(plan.components, values)
        private = PrivateGraph(edges, sources, on_backward)
        return Entry(
            plan=plan,
            published=Published(private, values, plan.components, plan.groups[kind], sources),
            sources=sources,
            modes=modes,
            steps=self._steps,
            graph=graph,
            addresses=list(map(Tensor.data_ptr, sources)),
            versions=list(map(version_of, sources)),
            trainable=trainable,
            weight_versions=list(map(version_of, values)),
            storages=[source.untyped_storage() for source in sources],
            received=received,
        )

    def _recompute_and_compare(self, entry: Entry) -> None:
        """``FXPARAM_CHECK=1``: what the cache hands out must be what the latents give now."""
        if any("module" in node.op for node in entry.plan.prologue.graph.nodes):
            return
        with torch.no_grad(), _disable_current_modes():
            now = entry.plan.prologue(*(registry[name].detach() for registry, name in entry.plan.slots))
        for name, old, new in zip(entry.plan.values, entry.published.values, now, strict=True):
            if not torch.equal(old.detach().nan_to_num(), new.nan_to_num()):
                raise StaleWeightsError(
                    f"{name} was cached, and its latents give another value now: they were written in a way that moves neither "
                    "version nor storage (p.data.add_, a numpy view); call model.invalidate() after such a write"
                )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a runtime is rebuilt, not copied")


def _under_a_transform() -> bool:
    """Whether compilation, functorch, or fake, functional or proxy tensors are about: nothing of these may enter the cache."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    names = ("FakeTensorMode", "ProxyTorchDispatchMode", "FunctionalTensorMode")
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(type(mode).__name__ in names for mode in modes)


def _without_saved_tensor_hooks() -> AbstractContextManager[Any]:
    """Hide the user's saved-tensor hooks (checkpoint, offloading) from the private graph; keep autograd's version check."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return nullcontext()
    return saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), -1 if tensor.is_inference() else tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if version >= 0 and tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a latent was "
            f"written between forward and backward (is at version {tensor._version}; expected version {version} instead)"
        )
    return tensor


def _submodule(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def _in_functorch() -> bool:
    return torch._C._functorch.maybe_current_level() is not None
