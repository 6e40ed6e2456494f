"""Buffers: statistics, counters and tables that a forward reads, writes or replaces."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing.common import CALL, Base, Case, N, cases, changes, check, mutate, to_eval, to_train


class BatchNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.lin(x))


class BatchNormRead(BatchNorm):
    """Reads the statistics that the layer writes in the same forward, before and after."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.norm.running_mean * 2
        y = self.norm(self.lin(x))
        return y + before + self.norm.running_mean * 2


class BatchNormFunctional(BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        before = self.norm.running_var.sqrt()
        y = F.batch_norm(
            self.lin(x), self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias, self.training
        )
        return y * before + self.norm.running_var.sqrt()


class StatefulLeaf(Base):
    """The buffer of a leaf read by the code around it, through arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.BatchNorm1d(N))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.lin(x))
        return y / (self.norm[0].running_var + 1).sqrt()


class EmbeddingMaxNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, N, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        before = self.emb.weight.sum()
        index = torch.arange(3)
        return self.lin(x)[:3] + self.emb(index) + before + self.emb.weight.sum()


class BufferWritten(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("average", torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        before = self.average * 2
        self.steps += 1
        self.average.mul_(0.5).add_(y.detach().mean(0))
        return y + before + self.average * 2 + self.steps


class BufferReplaced(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        self.average = self.average * 0.5 + y.detach().mean(0)
        return y + self.average


class BufferWrittenElsewhere(Base):
    """Written between calls by a method, read in forward through arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * (self.scale * 2).exp()


class AliasedBuffer(Base):
    """Two buffers on one memory, one of them written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(N))
        self.register_buffer("b", self.a[1:])

    def _apply(self, fn: Any, recurse: bool = True) -> AliasedBuffer:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.a.add_(1)
        return self.lin(x) + (self.b * 2).sum()


class DetachedWritten(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        before = (self.a * 2).exp()
        self.a.detach().copy_(x.detach()[0])
        return self.lin(x) + before + (self.a * 2).exp()


class NumpyView(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        self.a.numpy()[0] += 1
        return self.lin(x) + self.a


CASES = (
    Case("batch norm", BatchNorm, body="graph"),
    Case("batch norm eval of child", BatchNorm, (CALL, mutate("model.norm.eval()"), CALL, CALL)),
    Case("batch norm momentum", BatchNorm, (CALL, mutate("model.norm.momentum = 0.9"), CALL, to_eval, CALL)),
    Case("batch norm read", BatchNormRead),
    Case("batch norm functional", BatchNormFunctional),
    Case("batch norm buffer read after", StatefulLeaf),
    Case("embedding max_norm", EmbeddingMaxNorm, (CALL, CALL, to_eval, CALL, to_train, CALL)),
    Case("buffer written", BufferWritten),
    Case("buffer replaced", BufferReplaced),
    Case(
        "buffer written elsewhere",
        BufferWrittenElsewhere,
        changes("model.scale.mul_(2)", "model.scale = torch.full((4,), 0.5, dtype=torch.float64)"),
    ),
    Case("aliased buffers", AliasedBuffer),
    Case("detached buffer written", DetachedWritten),
    Case("numpy view", NumpyView),
)


@pytest.mark.parametrize(("case", "spec"), cases(CASES))
def test_does_what_the_eager_model_does(case: Case, spec: bool) -> None:
    check(case, spec)
