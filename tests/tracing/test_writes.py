"""Writes in place: through aliases and views, by modules and functions, to what others still read."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing.common import CALL, WRITE, Base, Case, N, cases, check, step, to_eval


class InPlaceAliasing(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        z = y
        y += 1
        z *= 2
        return y + z


class InPlaceView(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        y[0] += x.mean()
        y[:, 1] = 0
        y.view(-1)[2:4].mul_(2)
        return y


class InPlaceOnInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = x
        z = self.lin(x * 2)
        x += z
        return y + x


class InPlaceOnComputedArithmetic(Base):
    def forward(self, x: Tensor) -> Tensor:
        v = (self.lin.weight * 2).view(-1)
        v[0] += x.mean()
        return x @ v.view(N, N)


class WeightData(Base):
    """Writes to a parameter through ``.data``: no version, no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        self.lin.bias.data.mul_(0.5)
        return self.lin(x) + (self.lin.bias * 2).exp()


class WritesParameterNoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.lin.bias.clamp_(-0.1, 0.1)
        return self.lin(x)


class WeightWrittenOut(Base):
    """Weight arithmetic with ``out=``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("work", torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        torch.exp(self.lin.bias.detach(), out=self.work)
        return self.lin(x) * self.work


class InplaceModule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.p = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        v = self.p * 2
        w = v
        self.act(v)
        return self.lin(x) * w


class InplaceFunctional(Base):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        v, u, t = self.p * 2, self.p * 3, self.p * 4
        a, b, c = v, u, t
        F.relu(v, True)
        F.leaky_relu_(u)
        F.elu(t, inplace=True)
        return self.lin(x) * a + b + c


class InplaceTorch(Base):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        v, u = self.p * 2, self.p * 3
        torch.relu_(v)
        u.add_(x[0])
        first = u.exp()
        u.mul_(2)
        return self.lin(x) * v + first + u.exp()


class ChunkWritten(Base):
    """A view of a tuple of views, written."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(2 * N))

    def forward(self, x: Tensor) -> Tensor:
        v = self.p * 2
        a, b = v[:N], v[N:]
        a += x[0]
        return self.lin(x) + v[:N] + b


class ConstantWritten(Base):
    def forward(self, x: Tensor) -> Tensor:
        eye = torch.eye(N)
        mask = torch.ones(N)
        mask[0] = x.mean()
        table = torch.zeros(N)
        table[1:] += 1
        table.fill_(2.0)
        return self.lin(x) @ eye * mask * table


class WritesInputsOfLeaf(Base):
    """A user's own in-place function registered as a module of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Hardtanh(inplace=True)
        self.drop = nn.Dropout(0.5, inplace=True)
        self.p = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        v, u = self.p * 2, self.p * 3
        a, b = v, u
        self.act(v)
        self.drop(u)
        return self.lin(x) * a + b


class IdentityLeaf(Base):
    """A leaf that returns what it is given, then written."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Identity()
        self.p = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        v = self.p * 2
        w = self.drop(v)
        w += x[0]
        return self.lin(x) * v


class EvalDropoutAlias(IdentityLeaf):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)


class FunctionalAlias(Base):
    """Functions that may return their input itself, then written."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(2, N))

    def forward(self, x: Tensor) -> Tensor:
        out = self.lin(x)
        for same in (
            lambda v: F.dropout(v, 0.5, False),
            lambda v: F.pad(v, (0, 0)),
            lambda v: torch.atleast_1d(v),
            lambda v: torch.flatten(v, 0, 0),
            lambda v: v.contiguous(),
            lambda v: torch.ravel(v[0]),
            lambda v: torch.real(v),
            lambda v: v.to(torch.float64),
            lambda v: v.type_as(v),
            lambda v: torch.broadcast_tensors(v, v)[0],
            lambda v: torch.einsum("ij->ij", v),
            lambda v: torch.conj(v),
            lambda v: v.expand_as(v),
            lambda v: torch.meshgrid(v[0], v[1], indexing="ij")[0][:, 0],
            lambda v: torch.dropout(v, 0.5, False),
            lambda v: torch.movedim(v, 0, 0),
            lambda v: torch.block_diag(v)[:2],
            lambda v: torch.cartesian_prod(v[0]),
            lambda v: v.__getitem__(0),
            lambda v: torch.clamp(v, -100, 100, out=v) if not v.requires_grad else v.clamp_(-100, 100),
            lambda v: v.data,
            lambda v: torch.resolve_conj(v),
            lambda v: torch.nan_to_num(v, out=None),
        ):
            v = self.p * 2
            w = same(v)
            with_x = w.detach()
            with_x += x.detach()[0, 0]
            out = out + v.sum() + v.exp().mean()
        return out


class OutputMutated(Base):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Any:
        v = self.p * 2
        return self.lin(x), v, v.view(2, 2), v[:2], [torch.ones(3), v.detach()], self.lin.weight * 2


CASES = (
    Case("in-place aliasing", InPlaceAliasing),
    Case("in-place view", InPlaceView),
    Case("in-place on input", InPlaceOnInput),
    Case("in-place on weight arithmetic", InPlaceOnComputedArithmetic),
    Case("data written", WeightData, (CALL, CALL, CALL, to_eval, CALL, CALL)),
    Case("parameter written", WritesParameterNoGrad),
    Case("out=", WeightWrittenOut),
    Case("in-place module on parameters", InplaceModule),
    Case("in-place functional on parameters", InplaceFunctional),
    Case("in-place torch on parameters", InplaceTorch),
    Case("chunk written", ChunkWritten),
    Case("constant written", ConstantWritten),
    Case("in-place leaves", WritesInputsOfLeaf),
    Case("identity leaf written", IdentityLeaf),
    Case("dropout leaf written", EvalDropoutAlias),
    Case("functions that return their input", FunctionalAlias),
    Case("output written by the caller", OutputMutated, (WRITE, WRITE, step, WRITE, CALL, to_eval, WRITE, CALL)),
)


@pytest.mark.parametrize(("case", "spec"), cases(CASES))
def test_does_what_the_eager_model_does(case: Case, spec: bool) -> None:
    check(case, spec)
