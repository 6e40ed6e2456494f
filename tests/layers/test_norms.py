"""Normalizations with computed scale and shift, and what else has a vector of parameters."""

from __future__ import annotations

from typing import Any

import torch
from layers.common import (
    FLAT,
    Case,
    Check,
    every_check,
)
from torch import nn


def batch(*size: int) -> Any:
    return lambda: (torch.randn(*size),)


ANY = ("*",)
CASES: dict[str, Case] = {
    "layer": Case(lambda: nn.LayerNorm(6), ANY, batch(3, 6), FLAT),
    "layer, two dimensions": Case(lambda: nn.LayerNorm((5, 6)), ANY, batch(3, 5, 6), FLAT),
    "layer, no bias": Case(lambda: nn.LayerNorm(6, bias=False), ANY, batch(3, 6), FLAT),
    "batch": Case(lambda: nn.BatchNorm1d(6), ("weight", "bias"), batch(4, 6), FLAT),
    "batch, scale only": Case(lambda: nn.BatchNorm2d(6), ("weight",), batch(3, 6, 4, 4), FLAT),
    "batch, cumulative": Case(lambda: nn.BatchNorm3d(2, momentum=None), ("weight",), batch(3, 2, 2, 2, 2), FLAT),
    "batch, no statistics": Case(lambda: nn.BatchNorm1d(6, track_running_stats=False), ("weight", "bias"), batch(4, 6), FLAT),
    "group": Case(lambda: nn.GroupNorm(2, 6), ANY, batch(3, 6, 4), FLAT),
    "instance": Case(lambda: nn.InstanceNorm1d(6, affine=True), ("weight", "bias"), batch(3, 6, 4), FLAT),
    "instance, statistics": Case(
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True), ("weight", "bias"), batch(3, 6, 4, 4), FLAT
    ),
    "root mean square": Case(lambda: nn.RMSNorm(6), ANY, batch(3, 6), FLAT),
    "PReLU": Case(nn.PReLU, ANY, batch(3, 6), ("module", "weight_norm")),
    "PReLU, channels": Case(lambda: nn.PReLU(6), ANY, batch(3, 6, 4), FLAT),
    "between layers": Case(
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 2, 3)),
        ("[013].weight", "1.bias"),
        batch(2, 4, 9),
        FLAT,
    ),
}


@every_check(CASES, kinds=3)
def test_what_every_layer_must_do(check: Check, case: Case, kind: str, trace: str) -> None:
    check(case, kind, trace)
