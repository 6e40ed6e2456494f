"""Never stale: every optimizer, closures, raw kernels and adversarial training."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.cache.common import pair, same
from runtime.models import TwoLayers
from runtime.oracles import TRACES, loss_of, raw_fused
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxparam as fxp

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    f"{cls.__name__}-{kind}": lambda ps, cls=cls, kind=kind: cls(
        ps, lr=0.05, **({kind: True} if kind != "plain" else {"foreach": False})
    )
    for cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    for kind in ("plain", "foreach", "fused")
} | {
    "SGD-momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01),
    "Rprop": lambda ps: torch.optim.Rprop(ps, lr=0.01),
    "Adamax": lambda ps: torch.optim.Adamax(ps, lr=0.01),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_as_uncached(name: str, set_to_none: bool, trace: str) -> None:
    model, oracle = pair(trace)
    x = torch.randn(4, 5)
    for module in (model, oracle):
        optimizer = OPTIMIZERS[name](module.parameters())
        for _ in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(module, x).backward()
            optimizer.step()
    same(model(x), oracle(x))
    start = TwoLayers()
    assert not torch.allclose(model(x), start(x))


def test_one_refresh_and_one_backward_per_step() -> None:
    model, _ = pair()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    refreshes, backwards = model.stats.refreshes, model.stats.backwards
    for _ in range(5):
        optimizer.zero_grad()
        for _ in range(3):
            loss_of(model, torch.randn(4, 5)).backward()
        optimizer.step()
    assert model.stats.refreshes - refreshes == 5
    # Two components, three backward passes each step.
    assert model.stats.backwards - backwards == 5 * 3 * 2


def test_lbfgs_closures() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    for module in (model, oracle):
        optimizer = torch.optim.LBFGS(module.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")

        def closure(module: nn.Module = module, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(module, x)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
    torch.testing.assert_close(model(x), oracle(x), rtol=1e-8, atol=1e-9)


def test_raw_fused_kernel_between_steps() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    for module in (model, oracle):
        for _ in range(3):
            loss_of(module, x).backward()
            raw_fused(list(module.parameters()))
            module.zero_grad()
    same(model(x), oracle(x))


def test_step_assigned_on_the_instance() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    for module in (model, oracle):
        optimizer = torch.optim.SGD(module.parameters(), 0.1, fused=True)
        parameters = list(module.parameters())
        optimizer.step = functools.partial(raw_fused, parameters)  # type: ignore[method-assign]
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(module, x).backward()
            optimizer.step()
            optimizer.zero_grad()
    same(model(x), oracle(x))


def test_gan_loop() -> None:
    x = torch.randn(4, 5)

    def train(generator: nn.Module, critic: nn.Module) -> Tensor:
        of_generator = torch.optim.Adam(generator.parameters(), 0.01, fused=True)
        of_critic = torch.optim.Adam(critic.parameters(), 0.01, fused=True)
        for _ in range(3):
            fake = generator(x)
            of_critic.zero_grad()
            real_loss, fake_loss = critic(x).mean(), -critic(fake.detach()).mean()
            real_loss.backward()
            fake_loss.backward()
            of_critic.step()
            of_generator.zero_grad()
            (critic(fake).mean() + fake.pow(2).mean()).backward()
            of_generator.step()
        return critic(generator(x)).detach()

    torch.manual_seed(1)
    nets = [nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(2)]
    oracles = copy.deepcopy(nets)
    for oracle in oracles:
        for at in (0, 2):
            parametrizations.weight_norm(oracle[at])
    models = [fxp.transform(net, {"*.weight": fxp.weight_norm()}) for net in nets]
    same(train(*models), train(*oracles))
