"""Modules within a recorded model: shared, looped over, called in other ways, replaced and patched; copies of the model."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import copy
import dataclasses
import pickle
from types import MethodType
from typing import Any

import pytest
import torch
from recording.common import (
    WAYS,
    Base,
    Case,
    N,
    build,
    cases,
    changes,
    check,
    doubles,
    step,
    transformed,
    x,
)
from torch import Tensor, nn
from torch.nn import functional as F

import fxparam as fxp


class Mixes(Base):
    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * self.gain

    def other(self, x: Tensor) -> Tensor:
        return self.mixed(x).cos()


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Mixes(), Mixes()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Shared(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + self.a(x[:2]).sum()


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixes() for _ in range(3))
        self.rounds = 2

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.rounds):
            for layer in self.layers:
                x = torch.tanh(layer(x))
        return x


class Listed(nn.Module):
    """A plain list of modules that are registered elsewhere as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Mixes(), Mixes()
        self.order = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x


class OtherMethods(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.a.other(x) + self.b.forward(x) + self.step_of(x)

    def step_of(self, x: Tensor) -> Tensor:
        return self.a(x)


class OthersWeight(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(x), self.a.lin.weight, self.a.lin.bias) + x @ F.normalize(self.a.raw, dim=0)


class Recursive(Base):
    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        return self.mixed(x) if depth == 0 else self(self.mixed(x), depth - 1) / 2


class Generating(Holder):
    def steps(self, x: Tensor) -> Any:
        for layer in (self.a, self.b):
            x = layer(x)
            yield x

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.steps(x))


class ReturnsNone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.silent, self.a = Silent(), Mixes()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.silent(x) is None else x


class Silent(Base):
    def forward(self, x: Tensor) -> None:
        self.mixed(x)


class Tied(Base):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Linear(N, N)
        self.two.weight = self.raw

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.mixed(x))


class HeldTwice(Base):
    def __init__(self) -> None:
        super().__init__()
        self.parts = [self.raw]

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) + x @ F.normalize(self.parts[0], dim=1)


