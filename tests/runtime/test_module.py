"""``ParametrizedModule`` as a module: names, copies, checkpoints, hooks, layers of PyTorch, functorch, declarations at work."""
# mypy: disable-error-code="operator,union-attr,arg-type,call-overload,has-type,list-item,misc", warn-unused-ignores=False

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as ckpt
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.utils import parametrizations, parametrize

import fxparam as fxp

DTYPE = torch.float64
TRACES = ["live", "auto"]
WN = {"*.weight": fxp.weight_norm()}


@pytest.fixture(autouse=True)
def _double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    yield
    torch.set_default_dtype(before)


class Net(nn.Module):
    """A model with methods and attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 4), nn.Linear(4, 5)
        self.scale = 1.0

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encode(x)) * self.scale

    def generate(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = self(x)
        return x


def same(a: Any, b: Any, tol: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def oracle_of(net: nn.Module) -> nn.Module:
    oracle = copy.deepcopy(net)
    for module in oracle.modules():
        if isinstance(module, nn.Linear):
            parametrizations.weight_norm(module)
    return oracle


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))


# --- names and checkpoints

DECLARATIONS: dict[str, tuple[Any, Callable[[nn.Module], Any]]] = {
    "weight_norm": (fxp.weight_norm(), parametrizations.weight_norm),
    "weight_norm-dim1": (fxp.weight_norm(dim=1), lambda m: parametrizations.weight_norm(m, dim=1)),
    "spectral_norm": (fxp.spectral_norm(), parametrizations.spectral_norm),
    "orthogonal-exp": (fxp.orthogonal(map="matrix_exp"), lambda m: parametrizations.orthogonal(m, orthogonal_map="matrix_exp")),
    "orthogonal-cayley": (fxp.orthogonal(map="cayley"), lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley")),
    "householder": (fxp.orthogonal(map="householder"), lambda m: parametrizations.orthogonal(m, orthogonal_map="householder")),
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_checkpoints_go_both_ways(name: str) -> None:
    declaration, apply = DECLARATIONS[name]
    x = torch.randn(3, 5)
    oracle = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model = fxp.transform(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), {"*.weight": declaration})
    for at in (0, 2):
        apply(oracle[at])
    assert list(model.state_dict()) == list(oracle.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in oracle.named_parameters()]
    for tensor, other in zip(model.state_dict().values(), oracle.state_dict().values(), strict=True):
        assert tensor.shape == other.shape and tensor.dtype == other.dtype
    model.eval()
    oracle.eval()
    model.load_state_dict(oracle.state_dict())
    same(model(x), oracle(x))
    for a, b in zip(gradients(model, model(x).pow(2).sum()), gradients(oracle, oracle(x).pow(2).sum()), strict=True):
        same(a, b, 1e-9)
    # Below the diagonal only: on it the Householder map keeps signs, which do not train.
    changed = {k: v + 0.01 * (v.ndim < 2 or torch.ones_like(v).tril(-1)) for k, v in model.state_dict().items()}
    model.load_state_dict(changed)
    oracle.load_state_dict(model.state_dict())
    same(model(x), oracle(x))


@pytest.mark.parametrize("assign", [False, True])
def test_plain_checkpoints(assign: bool) -> None:
    plain, model = Net(), fxp.transform(Net(), WN)
    x = torch.randn(3, 5)
    model(x)
    result = model.load_state_dict(plain.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    same(model(x), plain(x))
    before = plain.encoder.weight.detach().clone()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    assert torch.equal(plain.encoder.weight, before)


def test_plain_checkpoint_of_a_joint_site() -> None:
    plain, model = Net(), fxp.transform(Net(), {fxp.joint("*"): fxp.flat()})
    model.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5)
    same(model(x), plain(x))


def test_plain_checkpoint_that_is_not_in_the_image() -> None:
    model = fxp.transform(nn.Linear(5, 5), {"weight": fxp.orthogonal()})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(fxp.ImageError, match=r"the checkpoint holds the plain weight weight, which orthogonal\(\) cannot"):
        model.load_state_dict(nn.Linear(5, 5).state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "weight" in k)


def test_the_given_dict_is_not_changed_by_loading() -> None:
    plain, model = Net().state_dict(), fxp.transform(Net(), WN)
    keys = list(plain)
    model.load_state_dict(plain)
    assert list(plain) == keys


def test_checkpoint_inside_a_larger_model() -> None:
    plain = nn.Sequential(Net(), nn.Linear(5, 2))
    outer = nn.Sequential(fxp.transform(Net(), WN), nn.Linear(5, 2))
    outer.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5)
    same(outer(x), plain(x))


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.register_buffer("kept", torch.ones(2))
        self.epoch = 3

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


def test_extra_state_and_non_persistent_buffers_of_the_root() -> None:
    net = Stateful()
    model = fxp.transform(net, WN)
    names = [name for name in model.state_dict() if "parametrizations" not in name]
    assert names == [name for name in net.state_dict() if name != "layer.weight"]


# --- copies


@pytest.mark.parametrize("trace", TRACES)
def test_deepcopy(trace: str) -> None:
    model = fxp.transform(Net(), WN, trace=trace)
    x = torch.randn(3, 5)
    model(x).sum().backward()
    other = copy.deepcopy(model)
    same(other(x), model(x))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2.0)
    before = model(x).detach()
    other(x).pow(2).sum().backward()
    assert torch.equal(model(x), before)
    assert not torch.allclose(other(x), before)
    assert other.stats is not model.stats and other.report.body == model.report.body


@pytest.mark.parametrize("trace", TRACES)
def test_pickle_and_torch_save(trace: str) -> None:
    model = fxp.transform(Net(), WN, trace=trace)
    x = torch.randn(3, 5)
    model(x).sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert list(other.state_dict()) == list(model.state_dict())
        same(other(x), model(x))
        other.zero_grad()
        other(x).sum().backward()
        assert all(p.grad is not None for p in other.parameters())
        optimizer = torch.optim.SGD(other.parameters(), 0.1)
        optimizer.step()
        assert not torch.allclose(other(x), model(x))


def test_shallow_copy_leaves_the_original_alone() -> None:
    model = fxp.transform(Net(), {fxp.joint("*.weight"): fxp.flat()})
    x = torch.randn(3, 5)
    want = model(x)
    other = copy.copy(model)
    del other
    gc.collect()
    model.invalidate()
    same(model(x), want)


def test_submodules_copied_or_kept() -> None:
    model = fxp.transform(Net(), WN)
    x = torch.randn(3, 5)
    encoded = model.encoder(x).detach()
    clone = copy.deepcopy(model.encoder)
    clone(x).sum().backward()
    assert all(p.grad is not None for p in clone.parameters())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model.encoder.parametrizations.weight.original0.mul_(2.0)
    same(clone(x), encoded)
    kept = model.encoder
    doubled = model.encoder(x).detach()
    del model
    gc.collect()
    same(kept(x), doubled)
    assert not torch.allclose(doubled, encoded)


def test_kept_submodule_of_a_joint_site_says_what_to_do() -> None:
    model = fxp.transform(Net(), {fxp.joint("*.weight"): fxp.flat()})
    clone = copy.deepcopy(model.decoder)
    with pytest.raises(fxp.FxparamError, match="copy the whole transformed model, or use fxp.restore"):
        clone(torch.randn(3, 4))


def test_the_given_model_is_not_changed() -> None:
    net = Net()
    state, classes = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    model = fxp.transform(net, WN)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(3, 5)).sum().backward()
    assert net.encoder.weight.grad is None
    assert [type(m) for m in net.modules()] == classes
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    optimizer.step()
    assert torch.equal(net.encoder.weight, state["encoder.weight"])
    assert net.encoder.bias is model.encoder.bias


# --- the user's own code


@pytest.mark.parametrize("trace", TRACES)
def test_methods_and_attributes(trace: str) -> None:
    net = Net()
    model, oracle = fxp.transform(net, WN, trace=trace), oracle_of(net)
    x = torch.randn(3, 5)
    same(model.encode(x), oracle.encode(x))  # type: ignore[operator]
    same(model.generate(x, 3), oracle.generate(x, steps=3))  # type: ignore[operator]
    before = model(x)
    model.scale = 3.0
    same(model(x), 3 * before)
    assert model.scale == 3.0 and net.scale == 1.0
    for step in range(8):
        model.scale = float(step)
        same(model(x), step * before)


@pytest.mark.parametrize(
    "rule",
    [
        "encoder.weight",
        "*.weight",
    ],
)
def test_submodules_replaced(rule: str) -> None:
    model = fxp.transform(Net(), {rule: fxp.weight_norm()})
    x = torch.randn(3, 5)
    model(x)
    model.decoder = nn.Linear(4, 2)
    assert model(x).shape == (3, 2)
    assert "decoder.weight" in dict(model.named_parameters())


def test_attributes_can_be_deleted() -> None:
    class Optional(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.encode(x) * getattr(self, "scale", 7.0)

    model = fxp.transform(Optional(), WN)
    x = torch.randn(3, 5)
    before = model(x)
    del model.scale
    same(model(x), 7 * before)


def test_items_of_a_container() -> None:
    model = fxp.transform(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), WN)
    assert len(model) == 3 and [type(m).__name__ for m in model] == ["Linear", "Tanh", "Linear"]
    assert model[0].weight.shape == (4, 5)


def test_items_of_a_container_are_replaced() -> None:
    model = fxp.transform(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), {"0.weight": fxp.weight_norm()})
    model[2] = nn.Identity()
    assert model(torch.randn(2, 5)).shape == (2, 4)


class Named(nn.Module):
    """Attributes that are called as some of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def sample(self, n: int) -> Tensor:
        return self.body(torch.ones(n, 5))


