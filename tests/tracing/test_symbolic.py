"""Models on which a naive symbolic trace is wrong without a word: transformed, each does what it does eagerly.

The oracle is the same model with ``torch.nn.utils.parametrize`` (or nothing) in plain PyTorch. Both go through the same
story: changes (``model.eval()``, an attribute, a hook) and calls. Outputs, gradients and buffers are compared each time.
"""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import functools
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._pytree import tree_leaves

import fxparam as fxp

N = 4


class Tripled(nn.Module):
    """A map that is not the identity, so that a weight read past it shows."""

    def forward(self, latent: Tensor) -> Tensor:
        return 3 * latent + latent.sin()

    def right_inverse(self, weight: Tensor) -> Tensor:
        latent = weight / 4
        for _ in range(60):
            latent = latent - (3 * latent + latent.sin() - weight) / (3 + latent.cos())
        return latent


# --- the models


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(N, N)


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


class AutocastOff(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        with torch.autocast("cpu", enabled=False):
            y = y.double() @ y.double().mT
        return y


class GradModeAsked(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y * 2 if torch.is_grad_enabled() else y


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


class Optional(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.lin(x)
        return y if mask is None else y * mask


class OptionalFlag(Base):
    def forward(self, x: Tensor, twice: bool = False, scale: float = 1.0) -> Tensor:
        return self.lin(self.lin(x)) * scale if twice else self.lin(x) * scale


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


class WeightRequiresGradAsked(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.relu() if self.lin.weight.requires_grad and self.lin.bias.requires_grad else y.tanh()


class IsNoneReturned(Base):
    def forward(self, x: Tensor) -> Any:
        return self.lin(x), None


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


class Temperature(Base):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0
        self.scales = [1.0, 2.0]
        self.table = {"a": [1.0]}
        self.config = Config()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x) / self.temperature
        for scale in self.scales:
            y = y * scale
        return y * self.table["a"][0] * self.config.gain * self.config.nested.gain


class Nested:
    def __init__(self) -> None:
        self.gain = 1.0


class Config:
    def __init__(self) -> None:
        self.gain = 1.0
        self.nested = Nested()


@dataclass
class Slotted:
    __slots__ = ("gain",)
    gain: float


class SlottedConfig(Base):
    def __init__(self) -> None:
        super().__init__()
        self.config = Slotted(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.config.gain


class NumpyAttribute(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gain = np.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * float(self.gain[0])


class ClassAttribute(Base):
    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * type(self).gain


GLOBALS = {"gain": 1.0}


class GlobalAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * GLOBALS["gain"]


class LeafOption(Base):
    """An option of a torch.nn module that the body reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.norm.eps * 1e5


class WritesCounter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.lin(x) * self.count


class WritesLast(Base):
    def __init__(self) -> None:
        super().__init__()
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.lin(x)
        return self.last * 2


class AppendsList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        self.kept.append(1)
        return y * len(self.kept)


class AppendsNested(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[Any]] = {"all": []}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["all"].append(1)
        return self.lin(x) * len(self.kept["all"])


class WritesConfig(Base):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()

    def forward(self, x: Tensor) -> Tensor:
        self.config.nested.gain += 1
        return self.lin(x) * self.config.nested.gain


class WritesLeafAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.lin.seen = getattr(self.lin, "seen", 0) + 1
        return self.lin(x) * self.lin.seen


class Iterates(Base):
    """An iterator that is used up by the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * next(self.gains)


class Dropout(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.drop(self.lin(x)), 0.3, training=self.training)


class DropoutAlways(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.lin(x), 0.3)


class TrainingBranch(Base):
    def __init__(self) -> None:
        super().__init__()
        self.sub = Base()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        if self.training:
            y = y.relu()
        return y if self.sub.training else y * 2


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


class Closure(Base):
    def __init__(self) -> None:
        super().__init__()
        held = torch.rand(N)
        self.held = held
        self.act = lambda y: y * held

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.lin(x))


class PlainTensor(Base):
    """A tensor that is an attribute and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.scale.exp()


class PlainTensorInList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [torch.ones(N), torch.ones(N)]

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.scales[0].exp() * self.scales[1]


class PlainTensorThatTrains(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [torch.ones(N, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.scales[0].exp()


class Keywords(Base):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.lin(x) * scale


class KeywordRequired(Base):
    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.lin(x) * scale


class VarArgs(Base):
    def forward(self, x: Tensor, *more: Tensor, **named: Tensor) -> Tensor:
        y = self.lin(x)
        for other in (*more, *named.values()):
            y = y + other
        return y


class OnlyVarArgs(Base):
    def forward(self, *xs: Tensor) -> Tensor:
        return sum(map(self.lin, xs))


class NotTensor(Base):
    def forward(self, x: Tensor, n: int) -> Tensor:
        return self.lin(x) * n


class DictInput(Base):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.lin(batch["x"]) + batch["y"]


class NoneInput(Base):
    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        z = self.lin(x)
        if y is not None:
            z = z + y
        return z


class DictOutput(Base):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.lin(x)
        return {"y": y, "more": (y.relu(), [y.tanh(), None]), "n": 3}


@dataclass
class Output:
    y: Tensor
    z: Tensor


class DataclassOutput(Base):
    def forward(self, x: Tensor) -> Output:
        y = self.lin(x)
        return Output(y, y.relu())


class ReturnsWeight(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.lin(x), self.lin.weight, self.lin.weight * 2, self.lin.weight.mT, self.lin.bias


class ReturnsInput(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, self.lin(x)


class ReturnsConstant(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.lin(x), torch.ones(3), torch.arange(3).float() * 2


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


class WeightData(Base):
    """Writes to a parameter through ``.data``: no version, no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        self.lin.bias.data.mul_(0.5)
        return self.lin(x) + (self.lin.bias * 2).exp()


class WeightDetached(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + (self.lin.weight.detach() * 2).sum() + (self.lin.weight.data * 2).sum()


class WritesParameterNoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.lin.bias.clamp_(-0.1, 0.1)
        return self.lin(x)


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


class TryFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        try:
            return StraightThrough.apply(3 * y)
        except Exception:
            return y.tanh()


TWOS = torch.full((N,), 2.0, dtype=torch.float64)


class DefaultTensorArgument(Base):
    def forward(self, x: Tensor, scale: Tensor = TWOS) -> Tensor:
        return self.lin(x) * scale.exp()


class WeightNormByHand(Base):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.rand(N, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.lin.weight
        return F.linear(x, self.g * w / w.norm(dim=1, keepdim=True), self.lin.bias)


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


class CapturedWritten(Base):
    """A held tensor that the forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.zeros(N)

    def forward(self, x: Tensor) -> Tensor:
        before = self.table * 2
        self.table[0] += 1
        return self.lin(x) + before + self.table * 2


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


class StatefulLeaf(Base):
    """The buffer of a leaf read by the code around it, through arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.BatchNorm1d(N))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.lin(x))
        return y / (self.norm[0].running_var + 1).sqrt()


class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(lambda y: self.lin(y).tanh(), x, use_reentrant=False)


class LazyWarning(Base):
    """Warm-up on the first call only."""

    def __init__(self) -> None:
        super().__init__()
        self.warm = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.warm:
            self.warm = True
            return self.lin(x) * 0
        return self.lin(x)


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


# --- what the second look found


@functools.lru_cache
def cached_ramp(n: int) -> Tensor:
    return torch.linspace(1.0, 2.0, n)


class LruCache(Base):
    """Tensors kept by a cache outside of any module: a traced value must not get into it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * cached_ramp(N)


RAMPS: dict[int, Tensor] = {}


class GlobalCache(Base):
    def forward(self, x: Tensor) -> Tensor:
        if N not in RAMPS:
            RAMPS[N] = torch.linspace(1.0, 2.0, N)
        return self.lin(x) * RAMPS[N]


class Ready(Base):
    """Caches filled before the transform."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * READY[N]


READY = {N: torch.linspace(1.0, 2.0, N, dtype=torch.float64)}


class CachedProperty(Base):
    @functools.cached_property
    def ramp(self) -> Tensor:
        return torch.linspace(1.0, 2.0, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.ramp


class ObjectCache(Base):
    """A mask kept by a helper object on the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.helper(x)


class Helper:
    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if "ramp" not in self.kept:
            self.kept["ramp"] = torch.linspace(1.0, 2.0, N)
        return self.kept["ramp"]


class KeepsOutputs(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        self.kept.append(y.detach())
        return y + sum(self.kept[:-1])


class FreshConstructor(Base):
    """``torch.Tensor(...)`` goes past every mode; it is made anew at each call."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.Tensor([1.0, 2.0, 3.0, 4.0])
        table += x[0].detach()
        return self.lin(x) * table


class FreshAsTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        table = torch.as_tensor([1.0, 2.0, 3.0, 4.0])
        table += x[0].detach()
        return self.lin(x) * table


class FreshFromNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        table = torch.from_numpy(np.ones(N))
        table[1] += 1
        return self.lin(x) * table


class FreshParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        extra = nn.Parameter(torch.ones(N))
        return self.lin(x) * extra


class FreshModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear(N, N)(self.lin(x))


class FreshFunctionalCall(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.lin, {"bias": self.lin.bias * 2}, (x,))


class TupleOfTensors(Base):
    def __init__(self) -> None:
        super().__init__()
        self.pair = (torch.ones(N), torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.pair[0] + self.pair[1]


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


class NamedTupleOutput(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.lin(x)
        return Pair(y, y * 2)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class BakesDtype(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + torch.ones(N, dtype=self.lin.bias.dtype) * torch.finfo(self.lin.bias.dtype).eps * 1e6


class BakesShape(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(3, N))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.table.shape[0] + self.table.sum(0) * len(self.table)


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


class GlobalWritten(Base):
    def forward(self, x: Tensor) -> Tensor:
        COUNTS.append(1)
        return self.lin(x) * ((1 + len(COUNTS)) // 2)


COUNTS: list[int] = []


class ClassWritten(Base):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).count += 1
        return self.lin(x) * ((1 + type(self).count) // 2)


class Environment(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * (time.perf_counter() > 0) * len(os.environ)


class SwapsOut(Base):
    """Swaps a submodule for the time of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.lin(x))
        self.act = nn.ReLU() if isinstance(self.act, nn.Tanh) else nn.Tanh()
        return y


class TogglesTraining(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        before = self.drop.training
        self.drop.train(False)
        y = self.drop(self.lin(x))
        self.drop.train(before)
        return y


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


class SavedHooks(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t * 1):
            return (self.lin(x) * 1).square()


class VmapInside(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: self.lin(row) * (self.lin.bias * 2).exp())(x)


class DefaultMutable(Base):
    def forward(self, x: Tensor, kept: list[int] = []) -> Tensor:  # noqa: B006
        kept.append(1)
        return self.lin(x) * ((1 + len(kept)) // 2)


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


# --- stories


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    story: Sequence[Any] = ()
    body: str | None = None
    """The layer that the design fixes: ``"graph"``, ``"live"``, or None where either may be used."""
    why: str = ""
    """A part of the reason against a graph."""
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Call:
    """One forward: inputs made from a seed, so that both models get equal ones of their own."""

    args: Callable[[], tuple[Any, ...]] = lambda: (torch.randn(5, N),)
    kwargs: Callable[[], dict[str, Any]] = dict
    grad: bool = True
    autocast: bool = False
    write: bool = False
    """Whether the caller writes to the outputs afterwards."""


def put(path: str, value: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        *owners, name = path.split(".")
        owner: Any = model
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)

    return change


def step(model: nn.Module) -> None:
    """One step of gradient descent, with the gradients of the last call."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


def to_eval(model: nn.Module) -> None:
    model.eval()


def to_train(model: nn.Module) -> None:
    model.train()


def without_grad(model: nn.Module) -> None:
    model.requires_grad_(False)


CALL = Call()
LOW = Call(autocast=True)
WRITE = Call(write=True)
AS_FLOAT = Call(lambda: (torch.randn(5, N, dtype=torch.float32),))
STORY = (CALL, CALL, step, CALL, to_eval, CALL, CALL, Call(grad=False), to_train, CALL, step, CALL)


def doubled(module: nn.Module, args: Any, out: Any) -> Any:
    return out * 2


def negated(module: nn.Module, args: Any) -> Any:
    return (-args[0],)


def add_hook(path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(path).register_forward_hook(doubled)
        model.get_submodule(path).register_forward_pre_hook(negated)

    return change


def with_hook(make: Callable[[], nn.Module], path: str) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        add_hook(path)(model)
        return model

    return made


def instance_forward(model: nn.Module) -> None:
    lin = model.lin
    lin.forward = lambda x: F.linear(x, lin.weight, lin.bias) * 7


class Plain(Base):
    """Nothing special: the control."""

    def __init__(self) -> None:
        super().__init__()
        self.sub = nn.Sequential(nn.Linear(N, N), Base2())

    def forward(self, x: Tensor) -> Tensor:
        return self.sub(self.lin(x).tanh())


class Base2(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).relu()


def replace_submodule(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.sub[0] = nn.Linear(N, N)


def replace_submodule_attribute(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.sub = nn.Sequential(nn.Linear(N, N), nn.Sigmoid())


def replace_bias(model: nn.Module) -> None:
    torch.manual_seed(6)
    model.lin.bias = nn.Parameter(torch.randn(N))


def remove_bias(model: nn.Module) -> None:
    model.sub[0].bias = None


def model_class(model: nn.Module) -> type:
    """The user's class of a model: the story changes it once for both."""
    return ClassAttribute


def mutate(expression: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        exec(expression, {"model": model, "torch": torch, "np": np, "GLOBALS": GLOBALS, "nn": nn, "model_class": model_class})

    change.__name__ = expression
    return change


def given(*args: Callable[[], Any], **kwargs: Callable[[], Any]) -> Call:
    return Call(lambda: tuple(a() for a in args), lambda: {k: v() for k, v in kwargs.items()})


def x() -> Tensor:
    return torch.randn(5, N)


def small() -> Tensor:
    return torch.randn(3, N)


def row() -> Tensor:
    return torch.randn(N)


def changes(*expressions: str) -> tuple[Any, ...]:
    """Calls before and after each change."""
    return (CALL, *(part for expression in expressions for part in (mutate(expression), CALL, CALL)))


CASES = (
    Case("plain", Plain, body="graph"),
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
    Case("in-place aliasing", InPlaceAliasing),
    Case("in-place view", InPlaceView),
    Case("in-place on input", InPlaceOnInput),
    Case("in-place on weight arithmetic", InPlaceOnComputedArithmetic),
    Case(
        "optional", Optional, (CALL, given(x, row), CALL, given(x, mask=row), given(x, lambda: None), step, given(x, row), CALL)
    ),
    Case(
        "flags",
        OptionalFlag,
        (
            CALL,
            given(x, lambda: True),
            given(x, twice=lambda: True),
            given(x, scale=lambda: 2.0),
            CALL,
            given(x, lambda: False, lambda: 3.0),
        ),
    ),
    Case("isinstance", IsInstance, body="live", why="isinstance"),
    Case("type is", TypeIs),
    Case("hasattr", HasAttr),
    Case("is_tensor", IsTensor),
    Case("is_floating_point", FloatingAsked),
    Case("requires_grad asked", RequiresGradAsked, (*STORY, without_grad, CALL, Call(grad=False))),
    Case("requires_grad of weight asked", WeightRequiresGradAsked, (*STORY, without_grad, CALL)),
    Case("none returned", IsNoneReturned),
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
        "attributes",
        Temperature,
        changes(
            "model.temperature = 2.0",
            "model.scales.append(3.0)",
            "model.scales[0] = 5.0",
            "model.table['a'][0] = 7.0",
            "model.config.gain = 3.0",
            "model.config.nested.gain = 4.0",
            "model.scales = [9.0]",
            "model.table['a'] = [2.0]",
        ),
    ),
    Case("nested container", Temperature, changes("model.table['a'][0] = 7.0")),
    Case("nested object", Temperature, changes("model.config.nested.gain = 7.0")),
    Case("slots", SlottedConfig, changes("model.config.gain = 2.0")),
    Case("numpy attribute", NumpyAttribute, changes("model.gain[0] = 2.0")),
    Case("option of a leaf", LeafOption, changes("model.norm.eps = 1e-3")),
    Case("writes counter", WritesCounter, body="live", why="'count'"),
    Case("writes last", WritesLast, body="live"),
    Case("appends", AppendsList, body="live"),
    Case("appends nested", AppendsNested, body="live"),
    Case("writes config", WritesConfig, body="live"),
    Case("writes attribute of a leaf", WritesLeafAttribute, body="live"),
    Case("iterator", Iterates, (CALL,) * 4, body="live"),
    Case("warm-up", LazyWarning, body="live", why="'warm'"),
    Case("hook before", with_hook(Plain, "lin")),
    Case("hook before on own module", with_hook(Plain, "sub.1"), body="live", why="hooks"),
    Case("hook before on root", with_hook(Plain, ""), body="live"),
    Case("hook after", Plain, (CALL, add_hook("lin"), CALL, CALL, add_hook("sub.1"), CALL, add_hook("sub"), CALL)),
    Case("hook after on leaf", Plain, (CALL, add_hook("sub.0"), CALL, CALL)),
    Case("hook after on root", Plain, (CALL, add_hook(""), CALL, CALL)),
    Case("forward of instance after", Plain, (CALL, instance_forward, CALL, CALL)),
    Case("submodule replaced", Plain, (CALL, replace_submodule, CALL, CALL, step, CALL)),
    Case("submodule attribute replaced", Plain, (CALL, replace_submodule_attribute, CALL, CALL, step, CALL)),
    Case("parameter replaced", Plain, (CALL, replace_bias, CALL, CALL, step, CALL)),
    Case("parameter removed", Plain, (CALL, remove_bias, CALL, CALL, step, CALL)),
    Case(
        "eval of a child",
        Dropout,
        (CALL, mutate("model.drop.eval()"), CALL, to_eval, CALL, mutate("model.drop.train()"), CALL, to_train, CALL),
    ),
    Case(
        "training branch", TrainingBranch, (*STORY, mutate("model.sub.eval()"), CALL, CALL, mutate("model.sub.train()"), CALL)
    ),
    Case("training assigned", TrainingBranch, (CALL, mutate("model.sub.training = False"), CALL, CALL)),
    Case("dropout", Dropout),
    Case("dropout always", DropoutAlways),
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
    Case("registries", ReadsRegistries),
    Case("named_parameters", ReadsOwnBias),
    Case("lists", Lists, body="graph"),
    Case("closure", Closure, changes("model.held.mul_(2)")),
    Case("plain tensor", PlainTensor, changes("model.scale.mul_(2)", "model.scale = model.scale * 3")),
    Case(
        "plain tensors in list", PlainTensorInList, changes("model.scales[0].mul_(2)", "model.scales[0] = model.scales[1] * 3")
    ),
    Case("plain tensor that trains", PlainTensorThatTrains, (CALL, CALL, CALL)),
    Case("keywords", Keywords, (CALL, given(x, scale=lambda: 2.0), CALL)),
    Case("keyword required", KeywordRequired, (given(x, scale=row), given(x, scale=row)), body="live", why="by keyword"),
    Case("var args", VarArgs, (CALL, given(x, x), given(x, x, x, a=x), CALL)),
    Case("only var args", OnlyVarArgs, (CALL, given(x, x), CALL)),
    Case("int input", NotTensor, (given(x, lambda: 2), given(x, lambda: 3), given(x, lambda: torch.tensor(2.0)))),
    Case("dict input", DictInput, (Call(lambda: ({"x": torch.randn(5, N), "y": torch.randn(5, N)},)),) * 2),
    Case("none input", NoneInput, (given(x, x), given(x, lambda: None), given(x, x))),
    Case("dict output", DictOutput),
    Case("dataclass output", DataclassOutput),
    Case("returns weight", ReturnsWeight),
    Case("returns input", ReturnsInput),
    Case("returns constant", ReturnsConstant),
    Case("attention", Attention),
    Case("attention positional", AttentionPositional),
    Case("lstm", Recurrent),
    Case("shared submodule", Shared),
    Case("loop", Loop),
    Case("loop over rows", LoopOverRows, (CALL, given(small), CALL), body="live"),
    Case("shape branch", ShapeBranch, (CALL, given(small), CALL), body="live"),
    Case("shape arithmetic", ShapeArithmetic, (CALL, given(small), CALL, step, given(small))),
    Case("len", LenBranch, (CALL, given(small)), body="live"),
    Case("value branch", ValueBranch, body="live"),
    Case("value branch on weight", ValueBranchOnWeight, (CALL, mutate("model.lin.bias.data.fill_(1.0)"), CALL, CALL)),
    Case("item of weight", ItemOfWeight),
    Case("item of buffer", ItemOfBuffer, (CALL, mutate("model.n.add_(2)"), CALL, CALL), body="live"),
    Case("buffer in range", BufferInRange, (CALL, mutate("model.n.add_(2)"), CALL, CALL), body="live"),
    Case("data written", WeightData, (CALL, CALL, CALL, to_eval, CALL, CALL)),
    Case("detached weight", WeightDetached),
    Case("parameter written", WritesParameterNoGrad),
    Case("tensor hook", TensorHook),
    Case("tensor hook always", TensorHookAlways, (CALL, CALL, step, CALL)),
    Case("weight of another module", CustomModuleCalled),
    Case("tied", Tied),
    Case("assertion", Assertion),
    Case("device of weight", DeviceOfWeight),
    Case("dtype of input", DtypeOfInput, (CALL, given(lambda: torch.randn(5, N).float()), CALL)),
    Case("string", FString),
    Case("identity", IdentityAsked),
    Case("identity in list", EqualityInList),
    Case("try around a branch", TryExcept),
    Case("try around isinstance", TryIsInstance),
    Case("try around a Function", TryFunction),
    Case("tensor default", DefaultTensorArgument, (CALL, given(x, row), CALL)),
    Case("weight norm by hand", WeightNormByHand, body="graph"),
    Case("out=", WeightWrittenOut),
    Case("in-place module on parameters", InplaceModule),
    Case("in-place functional on parameters", InplaceFunctional),
    Case("in-place torch on parameters", InplaceTorch),
    Case("chunk written", ChunkWritten),
    Case("constant written", ConstantWritten),
    Case("held tensor written", CapturedWritten),
    Case("aliased buffers", AliasedBuffer),
    Case("detached buffer written", DetachedWritten),
    Case("numpy view", NumpyView),
    Case("checkpoint", Checkpointed),
    Case("split", GeneratorExpression),
    Case("unbind", Unpacked),
    Case("chunk of weight", UnpackedWeight),
    Case("linear algebra of weight", Einsum),
    Case("method", SetAttrMethod, body="graph"),
    Case("lru_cache", LruCache),
    Case("global cache", GlobalCache),
    Case("global table", Ready),
    Case("cached property", CachedProperty),
    Case("object cache", ObjectCache),
    Case("keeps outputs", KeepsOutputs, (CALL, CALL, CALL), body="live"),
    Case("fresh Tensor()", FreshConstructor),
    Case("fresh as_tensor", FreshAsTensor),
    Case("fresh from_numpy", FreshFromNumpy),
    Case("fresh Parameter", FreshParameter),
    Case("fresh module", FreshModule),
    Case("functional_call", FreshFunctionalCall),
    Case("tuple of tensors", TupleOfTensors, changes("model.pair = (torch.zeros(4), torch.full((4,), 2.0))")),
    Case("seeds", Seeds, body="live"),
    Case("own torch generator", OwnTorchGenerator),
    Case("distribution", Distribution),
    Case("named tuple", NamedTupleOutput),
    Case("dtype baked", BakesDtype, (CALL, mutate("model.float()"), AS_FLOAT, AS_FLOAT, mutate("model.double()"), CALL)),
    Case("shape baked", BakesShape, changes("model.table = nn.Parameter(torch.ones(5, 4))")),
    Case("shape baked, set_", BakesShape, changes("model.table.data = torch.ones(5, 4)")),
    Case("autocast", Autocasted, (CALL, LOW, LOW, CALL, step, LOW, CALL, to_eval, LOW, CALL)),
    Case("autocast off under autocast", AutocastOff, (LOW, CALL, LOW, CALL)),
    Case("sets default dtype", SetsDefaultDtype, body="live"),
    Case("class attribute changed", ClassAttribute, changes("model_class(model).gain = 2.0")),
    Case("global changed", GlobalAttribute, changes("GLOBALS['gain'] = GLOBALS['gain'] % 3 + 0.75")),
    Case("global written", GlobalWritten, body="live"),
    Case("class written", ClassWritten, body="live"),
    Case("swaps a submodule", SwapsOut),
    Case("toggles training", TogglesTraining),
    Case("inference block", InferenceBlock, body="live"),
    Case("enable_grad", EnableGrad),
    Case("gradient penalty", GradientPenalty, (CALL, step, CALL, CALL)),
    Case("saved tensor hooks", SavedHooks),
    Case("vmap", VmapInside),
    Case("mutable default", DefaultMutable, body="live"),
    Case("private names", PrivateName),
    Case("in-place leaves", WritesInputsOfLeaf),
    Case("identity leaf written", IdentityLeaf),
    Case("dropout leaf written", EvalDropoutAlias),
    Case("functions that return their input", FunctionalAlias),
    Case("output written by the caller", OutputMutated, (WRITE, WRITE, step, WRITE, CALL, to_eval, WRITE, CALL)),
)


@dataclass
class Seen:
    """What a call left to compare."""

    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    inputs: list[Tensor | None]


def observe(model: nn.Module, call: Call, seed: int) -> Seen:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    args, kwargs = call.args(), call.kwargs()
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        leaf.requires_grad_(call.grad)
    for parameter in model.parameters():
        parameter.grad = None
    low = torch.autocast("cpu", dtype=torch.bfloat16) if call.autocast else nullcontext()
    with torch.set_grad_enabled(call.grad), low:
        out = model(*args, **kwargs)
    if isinstance(out, Output):
        out = (out.y, out.z)
    outputs = tree_leaves(out)
    scalars = [
        (o * torch.linspace(0.5, 1.5, o.numel()).view_as(o)).sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad
    ]
    if scalars:
        sum(scalars).backward()
    seen = Seen(
        [o.detach().clone() if isinstance(o, Tensor) else o for o in outputs],
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        {name: b.detach().clone() for name, b in model.named_buffers()},
        [leaf.grad for leaf in leaves],
    )
    if call.write:
        with torch.no_grad():
            for out in outputs:
                out.fill_(7.0)
    return seen


def compare(found: Seen, expected: Seen, at: str) -> None:
    def close(a: Any, b: Any, what: str) -> None:
        assert (a is None) == (b is None), f"{at}: {what}: got {a}, expected {b}"
        if isinstance(b, Tensor):
            assert isinstance(a, Tensor), f"{at}: {what}"
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda text: f"{at}: {what}: {text}")
        else:
            assert a == b, f"{at}: {what}: got {a}, expected {b}"

    assert len(found.outputs) == len(expected.outputs), f"{at}: number of outputs"
    for number, (a, b) in enumerate(zip(found.outputs, expected.outputs, strict=True)):
        close(a, b, f"output {number}")
    assert found.gradients.keys() == expected.gradients.keys(), f"{at}: names"
    for name, b in expected.gradients.items():
        close(found.gradients[name], b, f"gradient of {name}")
    assert found.buffers.keys() == expected.buffers.keys(), f"{at}: buffers"
    for name, buffer in expected.buffers.items():
        close(found.buffers[name], buffer, f"buffer {name}")
    for number, (a, b) in enumerate(zip(found.inputs, expected.inputs, strict=True)):
        close(a, b, f"gradient of input {number}")


def pair(case: Case, spec: bool) -> tuple[nn.Module, fxp.ParametrizedModule]:
    torch.manual_seed(0)
    eager = case.make().double()
    torch.manual_seed(0)
    given = case.make().double()
    if spec:
        register_parametrization(eager.lin, "weight", Tripled().double())
    # The trace itself must not leave traces in the global generators.
    return eager, fxp.transform(given, {"lin.weight": Tripled()} if spec else None, **case.options)


@pytest.fixture(autouse=True)
def _float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    # What models keep outside of themselves: each test starts without.
    cached_ramp.cache_clear()
    RAMPS.clear()
    COUNTS.clear()
    GLOBALS["gain"] = 1.0
    ClassAttribute.gain = 1.0
    ClassWritten.count = 0


def cases() -> list[Any]:
    return [
        pytest.param(
            case,
            spec,
            id=f"{case.name}-{'spec' if spec else 'empty'}",
        )
        for case in CASES
        for spec in (False, True)
    ]


@pytest.mark.parametrize(("case", "spec"), cases())
def test_does_what_the_eager_model_does(case: Case, spec: bool) -> None:
    eager, model = pair(case, spec)
    if case.body is not None:
        assert model.report.body == case.body, f"{case.body} expected: {model.report.why_live}"
        if case.body == "live":
            assert case.why in model.report.why_live
    for number, part in enumerate(case.story or STORY):
        at = f"part {number} ({model.report.body})"
        if isinstance(part, Call):
            expected = observe(eager, part, number)
            compare(observe(model, part, number), expected, at)
        else:
            part(eager)
            part(model)
