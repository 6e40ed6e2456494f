"""Maps that draw random numbers: at each read, or once per step, as declared.

The oracle is ``torch.nn.utils.parametrize`` with the same state of the generators, or plain arithmetic with the same noise.
"""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,misc,attr-defined,assignment,return-value"

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from runtime.random_maps import (
    STEP,
    TRACES,
    N,
    Noisy,
    PerStep,
    PythonNoise,
    TwoReads,
    batches,
    eps_after,
    grads,
    loss_of,
    net,
    per_step,
    same,
)
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import fxparam as fxp

# --- per call


@TRACES
@pytest.mark.parametrize("declared", [Noisy(), fxp.custom(Noisy(), resample="call"), fxp.noise(std=0.5)], ids=repr)
def test_per_call_is_what_parametrize_does(declared: Any, trace: str) -> None:
    eager = net()
    register_parametrization(eager.a, "weight", Noisy())
    model = fxp.transform(net(), {"a.weight": declared}, trace=trace)
    assert (model.report.sites[0].layer, model.report.sites[0].reason) == ("per read", "draws random numbers")
    assert model.report.body == "live"
    for one in (eager, model):
        torch.manual_seed(3)
        for x in batches():
            loss_of(one, x).backward()
    same(grads(model)["a.parametrizations.weight.original"], eager.a.parametrizations.weight.original.grad)
    same(model.b.weight.grad, eager.b.weight.grad)
    torch.manual_seed(4)
    found = [model.a.weight.detach() for _ in range(2)]
    torch.manual_seed(4)
    same(found, [eager.a.weight.detach() for _ in range(2)])
    assert not torch.equal(*found)


# --- per step


@TRACES
@pytest.mark.parametrize("name", list(per_step()))
def test_one_draw_for_all_reads_of_a_step(name: str, trace: str) -> None:
    model = fxp.transform(net(), {"a.weight": per_step()[name]}, trace=trace)
    assert (model.report.sites[0].layer, model.report.sites[0].reason) == ("call", STEP)
    assert model.report.body == ("live" if trace == "live" else "graph")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (latent,) = model.latents().values()
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        (eps,) = eps_after(step, (N, N))
        torch.manual_seed(step)
        expected = latent.detach() + 0.5 * eps
        for x in batches():
            loss_of(model, x).backward()
            same(model.a.weight.detach(), expected)
        with torch.no_grad():
            model(batches()[0])
            same(model.a.weight, expected)
        assert torch.equal(torch.get_rng_state(), _state_after(step))
        seen.append(expected - latent.detach())
        optimizer.step()
    assert model.stats.refreshes == 3
    assert not torch.equal(seen[0], seen[1])


def _state_after(seed: int) -> Tensor:
    state = torch.get_rng_state()
    eps_after(seed, (N, N))
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    return after