def test_names_of_ours_do_not_reach_into_the_users_own_code() -> None:
    class Inside(Named):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.sample(1)

    net = Inside()
    same(fxp.transform(net, {"body.weight": fxp.weight_norm()})(torch.ones(2, 5)), net(torch.ones(2, 5)))


class Log(nn.Module):
    def __init__(self, sink: Any) -> None:
        super().__init__()
        self.layer, self.sink = nn.Linear(5, 5), sink

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        self.sink["deep"]["hidden"].append(hidden)
        return hidden


SEEN: list[Any] = []


class LogGlobally(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        SEEN.append(hidden)
        return hidden


def test_writes_to_nested_containers_stay() -> None:
    model = fxp.transform(Log({"deep": {"hidden": []}}), WN)
    model(torch.randn(2, 5))
    model(torch.randn(2, 5))
    assert [type(value) for value in model.sink["deep"]["hidden"]] == [Tensor, Tensor]


def test_writes_to_globals_stay() -> None:
    SEEN.clear()
    model = fxp.transform(LogGlobally(), WN)
    model(torch.randn(2, 5))
    model(torch.randn(2, 5))
    assert [type(value) for value in SEEN] == [Tensor, Tensor]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("trace", TRACES)
def test_hooks_of_users(trace: str, when: str) -> None:
    calls: list[str] = []

    def hook(module: Any) -> None:
        for name, sub in (("root", module), ("encoder", module.encoder)):
            sub.register_forward_hook(lambda m, a, out, name=name: calls.append(f"{name} forward"))
            sub.register_forward_pre_hook(lambda m, a, name=name: calls.append(f"{name} pre"))
            sub.register_full_backward_hook(lambda m, i, o, name=name: calls.append(f"{name} backward"))

    net = Net()
    if when == "before":
        hook(net)
    model = fxp.transform(net, WN, trace=trace)
    x = torch.randn(3, 5, requires_grad=True)
    if when == "after":
        model(x)
        hook(model)
    calls.clear()
    for _ in range(2):
        model(x).sum().backward()
    want = ["root pre", "encoder pre", "encoder forward", "root forward", "encoder backward", "root backward"]
    assert sorted(calls) == sorted(want * 2)


def test_a_hook_that_changes_the_output() -> None:
    model = fxp.transform(Net(), WN)
    x = torch.randn(3, 5)
    before = model(x)
    handle = model.decoder.register_forward_hook(lambda module, args, out: out * 2)
    same(model(x), 2 * before)
    handle.remove()
    same(model(x), before)


# --- modes


@pytest.mark.parametrize("trace", TRACES)
def test_train_and_eval_of_root_and_submodules(trace: str) -> None:
    model = fxp.transform(nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5)), WN, trace=trace)
    x = torch.randn(3, 5)
    for mode, random in ((True, True), (False, False), (True, True)):
        model.train(mode)
        assert model.training is mode and model[0].training is mode
        assert torch.equal(model(x), model(x)) is not random
    model[1].eval()
    assert torch.equal(model(x), model(x))
    model[1].train()
    assert not torch.equal(model(x), model(x))
    outer = nn.Sequential(model)
    outer.eval()
    assert not model.training and not model[1].training and torch.equal(outer(x), outer(x))


