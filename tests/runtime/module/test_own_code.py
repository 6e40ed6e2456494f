"""The user's own code: methods, attributes, containers, submodules and hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtime.module.common import WN, Net, oracle_of
from runtime.oracles import TRACES, same
from torch import Tensor, nn

import fxparam as fxp


@pytest.mark.parametrize("trace", TRACES)
def test_methods_and_attributes(trace: str) -> None:
    net = Net()
    model, oracle = fxp.transform(net, WN, trace=trace), oracle_of(net)
    x = torch.randn(3, 5)
    same(model.encode(x), oracle.encode(x))  # type: ignore[operator]
    same(model.generate(x, 3), oracle.generate(x, steps=3))  # type: ignore[operator]
    before = model(x)
    model.scale = 3.0
    same(model(x), 3 * before)
    assert model.scale == 3.0 and net.scale == 1.0
    for step in range(8):
        model.scale = float(step)
        same(model(x), step * before)


@pytest.mark.parametrize(
    "rule",
    [
        "encoder.weight",
        "*.weight",
    ],
)
def test_submodules_replaced(rule: str) -> None:
    model = fxp.transform(Net(), {rule: fxp.weight_norm()})
    x = torch.randn(3, 5)
    model(x)
    model.decoder = nn.Linear(4, 2)
    assert model(x).shape == (3, 2)
    assert "decoder.weight" in dict(model.named_parameters())


def test_attributes_can_be_deleted() -> None:
    class Optional(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.encode(x) * getattr(self, "scale", 7.0)

    model = fxp.transform(Optional(), WN)
    x = torch.randn(3, 5)
    before = model(x)
    del model.scale
    same(model(x), 7 * before)


def test_items_of_a_container() -> None:
    model = fxp.transform(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), WN)
    assert len(model) == 3 and [type(m).__name__ for m in model] == ["Linear", "Tanh", "Linear"]
    assert model[0].weight.shape == (4, 5)


def test_items_of_a_container_are_replaced() -> None:
    model = fxp.transform(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), {"0.weight": fxp.weight_norm()})
    model[2] = nn.Identity()
    assert model(torch.randn(2, 5)).shape == (2, 4)


class Named(nn.Module):
    """Attributes that are called as some of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def sample(self, n: int) -> Tensor:
        return self.body(torch.ones(n, 5))


def test_names_of_ours_do_not_reach_into_the_users_own_code() -> None:
    class Inside(Named):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.sample(1)

    net = Inside()
    same(fxp.transform(net, {"body.weight": fxp.weight_norm()})(torch.ones(2, 5)), net(torch.ones(2, 5)))


class Log(nn.Module):
    def __init__(self, sink: Any) -> None:
        super().__init__()
        self.layer, self.sink = nn.Linear(5, 5), sink

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        self.sink["deep"]["hidden"].append(hidden)
        return hidden


SEEN: list[Any] = []


class LogGlobally(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        SEEN.append(hidden)
        return hidden


def test_writes_to_nested_containers_stay() -> None:
    model = fxp.transform(Log({"deep": {"hidden": []}}), WN)
    model(torch.randn(2, 5))
    model(torch.randn(2, 5))
    assert [type(value) for value in model.sink["deep"]["hidden"]] == [Tensor, Tensor]


def test_writes_to_globals_stay() -> None:
    SEEN.clear()
    model = fxp.transform(LogGlobally(), WN)
    model(torch.randn(2, 5))
    model(torch.randn(2, 5))
    assert [type(value) for value in SEEN] == [Tensor, Tensor]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("trace", TRACES)
def test_hooks_of_users(trace: str, when: str) -> None:
    calls: list[str] = []

    def hook(module: Any) -> None:
        for name, sub in (("root", module), ("encoder", module.encoder)):
            sub.register_forward_hook(lambda m, a, out, name=name: calls.append(f"{name} forward"))
            sub.register_forward_pre_hook(lambda m, a, name=name: calls.append(f"{name} pre"))
            sub.register_full_backward_hook(lambda m, i, o, name=name: calls.append(f"{name} backward"))

    net = Net()
    if when == "before":
        hook(net)
    model = fxp.transform(net, WN, trace=trace)
    x = torch.randn(3, 5, requires_grad=True)
    if when == "after":
        model(x)
        hook(model)
    calls.clear()
    for _ in range(2):
        model(x).sum().backward()
    want = ["root pre", "encoder pre", "encoder forward", "root forward", "encoder backward", "root backward"]
    assert sorted(calls) == sorted(want * 2)


def test_a_hook_that_changes_the_output() -> None:
    model = fxp.transform(Net(), WN)
    x = torch.randn(3, 5)
    before = model(x)
    handle = model.decoder.register_forward_hook(lambda module, args, out: out * 2)
    same(model(x), 2 * before)
    handle.remove()
    same(model(x), before)
