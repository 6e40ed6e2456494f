"""Training and evaluation mode of the whole and of layers; what advances with them."""

from __future__ import annotations

import copy

import pytest
import torch
from runtime.module.common import WN, Net
from runtime.oracles import TRACES, same
from torch import nn
from torch.nn.utils import parametrizations

import fxparam as fxp


@pytest.mark.parametrize("trace", TRACES)
def test_train_and_eval_of_root_and_submodules(trace: str) -> None:
    model = fxp.transform(nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5)), WN, trace=trace)
    x = torch.randn(3, 5)
    for mode, random in ((True, True), (False, False), (True, True)):
        model.train(mode)
        assert model.training is mode and model[0].training is mode
        assert torch.equal(model(x), model(x)) is not random
    model[1].eval()
    assert torch.equal(model(x), model(x))
    model[1].train()
    assert not torch.equal(model(x), model(x))
    outer = nn.Sequential(model)
    outer.eval()
    assert not model.training and not model[1].training and torch.equal(outer(x), outer(x))


def test_eval_of_the_layer_with_spectral_norm() -> None:
    model = fxp.transform(Net(), {"encoder.weight": fxp.spectral_norm()})
    u = model.encoder.parametrizations.weight[0]._u
    model.encoder.eval()
    before = u.clone()
    for _ in range(2):
        model(torch.randn(3, 5))
        model.invalidate()
    assert torch.equal(u, before)
    model.encoder.train()
    model(torch.randn(3, 5))
    assert not torch.equal(u, before)


def test_power_iteration_advances_once_per_training_refresh() -> None:
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model, oracle = fxp.transform(net, {"0.weight": fxp.spectral_norm()}), copy.deepcopy(net)
    parametrizations.spectral_norm(oracle[0])
    oracle.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (model, oracle)]
    u = model[0].parametrizations.weight[0]._u
    x = torch.randn(3, 5)
    for _ in range(3):
        before = u.clone()
        for module, optimizer in zip((model, oracle), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).pow(2).sum().backward()
            optimizer.step()
        assert not torch.equal(u, before)
        after = u.clone()
        model.eval()
        with torch.no_grad():
            model(x)
        assert torch.equal(u, after)
        model.train()
    for a, b in zip(model.state_dict().values(), oracle.state_dict().values(), strict=True):
        same(a, b)
    # Several reads in one step: plain PyTorch would advance at each.
    model.zero_grad()
    model(x).sum().backward()
    after = u.clone()
    model(x).sum().backward()
    model.weights()
    assert torch.equal(u, after)
