"""Transformer layers: in eval without gradients they hand all weights of a layer to one fused function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers.common import (
    ALL,
    FLAT,
    QUIET,
    TRACES,
    Case,
    Check,
    every_check,
    made,
    outputs_of,
    same,
    step,
)
from torch import Tensor, nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but self.use_nested_tensor is False"),
]

PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
SIZES: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(**{**SIZES, **options})


def encoder(count: int = 2, **options: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(**options), count, norm=nn.LayerNorm(8))


def transformer(**options: Any) -> nn.Transformer:
    return nn.Transformer(**{**SIZES, "num_encoder_layers": 1, "num_decoder_layers": 1, **options})


class Padded(nn.Module):
    """An encoder on sequences of different lengths."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, src_key_padding_mask=PADDING)


def batch() -> tuple[Tensor]:
    return (torch.randn(3, 5, 8),)


def two() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, 8), torch.randn(3, 5, 8)


FEED = ("*linear[12].weight",)
MOST = ("*.in_proj_weight", "*.out_proj.weight", *FEED)
TOP = ("*in_proj_weight", "*out_proj.weight", *FEED)
CASES: dict[str, Case] = {
    "layer": Case(layer, TOP, batch),
    "layer, feed forward": Case(layer, FEED, batch),
    "layer, norms": Case(layer, ("norm?.weight", "norm?.bias"), batch, FLAT),
    "layer, biases": Case(layer, ("*bias",), batch, FLAT),
    "layer, everything": Case(layer, ("*",), batch, ("module", "mask")),
    "layer, norm first": Case(lambda: layer(norm_first=True), TOP, batch),
    "layer, gelu": Case(lambda: layer(activation="gelu"), TOP, batch),
    "layer, gelu function": Case(lambda: layer(activation=F.gelu), TOP, batch),
    "layer, silu": Case(lambda: layer(activation=F.silu), TOP, batch),
    "layer, relu module": Case(lambda: layer(activation=nn.ReLU()), TOP, batch),
    "layer, no bias": Case(lambda: layer(bias=False), TOP, batch),
    "layer, time first": Case(lambda: layer(batch_first=False), TOP, batch),
    "layer, dropout": Case(lambda: layer(dropout=0.3), TOP, batch),
    "layer, padding": Case(lambda: Padded(layer()), MOST, batch),
    "encoder": Case(encoder, MOST, batch),
    "encoder, first layer": Case(encoder, ("layers.0.linear1.weight",), batch),
    "encoder, last layer": Case(encoder, ("layers.1.self_attn.out_proj.weight",), batch),
    "encoder, padding": Case(lambda: Padded(encoder()), MOST, batch, folds=False),
    "encoder, padding, last layer": Case(lambda: Padded(encoder()), ("inner.layers.1.*.weight",), batch, FLAT, folds=False),
    "encoder, padding, all tensors": Case(lambda: Padded(encoder()), ("*",), batch, ("module",), folds=False),
    "encoder, norm first": Case(lambda: encoder(norm_first=True), MOST, batch),
    "decoder layer": Case(lambda: nn.TransformerDecoderLayer(**SIZES), TOP, two),
    "decoder layer, norms": Case(lambda: nn.TransformerDecoderLayer(**SIZES), ("norm?.*",), two, FLAT),
    "decoder": Case(lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**SIZES, norm_first=True), 2), MOST, two),
    "transformer": Case(transformer, MOST, two),
    "transformer, time first": Case(
        lambda: transformer(batch_first=False, activation="gelu"), MOST, lambda: (torch.randn(5, 3, 8), torch.randn(4, 3, 8))
    ),
}
for _name in ("layer, norms", "layer, biases", "decoder layer, norms", "encoder, padding, last layer"):
    assert CASES[_name].kinds is FLAT


@every_check(CASES, kinds=1)
def test_what_every_layer_must_do(check: Check, case: Case, kind: str, trace: str) -> None:
    check(case, kind, trace)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The calls of the fused layer."""
    calls: list[Any] = []
    original = torch._transformer_encoder_layer_fwd

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    yield calls


FAST = ("layer", "layer, norms", "layer, padding", "encoder", "encoder, padding", "encoder, padding, last layer")


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("quiet", QUIET)
@pytest.mark.parametrize("name", FAST)
def test_the_fused_layer_is_taken_and_sees_the_weights_of_now(
    name: str, quiet: Callable[[], Any], trace: str, fused: list[Any]
) -> None:
    case = CASES[name]
    model, oracle = made(case, "weight_norm", trace)
    model.eval()
    oracle.train(False)
    for seed in range(3):
        with quiet():
            want = outputs_of(oracle, case, seed)
            expected = len(fused)
            assert expected
            same(outputs_of(model, case, seed), want)
            assert len(fused) == 2 * expected
        fused.clear()
        step(model, oracle, case, seed)
        fused.clear()


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("kind", ALL)
def test_a_frozen_model_takes_the_fused_layer_with_gradients_on(kind: str, trace: str, fused: list[Any]) -> None:
    case = Case(lambda: Padded(encoder()), ("*.linear?.weight",), batch)
    model, oracle = made(case, kind, trace)
    model.eval().requires_grad_(False)
    oracle.train(False)
    for seed in range(2):
        torch.manual_seed(seed)
        got = model(*batch())
        with torch.no_grad():
            same([got], outputs_of(oracle, case, seed))
        for latent in model.latents().values():
            latent.mul_(1.1)
        oracle.follow(model)
    assert len(fused) == 8
