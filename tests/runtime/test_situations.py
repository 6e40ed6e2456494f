"""Whatever a training script does between two reads of a weight: the model against the same one under
``torch.nn.utils.parametrize``, which computes its weights at each read. Values, gradients and errors are the same.
"""
# mypy: disable-error-code="operator,union-attr,arg-type,call-overload,has-type,list-item,misc", warn-unused-ignores=False

from __future__ import annotations

import copy
import os
import re
import signal
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, stack_module_state
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

import fxparam as fxp

TRACES: list[Any] = ["live", "auto"]
X, Y = (torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))

Case = Callable[[Any], list[Any]]
CASES: dict[str, Case] = {}
ERRORS: dict[str, Case] = {}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    torch.__future__.set_swap_module_params_on_conversion(False)


class Net(nn.Module):
    """``inside`` runs between two uses of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def pair(trace: Any, make: Callable[[], nn.Module] = Net) -> tuple[Any, Any]:
    """A transformed model and its oracle."""
    torch.manual_seed(0)
    oracle: Any = make()
    owner = oracle if isinstance(oracle, Net) else oracle.net
    parametrizations.weight_norm(owner.first)
    parametrizations.orthogonal(owner.second, orthogonal_map="cayley")
    return fxp.transform(copy.deepcopy(oracle), trace=trace), oracle


def loss_of(m: Any, x: Tensor = X) -> Tensor:
    return m(x).pow(2).sum()


def grads(m: Any) -> list[Any]:
    return [None if p.grad is None else p.grad.clone() for p in m.parameters()]


def outcome(m: Any) -> list[Any]:
    """Values and gradients from here on."""
    m.zero_grad()
    loss_of(m).backward()
    return [m(Y).detach(), *grads(m)]


def latents(m: Any) -> list[nn.Parameter]:
    return [parameter for name, parameter in m.named_parameters() if "parametrizations" in name]


def forget(m: Any) -> None:
    """The next read computes."""
    if isinstance(m, fxp.ParametrizedModule):
        m.invalidate()


def same(got: Sequence[Any], want: Sequence[Any]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
        else:
            assert one == other


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# --- steps that no version tells of


def raw_fused(parameters: Sequence[Tensor]) -> None:
    options = {"weight_decay": 0.0, "momentum": 0.0, "lr": 0.1, "dampening": 0.0, "nesterov": False, "maximize": False}
    torch._fused_sgd_(parameters, [p.grad for p in parameters], [], is_first_step=True, **options)


@case
def numpy_views_written(m: Any) -> list[Any]:
    views = [(p, p.detach().numpy()) for p in m.parameters()]
    for _ in range(3):
        m.zero_grad(set_to_none=True)
        loss_of(m).backward()
        for p, view in views:
            view -= 0.1 * p.grad.numpy()
    return outcome(m)


@case
def data_added_to(m: Any) -> list[Any]:
    for _ in range(3):
        m.zero_grad(set_to_none=True)
        loss_of(m).backward()
        for p in m.parameters():
            p.data.add_(p.grad, alpha=-0.1)
    return outcome(m)


@case
def raw_fused_kernel(m: Any) -> list[Any]:
    for _ in range(3):
        m.zero_grad(set_to_none=True)
        (loss_of(m) + loss_of(m, Y)).backward()
        raw_fused(list(m.parameters()))
    return outcome(m)


@case
def two_autocast_states_and_a_raw_kernel(m: Any) -> list[Any]:
    """The backward is that of one autocast state; the values in the other are as old."""
    for _ in range(3):
        m.zero_grad(set_to_none=True)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            metric = m(X)
        loss_of(m).backward()
        raw_fused(list(m.parameters()))
    return [metric, *grads(m)]


@case
def step_assigned_on_the_instance(m: Any) -> list[Any]:
    optimizer = torch.optim.SGD(m.parameters(), 0.1, fused=True)

    def step(self: torch.optim.Optimizer) -> None:
        raw_fused(self.param_groups[0]["params"])

    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        loss_of(m).backward()
        optimizer.step()
    return outcome(m)


def flatten(parameters: Sequence[Tensor]) -> Tensor:
    """One flat tensor; the parameters and their gradients become views into it and into its gradient."""
    flat = torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()
    flat.grad = torch.zeros_like(flat)
    sizes = [p.numel() for p in parameters]
    for p, data, gradient in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        p.data, p.grad = data.view_as(p), gradient.view_as(p)
    return flat


def train_flat(m: Any, flat: Tensor, held: Sequence[Tensor], **options: Any) -> list[Any]:
    """Gradients are never None: nothing but the step of the flat tensor tells."""
    optimizer = torch.optim.SGD([flat, *held], 0.1, **options)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(m).backward()
        optimizer.step()
    return [m(Y).detach(), flat.detach()]


@case
def flat_master_buffer(m: Any) -> list[Any]:
    return train_flat(m, flatten(list(m.parameters())), [], foreach=False)


@case
def flat_master_buffer_fused(m: Any) -> list[Any]:
    return train_flat(m, flatten(list(m.parameters())), [], fused=True)


@case
def flat_latents_beside_other_parameters(m: Any) -> list[Any]:
    biases = [p for name, p in m.named_parameters() if name.endswith("bias")]
    for bias in biases:
        bias.grad = torch.zeros_like(bias)
    return train_flat(m, flatten(latents(m)), biases, fused=True)


@case
def flat_latents_beside_another_model(m: Any) -> list[Any]:
    other, _ = pair("live")
    loss_of(other).backward()
    return train_flat(m, flatten(list(m.parameters())), list(other.parameters()), fused=True)


@case
def flat_master_copies(m: Any) -> list[Any]:
    """As mixed precision does it: the step is of a copy, which is then copied back."""
    flat = nn.utils.parameters_to_vector(m.parameters()).detach().requires_grad_()
    optimizer = torch.optim.SGD([flat], 0.1, fused=True)
    for _ in range(3):
        m.zero_grad(set_to_none=False)
        loss_of(m).backward()
        flat.grad = torch.cat([p.grad.flatten() for p in m.parameters()])
        optimizer.step()
        nn.utils.vector_to_parameters(flat.detach(), m.parameters())
    return outcome(m)


class _ThroughData(torch.optim.Optimizer):
    """An optimizer of the user's own that no version tells of."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-0.1)


