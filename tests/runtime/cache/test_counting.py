"""How often weights are computed, and maps with state, with random numbers or with a backward of their own."""
# mypy: disable-error-code="arg-type,has-type"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtime.cache.common import pair, same
from runtime.models import TwoLayers
from runtime.oracles import TRACES, loss_of
from torch import Tensor, nn

import fxparam as fxp


class Recurrent(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.cell, self.steps = nn.RNNCell(3, 8), steps

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(x.shape[0], 8)
        for _ in range(self.steps):
            hidden = self.cell(x, hidden)
        return hidden


def count_calls() -> tuple[list[int], Callable[[Tensor], Tensor]]:
    """A map that stays a call, for it has a backward of its own, and the number of its forwards and backwards."""
    calls = [0, 0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, latent: Tensor) -> Tensor:
            calls[0] += 1
            return latent * 0.5

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            calls[1] += 1
            return gradient * 0.5

    return calls, lambda latent: Counted.apply(latent)


def test_a_cell_read_a_hundred_times_in_one_forward() -> None:
    calls, function = count_calls()
    model = fxp.transform(Recurrent(100), {"cell.weight_hh": function})
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    calls[:] = [0, 0]
    for step in range(1, 4):
        optimizer.zero_grad()
        loss_of(model, torch.randn(2, 3)).backward()
        optimizer.step()
        assert calls == [step, step]


def test_a_cell_called_a_hundred_times() -> None:
    calls, function = count_calls()
    cell = fxp.transform(nn.RNNCell(3, 8), {"weight_hh": function})
    optimizer = torch.optim.SGD(cell.parameters(), 1e-3, fused=True)
    calls[:] = [0, 0]
    refreshes, hits = cell.stats.refreshes, cell.stats.hits
    for step in range(1, 4):
        optimizer.zero_grad()
        hidden = torch.zeros(2, 8)
        for _ in range(100):
            hidden = cell(torch.randn(2, 3), hidden)
        hidden.pow(2).sum().backward()
        optimizer.step()
        assert calls == [step, step]
    assert cell.stats.refreshes - refreshes == 3
    assert cell.stats.hits - hits == 3 * 99


def test_the_cell_of_a_model_used_by_itself() -> None:
    calls, function = count_calls()
    model = fxp.transform(Recurrent(1), {"cell.weight_hh": function})
    calls[:] = [0, 0]
    hidden = torch.zeros(2, 8)
    for _ in range(100):
        hidden = model.cell(torch.randn(2, 3), hidden)
    hidden.sum().backward()
    assert calls == [1, 1]


def test_no_grad_first_then_gradient_is_one_evaluation_in_training() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    before = model.stats.refreshes
    with torch.no_grad():
        model(x)
    loss_of(model, x).backward()
    assert model.stats.refreshes - before == 1
    loss_of(oracle, x).backward()
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        same(p.grad, q.grad)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_loops_compute_once(context: Any) -> None:
    model, _ = pair()
    model.eval()
    before = model.stats.refreshes
    with context():
        for _ in range(10):
            model(torch.randn(4, 5))
    assert model.stats.refreshes - before == 1


def test_validation_between_training_steps_costs_two_evaluations() -> None:
    model, _ = pair()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.stats.refreshes
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        loss_of(model, torch.randn(4, 5)).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            for _ in range(5):
                model(torch.randn(4, 5))
    assert model.stats.refreshes - before == 6


class Power(nn.Module):
    """Spectral norm as many write it: the buffer is replaced, not written."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("u", torch.ones(5) / 5**0.5)

    def forward(self, latent: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                u = F.normalize(latent.mT @ (latent @ self.u), dim=0)
                if self.in_place:
                    self.u.copy_(u)
                else:
                    self.u = u
        return latent / (latent @ self.u.clone()).norm()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


@pytest.mark.parametrize(
    "in_place",
    [True, False],
)
def test_a_stateful_map_advances_once_per_step(in_place: bool) -> None:
    net = TwoLayers()
    model = fxp.transform(net, {"first.weight": Power(in_place)})
    before = model.stats.refreshes
    x = torch.randn(4, 5)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
    loss_of(model, x).backward()
    assert model.stats.refreshes - before == 1


class DropConnect(nn.Module):
    """Random in training only."""

    def forward(self, latent: Tensor) -> Tensor:
        return F.dropout(latent, 0.5, self.training)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


@pytest.mark.parametrize("trace", TRACES)
def test_random_in_training_and_fixed_in_evaluation(trace: str) -> None:
    net = TwoLayers()
    model = fxp.transform(net, {"first.weight": DropConnect()}, trace=trace)
    x = torch.randn(4, 5)
    for _ in range(2):
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        same(model(x), net(x))
    model.train()
    loss_of(model, x).backward()
    assert model.first.parametrizations.weight.original.grad is not None


class ClippedGradient(torch.autograd.Function):
    """The identity, with a gradient of zero outside of (-1, 1)."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        ctx.save_for_backward(latent)
        return latent * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (latent,) = ctx.saved_tensors
        return gradient * (latent.abs() < 1)


clipped = ClippedGradient.apply


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda latent: ClippedGradient.apply(latent), id="looked up at the call"),
        pytest.param(
            lambda latent: clipped(latent),
            id="looked up before",
        ),
    ],
)
def test_a_backward_of_its_own_is_kept(function: Any) -> None:
    model = fxp.transform(nn.Linear(5, 5), {"weight": function})
    latent = model.latents()["parametrizations.weight.original"]
    # Inside of (-1, 1), where every start lies, the graph and the function have the same gradient.
    assert latent.abs().max() < 1
    with torch.no_grad():
        latent.fill_(3.0)
    model(torch.randn(4, 5)).sum().backward()
    assert torch.equal(latent.grad, torch.zeros(5, 5))
