"""A transformed model as a part of another model."""

from __future__ import annotations

import copy

import pytest
import torch
from runtime.module.common import WN, Net, oracle_of
from runtime.oracles import same
from torch import nn

import fxparam as fxp


def test_a_transformed_model_inside_another() -> None:
    inner = Net()
    outer = nn.Sequential(fxp.transform(inner, WN), nn.Linear(5, 5))
    oracle = nn.Sequential(oracle_of(inner), copy.deepcopy(outer[1]))
    x = torch.randn(3, 5)
    for module in (outer, oracle):
        optimizer = torch.optim.Adam(module.parameters(), 0.01, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).pow(2).sum().backward()
            optimizer.step()
    same(outer(x), oracle(x))
    outer.float()
    assert outer(x.float()).dtype == torch.float32


def test_transforming_a_model_that_holds_a_transformed_one() -> None:
    outer = nn.Sequential(fxp.transform(Net(), WN), nn.Linear(5, 5))
    with pytest.raises(fxp.SpecError, match=r"0 is transformed already; transform the whole model at once"):
        fxp.transform(outer, {"1.weight": fxp.weight_norm()})
