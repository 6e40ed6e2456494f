"""Autograd functions, grad modes, autocast and hooks of autograd inside a forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing.common import CALL, LOW, Base, Case, N, cases, check, step, to_eval


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class AutogradFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(self.lin(x) * 3)


class AutogradFunctionOnWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, StraightThrough.apply(self.lin.weight * 5), self.lin.bias)


class AutogradFunctionBoundEarly(Base):
    """``apply`` taken off the class before anything could watch it."""

    def __init__(self) -> None:
        super().__init__()
        self.round = StraightThrough.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.round(self.lin(x) * 3)


ROUND = StraightThrough.apply


class AutogradFunctionGlobal(Base):
    def forward(self, x: Tensor) -> Tensor:
        return ROUND(self.lin(x) * 3)


class AutogradFunctionOnWeightGlobal(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, ROUND(self.lin.weight * 5), self.lin.bias)


class TryFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        try:
            return StraightThrough.apply(3 * y)
        except Exception:
            return y.tanh()


class NoGradBlock(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        with torch.no_grad():
            scale = y.abs().max()
        return y / scale


class NoGradBlockOnWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.lin.weight.abs().max()
        return self.lin(x) / scale


class NoGradDecorated(Base):
    @torch.no_grad()
    def scale(self, y: Tensor) -> Tensor:
        return y.abs().max()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y / self.scale(y)


class NoGradAroundNothingTraced(Base):
    """The block holds one call of a leaf module and no other node."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        with torch.no_grad():
            gate = self.norm(y)
        return y * gate


class GradModeAsked(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y * 2 if torch.is_grad_enabled() else y


class InferenceBlock(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            s = self.lin.weight.detach().abs().sum() + 1
            s = s * 2
        return self.lin(x) * float(s)


class EnableGrad(Base):
    """Grad mode switched on inside: a difference only where the caller had switched it off."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = self.lin(x.detach().requires_grad_())
            (g,) = torch.autograd.grad(y.square().sum(), self.lin.bias, create_graph=self.training)
        return y.detach() + g


class GradientPenalty(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        (g,) = torch.autograd.grad(y.square().sum(), self.lin.bias, create_graph=True)
        return y + g


class AutocastOff(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        with torch.autocast("cpu", enabled=False):
            y = y.double() @ y.double().mT
        return y


class Autocasted(Base):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        w = self.other.weight / self.other.weight.norm()
        return F.linear(self.lin(x), w @ w.mT, self.other.bias)


class SetsDefaultDtype(Base):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float32)
        try:
            y = torch.ones(N) / 3
        finally:
            torch.set_default_dtype(torch.float64)
        return self.lin(x) * y


class TensorHook(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 2)
        return y


class TensorHookAlways(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x) * 1
        y.register_hook(lambda grad: grad * 2)
        return y


class SavedHooks(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t * 1):
            return (self.lin(x) * 1).square()


class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(lambda y: self.lin(y).tanh(), x, use_reentrant=False)


class VmapInside(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: self.lin(row) * (self.lin.bias * 2).exp())(x)


CASES = (
    Case("autograd function", AutogradFunction, body="live", why="autograd.Function StraightThrough"),
    Case("autograd function on weight", AutogradFunctionOnWeight, body="live", why="autograd.Function StraightThrough"),
    Case("autograd function bound early", AutogradFunctionBoundEarly, body="live"),
    Case("autograd function global", AutogradFunctionGlobal, body="live"),
    Case("autograd function on weight, global", AutogradFunctionOnWeightGlobal, body="live"),
    Case("no_grad block", NoGradBlock, body="live", why="switches grad mode"),
    Case("no_grad block on weight", NoGradBlockOnWeight, body="live", why="switches grad mode"),
    Case("no_grad decorated", NoGradDecorated, body="live", why="switches grad mode"),
    Case("no_grad around a leaf", NoGradAroundNothingTraced, body="live", why="switches grad mode"),
    Case("grad mode asked", GradModeAsked, body="live", why="is_grad_enabled"),
    Case("tensor hook", TensorHook),
    Case("tensor hook always", TensorHookAlways, (CALL, CALL, step, CALL)),
    Case("try around a Function", TryFunction),
    Case("checkpoint", Checkpointed),
    Case("autocast", Autocasted, (CALL, LOW, LOW, CALL, step, LOW, CALL, to_eval, LOW, CALL)),
    Case("autocast off under autocast", AutocastOff, (LOW, CALL, LOW, CALL)),
    Case("sets default dtype", SetsDefaultDtype, body="live"),
    Case("inference block", InferenceBlock, body="live"),
    Case("enable_grad", EnableGrad),
    Case("gradient penalty", GradientPenalty, (CALL, step, CALL, CALL)),
    Case("saved tensor hooks", SavedHooks),
    Case("vmap", VmapInside),
)


@pytest.mark.parametrize(("case", "spec"), cases(CASES))
def test_does_what_the_eager_model_does(case: Case, spec: bool) -> None:
    check(case, spec)