@case
def optimizers_around_optimizers(m: Any) -> list[Any]:
    """A scaler, a schedule, an optimizer of one's own; gradients stay."""
    own = _ThroughData(m.parameters())
    fused = torch.optim.Adam(m.parameters(), 0.1, fused=True)
    schedule, scaler = torch.optim.lr_scheduler.StepLR(fused, 1), torch.amp.GradScaler("cpu")
    seen = []
    for _ in range(3):
        fused.zero_grad(set_to_none=False)
        scaler.scale(loss_of(m)).backward()
        scaler.step(fused)
        scaler.update()
        schedule.step()
        seen.append(m(X).detach())
        own.step()
        seen.append(m(X).detach())
    return [*seen, *outcome(m)]


@case
def averaged_models(m: Any) -> list[Any]:
    average = torch.optim.swa_utils.AveragedModel(m)
    optimizer = torch.optim.SGD(m.parameters(), 0.1, fused=True)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(m).backward()
        optimizer.step()
        average.update_parameters(m)
        seen.append(average(X).detach())
    return [*seen, *outcome(m)]


@case
def average_swapped_in_through_data(m: Any) -> list[Any]:
    loss_of(m).backward()
    kept = [p.detach().clone() for p in m.parameters()]
    for p in m.parameters():
        p.data.copy_(0.5 * p.data)
    m.eval()
    averaged = m(X).detach()
    for p, value in zip(m.parameters(), kept, strict=True):
        p.data.copy_(value)
    m.train()
    return [averaged, *outcome(m)]


# --- latents replaced


@case
def vector_to_parameters(m: Any) -> list[Any]:
    m(X)
    nn.utils.vector_to_parameters(1.5 * nn.utils.parameters_to_vector(m.parameters()).detach(), m.parameters())
    return outcome(m)


