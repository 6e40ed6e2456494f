"""Parametrizations of the originals of parametrizations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam as fxp
from fxparam.errors import SpecError


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mT


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + 2 * b

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight / 3, weight / 3


def nested(depth: int, first: nn.Module) -> nn.Module:
    """A net whose weight has a map, whose original has a map, whose original has a map, ..."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64))
    owner: Any = net[0]
    name = "weight"
    for level in range(depth):
        parametrize.register_parametrization(owner, name, first if level == 0 else Tanh())
        owner = owner.parametrizations[name]
        name = "original1" if isinstance(first, Sum) and level == 0 else "original"
    return net


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("first", [Symmetric(), Sum()], ids=["one original", "two originals"])
@pytest.mark.parametrize("trace", ["auto", "live", "record"])
def test_it_computes_and_trains_as_before(depth: int, first: nn.Module, trace: str) -> None:
    reference = nested(depth, first)
    model = fxp.transform(nested(depth, first), trace=trace, copy=True)
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert len(model.sites) == depth and not model.report.refusals
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (model, reference)]
    for seed in range(3):
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        losses = []
        for net, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            loss = net(x).sin().sum()
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        wanted = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-12, atol=1e-14)
        for optimizer in optimizers:
            optimizer.step()
    assert model.stats.refreshes == 3


def test_it_is_folded_restored_copied_and_loaded() -> None:
    net = nested(3, Symmetric())
    model, x = fxp.transform(net), torch.randn(2, 3, dtype=torch.float64)
    wanted = net(x)
    assert dict(fxp.fold(model).named_parameters()).keys() == {"0.weight", "0.bias"}
    for other in (fxp.fold(model), fxp.restore(model), copy.deepcopy(model)):
        torch.testing.assert_close(other(x), wanted, rtol=1e-12, atol=0)
    fresh = fxp.transform(nested(3, Symmetric()), copy=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(fresh(x), net(x), rtol=1e-12, atol=0)


def test_extending_it_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match=r"0.weight is extended by one rule, and its latent computed already; give one"):
        fxp.transform(nested(2, Symmetric()), {"0.weight": fxp.existing() >> fxp.mask(density=0.5)})