@TRACES
@pytest.mark.parametrize("deferred", [False, True])
def test_gradients_are_those_of_the_same_noise(deferred: bool, trace: str) -> None:
    spec = {"a.weight": fxp.variational(init_std=0.3), "b.weight": fxp.noise(std=0.4, relative=True, resample="step")}
    model = fxp.transform(net(), spec, trace=trace)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(3):
        mean, rho, b = (latent.detach().clone().requires_grad_() for latent in model.latents().values())
        ahead = eps_after(step, (N, N), (N, N))
        plain = net()
        weights = {"a.weight": mean + torch.log1p(rho.exp()) * ahead[0], "b.weight": b * (1 + 0.4 * ahead[1])}
        biases = {name: getattr(model, name).bias.detach().clone() for name in "ab"}
        weights |= {f"{name}.bias": bias for name, bias in biases.items()}
        loss = sum(torch.func.functional_call(plain, weights, (x,)).square().sum() for x in batches())
        wanted = torch.autograd.grad(loss, (mean, rho, b))

        optimizer.zero_grad()
        torch.manual_seed(step)
        if deferred:
            with model.defer_backward():
                for x in batches():
                    loss_of(model, x).backward()
        else:
            for x in batches():
                loss_of(model, x).backward()
        same([latent.grad for latent in model.latents().values()], list(wanted))
        optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_share_the_draw(reentrant: bool) -> None:
    class Checkpointed(TwoReads):
        how: bool | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.how is None:
                return super().forward(x)
            for layer in (self.a, self.b, self.a):
                x = checkpoint(lambda y, one=layer: torch.dropout(one(y), 0.5, self.training), x, use_reentrant=self.how)
            return x

    torch.manual_seed(1)
    given = Checkpointed().double()
    given.how = reentrant
    model = fxp.transform(given, {"a.weight": fxp.noise(std=0.5, resample="step"), "b.weight": fxp.variational()})
    means = [latent.detach().clone().requires_grad_() for latent in model.latents().values()]
    eps = eps_after(3, (N, N), (N, N))
    weights = {"a": means[0] + 0.5 * eps[0], "b": means[1] + torch.log1p(means[2].exp()) * eps[1]}
    x = batches()[0].requires_grad_()
    value = x
    for name in "aba":
        value = torch.dropout(torch.nn.functional.linear(value, weights[name], getattr(model, name).bias), 0.5, True)
    wanted = torch.autograd.grad(value.square().sum(), means)

    torch.manual_seed(3)
    loss_of(model, x).backward()
    same([latent.grad for latent in model.latents().values()], list(wanted))
    assert model.stats.refreshes == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model_finds_the_generators_again(reentrant: bool) -> None:
    """The first run draws the noise and then the dropout; the second must draw the same dropout, though it draws no noise."""
    torch.manual_seed(1)
    given = nn.Sequential(nn.Linear(N, N), nn.Dropout(0.5), nn.Linear(N, N)).double()
    model = fxp.transform(given, {"0.weight": fxp.noise(std=0.5, resample="step")})
    x = batches()[0].requires_grad_()
    (eps,) = eps_after(3, (N, N))
    hidden = torch.dropout(
        torch.nn.functional.linear(x, next(iter(model.latents().values())).detach() + 0.5 * eps, given[0].bias), 0.5, True
    )
    (wanted,) = torch.autograd.grad(given[2](hidden).square().sum(), x)
    torch.manual_seed(3)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    same(x.grad, wanted)


def test_autocast_states_share_the_draw() -> None:
    model = fxp.transform(net(), {"a.weight": fxp.noise(std=0.5, resample="step")})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model.a.weight.detach().clone()
    state = torch.get_rng_state()
    same(model.a.weight.detach(), inside)
    assert torch.equal(torch.get_rng_state(), state)


def test_eval_draws_nothing_and_train_draws_anew() -> None:
    model = fxp.transform(net(), {"a.weight": fxp.noise(std=0.5, resample="step"), "b.weight": fxp.variational()})
    noisy = {name: weight.detach().clone() for name, weight in model.weights().items()}
    latents = model.latents()
    state = torch.get_rng_state()
    model.eval()
    for _ in range(2):
        same(model.a.weight, latents["a.parametrizations.weight.original"])
        same(model.b.weight, latents["b.parametrizations.weight.original0"])
    folded, restored = fxp.fold(model), fxp.restore(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {row.layer for row in model.report.sites} == {"graph"}
    x = batches()[0]
    same(folded(x), model(x))
    model.train()
    again = {name: weight.detach().clone() for name, weight in model.weights().items()}
    assert not any(torch.equal(noisy[name], again[name]) for name in noisy)
    # What is folded in training mode is that of eval mode as well.
    for plain in (restored, fxp.restore(model)):
        same(plain.a.weight, latents["a.parametrizations.weight.original"])
        same(plain.b.weight, latents["b.parametrizations.weight.original0"])
    same(fxp.fold(model)(x), folded(x))


@pytest.mark.parametrize("declared", [Noisy(), PerStep(), fxp.custom(PythonNoise(), resample="step")], ids=repr)
def test_a_transform_draws_nothing(declared: Any) -> None:
    given = net()
    states = torch.get_rng_state(), random.getstate()
    model = fxp.transform(given, {"a.weight": declared})
    _ = model.report, fxp.fold(model), fxp.restore(model), copy.deepcopy(model)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_numbers_of_python_are_drawn_once_per_step() -> None:
    model = fxp.transform(net(), {"a.weight": fxp.custom(PythonNoise(), resample="step")})
    random.seed(3)
    factor = 1 + random.random()
    after = random.getstate()
    random.seed(3)
    for x in batches():
        model(x)
    same(model.a.weight.detach(), model.latents()["a.parametrizations.weight.original"].detach() * factor)
    assert random.getstate() == after
