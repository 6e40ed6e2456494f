"""Recording ahead with ``example_inputs`` leaves no trace of the call, and the calls after it are those of a fresh model."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recording.common import (
    CALL,
    SMALL,
    Base,
    Case,
    N,
    attributes,
    build,
    compare,
    doubles,
    observe,
    seeing,
    step,
    to_eval,
    to_train,
    x,
)
from torch import Tensor, nn

import fxparam as fxp


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)


class Statistics(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mixed(x))


class Draws(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * torch.rand(N) + random.random() + np.random.rand()


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last = 0, None
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.last = x.detach()
        return self.mixed(x) * self.calls


class CountsDeep(Base):
    def __init__(self) -> None:
        super().__init__()
        self.state = SimpleNamespace(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        self.state.calls += 1
        return self.mixed(x) * self.state.calls


class WritesParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.raw.mul_(0.5)
        return self.mixed(x.detach()).detach()


class WritesGiven(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(2)
        return self.mixed(x.clone())


class Raises(Base):
    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 100).any()):
            raise ValueError("too large")
        return self.mixed(x)


MODELS = [Plain, Statistics, Draws, Counts, Raises, CountsDeep, WritesParameter]


def given(make: Any, trace: str, value: Any) -> tuple[nn.Module, Any]:
    case = Case("", make)
    eager = build(case, region=False, parametrized=True)
    net = build(case, region=False, parametrized=False)
    return eager, fxp.transform(net, {"lin.weight": fxp.weight_norm(dim=0)}, trace=trace, example_inputs=value)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("trace", ["auto", "record"])
@doubles()
def test_it_leaves_no_trace(make: Any, trace: str) -> None:
    value = torch.randn(5, N)
    eager, model = given(make, trace, (value,))
    assert all(parameter.grad is None for parameter in model.parameters())
    for number, part in enumerate((CALL, CALL, step, SMALL, CALL, to_eval, CALL, to_train, CALL)):
        if part in (step, to_eval, to_train):
            part(eager)
            part(model)
            continue
        compare(observe(model, part, number), observe(eager, part, number), str(number))
        assert attributes(model) == attributes(eager)


@doubles()
def test_it_writes_to_no_tensor_it_was_given() -> None:
    value = torch.randn(5, N)
    then = value.clone()
    given(WritesGiven, "record", (value,))
    torch.testing.assert_close(value, then, rtol=0, atol=0)


@doubles()
def test_it_draws_no_numbers() -> None:
    net = build(Case("", Draws), region=False, parametrized=False)
    before = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    fxp.transform(net, trace="record", example_inputs=(torch.ones(5, N),))
    assert (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("trace", ["auto", "record"])
@pytest.mark.parametrize("value", [(torch.zeros(5, N, dtype=torch.float64),), {"x": torch.zeros(5, N, dtype=torch.float64)}])
@doubles()
def test_calls_like_the_example_run_no_python(trace: str, value: Any) -> None:
    _, model = given(Plain, trace, value)
    assert model.report.body == "graph"
    call = (lambda: model(**{"x": x()})) if isinstance(value, dict) else (lambda: model(x()))
    with seeing(Plain.forward.__code__) as ran:
        call()
    # A graph of symbolic tracing takes its inputs by position.
    assert not ran or (isinstance(value, dict) and trace == "auto")


@doubles()
def test_an_example_that_raises_says_what_the_model_says() -> None:
    with pytest.raises(ValueError, match="too large"):
        given(Raises, "record", (torch.full((5, N), 1000.0),))


@doubles()
def test_examples_in_no_grad_and_eval_mode() -> None:
    case = Case("", Statistics)
    net, eager = build(case, region=False, parametrized=False), build(case, region=False, parametrized=True)
    with torch.no_grad():
        model = fxp.transform(net.eval(), {"lin.weight": fxp.weight_norm(dim=0)}, trace="record", example_inputs=(x(),))
    eager.eval()
    for number, part in enumerate((CALL, CALL, to_train, CALL, CALL, step, CALL, to_eval, CALL)):
        if part in (step, to_eval, to_train):
            part(eager)
            part(model)
        else:
            compare(observe(model, part, number), observe(eager, part, number), str(number))