@case
def data_assigned_again_and_again(m: Any) -> list[Any]:
    seen = []
    for number in range(6):
        m.train(number % 2 == 0)
        with torch.no_grad():
            m(X)
        for p in latents(m):
            for _ in range(3):
                p.data = p.data.roll(1, 0).cos()
        seen.append(m(X).detach())
    return [*seen, *outcome(m.train())]


@case
def addresses_exchanged(m: Any) -> list[Any]:
    """No sum over addresses, versions or shapes tells."""
    a = m.first.parametrizations.weight.original1
    b = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(5)))
    first = m(X).detach()
    a.data, b.data = b.data, a.data
    second = outcome(m)
    a.data, b.data = b.data, a.data
    return [first, *second, *outcome(m)]


@case
def new_latents(m: Any) -> list[Any]:
    loss_of(m).backward()
    m.first.parametrizations.weight.original1 = nn.Parameter(torch.eye(5) + 0.5)
    found = outcome(m)
    m.first.parametrizations.weight.original0 = nn.Parameter(torch.full((5, 1), 2.0), requires_grad=False)
    return [*found, *outcome(m)]


@case
def new_latents_of_another_shape(m: Any) -> list[Any]:
    m(X)
    latent = m.first.parametrizations.weight
    latent.original0, latent.original1 = nn.Parameter(torch.ones(7, 1)), nn.Parameter(torch.ones(7, 5).cumsum(0).cos())
    m.first.bias = nn.Parameter(torch.ones(7))
    m.second = nn.Linear(7, 2)
    nn.init.constant_(m.second.weight, 0.3)
    nn.init.zeros_(m.second.bias)
    return outcome(m)


def _loaded(m: Any, **options: Any) -> list[Any]:
    loss_of(m).backward()
    m.load_state_dict({name: 1.5 * value for name, value in m.state_dict().items()}, **options)
    return outcome(m)


@case
def load_state_dict(m: Any) -> list[Any]:
    return _loaded(m)


@case
def load_state_dict_assigned(m: Any) -> list[Any]:
    return _loaded(m, assign=True)


@case
def load_state_dict_of_inference_tensors(m: Any) -> list[Any]:
    m(X)
    with torch.inference_mode():
        state = {name: 1.5 * value for name, value in m.state_dict().items()}
    m.load_state_dict(state)
    return outcome(m)


@case
def load_state_dict_assigned_of_another_dtype(m: Any) -> list[Any]:
    m(X)
    m.load_state_dict({name: value.bfloat16().double() for name, value in m.state_dict().items()}, assign=True)
    first = outcome(m)
    m.load_state_dict({name: value.float() for name, value in m.state_dict().items()}, assign=True)
    return [*first, m(X.float()).dtype, *(weight.dtype for weight in (m.first.weight, m.second.weight))]


@case
def made_under_inference_mode(m: Any) -> list[Any]:
    with torch.inference_mode():
        values = [p * 1.5 for p in m.parameters()]
        state = dict(zip(dict(m.named_parameters()), values, strict=True))
        m.load_state_dict({**m.state_dict(), **state}, assign=True)
        return [m(X).clone(), m(Y).clone()]


@contextmanager
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@case
def swapped_by_to(m: Any) -> list[Any]:
    loss_of(m).backward()
    m.zero_grad()
    with swapping():
        m.to(torch.float32)
        m.to(torch.float64)
    return outcome(m)


@case
def swapped_by_to_of_a_submodule(m: Any) -> list[Any]:
    loss_of(m).backward()
    m.zero_grad()
    with swapping():
        m.first.to(torch.float32)
        m.first.to(torch.float64)
    return outcome(m)


@case
def swapped_by_load_state_dict(m: Any) -> list[Any]:
    with swapping():
        return _loaded(m)


@case
def swapped_by_load_state_dict_of_a_submodule(m: Any) -> list[Any]:
    loss_of(m).backward()
    with swapping():
        m.first.load_state_dict({name: 1.5 * value for name, value in m.first.state_dict().items()})
    return outcome(m)


# --- modes


@case
def inference_first_then_training(m: Any) -> list[Any]:
    with torch.inference_mode():
        first = m(X).sum().item()
        _ = m.first.weight
    return [first, *outcome(m)]


