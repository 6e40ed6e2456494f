"""What a forward does besides computing tensors: it happens at each call, recorded or not."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import datetime
import functools
import itertools
import logging
import random
import time
import types
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from recording.common import CALL, SMALL, STORY, Base, Case, cases, check, check_naive, naive_cases
from torch import Tensor, nn

HISTORY: list[int] = []
NESTED: dict[str, dict[str, int]] = {"a": {"n": 0}}
SETTINGS = types.ModuleType("recording_settings")
DRAWS = random.Random(3)
ARRAYS = np.random.default_rng(3)
LOG = logging.getLogger("recording")
TABLE = torch.ones(4, dtype=torch.float64)
COUNT = itertools.count()


class CountsAttribute(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.mixed(x) * self.calls


class CountsInList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        return self.mixed(x) * len(self.seen)


class CountsDeep(Base):
    def __init__(self) -> None:
        super().__init__()
        self.state = types.SimpleNamespace(counts={"n": [0]})

    def forward(self, x: Tensor) -> Tensor:
        self.state.counts["n"][0] += 1
        return self.mixed(x) * self.state.counts["n"][0]


class CountsOnClass(Base):
    calls: ClassVar[int] = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return self.mixed(x) * self.calls


class CountsOnNamedClass(Base):
    calls: ClassVar[int] = 0

    def forward(self, x: Tensor) -> Tensor:
        CountsOnNamedClass.calls += 1
        return self.mixed(x) * CountsOnNamedClass.calls


def forget_classes() -> None:
    CountsOnNamedClass.calls = 0


class CountsInGlobalList(Base):
    def forward(self, x: Tensor) -> Tensor:
        HISTORY.append(1)
        return self.mixed(x) * len(HISTORY)


class SaysItElsewhere(Base):
    """The write is in a function, and shows only at the end."""

    def forward(self, x: Tensor) -> Tensor:
        note()
        return self.mixed(x) * HISTORY.count(1)


def note() -> None:
    HISTORY.append(1)


class CountsInNestedGlobal(Base):
    def forward(self, x: Tensor) -> Tensor:
        NESTED["a"]["n"] += 1
        return self.mixed(x) * NESTED["a"]["n"]


class CountsInModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        SETTINGS.calls += 1
        return self.mixed(x) * SETTINGS.calls


class CountsInDefault(Base):
    def forward(self, x: Tensor, calls: Any = None) -> Tensor:
        return self.mixed(x) * counted()


def counted(calls: list[int] = [0]) -> int:  # noqa: B006
    calls[0] += 1
    return calls[0]


class CountsOnFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * on_function()


def on_function() -> int:
    on_function.calls += 1
    return on_function.calls


class CountsByIterator(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (1 + next(COUNT) % 7)


class CountsInClosure(Base):
    def __init__(self) -> None:
        super().__init__()
        calls = 0

        def count() -> int:
            nonlocal calls
            calls += 1
            return calls

        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * self.count()


class CountsInTwoClosures(Base):
    """Two functions with the same code; the first one called has nothing to write."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet, self.loud = counter(0), counter(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (1 + self.quiet() + self.loud())


def counter(by: int) -> Any:
    calls: list[int] = []

    def count() -> int:
        if by:
            calls.append(by)
        return len(calls)

    return count