def test_eval_of_the_layer_with_spectral_norm() -> None:
    model = fxp.transform(Net(), {"encoder.weight": fxp.spectral_norm()})
    u = model.encoder.parametrizations.weight[0]._u
    model.encoder.eval()
    before = u.clone()
    for _ in range(2):
        model(torch.randn(3, 5))
        model.invalidate()
    assert torch.equal(u, before)
    model.encoder.train()
    model(torch.randn(3, 5))
    assert not torch.equal(u, before)


def test_power_iteration_advances_once_per_training_refresh() -> None:
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model, oracle = fxp.transform(net, {"0.weight": fxp.spectral_norm()}), copy.deepcopy(net)
    parametrizations.spectral_norm(oracle[0])
    oracle.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (model, oracle)]
    u = model[0].parametrizations.weight[0]._u
    x = torch.randn(3, 5)
    for _ in range(3):
        before = u.clone()
        for module, optimizer in zip((model, oracle), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).pow(2).sum().backward()
            optimizer.step()
        assert not torch.equal(u, before)
        after = u.clone()
        model.eval()
        with torch.no_grad():
            model(x)
        assert torch.equal(u, after)
        model.train()
    for a, b in zip(model.state_dict().values(), oracle.state_dict().values(), strict=True):
        same(a, b)
    # Several reads in one step: plain PyTorch would advance at each.
    model.zero_grad()
    model(x).sum().backward()
    after = u.clone()
    model(x).sum().backward()
    model.weights()
    assert torch.equal(u, after)


# --- optimizers


def test_an_optimizer_is_repointed() -> None:
    net = Net()
    groups: list[dict[str, Any]] = [{"params": net.encoder.parameters()}, {"params": net.decoder.parameters(), "lr": 0.5}]
    optimizer = torch.optim.Adam(groups)
    net(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    model = fxp.transform(net, WN, optimizer=optimizer)
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert held[0] == [id(p) for p in (*model.encoder.parametrizations.weight.latents, model.encoder.bias)]
    assert held[1] == [id(p) for p in (*model.decoder.parametrizations.weight.latents, model.decoder.bias)]
    assert optimizer.param_groups[1]["lr"] == 0.5
    before = model.weights()["encoder.weight"].detach().clone()
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weights()["encoder.weight"], before)