@case
def read_without_gradient_first(m: Any) -> list[Any]:
    with torch.no_grad():
        weight = m.first.weight
    loss_of(m).backward()
    return [weight, weight.requires_grad, *grads(m)]


@case
def read_by_another_thread_without_gradient_first(m: Any) -> list[Any]:
    def read() -> None:
        with torch.no_grad():
            m(X)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    return outcome(m)


@case
def dtypes_in_turn(m: Any) -> list[Any]:
    """Layer by layer too; the orthogonal map has no half precision."""
    seen: list[Any] = []
    for dtype in (torch.half, torch.bfloat16, torch.float, torch.double):
        m.first.to(dtype)
        seen += [m.first.weight.double(), m.first.weight.dtype, m.second.weight]
    m.float()
    seen += [m(X.float()).dtype, m.second.weight.dtype]
    return [*seen, *outcome(m.double())]


@case
def autocast_on_off_and_dtypes(m: Any) -> list[Any]:
    m.float()
    seen: list[Any] = []
    for dtype in (None, torch.bfloat16, torch.float16, None, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            seen.append(m(X.float()).detach())
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(1.1)
    return [*seen, *(value.dtype for value in seen), *outcome(m.double())]


@case
def frozen_and_unfrozen_in_between(m: Any) -> list[Any]:
    optimizer = torch.optim.SGD(m.parameters(), 0.1, fused=True)
    seen = []
    for number in range(5):
        for p in m.first.parametrizations.weight.parameters():
            p.requires_grad_(number % 2 == 0)
        optimizer.zero_grad()
        loss_of(m).backward()
        optimizer.step()
        seen += [m(X).detach(), *grads(m)]
    m.requires_grad_(False)
    seen.append(m(X).requires_grad)
    m.requires_grad_(True)
    return [*seen, *outcome(m)]


@case
def buffers_of_a_map_written(m: Any) -> list[Any]:
    m(X)
    base = m.second.parametrizations.weight[0].base
    with torch.no_grad():
        base.copy_(base.roll(1, 0))
    first = outcome(m)
    m.second.parametrizations.weight[0].base = -base
    second = outcome(m)
    base.data = base.data.flip(0)
    return [*first, *second, *outcome(m)]


@case
def modules_swapped(m: Any) -> list[Any]:
    m(X)
    new = copy.deepcopy(m.second.parametrizations.weight[0])
    new.base.mul_(-1)
    m.second.parametrizations.weight[0] = new
    first = outcome(m)
    m.first = nn.Linear(5, 5)
    for p in m.first.parameters():
        nn.init.constant_(p, 0.3)
    return [*first, *outcome(m)]


@case
def moved_to_meta_and_back(m: Any) -> list[Any]:
    state = {name: value.clone() for name, value in m.state_dict().items()}
    m(X)
    m.to("meta")
    shape = m(X.to("meta")).shape
    m.to_empty(device="cpu")
    m.load_state_dict(state)
    return [shape, *outcome(m)]


@case
def lossy_saved_tensor_hooks_around_the_first_read(m: Any) -> list[Any]:
    forget(m)
    with saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.double()):
        m(X)
    return outcome(m)


@case
def counted_flops(m: Any) -> list[Any]:
    with FlopCounterMode(display=False):
        loss = loss_of(m)
    loss.backward()
    return grads(m)


@case
def exported_before_the_first_read(m: Any) -> list[Any]:
    forget(m)
    exported = torch.export.export(m, (X,)).module()(X).detach()
    return [exported, *(type(weight) for weight in (m.first.weight, m.second.weight)), *outcome(m)]


@case
def inside_cached(m: Any) -> list[Any]:
    """PyTorch's own cache is stale in all of these; around a transformed model it does nothing, and so nothing wrong."""
    context = parametrize.cached() if isinstance(m, fxp.ParametrizedModule) else torch.enable_grad()
    optimizer = torch.optim.SGD(m.parameters(), 0.1, fused=True)
    with context:
        with torch.no_grad():
            seen = [m(X)]
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(m).backward()
            loss_of(m, Y).backward()
            optimizer.step()
            seen.append(m(X).detach())
        m.load_state_dict({name: 1.5 * value for name, value in m.state_dict().items()})
        seen.append(m(X).detach())
        m.double()
        return [*seen, *outcome(m)]


