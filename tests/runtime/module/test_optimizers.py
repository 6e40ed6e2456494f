"""Optimizers built before ``transform``: repointed, warned about, refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from runtime.module.common import WN, Net
from torch import Tensor, nn

import fxparam as fxp


def test_an_optimizer_is_repointed() -> None:
    net = Net()
    groups: list[dict[str, Any]] = [{"params": net.encoder.parameters()}, {"params": net.decoder.parameters(), "lr": 0.5}]
    optimizer = torch.optim.Adam(groups)
    net(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    model = fxp.transform(net, WN, optimizer=optimizer)
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert held[0] == [id(p) for p in (*model.encoder.parametrizations.weight.latents, model.encoder.bias)]
    assert held[1] == [id(p) for p in (*model.decoder.parametrizations.weight.latents, model.decoder.bias)]
    assert optimizer.param_groups[1]["lr"] == 0.5
    before = model.weights()["encoder.weight"].detach().clone()
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weights()["encoder.weight"], before)


def test_an_optimizer_of_replaced_parameters_is_warned_about_once() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = fxp.transform(net, WN)
    model(torch.randn(3, 5)).sum().backward()
    with pytest.warns(RuntimeWarning, match=r"an optimizer holds 2 parameters that fxparam.transform replaced by latents"):
        optimizer.step()
    optimizer.step()


def test_no_warning_where_the_given_model_is_trained_on_its_own() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = fxp.transform(net, WN)
    model(torch.randn(3, 5)).sum().backward()
    net(torch.randn(3, 5)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_warning_although_old_gradients_are_left() -> None:
    net = Net()
    net(torch.randn(3, 5)).sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = fxp.transform(net, WN)
    model(torch.randn(3, 5)).sum().backward()
    with pytest.warns(RuntimeWarning, match="replaced by latents"):
        optimizer.step()


def test_an_optimizer_of_something_else() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(fxp.SpecError, match=r"holds none of the parameters .* build it from model\.parameters\(\)"):
        fxp.transform(Net(), WN, optimizer=optimizer)


def test_an_lbfgs_built_before_is_repointed() -> None:
    net = nn.Linear(4, 4)
    optimizer = torch.optim.LBFGS(net.parameters())
    model = fxp.transform(net, {"weight": fxp.weight_norm()}, optimizer=optimizer)
    x = torch.randn(2, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    before = model(x).square().sum().item()
    optimizer.step(closure)
    assert model(x).square().sum().item() < 1e-3 * before


def test_an_optimizer_and_a_copy_exclude_each_other() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(fxp.SpecError, match=r"copy=True shares no tensor with the given model"):
        fxp.transform(net, {"weight": fxp.skew()}, copy=True, optimizer=torch.optim.SGD(net.parameters(), 0.1))
