"""Models that ask what a value is: its type, flags, size, dtype, identity or number."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing.common import CALL, STORY, Base, Call, Case, N, cases, changes, check, given, mutate, small, step


class IsInstance(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if isinstance(y, Tensor) else y.tanh()


class TypeIs(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if type(y) is Tensor else y.tanh()


class HasAttr(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if hasattr(y, "untyped_storage") and not hasattr(y, "node") else y.tanh()


class IsTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if torch.is_tensor(y) else y.tanh()


class FloatingAsked(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if torch.is_floating_point(y) and y.is_floating_point() else y.tanh()


class RequiresGradAsked(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if y.requires_grad else y.tanh()


def without_grad(model: nn.Module) -> None:
    model.requires_grad_(False)


class WeightRequiresGradAsked(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if self.lin.weight.requires_grad and self.lin.bias.requires_grad else y.tanh()


class FString(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if "Proxy" not in f"{y}" and "Proxy" not in repr(type(y)) else y.tanh()


class IdentityAsked(Base):
    def forward(self, x: Tensor) -> Tensor:
        w = self.lin.weight
        cache = {id(self.lin.bias): 2.0}
        return F.linear(x, w) * cache.get(id(self.lin.bias), 1.0)


class EqualityInList(Base):
    """``in`` asks for identity first."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y * 2 if any(p is self.lin.bias for p in self.parameters()) else y


class TryExcept(Base):
    """The tracer's error must not be taken for the model's own."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        try:
            if y.sum() > -1e9:
                return y.relu()
        except Exception:
            pass
        return y.tanh()


class TryIsInstance(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        try:
            return y.relu() if isinstance(y, Tensor) else y
        except Exception:
            return y.tanh()


class LoopOverRows(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.lin(row) for row in x])


class ShapeBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if x.shape[0] > 4 else y.tanh()


class ShapeArithmetic(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.reshape(x.size(0) * 2, -1) / math.sqrt(self.lin.weight.size(1)) + torch.ones(x.shape[0] * 2, 1)


class LenBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) / len(x)


class ValueBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if y.sum() > 0 else y.tanh()


class ValueBranchOnWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if self.lin.bias.sum() > 0 else y.tanh()


class ItemOfWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * float(self.lin.bias.detach().abs().max())


class ItemOfBuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.ones((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(self.n)):
            x = self.lin(x)
        return x


class BufferInRange(ItemOfBuffer):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.n):
            x = self.lin(x)
        return x


class Assertion(Base):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.dim() == 2, "two dimensions")
        return self.lin(x)


class DeviceOfWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(N, device=self.lin.weight.device, dtype=self.lin.weight.dtype)
        return self.lin(x) + y + torch.ones(2, N).to(self.lin.bias)[0]


class DtypeOfInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x.to(self.lin.weight.dtype)).to(x.dtype)


class BakesDtype(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + torch.ones(N, dtype=self.lin.bias.dtype) * torch.finfo(self.lin.bias.dtype).eps * 1e6


AS_FLOAT = Call(lambda: (torch.randn(5, N, dtype=torch.float32),))


class BakesShape(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(3, N))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.table.shape[0] + self.table.sum(0) * len(self.table)


CASES = (
    Case("isinstance", IsInstance, body="live", why="isinstance"),
    Case("type is", TypeIs),
    Case("hasattr", HasAttr),
    Case("is_tensor", IsTensor),
    Case("is_floating_point", FloatingAsked),
    Case("requires_grad asked", RequiresGradAsked, (*STORY, without_grad, CALL, Call(grad=False))),
    Case("requires_grad of weight asked", WeightRequiresGradAsked, (*STORY, without_grad, CALL)),
    Case("loop over rows", LoopOverRows, (CALL, given(small), CALL), body="live"),
    Case("shape branch", ShapeBranch, (CALL, given(small), CALL), body="live"),
    Case("shape arithmetic", ShapeArithmetic, (CALL, given(small), CALL, step, given(small))),
    Case("len", LenBranch, (CALL, given(small)), body="live"),
    Case("value branch", ValueBranch, body="live"),
    Case("value branch on weight", ValueBranchOnWeight, (CALL, mutate("model.lin.bias.data.fill_(1.0)"), CALL, CALL)),
    Case("item of weight", ItemOfWeight),
    Case("item of buffer", ItemOfBuffer, (CALL, mutate("model.n.add_(2)"), CALL, CALL), body="live"),
    Case("buffer in range", BufferInRange, (CALL, mutate("model.n.add_(2)"), CALL, CALL), body="live"),
    Case("assertion", Assertion),
    Case("device of weight", DeviceOfWeight),
    Case("dtype of input", DtypeOfInput, (CALL, given(lambda: torch.randn(5, N).float()), CALL)),
    Case("string", FString),
    Case("identity", IdentityAsked),
    Case("identity in list", EqualityInList),
    Case("try around a branch", TryExcept),
    Case("try around isinstance", TryIsInstance),
    Case("dtype baked", BakesDtype, (CALL, mutate("model.float()"), AS_FLOAT, AS_FLOAT, mutate("model.double()"), CALL)),
    Case("shape baked", BakesShape, changes("model.table = nn.Parameter(torch.ones(5, 4))")),
    Case("shape baked, set_", BakesShape, changes("model.table.data = torch.ones(5, 4)")),
)


@pytest.mark.parametrize(("case", "spec"), cases(CASES))
def test_does_what_the_eager_model_does(case: Case, spec: bool) -> None:
    check(case, spec)
