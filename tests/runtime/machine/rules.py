"""The steps that a script is made of."""

# mypy: disable-error-code="operator,union-attr,arg-type,attr-defined,misc", warn-unused-ignores=False

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis.stateful import precondition, rule
from runtime.machine.models import DTYPE, N
from runtime.machine.script import Script
from runtime.machine.world import OPTIMIZERS

seeds = st.integers(0, 9)
places = st.integers(0, 199)
flags = st.booleans()
modes = st.sampled_from(["grad", "grad", "grad", "no_grad", "inference"])


def _waiting(self: Script) -> bool:
    return bool(self.subject.pending)


def _none_waiting(self: Script) -> bool:
    return not self.subject.pending and not self.subject.deferred


def _weights(self: Script) -> bool:
    return bool(self.kind.weights)


def _assignable(self: Script) -> bool:
    return bool(self.kind.assignable)


def _stateless(self: Script) -> bool:
    return not self.kind.stateful


def _transformed(self: Script) -> bool:
    return hasattr(self.subject.model, "defer_backward")


class Running(Script):
    """Forwards, backwards, deferral."""

    @rule(mode=modes, seed=seeds)
    def forward(self, mode: str, seed: int) -> None:
        self.do("forward", mode, seed, keeps=True, reads=True)

    @rule(seed=seeds)
    def warmed(self, seed: int) -> None:
        self.do("warmed", seed, keeps=True, reads=True)

    @precondition(_waiting)
    @rule(at=places, part=places, retain=flags, keep=flags)
    def backward(self, at: int, part: int, retain: bool, keep: bool) -> None:
        self.do("backward", at, part, retain, keep, False, keeps=True)

    @precondition(_waiting)
    @rule(at=places)
    def backward_of_all(self, at: int) -> None:
        self.do("backward", at, -1, False, False, False, keeps=True)

    @precondition(_waiting)
    @rule(at=places)
    def backward_that_steps(self, at: int) -> None:
        self.do("backward", at, -1, False, False, True)

    @precondition(_waiting)
    @rule(at=places, part=places, penalty=flags)
    def gradients(self, at: int, part: int, penalty: bool) -> None:
        self.do("gradients", at, part, penalty)

    @rule(seed=seeds)
    def input_penalty(self, seed: int) -> None:
        self.do("input_penalty", seed, keeps=True, reads=True)

    @rule(seed=seeds, reentrant=flags)
    def checkpointed(self, seed: int, reentrant: bool) -> None:
        self.do("checkpointed", seed, reentrant, keeps=True, reads=not reentrant)

    @precondition(_weights)
    @rule(at=places, mode=st.sampled_from(["grad", "grad", "no_grad", "inference"]), keep=flags)
    def read_one(self, at: int, mode: str, keep: bool) -> None:
        self.do("read_one", self.kind.weights[at % len(self.kind.weights)], mode, keep, keeps=True, reads=True)

    @precondition(_weights)
    @rule(keep=flags)
    def read_weights(self, keep: bool) -> None:
        self.do("read_weights", keep, keeps=True, reads=True)

    # A new thread knows nothing of the autocast of this one.
    @rule(seed=seeds)
    def forward_in_a_thread(self, seed: int) -> None:
        self.do("forward_in_a_thread", seed, keeps=not self.oracle.autocast, autocast=False)

    @precondition(lambda self: not (self.kind.stateful and self.oracle.autocast))
    @rule(count=st.integers(1, 2), seed=seeds, own=flags, outer=flags)
    def trained_in_a_thread(self, count: int, seed: int, own: bool, outer: bool) -> None:
        self.do("trained_in_a_thread", count, seed, own, outer, keeps=not self.oracle.autocast)

    @precondition(_stateless)
    @rule(seed=seeds)
    def replicated(self, seed: int) -> None:
        self.do("replicated", seed, keeps=True)

    @precondition(_stateless)
    @rule(seed=seeds, how=st.sampled_from(["grad", "backward", "func"]), some=st.integers(0, 3))
    def functional(self, seed: int, how: str, some: int) -> None:
        self.do("functional", seed, how, some, keeps=True)

    @precondition(lambda self: self.kind.taps)
    @rule(how=places, at=places, seed=seeds)
    def tapped(self, how: int, at: int, seed: int) -> None:
        self.do("tapped", self.kind.taps[how % len(self.kind.taps)], at, seed)

    @rule(count=st.integers(1, 3), seed=seeds, older=flags, keep=flags, nested=flags)
    def micro_batches(self, count: int, seed: int, older: bool, keep: bool, nested: bool) -> None:
        self.do("micro_batches", count, seed, older, keep, nested, keeps=True)

    @precondition(lambda self: self.subject.deferred)
    @rule()
    def backward_of_deferred(self) -> None:
        self.do("backward_of_deferred", keeps=True)

    @precondition(_weights)
    @precondition(_transformed)
    # Without noise, in eval mode, a weight is its latent, and a graph reads that.
    @precondition(lambda self: self.subject.model.training or not self.kind.stateful)
    @precondition(lambda self: any(latent.requires_grad for latent in self.subject.latents()))
    @rule(how=st.sampled_from(["step", "create_graph", "raise"]), seed=seeds)
    def broken_off(self, how: str, seed: int) -> None:
        self.do("broken_off", how, seed, keeps=True)

    # Gradients that are gone end a step, and what has a state may move.
    @rule(seed=seeds, set_to_none=flags)
    def zeroed(self, seed: int, set_to_none: bool) -> None:
        self.do("zeroed", seed, set_to_none and not self.kind.stateful)


