"""``fold`` against the plain model it promises to give: graph, numbers, parameters, the dtype it computes in."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from folding.common import (
    CASES,
    TABLE,
    Bare,
    Case,
    Doubled,
    Mlp,
    N,
    Normed,
    SharedModule,
    StandardizedNet,
    by_spec,
    close,
    inputs,
    made,
    run,
)
from torch import Tensor, nn

import fxparam as fxp


@pytest.mark.parametrize("case", TABLE)
def test_the_folded_graph_is_that_of_the_plain_model(case: Case) -> None:
    plain, model = made(case)
    found = fxp.diff(plain, fxp.fold(model, arithmetic=False))
    assert not found, str(found)
    found = fxp.diff(fxp.fold(plain), fxp.fold(model))
    assert not found, str(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", TABLE)
def test_folding_keeps_the_outputs(case: Case, dtype: torch.dtype) -> None:
    plain, model = made(case, dtype)
    wanted = run(model, inputs(dtype))
    close(run(plain, inputs(dtype)), wanted)
    for folded in (fxp.fold(model), fxp.fold(model, arithmetic=False), fxp.restore(model)):
        close(run(folded, inputs(dtype)), wanted)
        assert not folded.training


@pytest.mark.parametrize("net", [Normed, Bare, SharedModule], ids=lambda n: n.__name__)
def test_every_module_of_a_folded_model_is_in_eval_mode(net: type[nn.Module]) -> None:
    assert not any(module.training for module in fxp.fold(by_spec(net())).modules())


@pytest.mark.parametrize("case", TABLE)
def test_weights_are_parameters_without_gradient_and_no_latent_is_left(case: Case) -> None:
    plain, model = made(case)
    folded = fxp.fold(model, arithmetic=False)
    names = dict(plain.named_parameters(remove_duplicate=False))
    found = dict(folded.named_parameters(remove_duplicate=False))
    assert found.keys() <= names.keys()
    # Tied tensors may be read under one of their names; every other is there.
    assert {id(names[name]) for name in found} == set(map(id, names.values()))
    for name, parameter in found.items():
        assert isinstance(parameter, nn.Parameter) and not parameter.requires_grad, name
        torch.testing.assert_close(parameter, names[name].detach(), rtol=1e-13, atol=1e-13)
    assert not any("parametrizations" in name or name.endswith(("_orig", "_g", "_v")) for name in folded.state_dict())
    # Nothing of it is the model's.
    theirs = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *model.weights().values())}
    assert theirs.isdisjoint(t.untyped_storage().data_ptr() for t in (*folded.parameters(), *folded.buffers()))


def test_a_submodule_named_like_something_of_ours_is_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(N, N))
            self.graph = nn.Linear(N, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.graph(self.body(x))

    model = fxp.transform(Net(), {"body.0.weight": Doubled()})
    assert type(model.get_submodule("graph")) is nn.Linear
    assert model.get_parameter("body.0.bias").shape == (N,)
    assert set(fxp.restore(model).state_dict()) == set(Net().state_dict())
    assert model.report.body == "live"
    with pytest.raises(fxp.TraceError, match="Net.graph has a name that a graph module needs for itself"):
        fxp.fold(model)


@pytest.mark.parametrize("case", [c for c in CASES if c.by is by_spec], ids=str)
def test_fold_of_a_plain_module(case: Case) -> None:
    torch.manual_seed(0)
    plain = case.net().double().eval()
    before = copy.deepcopy(plain.state_dict())
    x = inputs()
    folded = fxp.fold(plain)
    close(run(folded, x), run(plain, x))
    assert all(p.requires_grad for p in plain.parameters())
    assert all(map(torch.equal, before.values(), plain.state_dict().values()))
    assert not any(p.requires_grad for p in folded.parameters())
    found = fxp.diff(plain, fxp.fold(plain, arithmetic=False))
    assert not found, str(found)


@pytest.mark.parametrize("net", [Normed, StandardizedNet], ids=lambda n: n.__name__)
def test_arithmetic_is_folded_or_left_alone(net: type[nn.Module]) -> None:
    plain = net().double().eval()
    folded, left = fxp.fold(plain), fxp.fold(plain, arithmetic=False)
    assert any(name.startswith("hoisted.") for name, _ in folded.named_parameters())
    assert not any(name.startswith("hoisted.") for name, _ in left.named_parameters())
    inputs_of = {n for n in folded.graph.nodes if n.op == "placeholder"}
    seen = set(inputs_of)
    for node in folded.graph.nodes:
        if node.all_input_nodes and seen & set(node.all_input_nodes):
            seen.add(node)
        elif node.op == "call_function":
            assert node.target is __import__("operator").getitem, f"{node} depends on parameters only"


def test_compute_dtype_rounds_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32))
    model = fxp.transform(net, {"0.weight": fxp.orthogonal(map="matrix_exp")})
    latent = model.latents()["0.parametrizations.weight.original"].detach()
    latent.add_(torch.randn(32, 32))
    wide = copy.deepcopy(model).double()
    exact = wide.weights()["0.weight"].detach()
    once = fxp.fold(model, compute_dtype=torch.float64).get_parameter("0.weight")
    assert once.dtype == torch.float32
    assert torch.equal(once, exact.float())
    assert not torch.equal(fxp.fold(model).get_parameter("0.weight"), exact.float()), "too easy: single precision is exact too"
    assert torch.equal(fxp.restore(model, compute_dtype=torch.float64).get_parameter("0.weight"), exact.float())
    assert torch.equal(latent, model.latents()["0.parametrizations.weight.original"])


def test_compute_dtype_reaches_the_models_own_arithmetic_and_what_it_reads() -> None:
    """Weight arithmetic on a computed weight: rounded once, at the end of both."""
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, torch.matrix_exp(self.a.weight / 3) @ self.a.weight)

    plain = Both()
    exact = copy.deepcopy(plain).double()
    w = exact.a.weight.detach()
    folded = fxp.fold(plain, compute_dtype=torch.float64)
    (value,) = folded.parameters()
    assert value.dtype == torch.float32
    assert torch.equal(value, (torch.matrix_exp(w / 3) @ w).float())


def test_fold_of_buffers_a_forward_writes_keeps_them() -> None:
    """In eval mode still written: the folded graph writes as the model does."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(N, N)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.n.add_(1)
            return self.a(x) * self.n * (self.n + 1)

    net = Counting()
    folded = fxp.fold(net)
    x = torch.randn(2, N)
    for _ in range(3):
        torch.testing.assert_close(folded(x), net(x))


def test_refolding_after_training_gives_the_new_weights() -> None:
    model = fxp.transform(Mlp(), {"*.weight": Doubled()})
    x = torch.randn(2, N)
    first = fxp.fold(model)(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(x).square().sum().backward()
    optimizer.step()
    second = fxp.fold(model)
    assert not torch.allclose(first, second(x))
    torch.testing.assert_close(second(x), model(x))
