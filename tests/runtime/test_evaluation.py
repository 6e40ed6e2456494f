"""Prologues that keep nothing for their backward, and compiled ones, against the same model as PyTorch computes it."""
# mypy: disable-error-code="operator,union-attr,arg-type,index", warn-unused-ignores=False

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrizations, parametrize

import fxparam as fxp

DTYPE = torch.float64
X = torch.linspace(-1, 1, 24, dtype=DTYPE).reshape(4, 6)


class Bjorck(nn.Module):
    """Orthogonalizes by iteration, and keeps every step for its backward."""

    def forward(self, latent: Tensor) -> Tensor:
        weight = latent / torch.linalg.matrix_norm(latent)
        for _ in range(15):
            weight = 1.5 * weight - 0.5 * weight @ weight.mT @ weight
        return weight


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))))


def eager() -> Net:
    torch.manual_seed(0)
    net = Net().to(DTYPE)
    for layer in (net.first, net.second):
        parametrize.register_parametrization(layer, "weight", Bjorck())
    parametrizations.weight_norm(net.third)
    return net


def both(**options: Any) -> tuple[Net, fxp.ParametrizedModule]:
    net = eager()
    return net, fxp.transform(net, copy=True, **options)


def same(model: nn.Module, net: nn.Module, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(model(X), net(X), rtol=tolerance, atol=tolerance)
    for (name, got), (_, want) in zip(model.named_parameters(), net.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=tolerance, atol=tolerance, msg=name)


def train(model: nn.Module, steps: int = 3, *, retain: bool = True) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        for part in X.split(2):
            model(part).square().sum().backward(retain_graph=retain and step == 0)
        optimizer.step()


def kept(model: fxp.ParametrizedModule) -> int:
    """Bytes that one evaluation of the prologue saves for its backward, apart from the latents."""
    plan, found = model._fxp_runtime.plan, dict[int, int]()
    sources = [registry[name] for registry, name in plan.slots]
    own = {source.untyped_storage().data_ptr() for source in sources}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        values = plan.evaluation([source.view_as(source) for source in sources])
    assert values
    return sum(found.values())


@pytest.mark.parametrize("trace", ["live", "auto"])
@pytest.mark.parametrize("recompute", [True, "first.*", ["first.weight", "third.*"]])
def test_recomputing_changes_nothing_but_memory(recompute: Any, trace: str) -> None:
    net, model = both(recompute=recompute, trace=trace)
    train(net)
    train(model)
    same(model, net)
    rows = {row.weights[0]: row.recomputed for row in model.report.sites}
    assert rows["first.weight"] and rows["second.weight"] is (recompute is True)
    assert "recomputed in backward" in str(model.report)


def test_memory_that_is_kept() -> None:
    weight = 6 * 6 * 8
    _, usual = both()
    _, none = both(recompute=True)
    _, some = both(recompute="first.weight")
    assert kept(none) == 0
    assert kept(usual) > 2 * 30 * weight
    assert 0.4 * kept(usual) < kept(some) < 0.6 * kept(usual)


def test_second_derivatives() -> None:
    net, model = both(recompute=True)
    for one in (net, model):
        latents = list(one.parameters())
        gradients = torch.autograd.grad(one(X).square().sum(), latents, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
    same(model, net, 1e-9)


def test_deferred() -> None:
    net, model = both(recompute=True)
    for part in X.split(2):
        net(part).square().sum().backward()
    with model.defer_backward():
        for part in X.split(2):
            model(part).square().sum().backward()
    same(model, net)


def test_a_write_between_forward_and_backward_is_refused() -> None:
    _, model = both(recompute=True)
    loss = model(X).sum()
    with torch.no_grad():
        model.latents()["first.parametrizations.weight.original"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_states_and_random_numbers_are_not_computed_twice() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6, dtype=DTYPE)), nn.Linear(6, 2, dtype=DTYPE))
    model = fxp.transform(net, copy=True, recompute=True)
    before = model.state_dict()["0.parametrizations.weight.0._u"].clone()
    net(X).sum().backward()
    model(X).sum().backward()
    assert not model.report.sites[0].recomputed
    assert not torch.equal(before, model.state_dict()["0.parametrizations.weight.0._u"])
    torch.testing.assert_close(model.state_dict(), net.state_dict(), rtol=1e-12, atol=1e-12)


def test_copies_keep_the_option() -> None:
    _, model = both(recompute=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.report.sites[0].recomputed


def test_a_pattern_that_fits_nothing() -> None:
    with pytest.raises(fxp.SpecError, match=r"recompute='frist\.\*' fits no computed weight; nearest: first\.weight"):
        fxp.transform(eager(), recompute="frist.*")


# --- compiled


@pytest.fixture
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh")
# Dynamo hides it, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("recompute", [False, "first.*"])
def test_compiled_prologues(backend: str, recompute: Any) -> None:
    net, model = both(recompute=recompute)
    model.compile(backend=backend, prologue=True)
    before = model.stats.refreshes
    train(net)
    train(model)
    same(model, net)
    assert model.stats.refreshes == before + 4


@pytest.mark.usefixtures("_fresh")
# Dynamo hides it, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_of_a_compiled_prologue_some_weights_are_reached() -> None:
    net, model = both()
    model.compile(backend="aot_eager", prologue=True)
    for one in (net, model):
        one.first.weight.sum().backward()
        one.first.weight.square().sum().backward()
    same(model, net)
    assert model.get_parameter("second.parametrizations.weight.original").grad is None


@pytest.mark.usefixtures("_fresh")
# Dynamo hides it, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiling_without_the_prologue_again() -> None:
    net, model = both()
    model.compile(backend="aot_eager", prologue=True)
    model(X).sum().backward()
    model.compile(backend="aot_eager")
    model.zero_grad()
    # PyTorch refuses to retain the graph of a compiled function.
    train(net, retain=False)
    train(model, retain=False)
    same(model, net)
    gradients = torch.autograd.grad(model.first.weight.square().sum(), list(model.latents().values())[:1], create_graph=True)
    gradients[0].sum().backward()
