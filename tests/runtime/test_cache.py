"""The cache: never stale, one evaluation and one backward per optimizer step, nothing kept alive that is no longer needed."""
# mypy: disable-error-code="operator,union-attr,arg-type,call-overload,has-type,list-item,misc", warn-unused-ignores=False

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fxparam as fxp

DTYPE = torch.float64
TRACES = ["live", "auto"]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    yield
    torch.set_default_dtype(before)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(trace: str = "live") -> tuple[fxp.ParametrizedModule, nn.Module]:
    """A transformed model and its oracle: the same model under ``torch.nn.utils.parametrize``, uncached."""
    net = Net()
    oracle = copy.deepcopy(net)
    parametrizations.weight_norm(oracle.first)
    parametrizations.orthogonal(oracle.second, orthogonal_map="cayley")
    spec = {"first.weight": fxp.weight_norm(), "second.weight": fxp.orthogonal(map="cayley")}
    model = fxp.transform(net, spec, trace=trace)
    oracle.load_state_dict(model.state_dict())
    return model, oracle


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).sum()


# --- never stale: optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    f"{cls.__name__}-{kind}": lambda ps, cls=cls, kind=kind: cls(
        ps, lr=0.05, **({kind: True} if kind != "plain" else {"foreach": False})
    )  # type: ignore[misc]
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
    start = Net()
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


def _raw_fused(parameters: list[Tensor]) -> None:
    gradients = [p.grad for p in parameters]
    torch._fused_sgd_(
        parameters,
        gradients,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.1,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
        grad_scale=None,
        found_inf=None,
    )


def test_raw_fused_kernel_between_steps() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    for module in (model, oracle):
        for _ in range(3):
            loss_of(module, x).backward()
            _raw_fused(list(module.parameters()))
            module.zero_grad()
    same(model(x), oracle(x))


def test_step_assigned_on_the_instance() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    for module in (model, oracle):
        optimizer = torch.optim.SGD(module.parameters(), 0.1, fused=True)
        parameters = list(module.parameters())
        optimizer.step = functools.partial(_raw_fused, parameters)  # type: ignore[method-assign]
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(module, x).backward()
            optimizer.step()
            optimizer.zero_grad()
    same(model(x), oracle(x))


# --- never stale: writes


def _assign_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data * 1.5


def _in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)


def _inference(module: nn.Module) -> None:
    with torch.inference_mode():
        for p in module.parameters():
            p.mul_(1.5)


def _copy(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p * 1.5)


def _vector(module: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 1.5, module.parameters())


def _load(module: nn.Module, assign: bool = False) -> None:
    module.load_state_dict({k: v * 1.5 for k, v in module.state_dict().items()}, assign=assign)


def _set(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.set_(p.detach() * 1.5)


def _new_parameter(module: nn.Module) -> None:
    for owner in module.modules():
        for name, p in list(owner._parameters.items()):
            if p is not None:
                owner._parameters[name] = nn.Parameter(p.detach() * 1.5)


def _foreach(module: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(module.parameters()), 1.5)


def _swapped(module: nn.Module) -> None:
    for p in module.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 1.5))


