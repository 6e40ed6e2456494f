"""Threads and forks: replicas of ``DataParallel``, one model in several threads, a fork in the middle of a refresh."""
# mypy: disable-error-code="operator,union-attr,arg-type", warn-unused-ignores=False

from __future__ import annotations

import copy
import importlib
import multiprocessing
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtime.oracles import DTYPE, TRACES, check, gradients, inputs, loss_of, pair, same, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxparam as fxp

PATIENCE = 60.0


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls return, each run in a thread of its own; all begin together."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait(PATIENCE)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(run, call) for call in calls]]


# --- replicas, as DataParallel makes them


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[nn.Module]]:
    """``torch.nn.parallel.replicate`` for two devices, with copies on the CPU in place of those it sends to GPUs."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def broadcast(tensors: Sequence[Tensor], devices: Sequence[Any], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return lambda network: module.replicate(network, [0, 1])


class Scaled(nn.Module):
    """A model whose root has a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 6, dtype=DTYPE), nn.Tanh(), nn.Linear(6, 3, dtype=DTYPE))
        self.scale = nn.Parameter(torch.full((3,), 1.5, dtype=DTYPE))
        self.register_buffer("shift", torch.ones(3, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale + self.shift


def scaled_pair(trace: Any) -> tuple[fxp.ParametrizedModule, nn.Module]:
    net = Scaled()
    oracle = copy.deepcopy(net)
    for at in (0, 2):
        parametrizations.weight_norm(oracle.inner[at])
    return fxp.transform(net, {"inner.*.weight": fxp.weight_norm()}, trace=trace, copy=True), oracle


def inside_another(trace: Any) -> tuple[nn.Module, nn.Module]:
    model, oracle = (nn.Sequential(module, nn.Linear(3, 3, dtype=DTYPE)) for module in pair(trace))
    oracle.load_state_dict(model.state_dict())
    return model, oracle


REPLICATED: dict[str, Callable[[Any], Any]] = {"layers": pair, "a root with tensors": scaled_pair, "a part": inside_another}


def parallel(replicas: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Scatter, one thread for each replica, gather."""
    return torch.cat(at_once(*(partial(replica, part) for replica, part in zip(replicas, x.chunk(2), strict=True))))


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("kind", REPLICATED)
def test_replicas_train_the_original(kind: str, trace: str, replicate: Callable[[nn.Module], list[nn.Module]]) -> None:
    model, oracle = REPLICATED[kind](trace)
    x, names = inputs(6), list(model.state_dict())
    parameters = dict(model.named_parameters())
    for _ in range(3):
        for module in (model, oracle):
            optimizer = torch.optim.SGD(module.parameters(), 0.05)
            # The oracle is never replicated.
            output = parallel(replicate(module), x) if module is model else module(x)
            output.pow(2).sum().backward()
            optimizer.step()
        for (_, p), (_, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
            same(p.grad, q.grad)
        model.zero_grad()
        oracle.zero_grad()
        check(model, oracle, x)
    assert list(model.state_dict()) == names
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", REPLICATED)
def test_replicas_read_the_tensors_they_were_given(kind: str, replicate: Callable[[nn.Module], list[nn.Module]]) -> None:
    """On other devices these are the only ones a replica can read."""
    model, oracle = REPLICATED[kind]("live")
    x = inputs()
    with torch.no_grad():
        replicas = [replicate(module)[1] for module in (model, oracle)]
        for replica in replicas:
            for module in replica.modules():
                for tensor in module._former_parameters.values():
                    tensor.mul_(0.5)
        same(replicas[0](x), replicas[1](x))
        assert not torch.allclose(replicas[0](x), model(x))


@pytest.mark.parametrize("kind", REPLICATED)
def test_making_replicas_leaves_the_original_alone(kind: str, replicate: Callable[[nn.Module], list[nn.Module]]) -> None:
    model, oracle = REPLICATED[kind]("live")
    modules, parameters = list(model.modules()), list(model.parameters())
    replicate(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    check(model, oracle, inputs())


# --- one model in several threads


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


def change_by_write(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.1)


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


# --- fork


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("trace", TRACES)
def test_a_fork_while_a_thread_refreshes(trace: str) -> None:
    inside, leave, parent = threading.Event(), threading.Event(), [True]

    class Waits(torch.autograd.Function):
        """Stays a call in every trace, and waits there, in this process."""

        @staticmethod
        def forward(ctx: Any, latent: Tensor) -> Tensor:  # type: ignore[override]
            if parent[0]:
                inside.set()
                leave.wait(PATIENCE)
            return latent * 0.5

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * 0.5

    leave.set()
    net = nn.Linear(5, 3, dtype=DTYPE)
    model = fxp.transform(net, {"weight": lambda latent: Waits.apply(latent)}, trace=trace)
    x = inputs()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child() -> None:
        parent[0] = False
        with torch.no_grad():
            first = model(x).tolist()
            change_by_write(model)
            results.put((first, model(x).tolist()))

    for _ in range(3):
        change_by_write(model)
        inside.clear()
        leave.clear()
        thread = threading.Thread(target=lambda: model(x))
        thread.start()
        assert inside.wait(PATIENCE)
        process = context.Process(target=child)
        process.start()
        process.join(PATIENCE)
        alive = process.is_alive()
        if alive:
            process.kill()
        leave.set()
        thread.join(PATIENCE)
        assert not alive and process.exitcode == 0
        with torch.no_grad():
            latent = model.latents()["parametrizations.weight.original"]
            want = [F.linear(x, latent * rate * 0.5, model.bias * rate) for rate in (1.0, 1.1)]
            same([torch.tensor(one, dtype=DTYPE) for one in results.get()], want)
        loss_of(model, x).backward()
    assert gradients(model, x).keys() == {"bias", "parametrizations.weight.original"}
