"""A transformed model and its oracle, which computes its weights at each read."""

from __future__ import annotations

import copy

import torch
from runtime.models import TwoLayers
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxparam as fxp


def pair(trace: str = "live") -> tuple[fxp.ParametrizedModule, nn.Module]:
    """A transformed model and its oracle: the same model under ``torch.nn.utils.parametrize``, uncached."""
    net = TwoLayers()
    oracle = copy.deepcopy(net)
    parametrizations.weight_norm(oracle.first)
    parametrizations.orthogonal(oracle.second, orthogonal_map="cayley")
    spec = {"first.weight": fxp.weight_norm(), "second.weight": fxp.orthogonal(map="cayley")}
    model = fxp.transform(net, spec, trace=trace)
    oracle.load_state_dict(model.state_dict())
    return model, oracle


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
