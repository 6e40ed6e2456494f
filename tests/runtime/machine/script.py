"""A random training script, run by a model and by its oracle."""

# mypy: disable-error-code="operator,union-attr,arg-type,attr-defined,misc", warn-unused-ignores=False

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from hypothesis.stateful import RuleBasedStateMachine
from runtime.machine.compare import EXACT, Mismatch, Tolerance, attempt, compare
from runtime.machine.oracles import Oracle
from runtime.machine.world import World
from torch import Tensor

LOST = {"data", "vector", "exchange"}
"""Ways to write after which the autograd of a plain model would mix the old and the new values."""
UNSEEN = {"sgd-fused", "adam-fused", "exponential_average", *LOST}
"""Ways to write that move no version."""


@dataclass(frozen=True)
class Kind:
    """A subject and its oracle.

    Attributes:
        build: both worlds, from a seed.
        weights: the computed weights.
        assignable: a value for each weight that can be written through its right inverse.
        parts: submodules that both have.
        stateful: maps advance once per evaluation; the oracle is told when.
        recompute: backward computes weights again, from what their sources are then.
        tolerance: how far the two may be apart.
        rough: the same under autocast, which rounds to half precision; None: it has no effect on this dtype.
        taps: what may happen in the middle of a forward.
    """

    build: Callable[[int], tuple[World, World]]
    weights: tuple[str, ...] = ()
    assignable: Mapping[str, Callable[[int], Tensor]] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    stateful: bool = False
    recompute: bool = False
    tolerance: Tolerance = EXACT
    rough: Tolerance | None = None
    taps: tuple[str, ...] = ("copy", "data", "inference", "set", "fused step", "autocast")


class Script(RuleBasedStateMachine):
    """How one step of a script is made and compared. The steps themselves are in ``rules``."""

    kind: ClassVar[Kind]
    steps: ClassVar[int] = 0
    scripts: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        Script.scripts += 1
        torch.manual_seed(0)
        self.subject, self.oracle = self.kind.build(0)
        # Whether the weights are at hand: reads must not compute them again.
        self.at_hand = False
        # Whether anything of half precision may be about: in gradients, in losses that wait.
        self.rough = False

    def do(self, action: str, *args: Any, keeps: bool = False, reads: bool = False, autocast: bool | None = None) -> None:
        """Run an action in both worlds and compare everything.

        Args:
            action: a method of ``World``.
            *args: its arguments.
            keeps: whether weights that were at hand before must still be.
            reads: whether they are at hand afterwards.
            autocast: whether it computes weights under autocast; None: as everything does now.
        """
        Script.steps += 1
        before, model = self._refreshes(), self.subject.model
        start = torch.manual_seed(Script.steps).get_state()
        got = attempt(self.subject.run, action, *args)
        drew = not torch.equal(torch.get_rng_state(), start)
        computed = self._refreshes() - before if self.subject.model is model else 0
        if keeps and self.at_hand and computed:
            raise Mismatch(f"{action}{args}: the weights were computed again, and nothing had changed")
        if self.kind.stateful and computed and self.oracle.model.training:
            if computed > 1:
                raise Mismatch(f"{action}{args}: the weights were computed {computed} times")
            torch.manual_seed(Script.steps)
            self.oracle.model.advance(self.oracle.autocast if autocast is None else autocast, drew)
        expected = attempt(self.oracle.run, action, *args)
        self.rough |= self.oracle.autocast or "autocast" in args
        self.compare(got, expected, f"{action}{args}")
        self._forget(action, args)
        failed = isinstance(expected, str) and expected.startswith("error")
        if failed:
            # How far a backward got before its error, and what moved on the way, is not defined.
            self.subject.clean()
            self.oracle.clean()
            self.oracle.fired = Counter(self.subject.fired)
            self.settle()
            if action == "backward" and args[-1]:
                # It stepped some latents in one world and others in the other one: their versions tell losses that wait.
                self._drop_losses()
        self.at_hand = not failed and (reads or (keeps and self.at_hand)) and self.subject.model.training
        self.compare_states(f"after {action}{args}")

    def _forget(self, action: str, args: tuple[Any, ...]) -> None:
        """Losses that wait are dropped where the backward of a plain model would mix old and new values in a way of its own."""
        done = {action, *(arg for arg in args if isinstance(arg, str))}
        plain = not isinstance(self.oracle.model, Oracle) and done & LOST
        if plain or (self.kind.recompute and done & UNSEEN) or "fused step" in done:
            self._drop_losses()

    def _drop_losses(self) -> None:
        for world in (self.subject, self.oracle):
            world.pending, world.deferred = [], []

    @property
    def tolerance(self) -> Tolerance:
        return self.kind.rough if self.kind.rough is not None and self.rough else self.kind.tolerance

    def compare(self, got: Any, expected: Any, what: str) -> None:
        compare(got, expected, what, self.tolerance)

    def compare_states(self, what: str) -> None:
        self.compare(self.subject.state(), self.oracle.state(), what)
        # Rounding must not add up.
        self.settle()

    def settle(self) -> None:
        """Give the oracle the subject's values behind autograd's back: its pending losses are none the wiser."""
        state, other = self.subject.state(), self.oracle.state()
        for name, tensor in state.items():
            # Gradients only where they differ a lot: optimizers make more of small differences.
            if isinstance(tensor, Tensor) and (self.kind.rough or not name.endswith(".grad")):
                other[name].data.copy_(tensor.detach())
        waiting = self.subject.pending or self.subject.deferred
        self.rough = bool(self.oracle.autocast or (self.rough and waiting))

    def follow(self, what: str, home: str) -> None:
        """The subject wrote to a site through its right inverse: the oracle takes its latents and buffers over."""
        state, other = self.subject.state(), self.oracle.state()
        with torch.no_grad():
            for name, tensor in state.items():
                if name.startswith(home) and isinstance(tensor, Tensor) and not name.endswith(".grad"):
                    other[name].copy_(tensor)
        self.at_hand = False
        self.compare_states(what)

    def _refreshes(self) -> int:
        stats = getattr(self.subject.model, "stats", None)
        return 0 if stats is None else stats.refreshes

    def teardown(self) -> None:
        """Whatever came before: one more step is right."""
        self.do("clean")
        self.do("switch_autocast", False)
        self._drop_losses()
        self.rough = False
        self.do("forward", "grad", 11)
        self.do("backward", -1, -1, False, False, False)
