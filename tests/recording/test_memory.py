"""A recording lets go of the tensors of its call when that is over, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxparam as fxp


class Leaky(nn.Module):
    """Notes a tensor in its middle, weakly."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.linear, self.gain, self.fails = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), fails
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y = self.linear(x) * scale
        self.seen.append(weakref.ref(y))
        if self.fails:
            raise ValueError("the model's own")
        return (y * self.gain.exp()).sum()


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.usefixtures("uncollected")
def test_nothing_of_the_recorded_call_stays(fails: bool) -> None:
    model = fxp.transform(Leaky(fails=fails), {"linear.weight": fxp.weight_norm()}, trace="record")
    if fails:
        with pytest.raises(ValueError, match="the model's own") as caught:
            model(torch.randn(2, 4), scale=2.0)
        # A traceback keeps its frames.
        del caught
    else:
        model(torch.randn(2, 4), scale=2.0).backward()
    seen = model._fxp_live.seen
    assert len(seen) == 1 and seen[0]() is None
