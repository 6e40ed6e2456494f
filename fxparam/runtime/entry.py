"""One evaluation of the prologue in use, and what a forward reads of it.

An entry is current while all of this holds, checked without a lock once per root forward:

- every tensor the prologue reads is the same object, on the same storage, at the same version, equally trainable;
- no optimizer that holds one of them has stepped (fused optimizers do not move the version);
- train or eval, autocast, the options of the maps are as they were;
- nobody wrote to a weight;
- every latent that a backward gave a gradient still has one that is not zero: ``zero_grad`` ends a step no hook reported.

Grad mode is not part of it: in training the private graph is built under ``no_grad`` as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from fxparam.runtime.bridge import Leased, Published
from fxparam.runtime.deferral import Block
from fxparam.runtime.draws import Draws
from fxparam.runtime.hooks import Stamp, gradient_stamp, is_zero
from fxparam.runtime.plan import Plan

_LOWERED = (torch.float32, torch.float16, torch.bfloat16)
"""What autocast casts; it leaves float64 alone."""

version_of, requires_grad_of = attrgetter("_version"), attrgetter("requires_grad")


def version(tensor: Tensor) -> int:
    """The version of a tensor; -1 for inference tensors, which have none."""
    return -1 if tensor.is_inference() else tensor._version


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """The version of each tensor."""
    return list(map(version, tensors))


@dataclass(eq=False)
class Entry:
    """A published refresh and everything that must not have changed since."""

    plan: Plan
    published: Published
    sources: list[Tensor]
    modes: tuple[object, ...]
    generation: int
    graph: bool
    addresses: list[int]
    versions: list[int]
    trainable: list[bool]
    weight_versions: list[int]
    # Keeps the storages: a freed one could be reused at the same address.
    storages: list[Any] = field(default_factory=list)
    # By id; shared with the entries of other autocast states.
    received: dict[int, tuple[Tensor, Stamp]] = field(default_factory=dict)
    draws: Draws | None = None
    # Copies of latents that are views into a larger storage: it may be written as a whole, which moves no version of theirs.
    snapshots: dict[int, Tensor] = field(default_factory=dict)

    def is_current(self, modes: tuple[object, ...], generation: int) -> bool:
        """Whether nothing changed since the refresh that the weights depend on.

        Args:
            modes: autocast state and train or eval now.
            generation: that of the runtime.
        """
        try:
            sources = [registry[name] for registry, name in self.plan.slots]
            return (
                all(map(is_, sources, self.sources))
                and list(map(version_of, sources)) == self.versions
                and list(map(Tensor.data_ptr, sources)) == self.addresses
                and list(map(requires_grad_of, sources)) == self.trainable
                and generation == self.generation
                and modes == self.modes
                and (self.graph or not torch.is_grad_enabled() or not any(self.trainable))
                and list(map(version_of, self.published.values)) == self.weight_versions
                and self.plan.holds()
                and self._gradients_kept()
                and all(torch.equal(sources[at], then) for at, then in self.snapshots.items())
            )
        except (KeyError, RuntimeError):
            # A source was taken away, or is an inference tensor, which has no version: nobody knows whether it was written.
            return False

    def written(self) -> list[str]:
        """The names of the values that somebody wrote to. One that is a view of a latent is none: the latent was written."""
        pairs = zip(self.plan.values, self.published.values, self.weight_versions, strict=True)
        found = [(name, value) for name, value, then in pairs if version(value) != then]
        latents = {storage.data_ptr() for storage in self.storages} if found else set()
        return [name for name, value in found if value.untyped_storage().data_ptr() not in latents]

    def _gradients_kept(self) -> bool:
        # In the middle of a backward (a checkpoint that computes again) gradients are still on their way.
        if not self.received or torch._C._current_graph_task_id() != -1:
            return True
        for key, (source, then) in list(self.received.items()):
            now = gradient_stamp(source)
            if not source.is_leaf or (now == then and source.grad is not None):
                continue
            if now[0] != then[0] or is_zero(source.grad):
                return False
            # Clipped, unscaled, or accumulated into on a way around the weights: the step goes on.
            self.received[key] = (source, now)
        return True


class Frame:
    """What one root forward (or nothing, outside of one) reads: leases made on first use, for each grad mode."""

    def __init__(self, entry: Entry, block: Block | None) -> None:
        self.entry, self.block = entry, block
        # For a forward that switches autocast, or writes to what it reads: frames of later entries, by modes.
        self.others: dict[object, Frame] = {}
        self._casts: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._leases: dict[int, Leased] = {}
        self._detached: dict[int, Mapping[int, Tensor]] = {}

    def read(self, name: str) -> Tensor | None:
        """The weight (or hoisted value) with this name, leased for this forward. None: it, or what it is computed from, was
        written since the evaluation.
        """
        entry = self.entry
        number, at = entry.plan.component_of[name]
        value = (self._leased if entry.published.trains(number) else self._without_gradient)(number)[at]
        try:
            if value._version != entry.weight_versions[at]:
                return None
            sources, versions = entry.sources, entry.versions
            for source in entry.plan.components[number].sources:
                now = sources[source]
                if now._version != versions[source] or now.data_ptr() != entry.addresses[source]:
                    return None
        except RuntimeError:
            # Inference tensors have no version; what was read of them at the beginning of a forward holds to its end.
            pass
        return value

    def cast(self, value: Tensor) -> Tensor:
        """A weight in the precision that autocast has for its device, the same for all reads of this forward."""
        device = value.device.type
        if not torch.is_autocast_enabled(device) or value.dtype not in _LOWERED:
            return value
        dtype = torch.get_autocast_dtype(device)
        if (id(value), dtype) not in self._casts:
            # With the value, whose id must not be used again meanwhile.
            self._casts[id(value), dtype] = (value, value.to(dtype))
        return self._casts[id(value), dtype][1]

    def _without_gradient(self, number: int) -> Mapping[int, Tensor]:
        values = self._detached.get(number)
        if values is None:
            values = self._detached[number] = self.entry.published.detached(number)
        return values

    def _leased(self, number: int) -> Mapping[int, Tensor]:
        leased = self._leases.get(number)
        if leased is None or not leased.account.is_open(number):
            published = self.entry.published
            leased = published.lease(number) if self.block is None else self.block.lease(published, number)
            self._leases |= dict.fromkeys(leased.group.components, leased)
        leased.account.read.add(number)
        return leased.values


class InlineFrame:
    """Weights computed in place for one forward, by name; anew for each grad mode and autocast state."""

    def __init__(self) -> None:
        self.level = torch._C._functorch.maybe_current_level()
        self.values: dict[object, dict[str, Tensor]] = {}
