"""Weight arithmetic that a model does by hand is moved out of the call without any rule, and counted."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from recording.common import WAYS, Call, Case, Host, check, doubles, given, step, to_eval, to_train
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxparam as fxp

N = 4


class Standardized(nn.Conv1d):
    """Weight standardization."""

    def __init__(self) -> None:
        super().__init__(N, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2), keepdim=True), self.weight.std((1, 2), keepdim=True)
        return F.conv1d(x, (self.weight - mean) / (std + 1e-5), self.bias)


class Equalized(nn.Module):
    """Equalized learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, N)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (1 / math.sqrt(N)), self.bias * 0.5)


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(3, N)), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1)) * self.scale.exp()


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alphas = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.alphas.softmax(0)
        return a * x + b * x.tanh() + c * x.relu()


class Positions(nn.Module):
    """A table of sines and cosines, computed of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.randn(8, N // 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat((self.angles.sin(), self.angles.cos()), -1)[: x.shape[-2]]


class Bias(nn.Module):
    """A relative position bias: a parameter looked up by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * N - 1, 2))
        at = torch.arange(N)
        self.register_buffer("index", at[:, None] - at[None] + N - 1)

    def forward(self, x: Tensor) -> Tensor:
        bias = F.embedding(self.index, self.table).permute(2, 0, 1).sigmoid()
        return (x[:, None] @ x[:, None].transpose(-1, -2))[..., :1, :1] * bias


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale, self.shift = nn.Parameter(torch.randn(N)), nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(self.log_scale) + F.softplus(self.shift)


@dataclass(frozen=True)
class Known:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    moved: tuple[str, ...]
    """Operations that run once per step."""
    left: tuple[str, ...]
    """Operations of the call."""
    other: tuple[int, ...]
    """Another shape of the input."""
    symbolic: tuple[int, int] | None = None
    """How many operations there are of each kind in a graph of symbolic tracing, if that differs."""


MIXED = ("softmax", "unbind", "getitem", "getitem", "getitem")
KNOWN = [
    Known(Standardized, (2, N, 5), ("mean", "std", "sub", "add", "div"), ("conv1d",), (3, N, 6)),
    Known(Equalized, (5, N), ("mul", "mul"), ("linear",), (3, N)),
    Known(Cosine, (5, N), ("normalize", "exp"), ("normalize", "linear", "mul"), (3, N)),
    Known(Mixture, (5, N), MIXED, ("mul", "tanh", "mul", "add", "relu", "mul", "add"), (3, N), (1, 10)),
    Known(Positions, (5, N), ("sin", "cos", "cat"), ("getitem", "add"), (3, N), (3, 4)),
    Known(
        Bias, (5, 1, N), ("embedding", "permute", "sigmoid"), ("getitem", "transpose", "matmul", "getitem", "mul"), (3, 1, N)
    ),
    Known(Scaled, (5, N), ("exp", "softplus"), ("mul", "add"), (3, N)),
]
IDS = [known.make.__name__ for known in KNOWN]


def operations(graph: fx.Graph) -> list[str]:
    nodes = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    return [str(getattr(node.target, "__name__", node.target)).strip("_") for node in nodes]


def values(*shape: int) -> Call:
    return given(lambda: torch.randn(*shape))


@pytest.mark.parametrize("known", KNOWN, ids=IDS)
@pytest.mark.parametrize("way", WAYS)
def test_it_computes_and_trains_as_before(known: Known, way: str) -> None:
    call, other = values(*known.shape), values(*known.other)
    story = (call, call, step, call, other, other, step, other, to_eval, call, call, other, to_train, call)
    check(Case(known.make.__name__, known.make, story, spec=False), way)


@pytest.mark.parametrize("known", KNOWN, ids=IDS)
@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_it_is_moved_out_of_the_call(known: Known, way: str) -> None:
    kind, trace = way.split("-")
    inner = known.make().double()
    model = fxp.transform(inner if kind == "model" else Host(inner).double(), trace=trace)
    for _ in range(3):
        model(torch.randn(*known.shape))
    moved = operations(model.prologue.graph)
    traced = known.symbolic if way == "model-auto" and known.symbolic else (len(known.moved), len(known.left))
    assert {name.removeprefix("true") for name in moved} <= set(known.moved)
    assert (len(moved), model.report.prologue_nodes, model.report.body_nodes) == (traced[0], *traced), str(model.report)
    assert model.report.layer_of("inner" if kind == "region" else "").layer != "live"


@pytest.mark.parametrize("known", KNOWN, ids=IDS)
@doubles()
def test_nothing_of_it_is_left_after_fold(known: Known) -> None:
    inner: Any = known.make().double()
    value = torch.randn(*known.shape)
    model = fxp.transform(inner, trace="record", example_inputs=(value,))
    plain = fxp.fold(model, example_inputs=(value,))
    torch.testing.assert_close(plain(value), inner.eval()(value), rtol=1e-12, atol=1e-12)
    for name in set(known.moved) - set(known.left):
        assert name not in operations(plain.graph), plain.graph