def test_an_optimizer_of_replaced_parameters_is_warned_about_once() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = fxp.transform(net, WN)
    model(torch.randn(3, 5)).sum().backward()
    with pytest.warns(RuntimeWarning, match=r"an optimizer holds 2 parameters that fxparam.transform replaced by latents"):
        optimizer.step()
    optimizer.step()


def test_no_warning_where_the_given_model_is_trained_on_its_own() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = fxp.transform(net, WN)
    model(torch.randn(3, 5)).sum().backward()
    net(torch.randn(3, 5)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_warning_although_old_gradients_are_left() -> None:
    net = Net()
    net(torch.randn(3, 5)).sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = fxp.transform(net, WN)
    model(torch.randn(3, 5)).sum().backward()
    with pytest.warns(RuntimeWarning, match="replaced by latents"):
        optimizer.step()


def test_an_optimizer_of_something_else() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(fxp.SpecError, match=r"holds none of the parameters .* build it from model\.parameters\(\)"):
        fxp.transform(Net(), WN, optimizer=optimizer)


# --- assign, sample, freeze, retract


def test_assign_and_errors() -> None:
    model = fxp.transform(Net(), {"encoder.weight": fxp.weight_norm(), "decoder.weight": fxp.orthogonal()})
    value = torch.randn(4, 5)
    model.assign("encoder.weight", value)
    same(model.weights()["encoder.weight"], value)
    latents = {k: v.clone() for k, v in model.latents().items()}
    refused: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: model.assign("decoder.weight", torch.randn(5, 4)), fxp.ImageError, "is not in the image"),
        (lambda: model.assign("encoder.weihgt", value), fxp.SpecError, r"'encoder.weihgt' is not a computed weight; nearest: "),
        (lambda: model.assign("encoder.weight", value.T), ValueError, r"shape \(5, 4\) for encoder.weight, expected \(4, 5\)"),
        (lambda: model.assign("encoder.bias", value), fxp.SpecError, "'encoder.bias' is not a computed weight"),
        (lambda: model.assign("encoder.weight", value * float("nan")), fxp.ImageError, "NaN or infinite"),
        (lambda: model.freeze("x*"), fxp.SpecError, r"no computed weight fits 'x\*'"),
        (lambda: model.retract("x*"), fxp.SpecError, r"no computed weight fits 'x\*'"),
        (lambda: model.sample("encoder.weihgt"), fxp.SpecError, "is not a computed weight; nearest"),
        (lambda: setattr(model.encoder, "weight", None), fxp.SpecError, "cannot assign NoneType to the computed weight weight"),
        (lambda: fxp.transform(model, WN), fxp.SpecError, r"transformed already; .* fxp\.restore\(model\)"),
    ]
    for function, error, text in refused:
        with pytest.raises(error, match=text):
            function()
    assert all(torch.equal(v, latents[k]) for k, v in model.latents().items())
    model.assign("decoder.weight", torch.randn(5, 4), project=True)
    decoder = model.weights()["decoder.weight"]
    same(decoder.mT @ decoder, torch.eye(4))


def test_sample() -> None:
    model = fxp.transform(Net(), {"decoder.weight": fxp.orthogonal()})
    before = model.weights()["decoder.weight"].detach().clone()
    a, b = (model.sample("decoder.weight", generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and not a.requires_grad
    same(a.mT @ a, torch.eye(4))
    assert torch.equal(model.weights()["decoder.weight"], before)
    plain = fxp.transform(Net(), {"decoder.weight": torch.tanh})
    with pytest.raises(fxp.ImageError, match=r"decoder.weight .* has no distribution to sample from"):
        plain.sample("decoder.weight")


class Circle(nn.Module):
    """Pairs on the unit circle; the latent's length is free and grows under SGD."""

    def forward(self, latent: Tensor) -> Tensor:
        return latent / latent.norm(dim=-1, keepdim=True)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / weight.norm(dim=-1, keepdim=True)


def test_retract_against_drift() -> None:
    model = fxp.transform(nn.Linear(2, 6), {"weight": Circle()})
    latent = model.latents()["parametrizations.weight.original"]
    same(latent.norm(dim=1), torch.ones(6))
    optimizer = torch.optim.SGD([latent], 0.5)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 2)).pow(2).mean().backward()
        optimizer.step()
    assert (latent.norm(dim=1) > 1.001).all()
    weight = model.weights()["weight"].detach().clone()
    model.retract()
    same(latent.norm(dim=1), torch.ones(6))
    same(model.weights()["weight"], weight)
    assert latent is model.latents()["parametrizations.weight.original"]


def test_retract_without_a_right_inverse() -> None:
    model = fxp.transform(nn.Linear(2, 6), {"weight": torch.tanh})
    with pytest.raises(fxp.ImageError, match="has no right inverse"):
        model.retract()


# --- functorch, checkpointing


