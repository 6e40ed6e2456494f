"""Hooks, modes and parts of a model that change before, between or in its calls."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing.common import CALL, STORY, Base, Case, N, cases, check, mutate, step


class Plain(Base):
    """Nothing special: the control."""

    def __init__(self) -> None:
        super().__init__()
        self.sub = nn.Sequential(nn.Linear(N, N), Base2())

    def forward(self, x: Tensor) -> Tensor:
        return self.sub(self.lin(x).tanh())


class Base2(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).relu()


def doubled(module: nn.Module, args: Any, out: Any) -> Any:
    return out * 2


def negated(module: nn.Module, args: Any) -> Any:
    return (-args[0],)


def add_hook(path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(path).register_forward_hook(doubled)
        model.get_submodule(path).register_forward_pre_hook(negated)

    return change


def with_hook(make: Callable[[], nn.Module], path: str) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        add_hook(path)(model)
        return model

    return made


def instance_forward(model: nn.Module) -> None:
    lin = model.lin
    lin.forward = lambda x: F.linear(x, lin.weight, lin.bias) * 7


def replace_submodule(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.sub[0] = nn.Linear(N, N)


def replace_submodule_attribute(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.sub = nn.Sequential(nn.Linear(N, N), nn.Sigmoid())


def replace_bias(model: nn.Module) -> None:
    torch.manual_seed(6)
    model.lin.bias = nn.Parameter(torch.randn(N))


def remove_bias(model: nn.Module) -> None:
    model.sub[0].bias = None


class TrainingBranch(Base):
    def __init__(self) -> None:
        super().__init__()
        self.sub = Base()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        if self.training:
            y = y.relu()
        return y if self.sub.training else y * 2


class TogglesTraining(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        before = self.drop.training
        self.drop.train(False)
        y = self.drop(self.lin(x))
        self.drop.train(before)
        return y


class SwapsOut(Base):
    """Swaps a submodule for the time of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.lin(x))
        self.act = nn.ReLU() if isinstance(self.act, nn.Tanh) else nn.Tanh()
        return y


CASES = (
    Case("plain", Plain, body="graph"),
    Case("hook before", with_hook(Plain, "lin")),
    Case("hook before on own module", with_hook(Plain, "sub.1"), body="live", why="hooks"),
    Case("hook before on root", with_hook(Plain, ""), body="live"),
    Case("hook after", Plain, (CALL, add_hook("lin"), CALL, CALL, add_hook("sub.1"), CALL, add_hook("sub"), CALL)),
    Case("hook after on leaf", Plain, (CALL, add_hook("sub.0"), CALL, CALL)),
    Case("hook after on root", Plain, (CALL, add_hook(""), CALL, CALL)),
    Case("forward of instance after", Plain, (CALL, instance_forward, CALL, CALL)),
    Case("submodule replaced", Plain, (CALL, replace_submodule, CALL, CALL, step, CALL)),
    Case("submodule attribute replaced", Plain, (CALL, replace_submodule_attribute, CALL, CALL, step, CALL)),
    Case("parameter replaced", Plain, (CALL, replace_bias, CALL, CALL, step, CALL)),
    Case("parameter removed", Plain, (CALL, remove_bias, CALL, CALL, step, CALL)),
    Case(
        "training branch", TrainingBranch, (*STORY, mutate("model.sub.eval()"), CALL, CALL, mutate("model.sub.train()"), CALL)
    ),
    Case("training assigned", TrainingBranch, (CALL, mutate("model.sub.training = False"), CALL, CALL)),
    Case("swaps a submodule", SwapsOut),
    Case("toggles training", TogglesTraining),
)


@pytest.mark.parametrize(("case", "spec"), cases(CASES))
def test_does_what_the_eager_model_does(case: Case, spec: bool) -> None:
    check(case, spec)
