"""Arguments and results of every kind: a graph serves the calls it was recorded for, and no other."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from recording.common import (
    CALL,
    SMALL,
    Base,
    Call,
    Case,
    N,
    cases,
    check,
    check_naive,
    given,
    naive_cases,
    small,
    step,
    to_eval,
    x,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

import fxparam as fxp


class Positional(Base):
    def forward(self, *xs: Tensor) -> Tensor:
        return self.mixed(sum(x * (1 + n) for n, x in enumerate(xs)))


class Keywords(Base):
    def forward(self, *, x: Tensor, **others: Tensor) -> Tensor:
        return self.mixed(x) + sum(others[name] * len(name) for name in others)


class Defaults(Base):
    def forward(self, x: Tensor, y: Tensor | None = None, gain: float = 2.0, *, shift: Any = None) -> Tensor:
        out = self.mixed(x) * gain
        out = out if y is None else out + y
        return out if shift is None else out + shift


class Flagged(Base):
    def forward(self, x: Tensor, flag: Any) -> Tensor:
        out = self.mixed(x)
        if isinstance(flag, bool):
            return out * 2 if flag else out
        if isinstance(flag, float):
            return out - 1 if math.isnan(flag) else out / flag
        if isinstance(flag, int):
            return out * 5 + flag
        if isinstance(flag, str):
            return out.sin() if flag == "sin" else out.cos()
        if isinstance(flag, torch.dtype):
            return out.to(flag).double()
        if isinstance(flag, Kind):
            return out * flag.value
        if isinstance(flag, slice):
            return out[flag]
        return flag(out)


class Kind(enum.Enum):
    LOW = 0.5
    HIGH = 3.0


class Zeros(Base):
    def forward(self, x: Tensor, by: float) -> Tensor:
        return self.mixed(x) * math.copysign(1.0, by)


class Pair(NamedTuple):
    a: Tensor
    b: Any


@dataclass
class Batch:
    x: Tensor
    scale: float = 1.0
    parts: list[Any] = field(default_factory=list)


class Containers(Base):
    def forward(self, given: Any) -> Any:
        if isinstance(given, Pair):
            return Pair(self.mixed(given.a), given.b)
        if isinstance(given, Batch):
            return Batch(self.mixed(given.x) * given.scale, 2 * given.scale, [part + 1 for part in given.parts])
        if isinstance(given, SimpleNamespace):
            return SimpleNamespace(y=self.mixed(given.x), note=given.note)
        if isinstance(given, dict):
            return OrderedDict((key, self.mixed(item)) for key, item in given.items())
        return tuple(self.mixed(item) for item in given)


class Counting(Base):
    """How many tensors there are, and where."""

    def forward(self, xs: list[Any]) -> list[Any]:
        return [None if x is None else self.mixed(x) * n for n, x in enumerate(xs, 1)]


class Same(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.mixed(x) * 2 if x is y else self.mixed(x) - y


class WritesFirst(Base):
    """The second argument may be the first one."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.mixed(x.clone())
        with torch.no_grad():
            x.mul_(2)
        return out + y.detach()


class Modelled(Base):
    def forward(self, given: Any, return_dict: bool = True) -> Any:
        out = self.mixed(given if isinstance(given, Tensor) else given.last_hidden_state)
        return BaseModelOutput(last_hidden_state=out, hidden_states=(out, out * 2)) if return_dict else (out,)