class Masked(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * self.mask if hasattr(self, "mask") else self.mixed(x)


class ByName(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gain_1 = 1.0
        self.other = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * getattr(self, f"gain_{1}") * self.__dict__["other"]


class CallsItself(Base):
    """Does more than its forward when it is called."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x * 2) + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)


class CallsForward(Base):
    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)


def doubled(self: Any, x: Tensor) -> Tensor:
    return self.mixed(x) * 2


def tripled(self: Any, x: Tensor) -> Tensor:
    return self.mixed(x) * 3


def patch(name: str, value: Any) -> Any:
    def change(model: nn.Module) -> None:
        setattr(Mixes, name, value)

    return change


FORWARD = Mixes.forward


def reset() -> None:
    Mixes.forward, Mixes.gain = FORWARD, 1.0


def fresh() -> nn.Module:
    torch.manual_seed(7)
    return Plain().double()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(N, N))

    def forward(self, x: Tensor) -> Tensor:
        return x @ F.normalize(self.raw, dim=0)


def table() -> nn.Parameter:
    torch.manual_seed(8)
    return nn.Parameter(torch.randn(N, N, dtype=torch.float64))


def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output * 2


HOOKED = "model.a.register_forward_hook(hook)"
FORWARDS = (
    "model.a.forward = MethodType(doubled, model.a)",
    "model.a.forward = MethodType(tripled, model.a)",
    "del model.a.forward",
)


def case(make: Any, *parts: Any, graph: bool | None = True, **names: Any) -> Case:
    return Case(make.__name__, make, changes(*parts, **names) if parts else (), graph=graph, reset=reset)


def names(number: int, one: Case) -> Case:
    return dataclasses.replace(one, name=f"{one.name} {number}")


PARTS = [
    *(case(make) for make in (Holder, Shared, Looped, Listed, OtherMethods, OthersWeight, Generating)),
    case(ReturnsNone, graph=None),
    case(Recursive, step),
    case(Looped, "model.rounds = 3", "model.rounds = 1", fresh=fresh),
    case(Looped, "model.layers.append(fresh())", fresh=fresh),
    case(Listed, "model.order.reverse()", "model.order.pop()"),
    case(Holder, "model.a = fresh()", "model.b = nn.Identity()", fresh=fresh),
    case(Holder, "model.a.raw = table()", step, "model.a.raw.data.mul_(2)", step, table=table),
    case(
        Holder,
        HOOKED,
        "model.a._forward_hooks.clear()",
        "model.b.register_forward_pre_hook(lambda m, a: (a[0] * 2,))",
        hook=hook,
        graph=None,
    ),
    case(Holder, "model.a.register_full_backward_hook(lambda m, i, o: (i[0] * 2,))", graph=None),
    case(Holder, *FORWARDS, MethodType=MethodType, doubled=doubled, tripled=tripled, graph=None),
    case(
        Holder,
        patch("forward", doubled),
        patch("forward", tripled),
        patch("forward", FORWARD),
    ),
    case(Holder, patch("gain", 2.0), "model.a.gain = 3.0", patch("gain", 4.0)),
    case(Holder, "model.a.eval()", "model.a.requires_grad_(False)", "model.a.requires_grad_(True)"),
    case(Tied, step, "model.two.weight = table()", step, table=table),
    case(
        HeldTwice,
        step,
        "model.raw = table()",
        step,
        table=table,
        graph=None,
    ),
    case(Masked, "model.register_buffer('mask', torch.ones(4).double() * 2)", "del model.mask"),
    case(ByName, "model.gain_1 = 2.0", "model.other = 3.0"),
    case(CallsItself, step, graph=None),
    case(CallsForward, step, graph=None),
]
CASES = [names(number, one) for number, one in enumerate(PARTS)]


@pytest.mark.parametrize(("case", "way"), cases(CASES))
def test_modules_of_a_recorded_model(case: Case, way: str) -> None:
    check(case, way)


HOLDER = Case("holder", Holder)


def recorded(way: str) -> tuple[nn.Module, fxp.ParametrizedModule]:
    model = transformed(HOLDER, way)
    for _ in range(3):
        model(x())
    return build(HOLDER, region=way.startswith("region"), parametrized=True), model


def same(model: nn.Module, eager: nn.Module, dtype: torch.dtype = torch.float64, tolerance: float = 1e-12) -> None:
    """Outputs and gradients, twice."""
    for rows in (5, 3, 5):
        value = torch.randn(rows, N, dtype=dtype)
        for one in (model, eager):
            one.zero_grad()
            one(value).square().sum().backward()
        torch.testing.assert_close(model(value), eager(value), rtol=tolerance, atol=tolerance)
        got, want = ({name: p.grad for name, p in one.named_parameters()} for one in (model, eager))
        torch.testing.assert_close({name: got[name] for name in want}, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@doubles()
def test_copies_of_a_recorded_model_are_models_of_their_own(way: str, copied: Any) -> None:
    eager, model = recorded(way)
    other = copied(model)
    same(other, eager)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    same(other, eager)


@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_other_precisions_and_checkpoints(way: str) -> None:
    eager, model = recorded(way)
    same(model.float(), eager.float(), torch.float32, 1e-4)
    same(model.double(), eager.double(), tolerance=1e-5)
    state = {name: value * 1.5 for name, value in eager.state_dict().items()}
    eager.load_state_dict(state)
    model.load_state_dict(state, strict=False)
    same(model, eager)
    model.load_state_dict({name: value / 2 for name, value in state.items()}, strict=False, assign=True)
    eager.load_state_dict({name: value / 2 for name, value in state.items()}, assign=True)
    same(model, eager)


@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_restored_and_folded_models_carry_nothing_of_a_recording(way: str) -> None:
    eager, model = recorded(way)
    plain = fxp.restore(model)
    assert all("_compiled_call_impl" not in vars(module) for module in plain.modules())
    value = x()
    torch.testing.assert_close(plain(value), eager(value), rtol=1e-12, atol=1e-12)
    if way.startswith("model"):
        torch.testing.assert_close(fxp.fold(model)(value), eager(value), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_replicas_run_their_own_modules(way: str) -> None:
    """What ``DataParallel`` does: copies of all modules whose parameters are other tensors."""
    _, model = recorded(way)
    value = x()
    replica = _replica(model)
    loss = replica(value).square().sum()
    loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    _, other = recorded(way)
    other(value).square().sum().backward()
    want = {name: parameter.grad for name, parameter in other.named_parameters()}
    torch.testing.assert_close({n: got[n] if got[n] is None else got[n] / 4 for n in want}, want, rtol=1e-12, atol=1e-12)


def _replica(model: nn.Module) -> nn.Module:
    """A replica whose parameters are the model's, in a way that makes their gradients four times as large."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            twin._modules[name] = copies[child]
            setattr(twin, name, copies[child])
        for name, parameter in module._parameters.items():
            value = None if parameter is None else parameter * 4 - parameter.detach() * 3
            twin._parameters.pop(name, None)
            object.__setattr__(twin, name, value)
        for name, buffer in module._buffers.items():
            twin._buffers[name] = buffer
    return copies[model]
