"""Random numbers: drawn by torch, numpy and Python, from generators of all and of one's own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing.common import CALL, Base, Case, N, cases, check, mutate, to_eval, to_train


class PythonRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * random.random()


class NumpyRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * float(np.random.rand())


class OwnGeneratorRandom(Base):
    """A generator of the module's own, which no watch of the global ones sees."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.rng.random()


class OwnNumpyGenerator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * float(self.rng.random())


class TorchRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + torch.randn(N) + torch.rand_like(x) + torch.empty(N).normal_()


class TorchRandomOnWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lin.weight + torch.randn_like(self.lin.weight), self.lin.bias)


class TorchRandomInPlaceOnly(Base):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.zeros(N)
        noise.uniform_()
        return self.lin(x) * noise


class TorchRandomItem(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) if torch.rand(()).item() < 0.5 else x


class RandomNumbersDrawnByWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.lin.weight, 0.5, self.training), self.lin.bias)


class Dropout(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.drop(self.lin(x)), 0.3, training=self.training)


class DropoutAlways(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.lin(x), 0.3)


class Seeds(Base):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return self.lin(x) + torch.randn(N)


class OwnTorchGenerator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.generators = [torch.Generator().manual_seed(3)]

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + torch.randn(N, generator=self.generators[0])


class Distribution(Base):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.rand(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + torch.distributions.Normal(self.p, 1.0).rsample()


CASES = (
    Case("python random", PythonRandom, body="live", why="random numbers"),
    Case("numpy random", NumpyRandom, body="live", why="random numbers"),
    Case("random.Random", OwnGeneratorRandom, body="live"),
    Case("numpy Generator", OwnNumpyGenerator, body="live"),
    Case("torch random", TorchRandom),
    Case("torch random on weight", TorchRandomOnWeight),
    Case("torch random in place", TorchRandomInPlaceOnly),
    Case("torch random item", TorchRandomItem, body="live"),
    Case("dropout of weight", RandomNumbersDrawnByWeight),
    Case(
        "eval of a child",
        Dropout,
        (CALL, mutate("model.drop.eval()"), CALL, to_eval, CALL, mutate("model.drop.train()"), CALL, to_train, CALL),
    ),
    Case("dropout", Dropout),
    Case("dropout always", DropoutAlways),
    Case("seeds", Seeds, body="live"),
    Case("own torch generator", OwnTorchGenerator),
    Case("distribution", Distribution),
)


@pytest.mark.parametrize(("case", "spec"), cases(CASES))
def test_does_what_the_eager_model_does(case: Case, spec: bool) -> None:
    check(case, spec)