class Inner(nn.Module):
    """A forward that differentiates or maps over a computed layer of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(5, 5), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "vmap":
            return torch.vmap(lambda row: F.linear(row, self.layer.weight, self.layer.bias))(x)
        if self.kind == "jacrev":
            return torch.func.jacrev(lambda row: torch.tanh(self.layer(row)))(x[0])
        if self.kind == "hessian":
            return torch.func.hessian(lambda row: torch.tanh(self.layer(row)).sum())(x[0])
        if self.kind == "jvp":
            return torch.func.jvp(lambda rows: torch.tanh(self.layer(rows)), (x,), (x,))[1]
        if self.kind == "used before":
            return torch.func.jacrev(lambda row: torch.tanh(self.layer(row)))(x[0]) + self.layer(x).sum()
        inner = torch.autograd.functional.jacobian(lambda row: torch.tanh(self.layer(row)), x[0], create_graph=True)
        assert isinstance(inner, Tensor)
        return inner


# PyTorch's own decompositions for forward mode are scripted on first use.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize(
    "kind",
    [
        *("vmap", "jacrev", "hessian", "jvp", "used before"),
        "autograd.functional",
    ],
)
def test_transforms_inside_the_forward(kind: str, trace: str) -> None:
    net = Inner(kind)
    model, oracle = fxp.transform(net, WN, trace=trace), oracle_of(net)
    x = torch.randn(4, 5)
    same(model(x), oracle(x))
    for a, b in zip(gradients(model, model(x).pow(2).sum()), gradients(oracle, oracle(x).pow(2).sum()), strict=True):
        same(a, b)


def test_transforms_inside_a_forward_that_computes_in_place() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            first = torch.func.jacrev(lambda row: torch.tanh(self.layer(row)))(x[0])
            return first + torch.func.jacrev(lambda row: torch.tanh(self.layer(row)))(x[1]) + self.layer(x).sum()

    net = Twice()
    model, oracle = fxp.transform(net, WN), oracle_of(net)
    x = torch.randn(4, 5)
    found = []
    for module in (model, oracle):
        doubled = {name: (2 * p.detach()).requires_grad_() for name, p in module.named_parameters()}
        out = functional_call(module, doubled, (x,))
        found.append([out, *torch.autograd.grad(out.pow(2).sum(), list(doubled.values()))])
    for a, b in zip(*found, strict=True):
        same(a, b)


class Normed(nn.Module):
    """Looks at its weight without gradient before it uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = self.layer.weight.norm()
        return self.layer(x) / size


@pytest.mark.parametrize(
    "call",
    [
        "eager",
        "functional_call",
    ],
)
def test_a_look_without_gradient_costs_no_gradient(call: str) -> None:
    net = Normed()
    model, oracle = fxp.transform(net, WN), oracle_of(net)
    x = torch.randn(4, 5)

    def loss(module: nn.Module, parameters: dict[str, Any]) -> Tensor:
        out = module(x) if call == "eager" else functional_call(module, parameters, (x,))
        return out.pow(2).sum()

    found = []
    for module in (model, oracle):
        named = dict(module.named_parameters())
        if call == "eager":
            found.append(list(torch.autograd.grad(loss(module, named), list(named.values()))))
        else:
            found.append(
                list(grad(lambda p, module=module: loss(module, p))({k: v.detach() for k, v in named.items()}).values())
            )
    for a, b in zip(*found, strict=True):
        same(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("trace", TRACES)
def test_checkpointed_layers(trace: str, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = ckpt.checkpoint(lambda h, layer=layer: torch.tanh(layer(h)), x, use_reentrant=reentrant)
            return x

    net = Checkpointed()
    model, oracle = fxp.transform(net, WN, trace=trace), oracle_of(net)
    x = torch.randn(4, 5, requires_grad=True)
    for module in (model, oracle):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).pow(2).sum().backward()
            optimizer.step()
    same(model(x), oracle(x))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x).sum(), self.b(x).sum()


def test_a_backward_for_each_head_of_a_flat_vector() -> None:
    model = fxp.transform(Heads(), {fxp.joint("*"): fxp.flat()})
    a, b = model(torch.randn(3, 5))
    a.backward()
    b.backward()


# --- nesting


def test_a_transformed_model_inside_another() -> None:
    inner = Net()
    outer = nn.Sequential(fxp.transform(inner, WN), nn.Linear(5, 5))
    oracle = nn.Sequential(oracle_of(inner), copy.deepcopy(outer[1]))
    x = torch.randn(3, 5)
    for module in (outer, oracle):
        optimizer = torch.optim.Adam(module.parameters(), 0.01, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).pow(2).sum().backward()
            optimizer.step()
    same(outer(x), oracle(x))
    outer.float()
    assert outer(x.float()).dtype == torch.float32


def test_transforming_a_model_that_holds_a_transformed_one() -> None:
    outer = nn.Sequential(fxp.transform(Net(), WN), nn.Linear(5, 5))
    with pytest.raises(fxp.SpecError, match=r"0 is transformed already; transform the whole model at once"):
        fxp.transform(outer, {"1.weight": fxp.weight_norm()})


# --- layers of PyTorch


def _norm_all(module: nn.Module, names: list[str]) -> None:
    for name in names:
        path, _, local = name.rpartition(".")
        parametrizations.weight_norm(module.get_submodule(path), local)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def _encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


LAYERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    **{
        cls.__name__: (lambda cls=cls: cls(8, 8, 2), ["weight_hh_l0", "weight_ih_l1", "weight_hh_l1"])  # type: ignore[misc]
        for cls in (nn.LSTM, nn.GRU, nn.RNN)
    },
    "bidirectional": (lambda: nn.LSTM(8, 8, bidirectional=True, batch_first=True), ["weight_hh_l0", "weight_hh_l0_reverse"]),
    "projected": (lambda: nn.LSTM(8, 8, proj_size=4), ["weight_hr_l0"]),
    "attention": (SelfAttention, ["attention.in_proj_weight", "attention.out_proj.weight"]),
    "encoder layer": (_encoder_layer, ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"]),
    "encoder": (lambda: nn.TransformerEncoder(_encoder_layer(), 2), ["layers.0.linear1.weight", "layers.1.linear2.weight"]),
    "convolution": (lambda: nn.Conv1d(5, 3, 3, padding=1), ["weight"]),
    "transposed": (lambda: nn.ConvTranspose1d(5, 3, 3), ["weight"]),
    "bilinear": (lambda: _Bilinear(), ["layer.weight"]),
}


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_pytorch(name: str, trace: str) -> None:
    make, weights = LAYERS[name]
    net = make()
    oracle = copy.deepcopy(net)
    _norm_all(oracle, weights)
    model = fxp.transform(net, {weight: fxp.weight_norm() for weight in weights}, trace=trace)
    assert list(model.state_dict()) == list(oracle.state_dict())
    x = torch.randn(4, 5, 8)
    optimizers = [torch.optim.SGD(module.parameters(), 0.05) for module in (model, oracle)]
    for _ in range(3):
        for mode in (True, False):
            model.train(mode)
            oracle.train(mode)
            same(_first(model(x)), _first(oracle(x)))
            with torch.no_grad():  # attention has a fast path of its own here
                same(_first(model(x)), _first(oracle(x)))
        for module, optimizer in zip((model, oracle), optimizers, strict=True):
            optimizer.zero_grad()
            module.train()
            _first(module(x)).pow(2).mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        same(p, q)
    before = _first(model(x)).detach()
    model.float()
    torch.testing.assert_close(_first(model(x.float())).double(), before, rtol=1e-4, atol=1e-5)


def test_padded_batches_through_the_encoder() -> None:
    net = nn.TransformerEncoder(_encoder_layer(), 2, enable_nested_tensor=False)
    oracle = copy.deepcopy(net)
    _norm_all(oracle, ["layers.0.linear1.weight"])
    model = fxp.transform(net, {"layers.0.linear1.weight": fxp.weight_norm()}).eval()
    oracle.eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        same(model(x, src_key_padding_mask=mask), oracle(x, src_key_padding_mask=mask))


# --- declarations at work


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embed(tokens))


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("rule", ["out.weight", "embed.weight", "*.weight"])
def test_tied_weights_stay_tied(rule: str, trace: str) -> None:
    net = Tied()
    model = fxp.transform(net, {rule: fxp.weight_norm()}, trace=trace)
    tokens = torch.arange(4)
    same(model(tokens), net(tokens))
    assert [name for name, _ in model.named_parameters()] == [f"embed.parametrizations.weight.original{i}" for i in (0, 1)]
    model(tokens).pow(2).sum().backward()
    g, v = (p.detach().clone().requires_grad_() for p in model.parameters())
    weight = torch._weight_norm(v, g, 0)
    F.linear(F.embedding(tokens, weight), weight).pow(2).sum().backward()
    for p, want in zip(model.parameters(), (g.grad, v.grad), strict=True):
        same(p.grad, want)
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.equal(model.embed.weight, model.out.weight)
    restored: Any = fxp.restore(model)
    assert restored.embed.weight is restored.out.weight


def test_references_in_a_chain() -> None:
    net = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(3)))
    model = fxp.transform(
        net,
        {
            "2.weight": fxp.ref("1.weight") >> fxp.transpose() >> fxp.scale(2.0),
            "1.weight": fxp.ref("0.weight") >> fxp.scale(3.0),
            "0.weight": fxp.weight_norm(),
        },
    )
    x = torch.randn(3, 5)
    a = net[0].weight.detach().clone().requires_grad_()
    want = x @ a.T @ (3 * a).T @ (6 * a.T).T
    same(model(x), want)
    model(x).pow(2).sum().backward()
    (full,) = torch.autograd.grad(want.pow(2).sum(), a)
    g, v = (p.detach().clone().requires_grad_() for p in model.parameters())
    for p, expected in zip(model.parameters(), torch.autograd.grad(torch._weight_norm(v, g, 0), (g, v), full), strict=True):
        same(p.grad, expected)
    same(copy.deepcopy(model)(x), want)
    with pytest.raises(fxp.ImageError, match="computed from other weights"):
        model.assign("2.weight", torch.zeros(5, 5))


