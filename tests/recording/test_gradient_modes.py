"""Grad modes, autocast, deferred and second gradients, checkpoints around a recorded model, and who else looks at it."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from recording.common import CALL, SMALL, WAYS, Base, Call, Case, N, build, cases, changes, check, doubles, step, transformed, x
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Mixes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)


class Table(Base):
    """Nothing but weight arithmetic is returned."""

    def forward(self, x: Tensor) -> Tensor:
        self.lin(x)
        return F.normalize(self.raw, dim=0)


class Around(nn.Module):
    """Calls its child in another mode, and in its own."""

    mode: Any = torch.no_grad
    child_class: Any = Mixes

    def __init__(self) -> None:
        super().__init__()
        self.child = self.child_class()

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            first = self.child(x)
        return self.child(x + first.double().mean()) + first.double().sum()


class AroundTable(Around):
    child_class = Table


class Enabled(Around):
    mode = torch.enable_grad


class EnabledTable(Around):
    mode, child_class = torch.enable_grad, Table


class Lowered(Around):
    mode = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)


class AsksAutocast(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (2.0 if torch.is_autocast_enabled("cpu") else 1.0)


class LoweredAsking(Lowered):
    child_class = AsksAutocast


class Multiplied(Base):
    """Weight arithmetic that autocast would lower."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(N, N))

    def mixed(self, x: Tensor) -> Tensor:
        return self.lin(x) + x @ (self.left.float() @ self.raw.float()).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)


class LoweredProduct(Lowered):
    child_class = Multiplied


class NoGradRead(Base):
    """The weight is read under ``no_grad``, and used outside of it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.lin.weight
        return x @ weight.t() + x @ F.normalize(self.raw, dim=0)


class Detaches(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * self.raw.detach().cos()[0] + x.detach()


class AsksGradMode(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * (2.0 if torch.is_grad_enabled() else 1.0)


class AsksDefault(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) + torch.ones(1, dtype=torch.get_default_dtype()) / 3


@contextlib.contextmanager
def single() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


LOW = Call(around=Lowered.mode)
SINGLE = Call(around=single)
OFF = Call(grad=False)
INFERENCE = Call(around=torch.inference_mode, inputs=False, after=lambda out: None)
MODES = (CALL, CALL, LOW, LOW, CALL, OFF, OFF, LOW, step, CALL, LOW, SMALL, OFF, CALL)


def freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)


CASES = [
    Case("no_grad around a child", Around, MODES, graph=None),
    Case("no_grad around a table", AroundTable, MODES, graph=None),
    Case("enable_grad around a child", Enabled, (OFF, OFF, OFF, CALL, CALL, OFF, step, OFF), graph=None),
    Case("enable_grad around a table", EnabledTable, (OFF, OFF, OFF, CALL, CALL, OFF, step, OFF), graph=None),
    Case("autocast around a child", Lowered, MODES, graph=False),
    Case("autocast around a child that asks", LoweredAsking, MODES, graph=False),
    Case("autocast around a product", LoweredProduct, (CALL, CALL, step, CALL, OFF, OFF, SMALL, CALL), graph=False),
    Case("asks for autocast", AsksAutocast, MODES),
    Case("product", Multiplied),
    Case("read under no_grad", NoGradRead, graph=None),
    Case("detaches", Detaches),
    Case("asks for grad mode", AsksGradMode, MODES),
    Case("asks for the default dtype", AsksDefault, (CALL, CALL, SINGLE, SINGLE, CALL, SINGLE, step, CALL)),
    Case("freezes", Mixes, changes(freeze, freeze)),
    Case("inference", Mixes, (CALL, INFERENCE, INFERENCE, CALL, INFERENCE, step, CALL, INFERENCE)),
]


@pytest.mark.parametrize(("case", "way"), cases(CASES))
def test_modes_around_and_inside(case: Case, way: str) -> None:
    check(case, way)


MIXES = Case("mixes", Mixes)


def pair(way: str) -> tuple[nn.Module, Any]:
    """The eager model and the transformed one, recorded."""
    model = transformed(MIXES, way)
    for _ in range(2):
        model(x())
    return build(MIXES, region=way.startswith("region"), parametrized=True), model


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reentrant", [True, False])
@doubles()
def test_a_model_in_a_checkpoint_from_its_first_call_on(way: str, reentrant: bool) -> None:
    model = transformed(MIXES, way)
    eager = build(MIXES, region=way.startswith("region"), parametrized=True)
    for _ in range(4):
        given = x().requires_grad_()
        for one in (model, eager):
            one.zero_grad()
            checkpoint(one, given, use_reentrant=reentrant).square().sum().backward()
        same(gradients(model), gradients(eager))


@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_deferred_gradients_of_micro_batches(way: str) -> None:
    eager, model = pair(way)
    for _ in range(2):
        model.zero_grad()
        eager.zero_grad()
        batches = [x() for _ in range(3)]
        with model.defer_backward():
            for batch in batches:
                model(batch).square().sum().backward()
        for batch in batches:
            eager(batch).square().sum().backward()
        same(gradients(model), gradients(eager))
        step(model)
        step(eager)


@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_second_gradients(way: str) -> None:
    eager, model = pair(way)
    given = x().requires_grad_()
    for one in (model, eager):
        (first,) = torch.autograd.grad(one(given).tanh().square().sum(), given, create_graph=True)
        first.square().sum().backward()
    same(gradients(model), gradients(eager))


@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_transforms_of_functions(way: str) -> None:
    eager, model = pair(way)
    given = x()

    def loss(one: nn.Module, parameters: Any) -> Tensor:
        return torch.func.functional_call(one, parameters, (given,)).square().sum()

    other = {name: parameter.detach() * 1.5 for name, parameter in model.named_parameters()}
    for parameters in (dict(model.named_parameters()), other):
        got = torch.func.grad(lambda p: loss(model, p))({k: v.detach() for k, v in parameters.items()})
        want = torch.func.grad(lambda p: loss(eager, p))({k: v.detach() for k, v in parameters.items()})
        same(got, {name: want[name] for name in got})
        same(loss(model, parameters), loss(eager, parameters))
    same(torch.vmap(model)(given), torch.vmap(eager)(given))
    same(model(given), eager(given))


@pytest.mark.parametrize("way", ["region-auto", "region-record"])
@doubles()
def test_a_region_called_with_other_parameters(way: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = Mixes()

        def forward(self, given: Tensor) -> Tensor:
            raw = self.child.raw * 2 + 1
            return self.child(given) + torch.func.functional_call(self.child, {"raw": raw}, (given,)) + self.child(given)

    check(Case("Outer", Outer, graph=False, naive=False), way)
