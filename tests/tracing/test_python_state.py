"""Plain Python values: options that change between calls, and counters and lists that a forward writes."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from tracing.common import CALL, Base, Case, N, cases, changes, check


class Temperature(Base):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0
        self.scales = [1.0, 2.0]
        self.table = {"a": [1.0]}
        self.config = Config()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x) / self.temperature
        for scale in self.scales:
            y = y * scale
        return y * self.table["a"][0] * self.config.gain * self.config.nested.gain


class Nested:
    def __init__(self) -> None:
        self.gain = 1.0


class Config:
    def __init__(self) -> None:
        self.gain = 1.0
        self.nested = Nested()


@dataclass
class Slotted:
    __slots__ = ("gain",)
    gain: float


class SlottedConfig(Base):
    def __init__(self) -> None:
        super().__init__()
        self.config = Slotted(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.config.gain


class NumpyAttribute(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gain = np.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * float(self.gain[0])


class ClassAttribute(Base):
    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * type(self).gain


GLOBALS = {"gain": 1.0}


class GlobalAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * GLOBALS["gain"]


def model_class(model: nn.Module) -> type:
    """The user's class of a model: the story changes it once for both."""
    return ClassAttribute


class LeafOption(Base):
    """An option of a torch.nn module that the body reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.norm.eps * 1e5


class WritesCounter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.lin(x) * self.count


class WritesLast(Base):
    def __init__(self) -> None:
        super().__init__()
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.lin(x)
        return self.last * 2


class AppendsList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        self.kept.append(1)
        return y * len(self.kept)


class AppendsNested(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[Any]] = {"all": []}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["all"].append(1)
        return self.lin(x) * len(self.kept["all"])


class WritesConfig(Base):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()

    def forward(self, x: Tensor) -> Tensor:
        self.config.nested.gain += 1
        return self.lin(x) * self.config.nested.gain


class WritesLeafAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.lin.seen = getattr(self.lin, "seen", 0) + 1
        return self.lin(x) * self.lin.seen


class Iterates(Base):
    """An iterator that is used up by the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * next(self.gains)


class LazyWarning(Base):
    """Warm-up on the first call only."""

    def __init__(self) -> None:
        super().__init__()
        self.warm = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.warm:
            self.warm = True
            return self.lin(x) * 0
        return self.lin(x)


class GlobalWritten(Base):
    def forward(self, x: Tensor) -> Tensor:
        COUNTS.append(1)
        return self.lin(x) * ((1 + len(COUNTS)) // 2)


COUNTS: list[int] = []


class ClassWritten(Base):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).count += 1
        return self.lin(x) * ((1 + type(self).count) // 2)


class DefaultMutable(Base):
    def forward(self, x: Tensor, kept: list[int] = []) -> Tensor:  # noqa: B006
        kept.append(1)
        return self.lin(x) * ((1 + len(kept)) // 2)


CASES = (
    Case(
        "attributes",
        Temperature,
        changes(
            "model.temperature = 2.0",
            "model.scales.append(3.0)",
            "model.scales[0] = 5.0",
            "model.table['a'][0] = 7.0",
            "model.config.gain = 3.0",
            "model.config.nested.gain = 4.0",
            "model.scales = [9.0]",
            "model.table['a'] = [2.0]",
        ),
    ),
    Case("nested container", Temperature, changes("model.table['a'][0] = 7.0")),
    Case("nested object", Temperature, changes("model.config.nested.gain = 7.0")),
    Case("slots", SlottedConfig, changes("model.config.gain = 2.0")),
    Case("numpy attribute", NumpyAttribute, changes("model.gain[0] = 2.0")),
    Case("option of a leaf", LeafOption, changes("model.norm.eps = 1e-3")),
    Case("writes counter", WritesCounter, body="live", why="'count'"),
    Case("writes last", WritesLast, body="live"),
    Case("appends", AppendsList, body="live"),
    Case("appends nested", AppendsNested, body="live"),
    Case("writes config", WritesConfig, body="live"),
    Case("writes attribute of a leaf", WritesLeafAttribute, body="live"),
    Case("iterator", Iterates, (CALL,) * 4, body="live"),
    Case("warm-up", LazyWarning, body="live", why="'warm'"),
    Case("class attribute changed", ClassAttribute, changes("model_class(model).gain = 2.0", model_class=model_class)),
    Case("global changed", GlobalAttribute, changes("GLOBALS['gain'] = GLOBALS['gain'] % 3 + 0.75", GLOBALS=GLOBALS)),
    Case("global written", GlobalWritten, body="live"),
    Case("class written", ClassWritten, body="live"),
    Case("mutable default", DefaultMutable, body="live"),
)


@pytest.fixture(autouse=True)
def _as_at_import() -> Any:
    """What models keep outside of themselves: each test starts without."""
    yield
    COUNTS.clear()
    GLOBALS["gain"] = 1.0
    ClassAttribute.gain = 1.0
    ClassWritten.count = 0


@pytest.mark.parametrize(("case", "spec"), cases(CASES))
def test_does_what_the_eager_model_does(case: Case, spec: bool) -> None:
    check(case, spec)
