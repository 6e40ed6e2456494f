"""Forwards that differentiate, map or checkpoint over computed layers of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as ckpt
from runtime.module.common import WN, gradients, oracle_of
from runtime.oracles import TRACES, same
from torch import Tensor, nn
from torch.func import functional_call, grad

import fxparam as fxp


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
