"""One model in several threads: rounds, changes, modes, autocast, deferral, backwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtime.oracles import DTYPE, TRACES, check, gradients, inputs, loss_of, pair, same, train
from runtime.threads.common import PATIENCE, at_once, change_by_write
from torch import Tensor, nn

import fxparam as fxp


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("trace", TRACES)
def test_rounds_of_forwards_and_backwards_with_a_step_between(trace: str, mode: str) -> None:
    model, oracle = pair(trace)
    optimizers = [torch.optim.Adam(module.parameters(), 0.05, fused=True) for module in (model, oracle)]
    for module in (model, oracle):
        module.train(mode == "train")
    xs, refreshes = inputs(4, 3), model.stats.refreshes
    for step in range(1, 5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = at_once(*(partial(loss_of, model, x) for x in xs))
        wanted = [loss_of(oracle, x) for x in xs]
        same(losses, wanted)
        at_once(*(loss.backward for loss in losses))
        for loss in wanted:
            loss.backward()
        for (_, p), (_, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
            same(p.grad, q.grad)
        assert model.stats.refreshes - refreshes == step
        for optimizer in optimizers:
            optimizer.step()
    check(model, oracle, xs[0])


@pytest.mark.parametrize("trace", TRACES)
def test_threads_without_order(trace: str) -> None:
    """Forwards, backwards and evaluations as they come; between two steps nothing depends on the order."""
    model, oracle = pair(trace)
    optimizers = [torch.optim.SGD(module.parameters(), 0.01, fused=True) for module in (model, oracle)]
    xs = inputs(4, 3)

    def accumulate(module: nn.Module, x: Tensor) -> None:
        for _ in range(5):
            loss_of(module, x).backward()

    def evaluate(x: Tensor, want: Tensor) -> None:
        for _ in range(10):
            with torch.no_grad():
                same(model(x), want)

    for _ in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        want = oracle(xs[0]).detach()
        calls: list[Callable[[], None]] = [partial(accumulate, model, x) for x in xs]
        at_once(*calls, partial(evaluate, xs[0], want))
        for x in xs:
            accumulate(oracle, x)
        for (_, p), (_, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
            same(p.grad, q.grad, 1e-10)
        for optimizer in optimizers:
            optimizer.step()
    check(model, oracle, xs[0], 1e-9)


def change_by_step(module: nn.Module) -> None:
    loss_of(module, torch.ones(3, 5, dtype=DTYPE)).backward()
    optimizer = torch.optim.SGD(module.parameters(), 0.01, fused=True)
    optimizer.step()
    optimizer.zero_grad()


def change_by_loading(module: nn.Module) -> None:
    module.load_state_dict({name: value * 0.9 for name, value in module.state_dict().items()}, assign=True)


def change_of_mode(module: nn.Module) -> None:
    module.train(not module.training)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("change", [change_by_step, change_by_write, change_by_loading, change_of_mode])
def test_one_refresh_for_each_change(change: Callable[[nn.Module], None], trace: str) -> None:
    model, oracle = pair(trace)
    x = inputs()
    for _ in range(4):
        for module in (model, oracle):
            change(module)
        refreshes, hits = model.stats.refreshes, model.stats.hits
        found = at_once(*(lambda: [model(x).detach() for _ in range(5)] for _ in range(6)))
        assert model.stats.refreshes - refreshes == 1
        # The counter has no lock of its own, and may miss a few.
        assert 0 < model.stats.hits - hits <= 29
        same(found, [[oracle(x).detach()] * 5] * 6)


@pytest.mark.parametrize("trace", TRACES)
def test_modes_of_one_thread_are_not_those_of_another(trace: str) -> None:
    """Gradient, no gradient, inference, autocast and deferral, all at once."""
    model, oracle = pair(trace)
    optimizers = [torch.optim.SGD(module.parameters(), 0.02, fused=True) for module in (model, oracle)]
    x = inputs()

    def without_gradient(module: nn.Module) -> Tensor:
        with torch.no_grad():
            return module(x)

    def inference(module: nn.Module) -> Tensor:
        with torch.inference_mode():
            return module(x)

    def autocast(module: nn.Module) -> Tensor:
        # float64 is left alone, and a float32 product inside would not be: this is the other entry of the cache.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    kinds: list[Callable[[nn.Module], Tensor]] = [lambda module: module(x), without_gradient, inference, autocast]
    for _ in range(4):
        refreshes = model.stats.refreshes
        found = at_once(*(lambda kind=kind: [kind(model) for _ in range(5)] for kind in kinds))
        assert model.stats.refreshes - refreshes == 2
        for outputs, kind in zip(found, kinds, strict=True):
            want = kind(oracle)
            for output in outputs:
                same(output.detach().clone(), want.detach().clone())
                assert output.requires_grad == want.requires_grad and output.is_inference() == want.is_inference()
        for module, optimizer in zip((model, oracle), optimizers, strict=True):
            train(module, optimizer, [x])


class Square(nn.Module):
    """A product, which autocast computes in its lower precision."""

    def forward(self, latent: Tensor) -> Tensor:
        return latent @ latent


@pytest.mark.parametrize("trace", TRACES)
def test_autocast_of_one_thread_leaves_no_low_precision_to_another(trace: Any) -> None:
    net = nn.Linear(6, 6)
    model = fxp.transform(net, {"weight": Square()}, trace=trace)
    latent, bias, x = model.latents()["parametrizations.weight.original"], model.bias, torch.randn(4, 6)

    def run(low: bool, output: Callable[[], Tensor]) -> list[Tensor]:
        found = []
        for _ in range(8):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                found.append(output())
        return found

    def oracle() -> Tensor:
        return F.linear(x, latent @ latent, bias)

    for _ in range(3):
        refreshes = model.stats.refreshes
        low, full, _ = at_once(*(lambda low=low: run(low, lambda: model(x)) for low in (True, False, True)))
        assert model.stats.refreshes - refreshes == 2
        for found, want in ((low, run(True, oracle)[0]), (full, run(False, oracle)[0])):
            assert all(torch.equal(output, want) and output.dtype == want.dtype for output in found)
        same(torch.autograd.grad(full[0].sum(), [latent])[0], torch.autograd.grad(oracle().sum(), [latent])[0], 1e-5)
        change_by_write(model)


@pytest.mark.parametrize("trace", TRACES)
def test_blocks_of_deferral_in_threads_with_steps_between(trace: str) -> None:
    model, oracle = pair(trace)
    optimizers = [torch.optim.Adam(module.parameters(), 0.01, fused=True) for module in (model, oracle)]
    xs = inputs(6, 3)

    def accumulate(some: Tensor) -> None:
        with model.defer_backward():
            for x in some:
                loss_of(model, x).backward()

    def directly(x: Tensor) -> None:
        loss_of(model, x).backward()

    for _ in range(30):
        for optimizer in optimizers:
            optimizer.zero_grad()
        at_once(lambda: accumulate(xs[:3]), lambda: accumulate(xs[3:5]), lambda: directly(xs[5]))
        for x in xs:
            loss_of(oracle, x).backward()
        for (_, p), (_, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
            same(p.grad, q.grad, 1e-9)
        for optimizer in optimizers:
            optimizer.step()
    check(model, oracle, xs[0], 1e-8)


def forward_in_the_middle_of_a_backward(trace: str) -> int:
    """The first half of a backward in one thread, a forward in another, the second half: how often weights were computed."""
    model, oracle = pair(trace)
    x, reached, done = inputs(), threading.Event(), threading.Event()
    latent = model.latents()["second.parametrizations.weight.original"]

    def hold(gradient: Tensor) -> None:
        reached.set()
        assert done.wait(PATIENCE)

    handle = latent.register_hook(hold)

    def other() -> list[Tensor]:
        assert reached.wait(PATIENCE)
        try:
            loss = loss_of(model, x)
            handle.remove()
        finally:
            done.set()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    refreshes = model.stats.refreshes
    _, found = at_once(lambda: loss_of(model, x).backward(), other)
    computed = model.stats.refreshes - refreshes
    same(found, list(gradients(oracle, x).values()))
    loss_of(oracle, x).backward()
    for (_, p), (_, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        same(p.grad, q.grad)
    return computed


@pytest.mark.parametrize("trace", TRACES)
def test_a_forward_in_the_middle_of_a_backward_of_another_thread(trace: str) -> None:
    forward_in_the_middle_of_a_backward(trace)


def test_a_forward_in_the_middle_of_a_backward_of_another_thread_computes_nothing() -> None:
    assert forward_in_the_middle_of_a_backward("live") == 1


class Slow(nn.Module):
    """A map that takes its time."""

    started = threading.Event()

    def forward(self, latent: Tensor) -> Tensor:
        type(self).started.set()
        time.sleep(0.05)
        return latent @ latent


def test_a_forward_beside_a_trace_keeps_its_gradient() -> None:
    """While a thread traces a map for its autocast state, other tensors stand in place of the latents."""
    model = fxp.transform(nn.Linear(6, 6), {"weight": Slow()}, trace="live")
    latent, x = model.latents()["parametrizations.weight.original"], torch.randn(4, 6)
    want = torch.autograd.grad(F.linear(x, latent @ latent, model.bias).sum(), [latent])[0]
    model(x)
    Slow.started.clear()

    def low() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    def full() -> list[Tensor]:
        assert Slow.started.wait(10)
        return [torch.autograd.grad(model(x).sum(), [latent])[0] for _ in range(20)]

    _, found = at_once(low, full)
    assert model.stats.inlined == 0
    for gradient in found:
        same(gradient, want, 1e-5)