WRITES: dict[str, Callable[[nn.Module], None]] = {
    "data": _assign_data,
    "in-place": _in_place,
    "inference": _inference,
    "copy_": _copy,
    "vector_to_parameters": _vector,
    "load_state_dict": _load,
    "load_state_dict-assign": lambda module: _load(module, assign=True),
    "set_": _set,
    "new parameters": _new_parameter,
    "foreach": _foreach,
    "swap_tensors": _swapped,
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_seen(name: str, trace: str, mode: str) -> None:
    model, oracle = pair(trace)
    x = torch.randn(4, 5)
    for module in (model, oracle):
        module.train(mode == "train")
        with torch.no_grad():
            before = module(x)
        if name == "swap_tensors" and isinstance(module, fxp.ParametrizedModule):
            # The private graph of an entry refers to the latents, and PyTorch swaps nothing that a graph refers to.
            module.invalidate()
        WRITES[name](module)
    same(model(x), oracle(x))
    assert not torch.allclose(before, oracle(x))
    for module in (model, oracle):
        module.zero_grad()
        loss_of(module, x).backward()
    for (name, p), (other, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        assert name == other and p.grad is not None and q.grad is not None
        same(p.grad, q.grad)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_are_seen(dtype: torch.dtype, trace: str) -> None:
    model, oracle = (fxp.transform(Net(), {"*.weight": fxp.weight_norm()}, trace=trace) for _ in range(2))
    oracle.load_state_dict(model.state_dict())
    x = torch.randn(4, 5)
    before = model(x)
    model.to(dtype)
    assert model(x.to(dtype)).dtype == dtype
    assert all(weight.dtype == dtype for weight in model.weights().values())
    torch.testing.assert_close(model(x.to(dtype)).double(), before, rtol=0.05, atol=0.05)
    loss_of(model, x.to(dtype)).backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
    # And back: the values went through the narrow type, for both.
    oracle.to(dtype)
    model.double()
    oracle.double()
    same(model(x), oracle(x))


def test_cast_of_a_submodule() -> None:
    model, _ = pair()
    x = torch.randn(4, 5)
    model(x)
    model.first.float()
    assert model.weights()["first.weight"].dtype == torch.float32
    assert model.weights()["second.weight"].dtype == torch.float64


def test_exponential_average_swapped_in_for_evaluation() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    outputs = []
    for module in (model, oracle):
        module.train()
        loss_of(module, x).backward()
        kept = [p.data.clone() for p in module.parameters()]
        for p in module.parameters():
            p.data.copy_(p.data * 0.5)
        module.eval()
        averaged = module(x).detach()
        for p, old in zip(module.parameters(), kept, strict=True):
            p.data.copy_(old)
        module.train()
        outputs.append((averaged, module(x).detach()))
    same(outputs[0][0], outputs[1][0])
    same(outputs[0][1], outputs[1][1])
    assert not torch.allclose(*outputs[1])


def test_a_write_nothing_can_see_and_invalidate() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    for module in (model, oracle):
        module.eval()
        module(x)
        for p in module.parameters():
            p.data.mul_(1.5)
    # The documented limit of the cache; should this ever pass, the page on caching has to change.
    assert not torch.allclose(model(x), oracle(x))
    model.invalidate()
    same(model(x), oracle(x))


def test_check_turns_it_into_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPARAM_CHECK", "1")
    model, _ = pair()
    x = torch.randn(4, 5)
    model.eval()
    model(x)
    model(x)
    next(iter(model.latents().values())).data.mul_(1.5)
    with pytest.raises(fxp.StaleWeightsError, match=r"first\.weight was cached.*call model\.invalidate\(\)"):
        model(x)
    model.invalidate()
    model(x)


def test_check_is_silent_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPARAM_CHECK", "1")
    model, _ = pair()
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, torch.randn(4, 5)).backward()
        optimizer.step()


def test_write_to_a_delivered_weight_is_undone_at_the_next_forward() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    with torch.no_grad():
        model.first.weight.zero_()
        with pytest.warns(RuntimeWarning, match=r"first\.weight was written in place, and the write does not last"):
            model.weights()["second.weight"].fill_(7.0)
    with pytest.warns(RuntimeWarning, match=r"second\.weight was written in place"):
        same(model(x), oracle(x))


def test_assignment_through_the_property() -> None:
    model, _ = pair()
    x = torch.randn(4, 5)
    model(x)
    value = torch.randn(5, 5)
    with torch.no_grad():
        model.first.weight = nn.Parameter(value)
    same(model.first.weight.detach(), value)
    same(model(x), model.second(torch.tanh(F.linear(x, value, model.first.bias))))
    assert "weight" not in model.first._parameters


class Scaled(nn.Module):
    """A map that reads a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0))
        self.rate = 1.0

    def forward(self, latent: Tensor) -> Tensor:
        return latent * self.factor * self.rate

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / (self.factor * self.rate)


@pytest.mark.parametrize("trace", TRACES)
def test_buffers_and_options_of_maps(trace: str) -> None:
    net, scaled = Net(), Scaled()
    model = fxp.transform(net, {"first.weight": scaled}, trace=trace)
    weight = net.first.weight.detach()
    same(model.first.weight.detach(), weight)
    scaled.factor.fill_(4.0)
    same(model.first.weight.detach(), 2 * weight)
    scaled.rate = 0.5
    same(model.first.weight.detach(), weight)
    scaled.register_buffer("factor", torch.tensor(8.0))
    same(model.first.weight.detach(), 2 * weight)


@pytest.mark.parametrize("trace", TRACES)
def test_closures_of_functions(trace: str) -> None:
    options = {"rate": 1.0}
    net = Net()
    model = fxp.transform(net, {"first.weight": lambda latent: latent * options["rate"]}, trace=trace)
    options["rate"] = 3.0
    model.invalidate()
    same(model.first.weight.detach(), 3 * net.first.weight.detach())


def test_freezing() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    loss_of(model, x).backward()
    model.zero_grad()
    names = model.freeze("first.*")
    assert names == ["first.parametrizations.weight.original0", "first.parametrizations.weight.original1"]
    for name, p in oracle.named_parameters():
        p.requires_grad_(name not in names)
    for module in (model, oracle):
        loss_of(module, x).backward()
    for (_, p), (_, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            same(p.grad, q.grad)
    assert not model.weights()["first.weight"].requires_grad
    model.unfreeze("first.*")
    model.zero_grad()
    loss_of(model, x).backward()
    assert all(p.grad is not None for p in model.parameters())


# --- autocast


class Mixed(nn.Module):
    """One layer used inside and outside an autocast region of its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = self.layer(x)
        return inside.float() + self.layer(x)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def autocast_pair(net: nn.Module) -> tuple[fxp.ParametrizedModule, nn.Module]:
    """A product, which autocast computes in its lower precision."""
    oracle = copy.deepcopy(net)

    class Square(nn.Module):
        def forward(self, latent: Tensor) -> Tensor:
            return latent @ latent

    parametrize.register_parametrization(oracle.layer, "weight", Square())  # type: ignore[arg-type]
    return fxp.transform(net, {"layer.weight": Square()}), oracle


@pytest.mark.parametrize("trace", TRACES)
def test_autocast_around_and_not(trace: str) -> None:
    with default_dtype(torch.float32):
        model, oracle = autocast_pair(Mixed())
        x = torch.randn(4, 6)
        for _ in range(2):
            assert torch.equal(model(x), oracle(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(model(x), oracle(x))
        for module in (model, oracle):
            loss_of(module, x).backward()
        for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
            # Where plain PyTorch adds two gradients in bfloat16, a private graph may add them in float32.
            torch.testing.assert_close(p.grad, q.grad, rtol=2**-7, atol=0.05)


def test_autocast_inside_the_forward_evaluates_once_per_mode() -> None:
    with default_dtype(torch.float32):
        model, _ = autocast_pair(Mixed())
        before = model.stats.refreshes
        for _ in range(5):
            model(torch.randn(4, 6))
        assert model.stats.refreshes - before <= 2


# --- counting


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
        def forward(ctx: Any, latent: Tensor) -> Tensor:  # type: ignore[override]
            calls[0] += 1
            return latent * 0.5

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
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
    net = Net()
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
    net = Net()
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
    def forward(ctx: Any, latent: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(latent)
        return latent * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
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


# --- adversarial training


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


# --- threads


def test_threads_read_one_entry() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    want = oracle(x).detach()
    before = model.stats.refreshes
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def read() -> None:
        try:
            start.wait()
            for _ in range(50):
                with torch.no_grad():
                    same(model(x), want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert model.stats.refreshes - before == 1


def test_threads_with_gradients_sum_up() -> None:
    model, oracle = pair()
    inputs = [torch.randn(4, 5) for _ in range(4)]
    failures: list[BaseException] = []
    found: dict[int, tuple[Tensor, ...]] = {}

    def train(number: int) -> None:
        try:
            for _ in range(10):
                found[number] = torch.autograd.grad(loss_of(model, inputs[number]), list(model.parameters()))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for number, x in enumerate(inputs):
        want = torch.autograd.grad(loss_of(oracle, x), list(oracle.parameters()))
        for a, b in zip(found[number], want, strict=True):
            same(a, b)


def test_grad_mode_of_one_thread_is_not_that_of_another() -> None:
    model, _ = pair()
    x = torch.randn(4, 5)
    flags: list[bool] = []
    with torch.no_grad():
        model(x)
        thread = threading.Thread(target=lambda: flags.append(model(x).requires_grad))
        thread.start()
        thread.join()
        flags.append(model(x).requires_grad)
    assert flags == [True, False]


# --- memory


def refs_to_entry(model: fxp.ParametrizedModule) -> list[weakref.ref[Tensor]]:
    """Weak references to the cached values of the present entry."""
    entry = next(iter(model._fxp_runtime._entries.values()))
    assert entry is not None
    return [weakref.ref(value) for value in entry.published.values]


def test_kept_losses_do_not_keep_old_weights() -> None:
    model, _ = pair()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses, weights = [], []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, torch.randn(4, 5))
        weights.append(refs_to_entry(model))
        loss.backward()
        optimizer.step()
        losses.append(loss)
    model(torch.randn(4, 5))
    gc.collect()
    assert [[value() for value in refs] for refs in weights] == [[None, None]] * 3


def test_kept_losses_do_not_keep_old_weights_when_another_forward_was_dropped() -> None:
    model, _ = pair()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses, weights = [], []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5))
        loss = loss_of(model, torch.randn(4, 5))
        weights.append(refs_to_entry(model))
        loss.backward()
        optimizer.step()
        losses.append(loss)
    model(torch.randn(4, 5))
    gc.collect()
    assert [[value() for value in refs] for refs in weights] == [[None, None]] * 3


def test_dropped_losses_and_kept_outputs_keep_nothing() -> None:
    model, _ = pair()
    weights, outputs = [], []
    for _ in range(3):
        loss_of(model, torch.randn(4, 5))
        outputs.append(model(torch.randn(4, 5)).detach())
        weights.append(refs_to_entry(model))
        model.invalidate()
    gc.collect()
    assert [[value() for value in refs] for refs in weights] == [[None, None]] * 3


def test_a_loss_before_its_backward_keeps_its_graph() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    loss = loss_of(model, x)
    model.invalidate()
    model(x)
    gc.collect()
    loss.backward()
    loss_of(oracle, x).backward()
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        same(p.grad, q.grad)


@pytest.mark.parametrize("graph", [True, False])
def test_a_model_is_collected(graph: bool) -> None:
    model, _ = pair()
    with torch.set_grad_enabled(graph):
        model(torch.randn(4, 5))
    latent = weakref.ref(next(iter(model.latents().values())))
    del model
    gc.collect()
    assert latent() is None