def test_a_parametrized_buffer() -> None:
    net = nn.BatchNorm1d(5)
    model = fxp.transform(net, {"running_var": fxp.positive()}).eval()
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]
    assert "parametrizations.running_var.original" in model.state_dict()
    x = torch.randn(6, 5)
    same(model(x), net.eval()(x))


def test_a_scalar_behind_a_matrix() -> None:
    declared = fxp.custom(lambda scalar: scalar * torch.ones(3, 5), init=torch.tensor(0.5))
    model = fxp.transform(nn.Linear(5, 3), {"weight": declared})
    x = torch.randn(4, 5)
    latent = model.latents()["parametrizations.weight.original"]
    assert latent.shape == ()
    same(model.weights()["weight"], torch.full((3, 5), 0.5))
    model(x).sum().backward()
    same(latent.grad, 3 * x.sum())
    with pytest.raises(fxp.SpecError, match=re.escape("has no right inverse; give the start of its latent with fxp.custom(")):
        fxp.transform(nn.Linear(5, 3), {"weight": lambda scalar: scalar.sum()})


@pytest.mark.parametrize("trace", TRACES)
def test_existing_then_mask(trace: str) -> None:
    net = Net()
    parametrizations.weight_norm(net.encoder)
    model = fxp.transform(net, {"encoder.weight": fxp.existing() >> fxp.mask(density=0.5)}, trace=trace)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    zeros = model.weights()["encoder.weight"] == 0
    assert zeros.sum() == 10
    for _ in range(3):
        model(torch.randn(4, 5)).pow(2).sum().backward()
        optimizer.step()
    assert torch.equal(model.weights()["encoder.weight"] == 0, zeros)
    with pytest.raises(fxp.SpecError, match=r"already parametrized .* fxp.existing\(\) >> mask"):
        fxp.transform(net, {"encoder.weight": fxp.mask(density=0.5)})


def test_one_latent_for_several_weights() -> None:
    class Scales(nn.Module):
        def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
            return latent[:20].view(4, 5), 2 * latent[:20].view(5, 4)

    net = Net()
    model = fxp.transform(net, {fxp.joint("encoder.weight", "decoder.weight"): fxp.custom(Scales(), init=torch.randn(20))})
    x = torch.randn(3, 5)
    (latent,) = model.latents().values()
    free = latent.detach().clone().requires_grad_()
    want = F.linear(torch.tanh(F.linear(x, free.view(4, 5), net.encoder.bias)), 2 * free.view(5, 4), net.decoder.bias)
    same(model(x), want)
    model(x).pow(2).sum().backward()
    want.pow(2).sum().backward()
    same(latent.grad, free.grad)


@pytest.mark.parametrize("trace", TRACES)
def test_the_whole_model_as_one_vector(trace: str) -> None:
    net = Net()
    model = fxp.transform(net, {fxp.joint("*"): fxp.flat()}, trace=trace)
    (vector,) = model.parameters()
    x = torch.randn(3, 5)
    (found,) = torch.autograd.grad(model(x).pow(2).sum(), vector)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(net(x).pow(2).sum(), list(net.parameters()))])
    same(found, want)
    same(vector, nn.utils.parameters_to_vector(net.parameters()))
    assert [name for name, _ in fxp.restore(model).named_parameters()] == [name for name, _ in net.named_parameters()]


@pytest.mark.parametrize("trace", TRACES)
def test_the_gradient_of_a_subspace_is_the_projected_one(trace: str) -> None:
    net = Net()
    model = fxp.transform(net, {fxp.joint("*"): fxp.subspace(dim=6)}, trace=trace)
    (d,) = model.parameters()
    (basis,) = (b for name, b in model.named_buffers() if name.endswith("basis"))
    x = torch.randn(3, 5)
    same(model(x), net(x))
    (found,) = torch.autograd.grad(model(x).pow(2).sum(), d)
    full = torch.cat([g.flatten() for g in torch.autograd.grad(net(x).pow(2).sum(), list(net.parameters()))])
    same(found, basis.T @ full)


