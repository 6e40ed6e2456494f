"""Control flow by shapes, values, options and modes: each call goes its own way."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import contextvars
import functools
import os
import threading
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from recording.common import CALL, SMALL, Base, Case, N, cases, changes, check, check_naive, given, naive_cases, step
from torch import Tensor, nn
from torch.nn import functional as F


class ByShape(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.mixed(x)
        for _ in range(x.shape[0] - 2):
            out = out.tanh()
        return out * x.size(0) if len(x) > 3 else out


class ByRank(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) if x.dim() == 2 else self.mixed(x).sum(0)


class BySplit(Base):
    def forward(self, x: Tensor) -> Tensor:
        return sum(part.sum() * n for n, part in enumerate(self.mixed(x).split(2), 1))


class ByRows(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(N)
        for row in self.mixed(x).unbind():
            out = out.sin() + row
        return out


class ByIteration(ByRows):
    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(N)
        for row in self.mixed(x):
            out = out.sin() + row
        return out


class ByBool(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) if x.sum() > 0 else -self.mixed(x)


class ByItem(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * x.sum().item()


class ByFloat(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (1 if float(x.detach()[0, 0]) > 0 else 2) * int(x.detach()[0, 0] > 0)


class ByAny(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * 2 if (x > 1.5).any() else self.mixed(x)


class ByMembership(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * 2 if 1 in (x > 1.5) else self.mixed(x)


class ByNonzero(Base):
    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, 0] > 0).nonzero()[:, 0]
        return self.mixed(x).index_select(0, rows).sum() + len(rows)


class ByMask(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)[x > 0].square().sum()


class WritesMask(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.mixed(x).clone()
        out[x > 0] = 0.0
        return out


class ByUnique(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * len(x.detach().round().unique())


class ByWhere(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * len(torch.where(x > 0)[0])


class ByList(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * sum(x.detach()[0].tolist())


class ByText(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * len(f"{x.detach()[0, 0]:.1f}".lstrip("-0"))


class ByRepeats(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.repeat_interleave(self.mixed(x), (x[:, 0] > 0).long() + 1, 0).sum(0)


class ByOneHot(Base):
    def forward(self, x: Tensor) -> Tensor:
        kinds = F.one_hot(x.detach().abs().round().long()[:, 0])
        return self.mixed(x) * kinds.shape[1]


class ByEqual(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (1 if torch.equal(x, x.abs()) else 2) * (1 if torch.allclose(x, x.relu(), atol=1) else 3)


class ByLiteral(Base):
    """Asks tensors that follow from nothing but numbers and shapes."""

    def forward(self, x: Tensor) -> Tensor:
        rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        return self.mixed(x) * rates[1] * int(torch.arange(len(x)).sum())


class ByRandomLiteral(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * torch.rand(()).item()


class WritesLiteral(Base):
    """What looks like a literal is written from an input."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(3)
        view = table[1:]
        view.copy_(x.detach()[0, :2])
        return self.mixed(x) * table.sum().item()


class ByParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) if self.raw.detach().sum() > 0 else self.mixed(x) * 2


class ByMode(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (2 if self.training else 1) + (1 if self.lin.training else 0)


class ByException(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.mixed(x).view(5, N)
        except RuntimeError:
            return self.mixed(x) * 2


class ByFailure(Base):
    """Whether the operation fails depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.mixed(x) * torch.linalg.cholesky(x.detach()[0, 0].reshape(1, 1))
        except torch.linalg.LinAlgError:
            return self.mixed(x)


class Experts(nn.Module):
    """Which expert is called depends on values; each is a region."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mixes() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x.detach().abs().sum() * 10) % 3](x)


class Mixes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)


class ByContext(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * CONTEXT.get()


class ByThread(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * LOCAL.gain


class ByEnvironment(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (2 if os.environ.get("FXPARAM_TEST_FLAG") else 1)


class BySettings(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * SETTINGS.gain


class ByClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * Options.gain


class ByFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * SETTINGS.function(x)


class Options:
    gain = 1.0


def enclosing() -> tuple[type[nn.Module], Any]:
    gain = 1.0

    class ByClosure(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.mixed(x) * gain

    def change(value: float) -> None:
        nonlocal gain
        gain = value

    return ByClosure, change


class SwitchesOption(nn.Module):
    """An object that its child reads is another one for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Configured()

    def forward(self, x: Tensor) -> Tensor:
        self.child.options.gain = 2.0
        first = self.child(x)
        self.child.options.gain = 1.0
        return first + self.child(x)


class Configured(Base):
    def __init__(self) -> None:
        super().__init__()
        self.options = Options()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * self.options.gain


CONTEXT: contextvars.ContextVar[float] = contextvars.ContextVar("gain", default=1.0)
LOCAL = threading.local()
SETTINGS: Any = types.ModuleType("recording_control_settings")
ByClosure, set_closure = enclosing()


def times(value: float, x: Tensor) -> float:
    return value * len(x)


def set_all(value: float) -> Any:
    def change(model: Any = None) -> None:
        CONTEXT.set(value)
        set_closure(value)
        LOCAL.gain = SETTINGS.gain = Options.gain = value
        SETTINGS.function = functools.partial(times, value) if value == 3 else lambda x: value
        os.environ["FXPARAM_TEST_FLAG"] = "yes" if value == 2 else ""

    return change


def make(name: str, graph: bool | None, naive: bool, why: str = "", story: Any = ()) -> Case:
    return Case(name, globals()[name], story, graph, why, naive)


CUBE = given(lambda: torch.randn(2, 3, N))
VALUES = (CALL, CALL, SMALL, CALL, CALL, step, CALL, CALL, CALL, SMALL, CALL, CALL)
BY_VALUE = """ByBool ByItem ByFloat ByAny ByMembership ByNonzero ByUnique ByWhere ByList ByText ByOneHot ByEqual WritesLiteral
ByRandomLiteral""".split()
OUTSIDE = "ByContext ByThread ByEnvironment BySettings ByClass ByFunction".split()
CASES = [
    *(
        make(name, True, True, story=(CALL, CALL, SMALL, SMALL, CALL, step, SMALL, CALL))
        for name in ("ByShape", "BySplit", "ByRows")
    ),
    make("ByRank", True, True, story=(CALL, CALL, CUBE, CUBE, CALL, step, CUBE, CALL)),
    make("ByIteration", True, True),
    *(make(name, False, True, story=VALUES) for name in BY_VALUE),
    *(make(name, False, False, story=VALUES) for name in ("ByMask", "ByRepeats")),
    make("WritesMask", None, False),
    make("ByLiteral", True, True),
    make("ByParameter", False, False, story=changes("model.raw.data.neg_()", step)),
    make("ByMode", True, False, story=changes("model.eval()", "model.lin.train()", "model.train()")),
    make("ByException", False, True, "errors"),
    make("ByFailure", False, True, "errors", VALUES),
    *(replace(make(name, None, True, story=changes(set_all(2.0), set_all(3.0))), reset=set_all(1.0)) for name in OUTSIDE),
    Case("ByClosure", ByClosure, changes(set_all(2.0), set_all(3.0)), None, naive=True, reset=set_all(1.0)),
    make("SwitchesOption", None, False),
    make("Experts", False, True, story=VALUES),
]


@pytest.mark.parametrize(("case", "way"), cases(CASES))
def test_each_call_goes_its_own_way(case: Case, way: str) -> None:
    check(case, way)


@pytest.mark.parametrize("case", naive_cases(CASES))
def test_a_recorder_without_guards_goes_the_way_of_the_first_call(case: Case) -> None:
    check_naive(case)
