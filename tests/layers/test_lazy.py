"""Lazy modules: their own weights have no shape yet, those of others can be computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers.common import TRACES, Case, check_folded, check_restored, check_training, same
from torch import Tensor, nn

import fxparam as fxp
from fxparam.tracer.copying import structural_copy


def batch() -> tuple[Tensor]:
    return (torch.randn(3, 5, 7),)


LAZY: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "linear": (lambda: nn.LazyLinear(4), ("weight",)),
    "convolution": (lambda: nn.LazyConv1d(4, 3), ("weight",)),
    "transposed": (lambda: nn.LazyConvTranspose1d(4, 3), ("weight",)),
    "batch norm": (lambda: nn.LazyBatchNorm1d(), ("weight", "bias")),
    "in a model": (lambda: nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), nn.LazyLinear(2)), ("[02].weight",)),
}


@pytest.mark.parametrize("name", LAZY)
def test_a_weight_without_a_shape_says_what_to_do(name: str) -> None:
    make, weights = LAZY[name]
    with pytest.raises(fxp.SpecError, match="is lazy and has no shape yet; run the model once on an input, then transform it"):
        fxp.transform(make(), dict.fromkeys(weights, fxp.weight_norm()))


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", LAZY)
def test_after_a_first_run_it_is_a_layer_like_others(name: str, trace: str) -> None:
    def make() -> nn.Module:
        net = LAZY[name][0]()
        net(*batch())
        return net

    case = Case(make, LAZY[name][1], batch)
    check_training(case, "weight_norm", trace)
    check_restored(case, "module", trace)
    check_folded(case, "mask", trace)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("shared", [True, False])
def test_a_lazy_module_beside_computed_weights_finds_its_shape_at_the_first_call(shared: bool, trace: str) -> None:
    net = nn.Sequential(nn.LazyConv1d(5, 1), nn.LazyBatchNorm1d(), nn.Linear(7, 7))
    model: Any = fxp.transform(net, {"2.weight": fxp.orthogonal()}, trace=trace, copy=not shared)
    (x,) = batch()
    torch.manual_seed(0)
    got = model(x)
    assert type(model[0]) is nn.Conv1d and type(model[1]) is nn.BatchNorm1d
    plain: Any = fxp.restore(model).train()
    plain[1].reset_running_stats()
    same(got, plain(x))
    got.sin().sum().backward()
    plain(x).sin().sum().backward()
    for name in ("0.weight", "0.bias", "1.weight", "2.bias"):
        same(model.get_parameter(name).grad, plain.get_parameter(name).grad)


def test_a_structural_copy_of_what_has_no_shape_yet_stays_apart() -> None:
    net: Any = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    new: Any = structural_copy(net, copy_tensors=True).root
    new(torch.randn(3, 2))
    assert type(new[0]) is nn.Linear and type(new[1]) is nn.BatchNorm1d
    assert type(net[0]) is nn.LazyLinear and type(net[1]) is nn.LazyBatchNorm1d
    first, second = net
    assert all(torch.nn.parameter.is_lazy(tensor) for tensor in (first.weight, second.running_mean))
