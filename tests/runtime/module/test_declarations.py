"""Declarations at work: ties, references, masks, joint sites, constraints, instances."""
# mypy: disable-error-code="operator"

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtime.module.common import Net
from runtime.oracles import TRACES, same
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fxparam as fxp


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
