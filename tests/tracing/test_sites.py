"""Parametrizations that cannot be traced faithfully stay one call, with the reason, and their values and gradients stay exact.

The oracle is ``torch.nn.utils.parametrize`` on a copy of the same layer.
"""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from tracing.maps import (
    BufferReplaced,
    Counts,
    Dropped,
    KeepsLast,
    Modes,
    N,
    NoGradInside,
    Options,
    OwnParameter,
    PlainAttribute,
    PowerIteration,
    PythonRandom,
    Random,
    Same,
    Sign,
    StraightThrough,
    pair,
    story,
)

SIGN = Sign.apply


class StraightThroughEarly(Same):
    def forward(self, w: Tensor) -> Tensor:
        return SIGN(w * 1.5)


class StraightThroughDetach(Same):
    """The other way to write it: traceable, if the detach is kept."""

    def forward(self, w: Tensor) -> Tensor:
        return w + (w.round() - w).detach()


class BufferRead(Same):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(N) % 2).double())

    def forward(self, w: Tensor) -> Tensor:
        return w * self.mask


class ValueBranch(Same):
    def forward(self, w: Tensor) -> Tensor:
        return w * 2 if w.sum() > 0 else w * 3


class Item(Same):
    def forward(self, w: Tensor) -> Tensor:
        return w / w.detach().abs().max().item()


class Closure(Same):
    def __init__(self) -> None:
        super().__init__()
        table = torch.arange(1.0, N + 1)
        self.map = lambda w: w * table

    def forward(self, w: Tensor) -> Tensor:
        return self.map(w)


class ClosureThatTrains(Same):
    def __init__(self) -> None:
        super().__init__()
        table = torch.arange(1.0, N + 1, dtype=torch.float64).requires_grad_()
        self.map = lambda w: w * table.exp()

    def forward(self, w: Tensor) -> Tensor:
        return self.map(w)


class Nested(Same):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(N, N).double()
        nn.init.eye_(self.inner.weight)
        nn.init.constant_(self.inner.bias, 0.5)

    def forward(self, w: Tensor) -> Tensor:
        return self.inner(w).tanh()


class GradModeAsked(Same):
    def forward(self, w: Tensor) -> Tensor:
        return w * 2 if torch.is_grad_enabled() else w * 2.0


class AutocastOff(Same):
    def forward(self, w: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return w @ w


class InPlaceOnFresh(Same):
    def forward(self, w: Tensor) -> Tensor:
        v = w * 2
        u = v
        v[0] += 1
        v.mul_(w.detach())
        return v + u


class ReturnsLatent(Same):
    def forward(self, w: Tensor) -> Tensor:
        return w


class ReturnsView(Same):
    def forward(self, w: Tensor) -> Tensor:
        return w.mT


class HalfPrecision(Same):
    def forward(self, w: Tensor) -> Tensor:
        return w.to(torch.bfloat16).to(w.dtype)


class SecondOrder(Same):
    def forward(self, w: Tensor) -> Tensor:
        with torch.enable_grad():
            v = w if w.requires_grad else w.detach().requires_grad_()
            (g,) = torch.autograd.grad(v.pow(3).sum(), v, create_graph=True)
        return g


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    layer: str | None
    why: str = ""

    def __str__(self) -> str:
        return self.make.__name__


CASES = (
    Case(StraightThrough, "call", "autograd.Function Sign"),
    Case(StraightThroughEarly, "call"),
    Case(StraightThroughDetach, None),
    Case(NoGradInside, None),
    Case(PowerIteration, "call", "writes its buffers"),
    Case(BufferReplaced, "call", "writes its buffers"),
    Case(BufferRead, "graph"),
    Case(ValueBranch, "call", "tracing it raised"),
    Case(Item, "call", "tracing it raised"),
    Case(Closure, "graph"),
    Case(ClosureThatTrains, None),
    Case(PlainAttribute, None),
    Case(Random, "per read", "draws random numbers"),
    Case(Dropped, "per read", "draws random numbers"),
    Case(PythonRandom, "per read", "draws random numbers"),
    Case(Options, "graph"),
    Case(Counts, None),
    Case(KeepsLast, None),
    Case(Modes, "graph"),
    Case(OwnParameter, "graph"),
    Case(Nested, "graph"),
    Case(GradModeAsked, None),
    Case(AutocastOff, None),
    Case(InPlaceOnFresh, None),
    Case(ReturnsLatent, "graph"),
    Case(ReturnsView, "graph"),
    Case(HalfPrecision, None),
    Case(SecondOrder, None),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_exact(case: Case) -> None:
    eager, model = pair(case.make)
    story(eager, model)


@pytest.mark.parametrize("case", [c for c in CASES if c.layer], ids=str)
def test_the_layer_and_its_reason(case: Case) -> None:
    _, model = pair(case.make)
    (row,) = model.report.sites
    assert (row.layer, case.why in row.reason) == (case.layer, True), row
    assert (row.layer == "graph") == (row.reason == "")