class Writes(Script):
    """Optimizers, and writes of all kinds."""

    @rule(name=st.sampled_from(sorted(OPTIMIZERS)))
    def step(self, name: str) -> None:
        self.do("step", name)

    @rule(seed=seeds)
    def zero_forward_backward_step(self, seed: int) -> None:
        self.do("zero_grad", True)
        self.do("forward", "grad", seed)
        self.do("backward", -1, -1, False, False, False)
        self.do("step", "sgd-fused")

    @precondition(lambda self: not self.kind.stateful and not self.oracle.autocast)
    @rule(seed=seeds)
    def lbfgs(self, seed: int) -> None:
        self.do("lbfgs", seed)

    @rule(how=st.sampled_from(["inplace", "foreach", "data", "inference"]))
    def step_by_hand(self, how: str) -> None:
        self.do("step_by_hand", how)

    @rule(set_to_none=flags)
    def zero_grad(self, set_to_none: bool) -> None:
        self.do("zero_grad", set_to_none)

    @rule(seed=seeds, assign=flags, buffers=flags)
    def load(self, seed: int, assign: bool, buffers: bool) -> None:
        self.do("load", seed, assign, buffers)

    @rule(at=places, seed=seeds, how=st.sampled_from(["copy", "inference", "data", "set", "vector"]))
    def write(self, at: int, seed: int, how: str) -> None:
        self.do("write", at, seed, how)

    @rule(first=places, second=places)
    def exchange(self, first: int, second: int) -> None:
        self.do("exchange", first, second)

    @rule(at=places, seed=seeds)
    def write_buffer(self, at: int, seed: int) -> None:
        self.do("write_buffer", at, seed)

    @precondition(_weights)
    @precondition(_none_waiting)
    @rule(at=places)
    def write_weight(self, at: int) -> None:
        self.do("write_weight", self.kind.weights[at % len(self.kind.weights)])

    @precondition(_assignable)
    @rule(at=places, seed=seeds, by_name=flags)
    def assign(self, at: int, seed: int, by_name: bool) -> None:
        Script.steps += 1
        names = sorted(self.kind.assignable)
        name = names[at % len(names)]
        owner, _, local = name.rpartition(".")
        value = self.kind.assignable[name](seed)
        if by_name:
            self.subject.model.assign(name, value)
        else:
            setattr(self.subject.model.get_submodule(owner), local, value)
        self.follow(f"after {name} = ...", f"{owner}.parametrizations.{local}.")
        self.do("read_one", name, "grad", False)
        self.compare(self.oracle.read(self.oracle.model, name).detach(), value, f"the assigned {name}")

    @precondition(_assignable)
    @rule(at=places)
    def retract(self, at: int) -> None:
        Script.steps += 1
        names = sorted(self.kind.assignable)
        name = names[at % len(names)]
        owner, _, local = name.rpartition(".")
        before = self.oracle.read(self.oracle.model, name).detach()
        if name.startswith("orth") and not torch.allclose(before @ before.mT, torch.eye(N, dtype=DTYPE), atol=1e-12):
            # Its buffer was overwritten; what it computes is not in the image any more.
            return
        self.subject.model.retract(name)
        self.follow(f"after retract({name})", f"{owner}.parametrizations.{local}.")
        self.compare(self.oracle.read(self.oracle.model, name).detach(), before, f"the retracted {name}")

    @precondition(lambda self: hasattr(self.subject.model, "invalidate") and not self.kind.stateful)
    @rule()
    def invalidate(self) -> None:
        self.subject.model.invalidate()
        self.at_hand = False

    @precondition(_stateless)
    @rule(seed=seeds, mode_first=flags)
    def exponential_average(self, seed: int, mode_first: bool) -> None:
        if self.subject.model.training:
            self.do("exponential_average", seed, mode_first)


class Changes(Script):
    """Modes, hooks, copies."""

    @rule(on=flags)
    def switch_autocast(self, on: bool) -> None:
        self.do("switch_autocast", on, keeps=on == self.oracle.autocast)

    @rule(mode=flags)
    def train(self, mode: bool) -> None:
        self.do("train", mode)

    @precondition(lambda self: self.kind.parts)
    @rule(at=places, mode=flags)
    def train_part(self, at: int, mode: bool) -> None:
        self.do("train_part", self.kind.parts[at % len(self.kind.parts)], mode)

    @rule(at=places, flag=flags)
    def require(self, at: int, flag: bool) -> None:
        self.do("require", at, flag)

    @rule(prefix=st.sampled_from(["", "orth.", "enc.", "left.", "first.", "heads.1"]), flag=flags)
    def require_all(self, prefix: str, flag: bool) -> None:
        self.do("require_all", prefix, flag)

    @rule(at=places, how=st.sampled_from(["double", "count", "seen"]))
    def hook(self, at: int, how: str) -> None:
        self.do("hook", at, how, keeps=True)

    @rule(all_of_them=flags)
    def unhook(self, all_of_them: bool) -> None:
        self.do("unhook", all_of_them, keeps=True)

    # PyTorch refuses to swap a tensor that a graph or a hook holds.
    @precondition(_none_waiting)
    @rule(swapping=flags)
    def convert(self, swapping: bool) -> None:
        self.do("unhook", True)
        self.do("convert", swapping)

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def duplicate(self, how: str) -> None:
        self.do("duplicate", how)

    @rule()
    def swap(self) -> None:
        self.do("swap")


class Machine(Running, Writes, Changes):
    """All of them. Subclasses set ``kind``."""
