"""Maps, their buffers and layers that change after the first read, or during a forward; models that live shortly."""
# mypy: disable-error-code="misc,operator"

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from runtime.models import TwoLayers
from runtime.oracles import TRACES
from runtime.situations.common import Case, Doubled, X, Y, loss_of, outcome, pair, same
from runtime.tables import collector
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fxparam as fxp

CASES: dict[str, Case] = {}
case = collector(CASES)


@case
def buffers_of_a_map_written(m: Any) -> list[Any]:
    m(X)
    base = m.second.parametrizations.weight[0].base
    with torch.no_grad():
        base.copy_(base.roll(1, 0))
    first = outcome(m)
    m.second.parametrizations.weight[0].base = -base
    second = outcome(m)
    base.data = base.data.flip(0)
    return [*first, *second, *outcome(m)]


@case
def modules_swapped(m: Any) -> list[Any]:
    m(X)
    new = copy.deepcopy(m.second.parametrizations.weight[0])
    new.base.mul_(-1)
    m.second.parametrizations.weight[0] = new
    first = outcome(m)
    m.first = nn.Linear(5, 5)
    for p in m.first.parameters():
        nn.init.constant_(p, 0.3)
    return [*first, *outcome(m)]


@case
def moved_to_meta_and_back(m: Any) -> list[Any]:
    state = {name: value.clone() for name, value in m.state_dict().items()}
    m(X)
    m.to("meta")
    shape = m(X.to("meta")).shape
    m.to_empty(device="cpu")
    m.load_state_dict(state)
    return [shape, *outcome(m)]


@case
def a_map_appended(m: Any) -> list[Any]:
    m(X)
    m.first.parametrizations.weight.append(Doubled())
    return outcome(m)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", list(CASES))
def test_as_uncached(name: str, trace: Any) -> None:
    model, oracle = pair(trace)
    same(CASES[name](model), CASES[name](oracle))


@pytest.mark.parametrize("trace", TRACES)
def test_registrations_beside_a_computed_weight_are_refused(trace: Any) -> None:
    model, oracle = pair(trace)
    same(outcome(model), outcome(oracle))
    names, kind = [name for name, _ in model.named_parameters()], type(model.first)
    with pytest.raises(fxp.SpecError, match=r"cannot register on this Linear: fxparam computes its weight\. Register before"):
        parametrize.register_parametrization(model.first, "bias", nn.Tanh())
    assert [name for name, _ in model.named_parameters()] == names and type(model.first) is kind
    same(outcome(model), outcome(oracle))


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("change", [parametrize.register_parametrization, parametrize.remove_parametrizations])
def test_registrations_on_a_computed_weight_are_refused(change: Any, trace: Any) -> None:
    model, oracle = pair(trace)
    arguments = [Doubled()] if change is parametrize.register_parametrization else []
    with pytest.raises(ValueError, match="does not have a paramet"):
        change(model.first, "weight", *arguments)
    same(outcome(model), outcome(oracle))


@pytest.mark.parametrize("trace", TRACES)
def test_models_that_live_shortly(trace: Any) -> None:
    for number in range(100):
        oracle: Any = parametrizations.weight_norm(nn.Linear(3, 3))
        model = fxp.transform(copy.deepcopy(oracle), trace=trace)
        with torch.no_grad():
            for m in (model, oracle):
                m.parametrizations.weight.original1.mul_(1 + 0.1 * number)
                m.parametrizations.weight.original0.mul_(2)
        same([model.weight.detach()], [oracle.weight.detach()])
        del model, oracle


class _WritesInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = TwoLayers()

    def forward(self, x: Tensor) -> Tensor:
        before = self.net(x)
        with torch.no_grad():
            for p in self.net.parameters():
                p.mul_(1.5)
        return torch.cat([before.detach(), self.net(x)])


class _TrainsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = TwoLayers()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            self.net.zero_grad()
            loss_of(self.net, x).backward()
            with torch.no_grad():
                for p in self.net.parameters():
                    p -= 0.1 * p.grad
        return self.net(x)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", ["latents_written_inside_a_forward", "trained_inside_a_forward"])
def test_latents_that_change_during_a_forward(name: str, trace: Any) -> None:
    make = {"latents_written_inside_a_forward": _WritesInside, "trained_inside_a_forward": _TrainsInside}[name]
    model, oracle = pair(trace, make)
    same([model(X).detach(), model(Y).detach()], [oracle(X).detach(), oracle(Y).detach()])