class Caches(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.table:
            self.table[len(x)] = torch.rand(len(x), 1)
        return self.mixed(x) * self.table[len(x)]


class CachesFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * noise(len(x))


@functools.lru_cache
def noise(length: int) -> Tensor:
    return torch.rand(length, 1)


class CachesMethod(Base):
    @functools.cached_property
    def gain(self) -> float:
        return float(len(HISTORY) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * self.gain


class Prints(Base):
    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return self.mixed(x)


class Logs(Base):
    def forward(self, x: Tensor) -> Tensor:
        LOG.debug("called")
        return self.mixed(x)


class Warns(Base):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("called", stacklevel=1)
        return self.mixed(x)


class AsksClock(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (time.perf_counter() > 0)


class AsksDate(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (datetime.datetime.now().year > 1)


class DrawsPython(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * random.random()


class DrawsOwn(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * DRAWS.random()


class DrawsNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * float(np.random.rand())


class DrawsNumpyGenerator(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * float(ARRAYS.random())


class WritesModuleTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            TABLE.mul_(1.5)
        return self.mixed(x) * TABLE


class KeepsActivation(Base):
    def __init__(self) -> None:
        super().__init__()
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.mixed(x)
        self.last = out.detach()
        return out


class WritesSubmodule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ELU(1.0)

    def forward(self, x: Tensor) -> Tensor:
        self.act.alpha = self.act.alpha / 2
        return self.act(self.mixed(x))


class SwitchesForAWhile(Base):
    """Its child runs in two states within one call, and is as it was after it."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Gained()

    def forward(self, x: Tensor) -> Tensor:
        first = self.child(x)
        self.child.gain = 3.0
        second = self.child(x)
        self.child.gain = 1.0
        return self.mixed(first) + self.child(second)


class Gained(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * self.gain


class EvaluatesForAWhile(Base):
    def __init__(self) -> None:
        super().__init__()
        self.child = Modal()

    def forward(self, x: Tensor) -> Tensor:
        was = self.child.training
        first = self.child.eval()(x)
        self.child.train(was)
        return self.mixed(first) + self.child(x)


class Modal(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) if self.training else self.mixed(x) * 2


def reset() -> None:
    HISTORY.clear()
    NESTED["a"] = {"n": 0}
    SETTINGS.calls = 0
    CountsOnClass.calls = CountsOnNamedClass.calls = 0
    on_function.calls = 0
    counted.__defaults__[0][0] = 0
    noise.cache_clear()
    DRAWS.seed(3)
    ARRAYS.bit_generator.state = np.random.default_rng(3).bit_generator.state
    TABLE.fill_(1.0)
    globals()["COUNT"] = itertools.count()


def live(make: Any, why: str = "", naive: bool = True, **options: Any) -> Case:
    return Case(make.__name__, make, graph=False, why=why, naive=naive, reset=reset, **options)


CASES = [
    live(CountsAttribute, "writes"),
    live(CountsInList, "writes"),
    live(CountsDeep, "writes"),
    live(CountsOnClass),
    live(CountsOnNamedClass),
    live(CountsInGlobalList, "HISTORY"),
    live(SaysItElsewhere, "HISTORY"),
    live(CountsInNestedGlobal, "NESTED"),
    live(CountsInModule, "SETTINGS"),
    live(CountsInDefault),
    live(CountsOnFunction, "on_function"),
    live(CountsByIterator, "COUNT"),
    live(CountsInClosure, "calls"),
    live(CountsInTwoClosures),
    live(Caches, "writes", story=(*STORY, SMALL, CALL)),
    live(CachesFunction),
    live(CachesMethod, naive=False),
    live(Prints, "print"),
    live(Logs, naive=False),
    live(Warns),
    live(AsksClock, "perf_counter", naive=False),
    live(AsksDate, "now", naive=False),
    live(DrawsPython),
    live(DrawsOwn),
    live(DrawsNumpy),
    live(DrawsNumpyGenerator, "ARRAYS"),
    live(WritesModuleTensor, naive=False),
    live(KeepsActivation, "writes"),
    live(WritesSubmodule, "alpha"),
    Case("SwitchesForAWhile", SwitchesForAWhile, graph=None),
    Case("EvaluatesForAWhile", EvaluatesForAWhile, graph=None),
]


@pytest.mark.parametrize(("case", "way"), cases(CASES))
def test_what_a_forward_does_besides_computing_happens_at_each_call(case: Case, way: str) -> None:
    check(case, way)


@pytest.mark.parametrize("case", naive_cases(CASES))
def test_a_recorder_without_guards_loses_it(case: Case) -> None:
    check_naive(case)
