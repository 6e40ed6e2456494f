"""One tensor given for several inputs, as self-attention is tried: the graph still has an input for each."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam as fxp


class Mix(nn.Module):
    """Three inputs that count differently, in a forward that cannot be traced symbolically."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.linear = nn.Linear(3, 3)

    def forward(self, q: Tensor, k: Tensor, *, v: Tensor) -> Tensor:
        return self.linear((q - 2 * k + 3 * v * self.scale.exp()).reshape(len(q) * 3).reshape(-1, 3))


CALLS = list(product(range(3), repeat=3))


@pytest.fixture
def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, generator=generator) for _ in range(3)]


def test_a_folded_graph_reads_each_input(tensors: list[Tensor]) -> None:
    q = tensors[0]
    net = Mix()
    plain: Any = fxp.fold(net, example_inputs={"q": q, "k": q, "v": q})
    for a, b, c in CALLS:
        call = (tensors[a], tensors[b])
        torch.testing.assert_close(plain(*call, v=tensors[c]), net(*call, v=tensors[c]))


@pytest.mark.parametrize("trace", ["auto", "record", "export"])
def test_recorded_and_exported_bodies_read_each_input(trace: Any, tensors: list[Tensor]) -> None:
    q = tensors[0]
    net = Mix()
    model = fxp.transform(net, {"linear.weight": fxp.weight_norm()}, example_inputs={"q": q, "k": q, "v": q}, trace=trace)
    for a, b, c in CALLS:
        call = (tensors[a], tensors[b])
        torch.testing.assert_close(model(*call, v=tensors[c]), net(*call, v=tensors[c]))


def test_an_exported_file_reads_each_input(tmp_path: Path, tensors: list[Tensor]) -> None:
    q = tensors[0]
    report = fxp.export_onnx(nn.MultiheadAttention(3, 1).eval(), (q, q, q), tmp_path / "model.onnx", verify=3)
    assert all(parity.excess <= 1 for parity in report.parity)
