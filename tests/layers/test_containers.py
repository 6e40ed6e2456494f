"""Layers in containers, parameters in lists and dictionaries, and parameters of a user's own module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers.common import (
    FLAT,
    TRACES,
    Case,
    Check,
    every_check,
    same,
)
from torch import Tensor, nn

import fxparam as fxp


def batch() -> tuple[Tensor]:
    return (torch.randn(3, 4),)


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x + self.weights[-1].sum() + len(self.weights)


class Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({"a": torch.randn(4, 4), "b": torch.randn(4, 4), "c": torch.randn(4)})

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weights["a"] + self.weights.c
        for name, weight in self.weights.items():
            x = x * weight.sum() if name == "b" else x
        return x + torch.stack([weight.sum() for weight in self.weights.values()]).sum()


class Modules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.named = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.listed:
            x = layer(x).tanh()
        for name, layer in self.named.items():
            x = layer(x) if name == "first" else x + layer(x)
        return x


class Own(nn.Module):
    """A parameter of the model itself, a layer that is read and not called, and a weight with arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.rand(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x @ self.bare, F.normalize(self.layer.weight, dim=1), self.layer.bias) * self.scale


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(4, 4), ("weight",), batch),
    "linear, all": Case(lambda: nn.Linear(4, 5), ("*",), batch, FLAT),
    "sequence": Case(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), ("*.weight",), batch),
    "nested": Case(
        lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 2))), ("*.weight",), batch
    ),
    "modules": Case(Modules, ("listed.*.weight", "named.first.weight"), batch),
    "parameter list": Case(Lists, ("weights.?",), batch),
    "entry of a list": Case(Lists, ("weights.1",), batch),
    "parameter dictionary": Case(Dicts, ("weights.[ab]",), batch),
    "entry of a dictionary": Case(Dicts, ("weights.c",), batch, FLAT),
    "bare": Case(Own, ("bare",), batch),
    "own": Case(Own, ("bare", "layer.weight"), batch),
    "own, all": Case(Own, ("*",), batch, FLAT),
}


@every_check(CASES, kinds=4)
def test_what_every_layer_must_do(check: Check, case: Case, kind: str, trace: str) -> None:
    check(case, kind, trace)


@pytest.mark.parametrize("trace", TRACES)
def test_parameter_lists_and_dictionaries_stay_what_they_are(trace: str) -> None:
    model = fxp.transform(Lists(), {"weights.1": fxp.weight_norm()}, trace=trace)
    listed: Any = model.get_submodule("weights")
    assert len(listed) == 3
    same(listed[1], model.weights()["weights.1"])
    same(list(listed), [listed[0], listed[1], listed[2]])
    same(list(listed[1:]), [listed[1], listed[2]])
    assert type(listed[:1]) is nn.ParameterList
    model = fxp.transform(Dicts(), {"weights.b": fxp.weight_norm()}, trace=trace)
    named: Any = model.get_submodule("weights")
    assert list(named) == ["a", "b", "c"]
    assert "b" in named
    same(named["b"], model.weights()["weights.b"])
    same(dict(named.items())["b"], named.b)


class Again(nn.Linear):
    """A layer that makes others of its own class."""

    def like(self) -> nn.Linear:
        return type(self)(self.in_features, self.out_features)


@pytest.mark.parametrize("trace", TRACES)
def test_a_layer_made_by_the_class_of_an_owner_is_a_plain_one(trace: str) -> None:
    model = fxp.transform(Again(4, 4), {"weight": fxp.weight_norm()}, trace=trace)
    other = model.like()
    assert type(other) is Again
    assert [name for name, _ in other.named_parameters()] == ["weight", "bias"]
    (x,) = batch()
    same(other(x), F.linear(x, other.weight, other.bias))
    other.weight = nn.Parameter(torch.ones(4, 4))
    same(other(x), F.linear(x, torch.ones(4, 4), other.bias))


@pytest.mark.parametrize("trace", TRACES)
def test_slices_of_a_parameter_list_lead_to_the_latents(trace: str) -> None:
    """PyTorch would make parameters of the computed tensors in a slice, and lose their gradients."""

    class Sliced(Lists):
        def forward(self, x: Tensor) -> Tensor:
            for weight in self.weights[::-2]:
                x = torch.tanh(x @ weight)
            return x + self.weights[1:][0].sum()

    net = Sliced()
    weights = [weight.detach().requires_grad_() for weight in net.weights]
    model = fxp.transform(net, {"weights.[12]": lambda latent: latent * 2}, trace=trace)
    (x,) = batch()
    got = model(x)
    want = torch.tanh(torch.tanh(x @ (2 * weights[2])) @ weights[0]) + (2 * weights[1]).sum()
    same(got, want)
    found = torch.autograd.grad(got.sin().sum(), list(model.parameters()))
    names = ["weights.0", "weights.parametrizations.1.original", "weights.parametrizations.2.original"]
    assert [name for name, _ in model.named_parameters()] == names
    same(found, torch.autograd.grad(want.sin().sum(), weights))