class Strided(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (2.0 if x.is_contiguous() else 1.0)


class Offset(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) + x.storage_offset()


class Typed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (2.0 if isinstance(x, nn.Parameter) else 1.0)


class Tagged(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * getattr(x, "weight_of_it", 1.0)


class Trainable(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (2.0 if x.requires_grad else 1.0)


class Typeful(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x.double()) * (2.0 if x.dtype is torch.float32 else 1.0)


class MixesRaw(Base):
    """Given a parameter of its own, perhaps."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.mixed(x) + x @ F.normalize(self.raw, dim=0) * other.sum()


class GivesParameter(nn.Module):
    """A child is given a parameter of its own, and then another one."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.other = MixesRaw(), nn.Parameter(torch.randn(N, N))
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x, self.child.raw) if x.shape[0] == 5 else self.child(x, self.other)


class Lazy(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x.real) * (2.0 if x.is_conj() else 1.0)


class External(Base):
    def forward(self, x: Tensor, head: nn.Module) -> Tensor:
        return self.mixed(x) * head.gain


class Head(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain


HEAD = Head(1.0)


def head(gain: float) -> Head:
    HEAD.gain = gain
    return HEAD


def tagged(by: float) -> Tensor:
    made = x()
    made.weight_of_it = by
    return made


def twice() -> Call:
    def same() -> tuple[Tensor, Tensor]:
        one = x()
        return one, one

    return Call(same)


def modelled() -> BaseModelOutput:
    return BaseModelOutput(last_hidden_state=x())


def looped() -> Batch:
    made = Batch(x())
    made.parts = [made]
    return made


class Looped(Base):
    def forward(self, batch: Batch) -> Tensor:
        return self.mixed(batch.parts[0].x) * batch.scale


def repeated(*calls: Any) -> tuple[Any, ...]:
    """Each call twice, then all once more, a step, and all in eval mode."""
    pairs = tuple(call for one in calls for call in (one, one))
    return (*pairs, *calls, step, *calls, to_eval, *pairs, *calls)


def no_grad(*args: Any) -> Call:
    return Call(lambda: tuple(a() for a in args), inputs=False)


FLAGS = [True, False, 1, 0, 1.0, float("nan"), 2.0, "sin", "cos", torch.float32, torch.float64]
FLAGS += [Kind.LOW, Kind.HIGH, slice(1, 3), torch.tanh]
FLAGGED = tuple(given(x, lambda flag=flag: flag) for flag in FLAGS)
NAMED = [given(lambda n=n: Pair(x(), n)) for n in (1, None, "a")]
EMPTY = given(lambda: torch.randn(0, N))
CASES = [
    Case("args", Positional, repeated(CALL, given(x, x), given(x, x, x)), naive=False),
    Case("kwargs", Keywords, repeated(given(x=x), given(x=x, abc=x), given(x=x, de=x), given(de=x, x=x)), naive=True),
    Case(
        "defaults", Defaults, repeated(CALL, given(x, x), given(x, gain=lambda: 3.0), given(x, shift=x), given(x, lambda: None))
    ),
    Case("flags", Flagged, FLAGGED[:7] + FLAGGED[:7] + FLAGGED[7:] + FLAGGED, naive=True),
    Case("more flags", Flagged, FLAGGED[7:] + FLAGGED[7:], naive=True),
    Case("signed zero", Zeros, repeated(given(x, lambda: 0.0), given(x, lambda: -0.0)), naive=True),
    Case("named tuple", Containers, repeated(*NAMED), naive=True),
    Case("data class", Containers, repeated(given(lambda: Batch(x())), given(lambda: Batch(x(), 2.0, [x()]))), naive=True),
    Case("data class value", Containers, repeated(given(lambda: Batch(x(), 1.0)), given(lambda: Batch(x(), 2.0))), naive=True),
    Case("namespace", Containers, repeated(given(lambda: SimpleNamespace(x=x(), note="a")))),
    Case("dictionary", Containers, repeated(given(lambda: {"a": x(), "b": x()}), given(lambda: {"b": x(), "a": x()}))),
    Case("model output", Modelled, repeated(CALL, given(x, return_dict=lambda: False), given(modelled)), naive=True),
    Case("sequences", Containers, repeated(given(lambda: [x(), small()]), given(lambda: (x(), small())))),
    Case("Nones", Counting, repeated(given(lambda: [x(), None]), given(lambda: [None, x()]), given(lambda: [])), naive=True),
    Case("same twice", Same, repeated(twice(), given(x, x)), naive=True),
    Case("same twice, written", WritesFirst, repeated(Call(twice().args, inputs=False), no_grad(x, x)), graph=False),
    Case("other strides", Strided, repeated(CALL, given(lambda: torch.randn(N, 5).t())), naive=True),
    Case("other offset", Offset, repeated(CALL, given(lambda: torch.randn(6, N)[1:])), naive=True),
    Case("a parameter", Typed, repeated(CALL, given(lambda: nn.Parameter(x()))), naive=True),
    Case("tag", Tagged, repeated(CALL, given(lambda: tagged(2.0)), given(lambda: tagged(3.0))), graph=False, naive=True),
    Case("requires grad", Trainable, repeated(CALL, Call(inputs=False)), graph=False, naive=True),
    Case("dtype", Typeful, repeated(CALL, given(lambda: torch.randn(5, N, dtype=torch.float32))), naive=True),
    Case("own parameter", GivesParameter, repeated(CALL, SMALL, CALL), graph=None),
    Case(
        "conjugate",
        Lazy,
        repeated(*[no_grad(lambda f=f: f(torch.randn(5, N, dtype=torch.complex128))) for f in (torch.clone, torch.conj)]),
    ),
    Case("empty batch", Positional, repeated(EMPTY, CALL, EMPTY)),
    Case("object", External, repeated(given(x, lambda: head(1.0)), given(x, lambda: head(2.0))), graph=None, naive=True),
]


@pytest.mark.parametrize(("case", "way"), cases(CASES))
def test_calls_of_each_kind_get_their_own_result(case: Case, way: str) -> None:
    check(case, way)


@pytest.mark.parametrize("case", naive_cases(CASES))
def test_a_recorder_without_guards_mistakes_one_for_another(case: Case) -> None:
    check_naive(case)


class Padded(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x.to_padded_tensor(0.0))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_no_error() -> None:
    net = Padded().double()
    model = fxp.transform(net, {"lin.weight": fxp.weight_norm()}, trace="record")
    given = torch.nested.nested_tensor([torch.randn(3, N).double(), torch.randn(2, N).double()])
    for _ in range(3):
        torch.testing.assert_close(model(given), net(given), rtol=1e-12, atol=1e-12)


def test_an_argument_that_contains_itself_is_no_error() -> None:
    model = fxp.transform(Looped().double(), {"lin.weight": fxp.weight_norm()}, trace="record")
    batch = looped()
    batch.x = batch.x.double()
    torch.testing.assert_close(model(batch), model(batch), rtol=0, atol=0)
    assert model.report.layer_of("").layer == "live"
