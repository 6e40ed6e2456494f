"""Deferral of half precision, joint, tied and hoisted weights, stateful and random maps, copies, compiled models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.deferral.common import DTYPE, A, N, X, accumulate, check, grads, pair, plain
from runtime.models import SkewExp, ThreeLayers, through_one_node
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import fxparam as fxp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_kept_in_float32(dtype: torch.dtype) -> None:
    # In bfloat16 a running sum of ones stays at 256, in float16 at 2048.
    net = nn.Linear(1, 1, bias=False, dtype=dtype)
    model = fxp.transform(net, {"weight": fxp.custom(lambda latent: latent * 1.0)})
    count = {torch.bfloat16: 300, torch.float16: 2100}[dtype]
    with model.defer_backward():
        for _ in range(count):
            model(torch.ones(1, 1, dtype=dtype)).sum().backward()
    (latent,) = model.latents().values()
    assert latent.grad is not None and latent.grad.dtype == dtype
    assert latent.grad.item() == torch.tensor(float(count), dtype=dtype).item()


# --- other sites


def tied(net: ThreeLayers) -> dict[Any, Any]:
    return {"a.weight": fxp.custom(SkewExp(), init=lambda w: w), "b.weight": fxp.ref("a.weight") >> fxp.transpose()}


def joint(net: ThreeLayers) -> dict[Any, Any]:
    return {fxp.joint("a.weight", "b.weight"): fxp.custom(through_one_node, init=lambda weights: tuple(weights))}


def normed(net: ThreeLayers) -> dict[Any, Any]:
    return {"*.weight": fxp.weight_norm()}


@pytest.mark.parametrize("trace", ["auto", "live"])
@pytest.mark.parametrize("spec", [tied, joint, normed], ids=lambda f: f.__name__)
def test_equals_accumulation_without_the_block(spec: Callable[[ThreeLayers], dict[Any, Any]], trace: Any) -> None:
    net = ThreeLayers(N)
    model = fxp.transform(net, spec(net), copy=True, trace=trace)
    oracle = copy.deepcopy(model)
    accumulate(oracle)
    with model.defer_backward():
        accumulate(model)
    check(grads(model), grads(oracle))
    parts = 3 if spec is normed else 1
    assert (model.stats.backwards, oracle.stats.backwards) == (parts, parts * len(X))


class Standardized(nn.Module):
    """Weight arithmetic of the forward's own; ``w`` is also used as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(N, N, dtype=DTYPE)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(N, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        w = self.w - self.w.mean(1, keepdim=True)
        return torch.tanh(x @ (w / w.norm(dim=1, keepdim=True)) + self.bias) @ self.w @ torch.softmax(self.v, 1)


def test_hoisted_arithmetic_is_deferred_too() -> None:
    oracle = Standardized()
    model = fxp.transform(oracle, copy=True)
    accumulate(oracle)
    with model.defer_backward():
        accumulate(model)
    check(grads(model), grads(oracle))
    assert model.stats.backwards == 2
    with pytest.raises(fxp.DeferralError), model.defer_backward():
        accumulate(model)
        torch.optim.SGD(model.parameters(), 0.1).step()


def test_spectral_norm_advances_once() -> None:
    net = nn.Sequential(nn.Linear(N, N, dtype=DTYPE), nn.Tanh())
    spectral_norm(net[0])
    model = fxp.transform(net, copy=True)
    net(X[0])
    with model.defer_backward():
        accumulate(model)
    assert model.stats.refreshes == 1 and model.stats.backwards == 1
    for name, buffer in net.named_buffers():
        check(model.get_buffer(name), buffer)


def test_a_random_map_is_drawn_at_each_read() -> None:
    oracle = plain()
    parametrize.register_parametrization(oracle.c, "weight", nn.Dropout(0.5))
    model = fxp.transform(copy.deepcopy(oracle))
    torch.manual_seed(5)
    accumulate(oracle)
    torch.manual_seed(5)
    with model.defer_backward():
        accumulate(model)
    check(grads(model), grads(oracle))


def test_a_latent_frozen_inside_gets_nothing_and_the_others_do() -> None:
    oracle, model = pair()
    accumulate(oracle)
    with model.defer_backward():
        accumulate(model)
        model.freeze("a.*")
    want = grads(oracle)
    assert want.pop(A) is not None
    check(grads(model), {**want, A: None})


def test_two_models_in_two_blocks() -> None:
    (oracle1, model1), (oracle2, model2) = pair(), pair()
    accumulate(lambda x: oracle2(oracle1(x)))
    with model1.defer_backward(), model2.defer_backward():
        accumulate(lambda x: model2(model1(x)))
    check(grads(model1), grads(oracle1))
    check(grads(model2), grads(oracle2))
    assert model1.stats.backwards == model2.stats.backwards == 2


def test_a_copy_made_inside_is_not_deferred() -> None:
    _, model = pair()
    with model.defer_backward():
        accumulate(model)
        twin = copy.deepcopy(model)
        accumulate(twin)
        assert grads(twin)[A] is not None and grads(model)[A] is None
    check(grads(model)[A], grads(twin)[A])


# What dynamo looks at on its way; it hides the warning unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("how", ["model.compile", "torch.compile"])
def test_compiled(how: str) -> None:
    oracle, model = pair()
    run: Any = model
    if how == "model.compile":
        model.compile(backend="eager")
    else:
        run = torch.compile(model, backend="eager")
    for _ in range(2):
        accumulate(oracle)
        with model.defer_backward():
            accumulate(run)
        check(grads(model), grads(oracle))
    # torch.compile computes the weights in its graph, and has nothing to defer.
    assert model.stats.backwards == (4 if how == "model.compile" else 0)


class Rows(nn.Module):
    """Sparse gradients of the rows that are looked up, dense ones of the whole table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, sparse=True, dtype=torch.float64)

    def forward(self, index: Tensor, whole: bool) -> Tensor:
        return self.table.weight.sin().sum() if whole else self.table(index).square().sum()


@pytest.mark.parametrize("order", [(False, False), (False, False, True), (True, False, False), (False, True, False)])
def test_sparse_and_dense_gradients_of_one_weight(order: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    plain = Rows()
    model = fxp.transform(plain, {"table.weight": lambda latent: latent * 1.0}, trace="live", copy=True)
    index = torch.tensor([0, 2, 2])
    for whole in order:
        plain(index, whole).backward()
    with model.defer_backward():
        for whole in order:
            model(index, whole).backward()
    got, want = model.get_parameter("table.parametrizations.weight.original").grad, plain.table.weight.grad
    assert got is not None and want is not None
    torch.testing.assert_close(got.to_dense(), want.to_dense(), rtol=1e-12, atol=1e-12)