@case
def ensemble(m: Any) -> list[Any]:
    other = copy.deepcopy(m)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3)
    stacked, buffers = stack_module_state([m, other])
    base = copy.deepcopy(m).to("meta")
    out = torch.vmap(lambda p, b: functional_call(base, (p, b), (X,)))(stacked, buffers)
    out.sum().backward()
    return [out.detach(), *(value.grad for value in stacked.values()), *outcome(m), other(X).detach()]


# --- parametrizations registered and removed later


@case
def a_map_appended(m: Any) -> list[Any]:
    m(X)
    m.first.parametrizations.weight.append(Doubled())
    return outcome(m)


# Of vmap, about the ensemble's weight norm.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", list(CASES))
def test_as_uncached(name: str, trace: Any) -> None:
    model, oracle = pair(trace)
    same(CASES[name](model), CASES[name](oracle))


@pytest.mark.parametrize("trace", TRACES)
def test_registrations_beside_a_computed_weight_are_refused(trace: Any) -> None:
    model, oracle = pair(trace)
    same(outcome(model), outcome(oracle))
    names, kind = [name for name, _ in model.named_parameters()], type(model.first)
    with pytest.raises(fxp.SpecError, match=r"cannot register on this Linear: fxparam computes its weight\. Register before"):
        parametrize.register_parametrization(model.first, "bias", nn.Tanh())
    assert [name for name, _ in model.named_parameters()] == names and type(model.first) is kind
    same(outcome(model), outcome(oracle))


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("change", [parametrize.register_parametrization, parametrize.remove_parametrizations])
def test_registrations_on_a_computed_weight_are_refused(change: Any, trace: Any) -> None:
    model, oracle = pair(trace)
    arguments = [Doubled()] if change is parametrize.register_parametrization else []
    with pytest.raises(ValueError, match="does not have a paramet"):
        change(model.first, "weight", *arguments)
    same(outcome(model), outcome(oracle))


@pytest.mark.parametrize("trace", TRACES)
def test_models_that_live_shortly(trace: Any) -> None:
    for number in range(100):
        oracle: Any = parametrizations.weight_norm(nn.Linear(3, 3))
        model = fxp.transform(copy.deepcopy(oracle), trace=trace)
        with torch.no_grad():
            for m in (model, oracle):
                m.parametrizations.weight.original1.mul_(1 + 0.1 * number)
                m.parametrizations.weight.original0.mul_(2)
        same([model.weight.detach()], [oracle.weight.detach()])
        del model, oracle


class _WritesInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        before = self.net(x)
        with torch.no_grad():
            for p in self.net.parameters():
                p.mul_(1.5)
        return torch.cat([before.detach(), self.net(x)])


class _TrainsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            self.net.zero_grad()
            loss_of(self.net, x).backward()
            with torch.no_grad():
                for p in self.net.parameters():
                    p -= 0.1 * p.grad
        return self.net(x)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", ["latents_written_inside_a_forward", "trained_inside_a_forward"])
def test_latents_that_change_during_a_forward(name: str, trace: Any) -> None:
    make = {"latents_written_inside_a_forward": _WritesInside, "trained_inside_a_forward": _TrainsInside}[name]
    model, oracle = pair(trace, make)
    same([model(X).detach(), model(Y).detach()], [oracle(X).detach(), oracle(Y).detach()])


# --- every layer, every map: warmed without gradient, and other tensors for one call

LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[Tensor, ...]]] = {
    "linear": (lambda: nn.Linear(4, 4), "weight", (torch.randn(3, 4),)),
    "conv": (lambda: nn.Conv1d(4, 4, 4), "weight", (torch.randn(2, 4, 9),)),
    "cell": (lambda: nn.RNNCell(4, 4), "weight_hh", (torch.randn(3, 4), torch.randn(3, 4))),
    "lstm": (lambda: nn.LSTM(4, 4), "weight_hh_l0", (torch.randn(5, 3, 4),)),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", (torch.randn(5, 3, 4),) * 3),
}
MAPS: dict[str, Callable[[Any, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda layer, name: parametrizations.spectral_norm(layer, name).eval(),
    "matrix_exp": lambda layer, name: parametrizations.orthogonal(layer, name, "matrix_exp"),
    "householder": lambda layer, name: parametrizations.orthogonal(layer, name, "householder"),
    "function": lambda layer, name: parametrize.register_parametrization(layer, name, Doubled()),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_and_map(kind: str, name: str, trace: Any) -> None:
    make, weight, inputs = LAYERS[kind]
    inputs = tuple(x.to(torch.float64) for x in inputs)
    oracle = MAPS[name](make(), weight)
    model = fxp.transform(copy.deepcopy(oracle), trace=trace)

    def first(m: Any, tensors: Any = None) -> Tensor:
        found = m(*inputs) if tensors is None else functional_call(m, tensors, inputs)
        return found if isinstance(found, Tensor) else found[0]

    results = []
    for m in (model, oracle):
        with torch.no_grad():
            seen = [first(m)]
            seen.append(first(m, {key: 1.5 * value for key, value in m.named_parameters()}))
        others = {key: (2 * value.detach()).requires_grad_() for key, value in m.named_parameters()}
        first(m, others).pow(2).sum().backward()
        first(m).pow(2).sum().backward()
        results.append([*seen, *(value.grad for value in others.values()), *grads(m), first(m).detach()])
    same(*results)
    assert all(value is not None for value in results[1])


# --- errors: types and texts


def attempt(function: Callable[[], object]) -> str:
    """The error's type and text. Which node made a tensor, and its number of writes so far, are nobody's business."""
    try:
        function()
    except Exception as error:
        text = re.sub(r", which is output \d+ of \w+,", "", f"{type(error).__name__}: {error}")
        return re.sub(r"is at version \d+; expected version \d+ instead", "is at another version", text)
    return "no error"


def error(function: Case) -> Case:
    ERRORS[function.__name__] = function
    return function


@error
def second_backward(m: Any) -> list[Any]:
    loss = loss_of(m)
    loss.backward()
    return [attempt(loss.backward), *grads(m)]


@error
def second_grad(m: Any) -> list[Any]:
    loss, parameters = loss_of(m), list(m.parameters())
    torch.autograd.grad(loss, parameters)
    return [attempt(lambda: torch.autograd.grad(loss, parameters))]


@error
def second_backward_of_a_weight(m: Any) -> list[Any]:
    weight = m.first.weight
    weight.sum().backward()
    return [attempt(weight.sum().backward)]


@error
def latents_written_before_backward(m: Any) -> list[Any]:
    found = []
    for latent in latents(m):
        loss = loss_of(m)
        with torch.no_grad():
            latent.mul_(1.1)
        found.append(attempt(loss.backward))
    return [*found, *outcome(m)]


@error
def latents_loaded_before_backward(m: Any) -> list[Any]:
    loss = loss_of(m)
    m.load_state_dict(m.state_dict())
    return [attempt(loss.backward), *outcome(m)]


@error
def stepped_before_backward(m: Any) -> list[Any]:
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    first, second = loss_of(m), loss_of(m, Y)
    first.backward()
    optimizer.step()
    m(X)
    return [attempt(second.backward), *outcome(m)]


@error
def weights_written_before_backward(m: Any) -> list[Any]:
    found = []
    for gradient in (True, False):
        weight = m.first.weight
        loss = weight.pow(2).sum()
        with torch.set_grad_enabled(gradient):
            weight.add_(1.0)
        found.append(attempt(loss.backward))
    return [*found, *outcome(m)]


@error
def gradients_of_what_was_not_used(m: Any) -> list[Any]:
    weight = m.first.weight
    found = [attempt(lambda: torch.autograd.grad(loss_of(m), weight))]
    m.first.bias.requires_grad_(False)
    found.append(attempt(lambda: torch.autograd.grad(loss_of(m), m.first.bias)))
    m.requires_grad_(False)
    return [*found, attempt(loss_of(m).backward)]


@error
def without_gradient(m: Any) -> list[Any]:
    with torch.no_grad():
        loss = loss_of(m)
    with torch.inference_mode():
        other = loss_of(m)
    return [attempt(loss.backward), attempt(other.backward), *outcome(m)]


@error
def what_a_computed_weight_refuses(m: Any) -> list[Any]:
    return [
        attempt(lambda: m.first.weight.numpy()),
        attempt(lambda: copy.deepcopy(m.first.weight)),
        attempt(lambda: m.first.weight.requires_grad_(False)),
        attempt(lambda: m(torch.randn(3, 7))),
        attempt(lambda: m.first(X, X).sum()).replace("ParametrizedLinear", "Linear"),
        *outcome(m),
    ]


@error
def missing_and_unexpected_keys(m: Any) -> list[Any]:
    state = m.state_dict()
    del state["first.bias"]
    with_more = {**m.state_dict(), "third.weight": torch.ones(2)}
    wrong = {**m.state_dict(), "second.bias": torch.ones(7)}
    return [attempt(lambda given=given: m.load_state_dict(given)) for given in (state, with_more, wrong)] + outcome(m)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", list(ERRORS))
def test_errors_are_those_of_pytorch(name: str, trace: Any) -> None:
    model, oracle = pair(trace)
    warned = pytest.warns(RuntimeWarning, match="written in place") if name.startswith("weights_written") else nullcontext()
    want = ERRORS[name](oracle)
    with warned:
        got = ERRORS[name](model)
    assert any(isinstance(one, str) and "Error: " in one for one in want)
    same(got, want)


class _Shared(nn.Module):
    """Two weights through a node that both need for their backward."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        shared = a.exp()
        return shared * b, shared + 1.0


def test_losses_of_two_weights_that_share_a_node() -> None:
    net = nn.Module()
    net.a, net.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    start = [net.a.detach().clone(), net.b.detach().clone()]
    model = fxp.transform(net, {fxp.joint("a", "b"): fxp.custom(_Shared(), init=lambda weights: tuple(start))}, trace="live")
    own = [value.clone().requires_grad_() for value in start]
    results = []
    for latent, (first, second) in ((list(model.parameters()), model.weights().values()), (own, _Shared()(*own))):
        first.sum().backward()
        results.append([attempt(second.sum().backward), *(p.grad for p in latent)])
    same(*results)
    assert "a second time" in results[1][0]


# --- what the cache is made of


@pytest.mark.parametrize("trace", TRACES)
def test_reads_of_one_forward_share_their_way_to_the_latents(trace: Any) -> None:
    class Often(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.layer, self.times = parametrizations.weight_norm(nn.Linear(4, 4)), times

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = torch.tanh(F.linear(x, self.layer.weight))
            return x

    def functions(times: int) -> int:
        loss, found = fxp.transform(Often(times), trace=trace)(torch.randn(2, 4)).sum(), set()
        nodes: list[Any] = [loss.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in found:
                found.add(node)
                nodes += [other for other, _ in node.next_functions]
        return sum(isinstance(node, torch.autograd.function.BackwardCFunction) for node in found)

    assert functions(100) == functions(1) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_while_another_thread_computes() -> None:
    model = fxp.transform(nn.Linear(4, 4), {"weight": fxp.skew()})
    want = model.weight.detach()
    model._fxp_runtime.drop_entries()
    computing, finish = threading.Event(), threading.Event()

    def compute() -> None:
        with model._fxp_runtime._lock:
            computing.set()
            finish.wait(60)

    thread = threading.Thread(target=compute)
    thread.start()
    assert computing.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if torch.equal(model.weight.detach(), want) else 1)
    _, status = os.waitpid(child, 0)
    finish.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_storages_are_kept_while_their_address_is_a_key() -> None:
    """A freed one is soon had again, at the same address and with other values."""
    model, _ = pair("live")
    model.eval()
    with torch.no_grad():
        model(X)
    latent = model.first.parametrizations.weight.original1
    before = StorageWeakRef(latent.untyped_storage())
    latent.data = latent.detach() * 2
    assert not before.expired()
    with torch.no_grad():
        model(X)
    assert before.expired()
