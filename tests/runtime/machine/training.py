"""What a script does: forwards, backwards, and blocks that defer them."""

# mypy: disable-error-code="operator,union-attr,arg-type,attr-defined,misc", warn-unused-ignores=False

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from runtime.machine.base import Base, autocast, grad_mode, in_a_thread
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from fxparam.errors import DeferralError


class Training(Base):
    """Forwards and backwards."""

    def forward(self, mode: str, seed: int) -> list[Tensor]:
        with grad_mode(mode):
            outputs = self.model(self.input(seed))
        if mode == "grad":
            self.wait(self.losses(outputs))
        return [output.detach().clone() for output in outputs]

    def warmed(self, seed: int) -> None:
        """A forward without a graph, then one with it, in one autocast region, which keeps casts of leaves."""
        with torch.no_grad():
            self.model(self.input(seed))
        self.loss(seed).backward()

    def checkpointed(self, seed: int, reentrant: bool) -> None:
        """The forward runs again in its backward."""
        x = self.input(seed).requires_grad_(reentrant)
        self.losses(checkpoint(self.model, x, use_reentrant=reentrant))[-1].backward()

    def backward(self, at: int, part: int, retain: bool, keep: bool, stepping: bool) -> None:
        """One partial loss (or all of them) of one forward; stepping: each parameter moves as soon as it has its gradient."""
        losses = self.taken(at, keep)
        handles = []
        for parameter in self.model.parameters() if stepping else ():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(step_at_once))
        try:
            losses[part % len(losses)].backward(retain_graph=retain)
        finally:
            for handle in handles:
                handle.remove()

    def gradients(self, at: int, part: int, penalty: bool) -> list[Tensor | None]:
        """``autograd.grad`` to all parameters; the penalty goes through it once more."""
        losses = self.taken(at, True)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(
            losses[part % len(losses)], trained, create_graph=penalty, retain_graph=True, allow_unused=True
        )
        if penalty:
            self.taken(at, False)
            torch.stack([gradient.square().sum() for gradient in found if gradient is not None]).sum().backward()
        return [None if gradient is None else gradient.detach() for gradient in found]

    def input_penalty(self, seed: int) -> Tensor:
        x = self.input(seed).requires_grad_()
        (gradient,) = torch.autograd.grad(self.losses(self.model(x))[-1], x, create_graph=True)
        gradient.square().sum().backward()
        return gradient.detach()

    def read_one(self, name: str, mode: str, keep: bool) -> list[Tensor | None]:
        with grad_mode(mode):
            weight = self.read(self.model, name)
        if mode == "grad" and keep:
            self.wait(self.losses([weight, weight.exp()]))
        return [weight.detach().clone()]

    def read_weights(self, keep: bool) -> list[Tensor | None]:
        """All weights; the gradient of a loss of each to it, and later through it."""
        weights = self.read_all(self.model)
        names = sorted(weights)
        losses = self.losses([weights[name].sin() for name in names])
        found = [
            torch.autograd.grad(loss, weights[name], retain_graph=True)[0]
            for name, loss in zip(names, losses[:-1], strict=True)
            if weights[name].requires_grad
        ]
        if keep:
            self.wait(losses)
        return [*(weights[name].detach().clone() for name in names), *found]

    # Elsewhere: other threads, other parameters, replicas.

    def forward_in_a_thread(self, seed: int) -> list[Tensor]:
        """Its backward may come in this one."""
        return in_a_thread(lambda: self.forward("grad", seed))

    def trained_in_a_thread(self, count: int, seed: int, own: bool, outer: bool) -> None:
        """Forward and backward in a thread, with a block of its own or none, in the middle of a block of this one or not."""
        before = Counter(self.fired)

        def work() -> None:
            with self.deferring(own):
                for number in range(count):
                    self.loss(seed + number).backward()

        with self.deferring(outer):
            if outer:
                self.loss(seed).backward()
            in_a_thread(work)
            if outer:
                self.loss(seed + 1).backward()
        self.fired = before

    def replicated(self, seed: int) -> list[Tensor]:
        """Two replicas, each with half of the input, as ``DataParallel`` makes them."""
        x = self.input(seed)
        if hasattr(self.model, "defer_backward"):
            outputs = [torch.cat(parts) for parts in zip(*map(call, replicate(self.model), x.tensor_split(2)), strict=True)]
        else:
            outputs = list(self.model(x))
        self.losses(outputs)[-1].backward()
        return [output.detach().clone() for output in outputs]

    def functional(self, seed: int, how: str, some: int) -> list[Tensor | None]:
        """Other parameters for one call."""
        chosen = {
            name: parameter.detach() + 0.1 * self.noise(seed + number, *parameter.shape)
            for number, (name, parameter) in enumerate(self.named())
            if some == 0 or number % some == 0
        }
        x = self.input(seed)

        def loss(tensors: Mapping[str, Tensor]) -> Tensor:
            outputs = functional_call(self.model, {self.own(name): tensor for name, tensor in tensors.items()}, (x,))
            return self.losses(outputs)[-1]

        if how == "func":
            found = grad(loss)(chosen)
            return [found[name] for name in chosen]
        leaves = {name: tensor.requires_grad_() for name, tensor in chosen.items()}
        value = loss(leaves)
        if how == "backward":
            # The other parameters get theirs as well.
            value.backward()
            return [value.detach(), *(leaf.grad for leaf in leaves.values())]
        return [value.detach(), *torch.autograd.grad(value, list(leaves.values()), allow_unused=True)]

    # In the middle of a forward.

    def tapped(self, how: str, at: int, seed: int) -> list[Tensor]:
        """Something happens between two reads of a forward."""
        switched = autocast(not torch.is_autocast_enabled("cpu"))

        def between(module: nn.Module, args: Any) -> None:
            if how == "autocast":
                switched.__enter__()
                return
            if how == "fused step":
                self.step("sgd-fused")
            else:
                self.write(at, seed, how)
            # What an oracle computed before is of no use.
            getattr(self.model, "renew", lambda: None)()

        handle = self.model.get_submodule("tap").register_forward_pre_hook(between)
        try:
            outputs = self.model(self.input(seed))
        finally:
            handle.remove()
            if how == "autocast":
                switched.__exit__(None, None, None)
        if how == "autocast":
            self.wait(self.losses(outputs))
        elif how not in ("fused step", "vector"):
            # All at once: what one of the outputs shares with another one is not defined after a write.
            self.wait(self.losses(outputs)[-1:])
        return [output.detach().clone() for output in outputs]

    # Deferral.

    def micro_batches(self, count: int, seed: int, older: bool, keep: bool, nested: bool) -> None:
        """Several backwards in a row; one of them may be of a loss from before, one loss may be kept for later."""
        before = Counter(self.fired)
        with self.deferring():
            for number in range(count):
                with self.deferring(nested and number == 1):
                    self.loss(seed + number).backward()
            if older and self.pending:
                self.taken(0, False)[-1].backward()
            if keep:
                self.deferred.append(self.loss(seed))
        # One call of a hook for all of them, or one for each.
        self.fired = before

    def backward_of_deferred(self) -> None:
        """A loss of a block, after the block."""
        before = Counter(self.fired)
        self.deferred.pop().backward()
        self.fired = before

    def broken_off(self, how: str, seed: int) -> str:
        """A block that an error ends: nothing of it reaches the latents. Returns the error."""
        outcome = "KeyError" if how == "raise" else "DeferralError"
        if hasattr(self.model, "defer_backward"):
            outcome = self._broken_off(how, seed)
        for name, parameter in self.named():
            # Of these some had their gradient before the error, and some not.
            if "parametrizations." not in name:
                parameter.grad = None
        return outcome

    def _broken_off(self, how: str, seed: int) -> str:
        before = Counter(self.fired)
        try:
            with self.deferring():
                self.loss(seed).backward()
                if how == "raise":
                    raise KeyError(how)
                if how == "step":
                    self.optimizer("sgd").step()
                else:
                    with warnings.catch_warnings(action="ignore", category=UserWarning):
                        self.loss(seed + 1).backward(create_graph=True)
        except (DeferralError, KeyError) as error:
            return type(error).__name__
        finally:
            self.fired = before
        return "no error"

    def zeroed(self, seed: int, set_to_none: bool) -> None:
        """Gradients are reset in the middle of a block, those that are on their way as well."""
        before = Counter(self.fired)
        with self.deferring():
            self.loss(seed).backward()
            self.model.zero_grad(set_to_none)
            self.loss(seed + 1).backward()
        self.fired = before


def call(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
    return module(x)


def replicate(model: nn.Module) -> list[nn.Module]:
    """``torch.nn.parallel.replicate`` for two devices, with copies on the CPU in place of those it sends to GPUs."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def broadcast(tensors: Sequence[Tensor], devices: Sequence[Any], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    with patch.object(module, "_broadcast_coalesced_reshape", broadcast):
        return module.replicate(model, [0, 1])


def step_at_once(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter.sub_(0.01 * parameter.grad)
    parameter.grad = None
