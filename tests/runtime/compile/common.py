"""Models with computed weights beside their oracles, which run eagerly, and how both are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.models import SkewExp, through_one_node
from runtime.oracles import DTYPE, same
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import fxparam as fxp

# What dynamo looks at on its way; it hides the warning unless warnings are errors.
DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
N = 5


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


X = noise(1, 4, N)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(N, N, dtype=DTYPE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))


class Methods(nn.Module):
    """Weights read outside of their layers and by methods, some twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (nn.Linear(N, N, dtype=DTYPE) for _ in range(2))

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.encoder(x))

    def penalty(self) -> Tensor:
        return self.encoder.weight.exp().mean()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.encode(x), self.encoder.weight.mT + self.decoder.weight) * self.penalty()


class Standardized(nn.Module):
    """Weight arithmetic of the forward's own: hoisted, so that the body is a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(N, N, dtype=DTYPE)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.w / self.w.norm(dim=1, keepdim=True))) @ self.w @ torch.softmax(self.v, 1)


class Branching(Layers):
    """Python that no tracer takes: the body stays live."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b) if x.shape[0] > 2 else (self.c,):
            x = torch.tanh(layer(x))
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(N, N, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.unsqueeze(1))[0].squeeze(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(N, N, dtype=DTYPE) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def eager_twin(net: nn.Module, spec: dict[Any, Any]) -> tuple[Any, fxp.ParametrizedModule]:
    """For what ``parametrize`` cannot say: the same model, not compiled."""
    model = fxp.transform(net, spec)
    return copy.deepcopy(model), model


def adopted(net: nn.Module) -> tuple[Any, fxp.ParametrizedModule]:
    return net, fxp.transform(copy.deepcopy(net))


def skew() -> tuple[Any, fxp.ParametrizedModule]:
    net = Layers()
    for layer in (net.a, net.b):
        parametrize.register_parametrization(layer, "weight", SkewExp())
    return adopted(net)


def orthogonals() -> tuple[Any, fxp.ParametrizedModule]:
    net = Layers()
    for layer, name in zip((net.a, net.b, net.c), ("cayley", "matrix_exp", "householder"), strict=True):
        orthogonal(layer, orthogonal_map=name)
    return adopted(net)


def norms() -> tuple[Any, fxp.ParametrizedModule]:
    net = Layers()
    weight_norm(net.a)
    spectral_norm(net.b)
    return adopted(net)


def methods() -> tuple[Any, fxp.ParametrizedModule]:
    net = Methods()
    parametrize.register_parametrization(net.encoder, "weight", SkewExp())
    return adopted(net)


def hoisted() -> tuple[Any, fxp.ParametrizedModule]:
    return adopted(Standardized())


def branching() -> tuple[Any, fxp.ParametrizedModule]:
    net = Branching()
    parametrize.register_parametrization(net.a, "weight", SkewExp())
    return adopted(net)


def recurrent() -> tuple[Any, fxp.ParametrizedModule]:
    net = Recurrent()
    parametrize.register_parametrization(net.rnn, "weight_ih_l0", nn.Softplus(), unsafe=True)
    return adopted(net)


def tied() -> tuple[Any, fxp.ParametrizedModule]:
    return eager_twin(Tied(), {"a.weight": fxp.custom(SkewExp(), init=lambda w: w)})


def joint_and_ref() -> tuple[Any, fxp.ParametrizedModule]:
    spec = {
        fxp.joint("a.weight", "b.weight"): fxp.custom(through_one_node, init=lambda weights: tuple(weights)),
        "c.weight": fxp.ref("a.weight") >> fxp.transpose(),
    }
    return eager_twin(Layers(), spec)


def subspace() -> tuple[Any, fxp.ParametrizedModule]:
    return eager_twin(Layers(), {fxp.joint("*"): fxp.subspace(dim=20)})


MODELS: list[Callable[[], tuple[Any, fxp.ParametrizedModule]]] = [
    skew,
    orthogonals,
    norms,
    methods,
    hoisted,
    branching,
    recurrent,
    tied,
    joint_and_ref,
    subspace,
]


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def train(oracle: Any, model: Any, run: Callable[[Tensor], Tensor], *, steps: int = 3, x: Tensor = X) -> None:
    """Optimizer steps of both, with outputs and gradients compared at each."""
    optimizers = [torch.optim.SGD(module.parameters(), 0.05) for module in (oracle, model)]
    for _ in range(steps):
        outputs = []
        for optimizer, call in zip(optimizers, (oracle, run), strict=True):
            optimizer.zero_grad()
            output = call(x)
            output.square().mean().backward()
            outputs.append(output.detach())
        same(outputs[1], outputs[0])
        same(grads(model), grads(oracle))
        for optimizer in optimizers:
            optimizer.step()
    same(dict(model.named_buffers()), dict(oracle.named_buffers()))
