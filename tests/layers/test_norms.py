"""Normalizations with computed scale and shift, and what else has a vector of parameters."""

from __future__ import annotations

from typing import Any

import torch
from layers.common import (
    FLAT,
    Case,
    check_assigned,
    check_copies,
    check_folded,
    check_restored,
    check_training,
    table,
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


@table(CASES, kinds=3, every_trace=True)
def test_trains_as_on_weights_computed_by_pytorch(case: Case, kind: str, trace: str) -> None:
    check_training(case, kind, trace)


@table(CASES, kinds=1)
def test_a_weight_that_was_set_is_used_by_the_next_call(case: Case, kind: str, trace: str) -> None:
    check_assigned(case, kind, trace)


@table(CASES, kinds=1)
def test_copies_compute_weights_of_their_own(case: Case, kind: str, trace: str) -> None:
    check_copies(case, kind, trace)


@table(CASES, kinds=1)
def test_restores_the_plain_layer(case: Case, kind: str, trace: str) -> None:
    check_restored(case, kind, trace)


@table(CASES, only=lambda case: case.folds, kinds=1)
def test_folds(case: Case, kind: str, trace: str) -> None:
    check_folded(case, kind, trace)
