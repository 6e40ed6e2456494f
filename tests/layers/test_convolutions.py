"""Convolutions: plain, grouped, padded in all modes, and transposed, whose second dimension is that of the outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers.common import (
    FLAT,
    TRACES,
    Case,
    Check,
    check_eval,
    every_check,
    made,
    outputs_of,
    same,
    step,
)
from torch import Tensor, nn

import fxparam as fxp

KINDS = ("weight_norm", "module", "mask", "weight_norm dim 1")


def image(*size: int) -> Any:
    return lambda: (torch.randn(*(size or (2, 4, 7, 6))),)


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=(16, 14))


CASES: dict[str, Case] = {
    "1d": Case(lambda: nn.Conv1d(4, 6, 3), ("weight",), image(2, 4, 7), KINDS),
    "2d": Case(lambda: nn.Conv2d(4, 6, 3), ("*",), image(), FLAT),
    "3d": Case(lambda: nn.Conv3d(2, 3, 2), ("weight",), image(2, 2, 4, 4, 4), KINDS),
    "no bias": Case(lambda: nn.Conv2d(4, 6, 3, bias=False), ("weight",), image(), KINDS),
    "unbatched": Case(lambda: nn.Conv2d(4, 6, 3), ("weight",), image(4, 7, 6), KINDS),
    "grouped": Case(lambda: nn.Conv2d(4, 6, 3, groups=2), ("weight",), image(), KINDS),
    "depthwise": Case(lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding=2), ("weight",), image(), FLAT),
    "strided": Case(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), ("weight",), image(), KINDS),
    "same": Case(lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), ("weight",), image(), FLAT),
    **{
        mode: Case(lambda mode=mode: nn.Conv2d(4, 6, 3, padding=2, padding_mode=mode), ("weight",), image(), KINDS)  # type: ignore[misc]
        for mode in ("circular", "reflect", "replicate")
    },
    "transposed 1d": Case(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), ("weight",), image(2, 4, 7), KINDS),
    "transposed 2d": Case(lambda: nn.ConvTranspose2d(4, 6, 3, padding=1), ("*",), image(), FLAT),
    "transposed 3d": Case(lambda: nn.ConvTranspose3d(2, 3, 2), ("weight",), image(2, 2, 4, 4, 4), KINDS),
    "transposed, grouped": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1), ("weight",), image(), KINDS
    ),
    "transposed to a size": Case(Sized, ("up.weight",), image(), KINDS),
}


@every_check(CASES, kinds=4)
def test_what_every_layer_must_do(check: Check, case: Case, kind: str, trace: str) -> None:
    check(case, kind, trace)


LAYERS = {
    "convolution": Case(lambda: nn.Conv2d(4, 6, 3), ("weight",), image()),
    "transposed 1d": Case(lambda: nn.ConvTranspose1d(4, 6, 3), ("weight",), image(2, 4, 7)),
    "transposed 2d": Case(lambda: nn.ConvTranspose2d(4, 6, 3), ("weight",), image()),
    "transposed 3d": Case(lambda: nn.ConvTranspose3d(2, 3, 2), ("weight",), image(2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("kind", ["spectral_norm", "spectral_norm dim 1"])
@pytest.mark.parametrize("name", LAYERS)
def test_spectral_norm_iterates_once_a_step(name: str, kind: str, trace: str) -> None:
    case = LAYERS[name]
    model, oracle = made(case, kind, trace)
    for seed in range(3):
        model.train()
        oracle.train(True)
        step(model, oracle, case, seed)
        check_eval(model, oracle, case, seed)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "convolution"])
def test_spectral_norm_of_pytorch_on_a_transposed_convolution_is_adopted_along_its_outputs(name: str, trace: str) -> None:
    net = LAYERS[name].make()
    torch.nn.utils.parametrizations.spectral_norm(net)
    declared = fxp.transform(LAYERS[name].make(), {"weight": fxp.spectral_norm()}, trace=trace)
    declared.load_state_dict(net.state_dict())
    model = fxp.transform(net, trace=trace, copy=True)
    for seed in range(3):
        want = outputs_of(net, LAYERS[name], seed)
        same(outputs_of(model, LAYERS[name], seed), want)
        same(outputs_of(declared, LAYERS[name], seed), want)
        for module in (net, model, declared):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1.1)
