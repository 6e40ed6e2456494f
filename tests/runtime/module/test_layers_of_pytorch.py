"""Layers of PyTorch with computed weights train as under ``torch.nn.utils.parametrize``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.oracles import TRACES, same
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxparam as fxp


def _norm_all(module: nn.Module, names: list[str]) -> None:
    for name in names:
        path, _, local = name.rpartition(".")
        parametrizations.weight_norm(module.get_submodule(path), local)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def _encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


LAYERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    **{
        cls.__name__: (lambda cls=cls: cls(8, 8, 2), ["weight_hh_l0", "weight_ih_l1", "weight_hh_l1"])  # type: ignore[misc]
        for cls in (nn.LSTM, nn.GRU, nn.RNN)
    },
    "bidirectional": (lambda: nn.LSTM(8, 8, bidirectional=True, batch_first=True), ["weight_hh_l0", "weight_hh_l0_reverse"]),
    "projected": (lambda: nn.LSTM(8, 8, proj_size=4), ["weight_hr_l0"]),
    "attention": (SelfAttention, ["attention.in_proj_weight", "attention.out_proj.weight"]),
    "encoder layer": (_encoder_layer, ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"]),
    "encoder": (lambda: nn.TransformerEncoder(_encoder_layer(), 2), ["layers.0.linear1.weight", "layers.1.linear2.weight"]),
    "convolution": (lambda: nn.Conv1d(5, 3, 3, padding=1), ["weight"]),
    "transposed": (lambda: nn.ConvTranspose1d(5, 3, 3), ["weight"]),
    "bilinear": (lambda: _Bilinear(), ["layer.weight"]),
}


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_pytorch(name: str, trace: str) -> None:
    make, weights = LAYERS[name]
    net = make()
    oracle = copy.deepcopy(net)
    _norm_all(oracle, weights)
    model = fxp.transform(net, {weight: fxp.weight_norm() for weight in weights}, trace=trace)
    assert list(model.state_dict()) == list(oracle.state_dict())
    x = torch.randn(4, 5, 8)
    optimizers = [torch.optim.SGD(module.parameters(), 0.05) for module in (model, oracle)]
    for _ in range(3):
        for mode in (True, False):
            model.train(mode)
            oracle.train(mode)
            same(_first(model(x)), _first(oracle(x)))
            with torch.no_grad():  # attention has a fast path of its own here
                same(_first(model(x)), _first(oracle(x)))
        for module, optimizer in zip((model, oracle), optimizers, strict=True):
            optimizer.zero_grad()
            module.train()
            _first(module(x)).pow(2).mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        same(p, q)
    before = _first(model(x)).detach()
    model.float()
    torch.testing.assert_close(_first(model(x.float())).double(), before, rtol=1e-4, atol=1e-5)


def test_padded_batches_through_the_encoder() -> None:
    net = nn.TransformerEncoder(_encoder_layer(), 2, enable_nested_tensor=False)
    oracle = copy.deepcopy(net)
    _norm_all(oracle, ["layers.0.linear1.weight"])
    model = fxp.transform(net, {"layers.0.linear1.weight": fxp.weight_norm()}).eval()
    oracle.eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        same(model(x, src_key_padding_mask=mask), oracle(x, src_key_padding_mask=mask))