class Symmetric(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent.triu() + latent.triu(1).mT

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.triu()


CONSTRAINTS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "symmetric": (Symmetric(), lambda w: w - w.mT),
    "fxp.symmetric": (fxp.symmetric(), lambda w: w - w.mT),
    "skew": (fxp.skew(), lambda w: w + w.mT),
    "orthogonal": (fxp.orthogonal(), lambda w: w @ w.mT - torch.eye(len(w), dtype=w.dtype)),
    "cayley": (fxp.orthogonal(map="cayley"), lambda w: w @ w.mT - torch.eye(len(w), dtype=w.dtype)),
    "unit_norm": (fxp.unit_norm(), lambda w: w.norm(dim=-1) - 1),
    "positive": (fxp.positive(), lambda w: w.clamp(max=0)),
    "bounded": (fxp.bounded(-1.0, 1.0), lambda w: (w.abs() - 1).clamp(min=0)),
    "positive_definite": (fxp.positive_definite(), lambda w: torch.linalg.eigvalsh(w).clamp(max=0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_weights_satisfy_their_constraint_after_training(name: str, dtype: torch.dtype) -> None:
    declaration, violation = CONSTRAINTS[name]
    model = fxp.transform(nn.Linear(6, 6).to(dtype), {"weight": declaration})
    start = model.weights()["weight"].detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    target = torch.randn(16, 6, dtype=dtype)
    for _ in range(100):
        optimizer.zero_grad()
        (model(torch.randn(16, 6, dtype=dtype)) - target).pow(2).mean().backward()
        optimizer.step()
    weight = model.weights()["weight"].detach()
    assert weight.dtype == dtype and not torch.allclose(weight, start)
    scale = 1 + float(weight.abs().max())
    assert violation(weight).abs().max() <= 100 * torch.finfo(dtype).eps * scale


def test_instances_are_used_as_they_are() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))

        def forward(self, latent: Tensor) -> Tensor:
            return self.gain * latent

        def right_inverse(self, weight: Tensor) -> Tensor:
            return weight / self.gain

    gain = Gain()
    net = Net()
    model = fxp.transform(net, {"*.weight": gain})
    assert sum(p is gain.gain for p in model.parameters()) == 1
    x = torch.randn(3, 5)
    same(model(x), net(x))
    oracle = copy.deepcopy(net)
    other = Gain()
    for layer in (oracle.encoder, oracle.decoder):
        parametrize.register_parametrization(layer, "weight", other)
    model(x).pow(2).sum().backward()
    oracle(x).pow(2).sum().backward()
    same(gain.gain.grad, other.gain.grad)
    with torch.no_grad():
        gain.gain.mul_(2.0)
        other.gain.mul_(2.0)
    same(model(x), oracle(x))


# --- what came up when the whole was tried as a user would


def test_an_lbfgs_built_before_is_repointed() -> None:
    net = nn.Linear(4, 4)
    optimizer = torch.optim.LBFGS(net.parameters())
    model = fxp.transform(net, {"weight": fxp.weight_norm()}, optimizer=optimizer)
    x = torch.randn(2, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    before = model(x).square().sum().item()
    optimizer.step(closure)
    assert model(x).square().sum().item() < 1e-3 * before


@pytest.mark.parametrize(
    ("declared", "holds"),
    [
        (fxp.orthogonal() >> fxp.scale(3.0), lambda w: torch.allclose(w.T @ w, 9 * torch.eye(4, dtype=w.dtype))),
        (fxp.positive() >> fxp.mask(density=0.5), lambda w: bool((w >= 0).all()) and int((w == 0).sum()) == 8),
    ],
    ids=["scaled", "masked"],
)
def test_a_sample_of_a_chain_is_in_its_image(declared: Any, holds: Any) -> None:
    model = fxp.transform(nn.Linear(4, 4), {"weight": declared})
    weight = model.sample("weight", generator=torch.Generator().manual_seed(3))
    assert holds(weight)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_legacy_checkpoints_load_into_a_declared_model(kind: str) -> None:
    legacy = nn.Linear(4, 4)
    declared = {"weight_norm": fxp.weight_norm(), "spectral_norm": fxp.spectral_norm(), "prune": fxp.mask(density=0.5)}[kind]
    if kind == "prune":
        torch.nn.utils.prune.l1_unstructured(legacy, "weight", amount=0.5)
    else:
        getattr(torch.nn.utils, kind)(legacy, "weight")
    legacy.eval()
    model = fxp.transform(nn.Linear(4, 4), {"weight": declared}).eval()
    model.load_state_dict(legacy.state_dict())
    x = torch.randn(3, 4)
    same(model(x), legacy(x))


def test_a_plain_checkpoint_that_contradicts_a_reference_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = fxp.transform(net, {"1.weight": fxp.ref("0.weight") >> fxp.transpose()})
    state = dict(fxp.restore(model).state_dict())
    model.load_state_dict(state)
    with pytest.raises(fxp.ImageError, match=r"the checkpoint holds 1.weight, which is computed from 0.weight here"):
        model.load_state_dict(state | {"1.weight": torch.randn(4, 4)})


def test_what_is_no_spec_tensor_or_transformed_model_is_refused() -> None:
    with pytest.raises(fxp.SpecError, match=r"as a spec, expected a mapping"):
        fxp.transform(nn.Linear(2, 2), [("weight", fxp.skew())])  # type: ignore[arg-type]
    with pytest.raises(fxp.SpecError, match=r"expected a model that fxp.transform returned"):
        fxp.restore(nn.Linear(2, 2))  # type: ignore[arg-type]
    model = fxp.transform(nn.Linear(2, 2), {"weight": fxp.skew()})
    with pytest.raises(fxp.SpecError, match=r"got list for weight, expected a tensor"):
        model.assign("weight", [[0, 1], [-1, 0]])  # type: ignore[arg-type]
    with pytest.raises(fxp.SpecError, match=r"no weight of this model is computed"):
        fxp.transform(nn.Linear(2, 2)).freeze()


def test_an_optimizer_and_a_copy_exclude_each_other() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(fxp.SpecError, match=r"copy=True shares no tensor with the given model"):
        fxp.transform(net, {"weight": fxp.skew()}, copy=True, optimizer=torch.optim.SGD(net.parameters(), 0.1))
