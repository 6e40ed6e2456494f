"""What goes into a forward and what comes out: optional, keyword and nested inputs, outputs of every structure."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from tracing.common import CALL, Base, Call, Case, N, Output, cases, check, given, row, step, x


class Optional(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.lin(x)
        return y if mask is None else y * mask


class OptionalFlag(Base):
    def forward(self, x: Tensor, twice: bool = False, scale: float = 1.0) -> Tensor:
        return self.lin(self.lin(x)) * scale if twice else self.lin(x) * scale


class Keywords(Base):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.lin(x) * scale


class KeywordRequired(Base):
    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.lin(x) * scale


class VarArgs(Base):
    def forward(self, x: Tensor, *more: Tensor, **named: Tensor) -> Tensor:
        y = self.lin(x)
        for other in (*more, *named.values()):
            y = y + other
        return y


class OnlyVarArgs(Base):
    def forward(self, *xs: Tensor) -> Tensor:
        return sum(map(self.lin, xs))


class NotTensor(Base):
    def forward(self, x: Tensor, n: int) -> Tensor:
        return self.lin(x) * n


class DictInput(Base):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.lin(batch["x"]) + batch["y"]


class NoneInput(Base):
    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        z = self.lin(x)
        if y is not None:
            z = z + y
        return z


TWOS = torch.full((N,), 2.0, dtype=torch.float64)


class DefaultTensorArgument(Base):
    def forward(self, x: Tensor, scale: Tensor = TWOS) -> Tensor:
        return self.lin(x) * scale.exp()


class IsNoneReturned(Base):
    def forward(self, x: Tensor) -> Any:
        return self.lin(x), None


class DictOutput(Base):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.lin(x)
        return {"y": y, "more": (y.relu(), [y.tanh(), None]), "n": 3}


class DataclassOutput(Base):
    def forward(self, x: Tensor) -> Output:
        y = self.lin(x)
        return Output(y, y.relu())


class NamedTupleOutput(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.lin(x)
        return Pair(y, y * 2)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class ReturnsWeight(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.lin(x), self.lin.weight, self.lin.weight * 2, self.lin.weight.mT, self.lin.bias


class ReturnsInput(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, self.lin(x)


class ReturnsConstant(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.lin(x), torch.ones(3), torch.arange(3).float() * 2


CASES = (
    Case(
        "optional", Optional, (CALL, given(x, row), CALL, given(x, mask=row), given(x, lambda: None), step, given(x, row), CALL)
    ),
    Case(
        "flags",
        OptionalFlag,
        (
            CALL,
            given(x, lambda: True),
            given(x, twice=lambda: True),
            given(x, scale=lambda: 2.0),
            CALL,
            given(x, lambda: False, lambda: 3.0),
        ),
    ),
    Case("none returned", IsNoneReturned),
    Case("keywords", Keywords, (CALL, given(x, scale=lambda: 2.0), CALL)),
    Case("keyword required", KeywordRequired, (given(x, scale=row), given(x, scale=row)), body="live", why="by keyword"),
    Case("var args", VarArgs, (CALL, given(x, x), given(x, x, x, a=x), CALL)),
    Case("only var args", OnlyVarArgs, (CALL, given(x, x), CALL)),
    Case("int input", NotTensor, (given(x, lambda: 2), given(x, lambda: 3), given(x, lambda: torch.tensor(2.0)))),
    Case("dict input", DictInput, (Call(lambda: ({"x": torch.randn(5, N), "y": torch.randn(5, N)},)),) * 2),
    Case("none input", NoneInput, (given(x, x), given(x, lambda: None), given(x, x))),
    Case("dict output", DictOutput),
    Case("dataclass output", DataclassOutput),
    Case("returns weight", ReturnsWeight),
    Case("returns input", ReturnsInput),
    Case("returns constant", ReturnsConstant),
    Case("tensor default", DefaultTensorArgument, (CALL, given(x, row), CALL)),
    Case("named tuple", NamedTupleOutput),
)


@pytest.mark.parametrize(("case", "spec"), cases(CASES))
def test_does_what_the_eager_model_does(case: Case, spec: bool) -> None:
    check(case, spec)
