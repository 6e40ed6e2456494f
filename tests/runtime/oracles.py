"""A model with computed weights, and the same model under ``torch.nn.utils.parametrize`` to compare with."""
# mypy: disable-error-code="operator,union-attr,arg-type"

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxparam as fxp

DTYPE = torch.float64
TRACES = ["live", "auto"]
SPEC: dict[Any, Any] = {"first.weight": fxp.weight_norm(), "second.weight": fxp.orthogonal(map="cayley")}


class Net(nn.Module):
    """Two layers, and between them, if asked for, a normalization with statistics."""

    def __init__(self, statistics: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6, dtype=DTYPE), nn.Linear(6, 3, dtype=DTYPE)
        self.norm = nn.BatchNorm1d(6, dtype=DTYPE) if statistics else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def pair(trace: Any = "live", *, statistics: bool = False) -> tuple[fxp.ParametrizedModule, nn.Module]:
    """A transformed model, and the oracle with the same values of the same names."""
    net = Net(statistics)
    oracle = copy.deepcopy(net)
    parametrizations.weight_norm(oracle.first)
    parametrizations.orthogonal(oracle.second, orthogonal_map="cayley")
    model = fxp.transform(net, SPEC, trace=trace, copy=True)
    oracle.load_state_dict(model.state_dict())
    return model, oracle


def inputs(*sizes: int) -> Tensor:
    """Random inputs of the model; by default one batch of 4."""
    return torch.randn(*(sizes or (4,)), 5, dtype=DTYPE)


def same(got: Any, want: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Tensor] | Tensor) -> None:
    """One step for each batch."""
    for x in batches:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()


def raw_fused(parameters: Sequence[Tensor]) -> None:
    """A step of SGD by the fused kernel itself: no version and no hook of an optimizer tells of it."""
    options = {"weight_decay": 0.0, "momentum": 0.0, "lr": 0.1, "dampening": 0.0, "nesterov": False, "maximize": False}
    torch._fused_sgd_(parameters, [p.grad for p in parameters], [], is_first_step=True, **options)  # type: ignore[call-overload]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss_of(model, x), parameters), strict=True))


def check(model: nn.Module, oracle: nn.Module, x: Tensor, tolerance: float = 1e-11) -> None:
    """Same outputs with and without gradient, same gradients, same state."""
    with torch.no_grad():
        same(model(x), oracle(x), tolerance)
    same(model(x), oracle(x), tolerance)
    same(gradients(model, x), gradients(oracle, x), tolerance)
    same(dict(model.state_dict()), dict(oracle.state_dict()), tolerance)
