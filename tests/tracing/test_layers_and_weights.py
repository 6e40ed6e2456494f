"""Layers that are shared, repeated or read, and arithmetic on their weights."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing.common import Base, Case, N, cases, check


class ReadsRegistries(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x) + self.lin._parameters["bias"]
        return y + sum(p.sum() for p in self.lin.parameters())


class ReadsOwnBias(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + dict(self.named_parameters())["lin.bias"] * 2


class Lists(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([nn.Parameter(torch.rand(N)) for _ in range(3)])
        self.table = nn.ParameterDict({"a": nn.Parameter(torch.rand(N))})
        self.layers = nn.ModuleList([nn.Linear(N, N), nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x) * self.table["a"]
        for gain in self.gains:
            y = y * gain
        for layer in self.layers:
            y = layer(y)
        return y


class Attention(Base):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(N, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        h = self.lin(x).unsqueeze(0)
        a, none = self.attn(h, h, h, need_weights=False)
        if none is not None:
            a = a + 100
        b, weights = self.attn(h, h, h, average_attn_weights=False)
        return a, b, weights


class AttentionPositional(Attention):
    def forward(self, x: Tensor) -> tuple[Any, ...]:
        h = self.lin(x).unsqueeze(0)
        a, none = self.attn(h, h, h, None, False)
        return a, none


class Recurrent(Base):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(N, N, 2)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y, (h, c) = self.rnn(self.lin(x).unsqueeze(1))
        y, state = self.rnn(y, (h, c))
        return y, state, h


class Shared(Base):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.lin
        self.nested = nn.Sequential(nn.Tanh(), self.lin)

    def forward(self, x: Tensor) -> Tensor:
        return self.nested(self.again(self.lin(x)))


class Loop(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.lin(x).tanh()
        return x


class WeightDetached(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + (self.lin.weight.detach() * 2).sum() + (self.lin.weight.data * 2).sum()


class CustomModuleCalled(Base):
    """A submodule without forward of its own semantics: called through another method."""

    def __init__(self) -> None:
        super().__init__()
        self.sub = Base()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.lin(x), self.sub.lin.weight * 2, self.sub.lin.bias)


class Tied(Base):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(N, N, bias=False)
        self.out.weight = self.lin.bias_matrix if hasattr(self.lin, "bias_matrix") else self.out.weight
        self.head = nn.Linear(N, N, bias=False)
        self.head.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.lin(x)))


class WeightNormByHand(Base):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.rand(N, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.lin.weight
        return F.linear(x, self.g * w / w.norm(dim=1, keepdim=True), self.lin.bias)


class GeneratorExpression(Base):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lin(x).split(2, dim=1)
        return a * b


class Unpacked(Base):
    def forward(self, x: Tensor) -> Tensor:
        a, b, *rest = self.lin(x).unbind(1)
        return a * b + sum(rest)


class UnpackedWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k = self.lin.weight.chunk(2)
        a, *_ = self.lin.weight
        return F.linear(x, q * 2) + F.linear(x, k * 3) + a.sum()


class Einsum(Base):
    def forward(self, x: Tensor) -> Tensor:
        w = torch.einsum("ij,kj->ik", self.lin.weight, self.lin.weight)
        q, r = torch.linalg.qr(w + 3 * torch.eye(N))
        values, index = torch.sort(self.lin.bias)
        return x @ q + r.diagonal() + values[index]


class SetAttrMethod(Base):
    def scaled(self, x: Tensor) -> Tensor:
        return self.lin(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x)


class PrivateName(Base):
    """An attribute that the passes use for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.hoisted = nn.Linear(N, N)
        self.constants = nn.Linear(N, N)
        self.captured = nn.Linear(N, N)
        self.p = nn.Parameter(torch.rand(N))
        self.held = [torch.ones(N)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.captured(self.constants(self.hoisted(self.lin(x))))
        return y * self.p.exp() * torch.arange(N) * self.held[0] + self.hoisted.weight.exp().sum()


CASES = (
    Case("registries", ReadsRegistries),
    Case("named_parameters", ReadsOwnBias),
    Case("lists", Lists, body="graph"),
    Case("attention", Attention),
    Case("attention positional", AttentionPositional),
    Case("lstm", Recurrent),
    Case("shared submodule", Shared),
    Case("loop", Loop),
    Case("detached weight", WeightDetached),
    Case("weight of another module", CustomModuleCalled),
    Case("tied", Tied),
    Case("weight norm by hand", WeightNormByHand, body="graph"),
    Case("split", GeneratorExpression),
    Case("unbind", Unpacked),
    Case("chunk of weight", UnpackedWeight),
    Case("linear algebra of weight", Einsum),
    Case("method", SetAttrMethod, body="graph"),
    Case("private names", PrivateName),
)


@pytest.mark.parametrize(("case", "spec"), cases(CASES))
def test_does_what_the_eager_model_does(case: Case, spec: bool) -> None:
    check(case, spec)
