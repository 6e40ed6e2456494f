"""Parametrizations of one square weight, and the comparison of a model that has them with ``torch.nn.utils.parametrize``."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import fxparam as fxp

N = 4


class Same(nn.Module):
    """All maps here keep the latent as it is, so that both models start from equal latents."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class StraightThrough(Same):
    def forward(self, w: Tensor) -> Tensor:
        return Sign.apply(w * 1.5)


class NoGradInside(Same):
    def forward(self, w: Tensor) -> Tensor:
        with torch.no_grad():
            norm = w.norm()
        return w / norm


class PowerIteration(Same):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("u", torch.ones(N) / 2)

    def forward(self, w: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.u.copy_(F.normalize(w @ F.normalize(w.mT @ self.u, dim=0), dim=0))
        return w / (self.u @ w).norm()


class BufferReplaced(Same):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("u", torch.ones(N))

    def forward(self, w: Tensor) -> Tensor:
        if self.training:
            self.u = self.u * 0.5 + w.detach().sum(1)
        return w * self.u


class PlainAttribute(Same):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(1.0, N + 1, dtype=torch.float64)

    def forward(self, w: Tensor) -> Tensor:
        return w * self.table


class Random(Same):
    def forward(self, w: Tensor) -> Tensor:
        return w + torch.randn_like(w)


class Dropped(Same):
    def forward(self, w: Tensor) -> Tensor:
        return F.dropout(w, 0.5, self.training)


class PythonRandom(Same):
    def forward(self, w: Tensor) -> Tensor:
        return w * random.random()


class Options(Same):
    def __init__(self, eps: float = 0.5) -> None:
        super().__init__()
        self.eps = eps
        self.more = {"scale": 1.0}
        self.list = [1.0]

    def forward(self, w: Tensor) -> Tensor:
        return w / (w.norm() + self.eps) * self.more["scale"] * self.list[0]


class Counts(Same):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, w: Tensor) -> Tensor:
        self.count += 1
        return w * 2


class KeepsLast(Same):
    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None

    def forward(self, w: Tensor) -> Tensor:
        self.last = w.detach() * 2
        return w * 2


class Modes(Same):
    def forward(self, w: Tensor) -> Tensor:
        return w.exp() if self.training else w.sin()


class OwnParameter(Same):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((N, 1), 1.5, dtype=torch.float64))

    def forward(self, w: Tensor) -> Tensor:
        return w * self.scale


def pair(make: Callable[[], nn.Module], layers: int = 1) -> tuple[nn.Module, fxp.ParametrizedModule]:
    torch.manual_seed(1)
    net = nn.Sequential(*(nn.Linear(N, N) for _ in range(layers)))
    eager = copy.deepcopy(net)
    for layer in eager:
        register_parametrization(layer, "weight", make(), unsafe=True)
    return eager, fxp.transform(net, {"*.weight": lambda w: make()})


def observe(model: nn.Module, seed: int, *, grad: bool = True) -> dict[str, Any]:
    for parameter in model.parameters():
        parameter.grad = None
    x = torch.randn(3, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    x = x.to(next(model.parameters()).dtype)
    torch.manual_seed(seed)
    random.seed(seed)
    with torch.set_grad_enabled(grad):
        out = model(x)
    if grad:
        out.square().sum().backward()
    seen = {"out": out.detach()} | {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return seen | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


def same(found: dict[str, Any], expected: dict[str, Any], at: str) -> None:
    assert found.keys() == expected.keys(), at
    for key, wanted in expected.items():
        assert (found[key] is None) == (wanted is None), f"{at}: {key}"
        if wanted is not None:
            # The prologue orders sums as eager does; what is left is rounding.
            eps = 1e-12 if wanted.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(found[key], wanted, rtol=eps, atol=eps, msg=lambda m: f"{at}: {key}: {m}")  # noqa: B023


def story(eager: nn.Module, model: nn.Module) -> None:
    for number in range(3):
        same(observe(model, number), observe(eager, number), f"train {number}")
        with torch.no_grad():
            for one in (eager, model):
                for p in one.parameters():
                    p -= 0.1 * p.grad
    eager.eval(), model.eval()
    for number in range(2):
        same(observe(model, number), observe(eager, number), f"eval {number}")
        same(observe(model, number, grad=False), observe(eager, number, grad=False), f"eval without grad {number}")
    eager.train(), model.train()
    same(observe(model, 9), observe(eager, 9), "train again")
