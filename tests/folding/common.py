"""Plain nets, the ways to give them computed weights, and both as a pair: transformed, and plain with the same weights."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as stock
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

import fxparam as fxp

N = 6


class Doubled(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent * 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(N, N), nn.Linear(N, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.ConvTranspose1d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x.unsqueeze(1))).relu())


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LSTM(N, N, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.unsqueeze(1))[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(N, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        y = x.unsqueeze(0)
        return self.a(y, y, y)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(10, N), nn.Linear(N, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.abs().mul(3).long().clamp(0, 9)))


class Tied(Embedding):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight


class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(N, N)
        self.again = self.a
        self.layers = nn.Sequential(self.a, nn.Tanh(), self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.again(x))


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x), self.a.weight)


class Normed(nn.Module):
    """Weight arithmetic of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(N, N)
        self.alphas = nn.Parameter(torch.rand(3))
        self.register_buffer("scale", torch.rand(N))

    def forward(self, x: Tensor) -> Tensor:
        w = F.normalize(self.a.weight, dim=1) * self.scale.exp()
        alphas = self.alphas.softmax(0)
        return F.linear(x, w, self.a.bias) * alphas[0] + x * alphas[1]


class Standardized(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2), keepdim=True)) / (w.std((1, 2), keepdim=True) + 1e-5)
        return F.conv1d(x, w, self.bias)


class StandardizedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Standardized(1, 3, 3), nn.Linear(N - 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.unsqueeze(1)))


class Bare(nn.Module):
    """Parameters of the root itself, of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(N, N))
        self.layers = nn.ParameterList([nn.Parameter(torch.rand(N)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a * self.layers[0] + self.layers[1]


SPECS: dict[type[nn.Module], str] = {
    Mlp: "*.weight",
    Conv: "[ab].weight",
    Lstm: "a.weight_hh_l*",
    Attention: "a.in_proj_weight",
    Embedding: "*.weight",
    Tied: "a.weight",
    SharedModule: "a.weight",
    ReadsWeight: "a.weight",
    Normed: "a.weight",
    StandardizedNet: "*.weight",
    Bare: "a",
}


def by_spec(net: nn.Module) -> nn.Module:
    return fxp.transform(net, {SPECS[type(net)]: Doubled()})


def by_parametrize(net: nn.Module) -> nn.Module:
    for name, parameter in list(net.named_parameters()):
        owner = net.get_submodule(name.rpartition(".")[0])
        if parameter.dim() > 1 and not isinstance(net, Tied):
            register_parametrization(owner, name.rpartition(".")[2], Doubled())
    return fxp.transform(net)


def by_weight_norm(net: nn.Module) -> nn.Module:
    return fxp.transform(stock.weight_norm(net.a, "weight") and net)


def by_legacy_weight_norm(net: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(net.a, "weight")
    return fxp.transform(net)


def by_spectral_norm(net: nn.Module) -> nn.Module:
    stock.spectral_norm(net.a, "weight")
    return fxp.transform(net)


def by_legacy_spectral_norm(net: nn.Module) -> nn.Module:
    torch.nn.utils.spectral_norm(net.a, "weight")
    return fxp.transform(net)


def by_prune(net: nn.Module) -> nn.Module:
    prune.l1_unstructured(net.a, "weight", 0.5)
    return fxp.transform(net)


def by_spec_on_parametrized(net: nn.Module) -> nn.Module:
    register_parametrization(net.a, "weight", Doubled())
    return fxp.transform(net, {"a.weight": fxp.existing() >> fxp.custom(lambda w: w.tanh())})


@dataclass(frozen=True)
class Case:
    net: type[nn.Module]
    by: Callable[[nn.Module], nn.Module]

    def __str__(self) -> str:
        return f"{self.net.__name__}-{self.by.__name__}"


ON_LAYER = (
    by_weight_norm,
    by_legacy_weight_norm,
    by_spectral_norm,
    by_legacy_spectral_norm,
    by_prune,
    by_spec_on_parametrized,
)


CASES = (
    *(Case(net, by) for net in SPECS for by in (by_spec, by_parametrize)),
    *(Case(net, by) for net in (Mlp, Conv, ReadsWeight, SharedModule, Normed, StandardizedNet) for by in ON_LAYER),
)


TABLE = [pytest.param(case, id=str(case)) for case in CASES]


def inputs(dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(4, N, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def made(case: Case, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, fxp.ParametrizedModule]:
    """The transformed model, after some training, and a plain one of the user's class with the weights it has."""
    torch.manual_seed(0)
    model: Any = case.by(case.net().to(dtype))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for seed in range(2):
        optimizer.zero_grad()
        out = model(inputs(dtype, seed))
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        optimizer.step()
    model.eval()
    plain = case.net().to(dtype).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters(remove_duplicate=False):
            path, _, local = name.rpartition(".")
            parameter.copy_(getattr(model.get_submodule(path), local))
        for name, buffer in plain.named_buffers():
            buffer.copy_(model.get_buffer(name))
    return plain, model


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = model(x)
    return list(out) if isinstance(out, tuple) else [out]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        eps = torch.finfo(b.dtype).eps
        torch.testing.assert_close(a, b, rtol=100 * eps, atol=100 * eps)
