"""What every tracer loses without a word, in the setting of a recording."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recording.common import CALL, SMALL, WAYS, Base, Call, Case, N, cases, changes, check, check_naive, naive_cases, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

OPTIONS = SimpleNamespace(gain=1.0)
NUMBERS = [1.0, 2.0]


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class StraightThrough(Base):
    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(self.mixed(x)) * Sign.apply(self.raw).sum()


class Checkpointed(Base):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.mixed, x, use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class CheckpointsChild(nn.Module):
    """The child is a region; its forward inside of the checkpoint runs again in the backward."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.child = Mixes()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.child, x, use_reentrant=self.reentrant) + self.child(x)


class CheckpointsChildReentrant(CheckpointsChild):
    reentrant = True


class Mixes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)


class Dropout(Base):
    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        return F.dropout(self.mixed(x), 0.4, self.training) + torch.rand_like(x)


class Seeds(Base):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(len(x))
        return self.mixed(x) * torch.rand(())


class OwnGenerator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * torch.rand((), generator=self.generator)


class FromNumber(Base):
    def __init__(self) -> None:
        super().__init__()
        self.number = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * torch.tensor(self.number)


class FromList(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * torch.tensor(NUMBERS).sum()


class ThroughNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) @ torch.from_numpy(np.sin(self.raw.detach().numpy()))


class NumpyConstant(Base):
    def __init__(self) -> None:
        super().__init__()
        self.array = np.ones(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * torch.as_tensor(self.array)


class WritesInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.mixed(x.clone())
        with torch.no_grad():
            x.mul_(0.5)
        return out


class WritesGiven(Base):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.mixed(x).relu_()


class WritesOutOfPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        view = (self.raw * 2).view(-1)
        view[0] += x.mean()
        return self.mixed(x) + view.view(N, N)[0]


class WritesBuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().mean(0)
        return self.mixed(x) * torch.sin(self.seen)


class ReplacesBuffer(WritesBuffer):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.detach().mean(0)
        return self.mixed(x) * torch.sin(self.seen)


class WritesForAnother(nn.Module):
    """One child writes what another one computes with, at some calls only."""

    def __init__(self) -> None:
        super().__init__()
        self.writer, self.reader = Writer(), Reader()
        self.reader.seen = self.writer.seen

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.writer(x))


class Writer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        if x.detach().sum() > 0:
            self.seen.mul_(1.5)
        return self.mixed(x)


class Reader(Writer):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * torch.sin(self.seen)


class ClipsWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.raw.data.clamp_(-0.5, 0.5)
        return self.mixed(x)


class WritesThroughData(nn.Module):
    """A child writes the other's parameter in a way that moves no version."""

    def __init__(self) -> None:
        super().__init__()
        self.writer, self.child = nn.Module(), Mixes()
        self.clip = Clips(self.child)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) + self.clip(x) + self.child(x)


class Clips(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.others = [child]

    def forward(self, x: Tensor) -> Tensor:
        self.others[0].raw.data.mul_(0.9)
        return x * bool(x.isfinite().all())


class BoundedEmbedding(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, N, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) + self.table(torch.arange(len(x))) + F.normalize(self.table.weight).sum(0)


class GivesItsTable(nn.Module):
    """A child returns nothing but weight arithmetic, and its caller writes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.child = Table(), Mixes()

    def forward(self, x: Tensor) -> Tensor:
        out = self.table()
        out += x.mean()
        return self.child(x) + out[0] + self.table()[1]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(N, N))

    def forward(self) -> Tensor:
        return self.logits.cos()


class ReturnsHeld(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steady", torch.ones(N))

    def forward(self, x: Tensor) -> Any:
        return self.mixed(x), x, self.raw, self.steady, self.raw.t(), self.lin.bias[1:], x[0], None, 3


class SharedList(nn.Module):
    """A child returns the list it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Passes()

    def forward(self, x: Tensor) -> Any:
        seen: list[Tensor] = [x]
        out = self.child(seen)
        out.append(x * 2)
        return sum(seen) + self.child.mixed(x)


class Passes(Base):
    def forward(self, seen: list[Tensor]) -> list[Tensor]:
        self.mixed(seen[0])
        return seen


class OwnList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Lists()

    def forward(self, x: Tensor) -> Tensor:
        out = self.child(x)
        return out[0] * len(out)


class Lists(Base):
    def __init__(self) -> None:
        super().__init__()
        self.extra = [2.0]

    def forward(self, x: Tensor) -> Any:
        return [self.mixed(x), *self.extra]


class TagsOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Tags()

    def forward(self, x: Tensor) -> Tensor:
        out = self.child(x)
        return out * out.gain


class Tags(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.mixed(x)
        out.gain = 3.0
        return out


class GlobalOption(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) * OPTIONS.gain


def set_option(value: float) -> Any:
    def change(model: nn.Module) -> None:
        # Each of the models that are compared goes through the story by itself.
        OPTIONS.gain = value

    return change


def append(model: nn.Module) -> None:
    NUMBERS.append(3.0)


def reset() -> None:
    OPTIONS.gain = 1.0
    NUMBERS[:] = [1.0, 2.0]


def only(make: Any, **options: Any) -> Case:
    return Case(make.__name__, make, **{"naive": True, "reset": reset, **options})


QUIET = Call(inputs=False)
CASES = [
    only(StraightThrough, graph=False, why="autograd", story=(CALL, CALL, step, CALL, SMALL, CALL)),
    only(Checkpointed, graph=False, naive=False),
    only(CheckpointedReentrant, graph=False, naive=False),
    only(CheckpointsChildReentrant, graph=False, naive=False),
    only(Dropout, naive=False),
    only(Seeds, graph=False),
    only(OwnGenerator, graph=False, naive=False),
    only(FromNumber, story=changes("model.number = 3.0", "model.number = 2")),
    only(FromList, story=changes(append), naive=False),
    only(ThroughNumpy, graph=False, why="numpy"),
    only(NumpyConstant, graph=False, story=changes("model.array[0] = 2"), naive=False),
    only(WritesInput, graph=False, story=(QUIET, QUIET, step, QUIET, QUIET), naive=False),
    only(WritesGiven, story=(QUIET, QUIET, step, QUIET, QUIET), naive=False),
    only(WritesOutOfPlace, naive=False),
    only(WritesBuffer, naive=False),
    only(ReplacesBuffer, graph=False),
    only(WritesForAnother, graph=False),
    only(ClipsWeight, graph=None, naive=False),
    only(WritesThroughData, graph=False, naive=False),
    only(BoundedEmbedding, graph=None, naive=False),
    only(GivesItsTable, naive=False),
    only(ReturnsHeld, naive=False),
    only(SharedList, naive=False),
    only(OwnList, story=changes("model.child.extra.append(1.0)")),
    only(TagsOutput, naive=False),
    only(GlobalOption, story=changes(set_option(2.0), set_option(3.0))),
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("case", "way"), cases(CASES))
def test_a_recorded_model_does_what_it_did(case: Case, way: str) -> None:
    check(case, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_region_inside_of_a_checkpoint(way: str) -> None:
    check(only(CheckpointsChild, graph=False, naive=False), way)


@pytest.mark.parametrize("case", naive_cases(CASES))
def test_a_recorder_without_guards_does_not(case: Case) -> None:
    check_naive(case)
