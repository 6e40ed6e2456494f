"""Recurrent layers, attention and others with computed weights, as ONNX files of the plain layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from layers.common import Tanh2
from torch import Tensor, nn

import fxparam as fxp


class First(nn.Module):
    """The first output of a layer on one tensor, or on as many times that tensor as asked for."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(*[x] * self.times)
        return result if isinstance(result, Tensor) else result[0]


SIZES: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "batch_first": True}
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "LSTM": (lambda: First(nn.LSTM(8, 8, 2)), "layer.weight_hh_l*", (5, 3, 8)),
    "LSTM, both ways": (lambda: First(nn.LSTM(8, 8, bidirectional=True, batch_first=True)), "layer.weight_*", (3, 5, 8)),
    "GRU": (lambda: First(nn.GRU(8, 8, 2)), "layer.weight_hh_l*", (5, 3, 8)),
    "RNN": (lambda: First(nn.RNN(8, 8)), "layer.weight_hh_l0", (5, 3, 8)),
    "cell": (lambda: nn.GRUCell(8, 8), "weight_hh", (3, 8)),
    "attention": (lambda: First(nn.MultiheadAttention(8, 2, batch_first=True), 3), "layer.*proj*weight", (3, 5, 8)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(**SIZES), "*.weight", (3, 5, 8)),
    "decoder layer": (lambda: First(nn.TransformerDecoderLayer(**SIZES), 2), "layer.*.weight", (3, 5, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), "weight", (2, 3, 5, 5)),
    "circular": (lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), "weight", (2, 3, 6)),
    "bilinear": (lambda: First(nn.Bilinear(8, 8, 3), 2), "layer.weight", (3, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_file_holds_the_plain_layer_and_computes_the_same(name: str, tmp_path: Path) -> None:
    make, glob, size = LAYERS[name]
    torch.set_default_dtype(torch.float32)
    net = make()
    names = [name for name, _ in net.named_parameters()]
    model = fxp.transform(net, {glob: Tanh2()})
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(size)).square().mean().backward()
        optimizer.step()
    model.eval()
    x = torch.randn(size)
    fxp.export_onnx(model, (x,), tmp_path / "m.onnx")
    with torch.no_grad():
        want = model(x)
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(np.asarray(got)), want, rtol=1e-5, atol=1e-6)
    stored = {initializer.name for initializer in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert not any("parametrizations" in name for name in stored)
    assert stored & set(names)
