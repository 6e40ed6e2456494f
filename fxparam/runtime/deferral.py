"""``defer_backward``: one backward of the prologue for all micro-batches of a step.

Inside a block the weights of a forward are cut off from the latents; backward stops at them and their gradients are summed.
Leaving the block sends the sums through the prologue. Gradients are linear in the gradients of the weights, so the result is
the same, and sums of half precision are kept in float32.

Under ``DistributedDataParallel`` the forward that will synchronize is not cut off: its backward carries the sums along, so
that the reducer sees one complete gradient.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed._composable_state import _module_state_mapping
from torch.nn.parallel import DistributedDataParallel

from fxparam.errors import DeferralError, FxparamError
from fxparam.runtime.bridge import Account, Leased, Published, Values, aliases_of
from fxparam.runtime.groups import Group

_HALF = (torch.float16, torch.bfloat16)


class Block:
    """One ``defer_backward`` block of one thread: the sums of gradients that have not passed the prologue yet."""

    def __init__(self) -> None:
        self.open = True
        self.synchronizes = False
        self.anchor = torch.zeros((), requires_grad=True)
        self._sums: dict[Published, dict[int, Tensor]] = {}
        self._parallel: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        self._looked_at: weakref.WeakSet[Published] = weakref.WeakSet()
        self._lock = threading.Lock()

    def lease(self, published: Published, number: int) -> Leased:
        """The values of one component for one forward, and of those that share its nodes: cut off from the latents, or of all
        that train, carrying all sums, where DDP synchronizes.

        Raises:
            DeferralError: the latents are sharded (FSDP2).
        """
        if published not in self._looked_at:
            refuse_sharded(published.sources)
            self._looked_at.add(published)
        with torch.inference_mode(False):
            parallel = DistributedDataParallel._active_ddp_module
            if parallel is not None:
                self._parallel.add(parallel)
            if parallel is not None and parallel.require_backward_grad_sync:
                return self._carrying(published)
            group = published.group(number)
            # Made now, although they are used at the end only: a latent frozen until then is no error in PyTorch.
            held, _ = published.outputs(group)
            account = Account(held)
            values = _Deferred.apply(self, published, account, group, self.anchor)
            return Leased(group, account, dict(zip(group.values, values, strict=True)))

    def _carrying(self, published: Published) -> Leased:
        # All that trains: the synchronizing backward must carry every sum, whatever its loss reaches.
        self.synchronizes = True
        groups = published.groups()
        group = Group({number: part for one in groups for number, part in one.components.items()}, frees=True)
        outputs = [output for one in groups for output in published.outputs(one)[1]]
        values = _Carrying.apply(self, published, group, *outputs)
        return Leased(group, Account(Values({})), dict(zip(group.values, values, strict=True)))

    def add(self, published: Published, at: Iterable[int], gradients: Iterable[Tensor | None]) -> None:
        """Add gradients of values to the sums."""
        with self._lock, torch.no_grad():
            sums = self._sums.setdefault(published, {})
            for position, gradient in zip(at, gradients, strict=True):
                if gradient is None:
                    continue
                wide = torch.float32 if gradient.dtype in _HALF else gradient.dtype
                if position in sums:
                    sums[position] = _plus(sums[position], gradient)
                else:
                    sums[position] = gradient.detach().to(wide, copy=True)
        if not self.open:
            # A loss of the block whose backward comes after it.
            torch.autograd.Variable._execution_engine.queue_callback(self.flush)

    def take(self, published: Published, position: int) -> Tensor | None:
        """Remove and return the sum for one value."""
        with self._lock:
            sums = self._sums.get(published, {})
            total = sums.pop(position, None)
        return None if total is None else total.to(published.values[position].dtype)

    def pending(self) -> set[int]:
        """The ids of the latents that wait for a gradient."""
        with self._lock:
            return {
                id(published.sources[source])
                for published, sums in self._sums.items()
                for component in published.components
                if not sums.keys().isdisjoint(component.values)
                for source in component.sources
            }

    def discard(self) -> None:
        """Forget the sums: an exception left the block, or gradients were set to zero."""
        with self._lock:
            self._sums.clear()

    def flush(self) -> None:
        """Send the sums through the prologue into the gradients of the latents.

        Raises:
            DeferralError: DistributedDataParallel has synchronized without them.
        """
        with self._lock:
            sums, self._sums = self._sums, {}
        # The second sign: the last forward synchronizes, and read none of our weights.
        synchronized = self.synchronizes or any(parallel.require_forward_param_sync for parallel in self._parallel)
        for published, found in sums.items():
            if not found:
                continue
            if synchronized:
                raise DeferralError(
                    "gradients of earlier micro-batches are left over after the backward that DistributedDataParallel "
                    "synchronizes and would be added on this rank only; the last loss of the block must depend on a computed "
                    "weight, and its backward must come after all others and inside the block; else leave out "
                    "defer_backward()"
                )
            outputs, gradients = [], []
            with torch.enable_grad():
                for group in published.groups():
                    if found.keys().isdisjoint(group.values):
                        continue
                    for position, output in zip(group.values, published.outputs(group)[1], strict=True):
                        if position in found:
                            outputs.append(output)
                            gradients.append(found[position].to(output.dtype))
            torch.autograd.backward(outputs, gradients)


def _plus(total: Tensor, gradient: Tensor) -> Tensor:
    """The sum, in place where that is possible: ``total`` is our own. PyTorch adds sparse tensors to dense ones only."""
    if not total.is_sparse:
        return total.add_(gradient)
    return total + gradient if gradient.is_sparse else gradient + total


class _Deferred(torch.autograd.Function):
    """Values cut off from the latents: no hook of theirs fires, and no graph is kept beyond the values."""

    @staticmethod
    def forward(
        ctx: Any, block: Block, published: Published, account: Account, group: Group, anchor: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.block, ctx.published, ctx.account, ctx.group = block, published, account, group
        return aliases_of([published.values[at] for at in group.values], ctx)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        ctx.account.settle(ctx.group.reached(gradients), frees=ctx.group.frees)
        if torch.is_grad_enabled():
            raise DeferralError(
                "backward(create_graph=True) inside defer_backward() would have to differentiate the deferred part; take "
                "this loss out of the block"
            )
        ctx.block.add(ctx.published, ctx.group.values, gradients)
        if ctx.account.held is None:
            ctx.published = None
        return None, None, None, None, None


class _Carrying(torch.autograd.Function):
    """Values connected to the latents, whose backward adds what was deferred before."""

    @staticmethod
    def forward(ctx: Any, block: Block, published: Published, group: Group, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.block, ctx.published, ctx.group = block, published, group
        return aliases_of(outputs, ctx)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        total: list[Tensor | None] = []
        for position, gradient in zip(ctx.group.values, gradients, strict=True):
            deferred = ctx.block.take(ctx.published, position)
            total.append(gradient if deferred is None else deferred if gradient is None else gradient + deferred)
        return (None, None, None, *total)


def refuse_sharded(latents: Iterable[Tensor]) -> None:
    """Deferral needs the latents after backward; FSDP2 has freed them by then.

    Raises:
        DeferralError: a latent is sharded, or gathered from shards for a while.
    """
    gathered = _fsdp("_unsharded_param")
    if any(id(latent) in gathered or "DTensor" in (type(latent).__name__, type(latent.data).__name__) for latent in latents):
        raise DeferralError(
            "defer_backward() with fully_shard (FSDP2): the latents are sharded and freed after each backward; leave "
            "defer_backward() out, the weights are still computed once per forward"
        )


def refuse_shards(sources: Iterable[Tensor]) -> None:
    """A prologue reads whole tensors; those of FSDP2 are whole while the module runs that was given to ``fully_shard``.

    Raises:
        FxparamError: a source is a shard.
    """
    shards = _fsdp("sharded_param")
    if shards and any(id(source) in shards for source in sources):
        raise FxparamError(
            "latents are shards when the weights are computed, at the beginning of a forward of the whole model; give "
            "fully_shard the whole model, and of its submodules only those without computed weights"
        )


def _fsdp(kind: str) -> set[int]:
    """The ids of FSDP2's parameters of one kind. Gathered ones look like any other parameter."""
    states = [state() for state in _module_state_mapping.values()]
    groups = [group for state in states for group in getattr(state, "_fsdp_param_groups", ())]
    return {id(getattr(parameter, kind, None)) for group in groups for parameter in group.fsdp_params}
