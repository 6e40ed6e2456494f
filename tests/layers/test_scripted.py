"""Modules of TorchScript beside computed weights: they run by themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fxparam as fxp


def scripted(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        # PyTorch advises against TorchScript; people have models of it.
        warnings.simplefilter("ignore")
        return torch.jit.script(layer)


def traced(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(layer, torch.randn(4, 6))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "scripted": lambda: scripted(nn.Linear(6, 6)),
    "traced": lambda: traced(nn.Linear(6, 6)),
    "with buffers": lambda: scripted(nn.BatchNorm1d(6)),
    "without tensors": lambda: scripted(nn.Tanh()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trace", ["auto", "live", "record"])
def test_a_scripted_module_beside_computed_weights(name: str, trace: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(MODELS[name](), parametrizations.weight_norm(nn.Linear(6, 3)))
    model = fxp.transform(net, trace=trace)
    for train in (True, True, False):
        net.train(train)
        model.train(train)
        # Buffers are shared: both see the same batch statistics, one after the other.
        x = torch.randn(4, 6)
        assert torch.equal(model(x), net(x))
        grads = [torch.autograd.grad(module(x).sin().sum(), list(net[1].parameters())) for module in (model, net)]
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fxp.restore(model)(x), net(x), rtol=1e-12, atol=0)
