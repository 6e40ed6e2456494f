"""Tensors that are no parameter and no buffer: attributes, closures, caches, and those made anew at each call."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tracing.common import CALL, Base, Case, N, cases, changes, check


class Closure(Base):
    def __init__(self) -> None:
        super().__init__()
        held = torch.rand(N)
        self.held = held
        self.act = lambda y: y * held

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.lin(x))


class PlainTensor(Base):
    """A tensor that is an attribute and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.scale.exp()


class PlainTensorInList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [torch.ones(N), torch.ones(N)]

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.scales[0].exp() * self.scales[1]


class PlainTensorThatTrains(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [torch.ones(N, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.scales[0].exp()


class TupleOfTensors(Base):
    def __init__(self) -> None:
        super().__init__()
        self.pair = (torch.ones(N), torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.pair[0] + self.pair[1]


class CapturedWritten(Base):
    """A held tensor that the forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.zeros(N)

    def forward(self, x: Tensor) -> Tensor:
        before = self.table * 2
        self.table[0] += 1
        return self.lin(x) + before + self.table * 2


@functools.lru_cache
def cached_ramp(n: int) -> Tensor:
    return torch.linspace(1.0, 2.0, n)


class LruCache(Base):
    """Tensors kept by a cache outside of any module: a traced value must not get into it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * cached_ramp(N)


RAMPS: dict[int, Tensor] = {}


class GlobalCache(Base):
    def forward(self, x: Tensor) -> Tensor:
        if N not in RAMPS:
            RAMPS[N] = torch.linspace(1.0, 2.0, N)
        return self.lin(x) * RAMPS[N]


class Ready(Base):
    """Caches filled before the transform."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * READY[N]


READY = {N: torch.linspace(1.0, 2.0, N, dtype=torch.float64)}


class CachedProperty(Base):
    @functools.cached_property
    def ramp(self) -> Tensor:
        return torch.linspace(1.0, 2.0, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.ramp


class ObjectCache(Base):
    """A mask kept by a helper object on the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.helper(x)


class Helper:
    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if "ramp" not in self.kept:
            self.kept["ramp"] = torch.linspace(1.0, 2.0, N)
        return self.kept["ramp"]


class KeepsOutputs(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        self.kept.append(y.detach())
        return y + sum(self.kept[:-1])


class FreshConstructor(Base):
    """``torch.Tensor(...)`` goes past every mode; it is made anew at each call."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.Tensor([1.0, 2.0, 3.0, 4.0])
        table += x[0].detach()
        return self.lin(x) * table


class FreshAsTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        table = torch.as_tensor([1.0, 2.0, 3.0, 4.0])
        table += x[0].detach()
        return self.lin(x) * table


class FreshFromNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        table = torch.from_numpy(np.ones(N))
        table[1] += 1
        return self.lin(x) * table


class FreshParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        extra = nn.Parameter(torch.ones(N))
        return self.lin(x) * extra


class FreshModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear(N, N)(self.lin(x))


class FreshFunctionalCall(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.lin, {"bias": self.lin.bias * 2}, (x,))


CASES = (
    Case("closure", Closure, changes("model.held.mul_(2)")),
    Case("plain tensor", PlainTensor, changes("model.scale.mul_(2)", "model.scale = model.scale * 3")),
    Case(
        "plain tensors in list", PlainTensorInList, changes("model.scales[0].mul_(2)", "model.scales[0] = model.scales[1] * 3")
    ),
    Case("plain tensor that trains", PlainTensorThatTrains, (CALL, CALL, CALL)),
    Case("held tensor written", CapturedWritten),
    Case("lru_cache", LruCache),
    Case("global cache", GlobalCache),
    Case("global table", Ready),
    Case("cached property", CachedProperty),
    Case("object cache", ObjectCache),
    Case("keeps outputs", KeepsOutputs, (CALL, CALL, CALL), body="live"),
    Case("fresh Tensor()", FreshConstructor),
    Case("fresh as_tensor", FreshAsTensor),
    Case("fresh from_numpy", FreshFromNumpy),
    Case("fresh Parameter", FreshParameter),
    Case("fresh module", FreshModule),
    Case("functional_call", FreshFunctionalCall),
    Case("tuple of tensors", TupleOfTensors, changes("model.pair = (torch.zeros(4), torch.full((4,), 2.0))")),
)


@pytest.fixture(autouse=True)
def _empty_caches() -> Any:
    """What models keep outside of themselves: each test starts without."""
    yield
    cached_ramp.cache_clear()
    RAMPS.clear()


@pytest.mark.parametrize(("case", "spec"), cases(CASES))
def test_does_what_the_eager_model_does(case: Case, spec: bool) -> None:
    check(case, spec)
