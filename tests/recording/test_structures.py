"""What goes in and out of a model keeps its kind, also through graphs, folding and export."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from recording.common import doubles
from torch import Tensor, nn

import fxparam as fxp


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class Result(dict):
    @property
    def loss(self) -> Tensor:
        return self["loss"]


class Returning(nn.Module):
    """Keyword arguments keep symbolic tracing away; the scale is weight arithmetic to move out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear, self.log_scale = kind, nn.Linear(3, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, *, factor: float = 1.0) -> Any:
        y = factor * self.linear(x) * self.log_scale.exp()
        if self.kind == "data class":
            return Output(y, None)
        if self.kind == "ordered":
            return OrderedDict(b=y, a=y + 1)
        if self.kind == "subclass":
            return Result(loss=y)
        return {"y": y, "size": x.shape}


def leaves(value: Any) -> Any:
    return vars(value) if dataclasses.is_dataclass(value) else value


@pytest.mark.parametrize("kind", ["data class", "ordered", "subclass", "size"])
@pytest.mark.parametrize("trace", ["auto", "record", "live"])
@doubles()
def test_results_keep_their_class(kind: str, trace: str) -> None:
    net = Returning(kind)
    model = fxp.transform(net, {"linear.weight": fxp.weight_norm()}, trace=trace)
    for seed in range(3):
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        for options in ({}, {"factor": 2.0}):
            got, want = model(x, **options), net(x, **options)
            assert type(got) is type(want)
            torch.testing.assert_close(leaves(got), leaves(want), rtol=1e-12, atol=1e-14)
            if kind == "size":
                assert type(got["size"]) is torch.Size
            if kind == "subclass":
                assert got.loss is got["loss"]


@doubles()
def test_a_data_class_is_folded_and_exported(tmp_path: Path) -> None:
    model = fxp.transform(Returning("data class"), {"linear.weight": fxp.weight_norm()})
    x = torch.randn(2, 3)
    folded = fxp.fold(model, example_inputs=(x,))
    want = model.eval()(x)
    got = folded(x)
    assert type(got) is Output and got.hidden is None
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-12, atol=0)
    report = fxp.export_onnx(model.float(), {"x": x.float(), "factor": 2.0}, tmp_path / "model.onnx")
    assert report.nodes
