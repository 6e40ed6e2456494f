"""``model.compile()`` and ``torch.compile(model)``: autocast, casts, random maps, copies, both in turn."""

from __future__ import annotations

import copy
import io
import shutil
from typing import Any

import pytest
import torch
from runtime.compile.common import DYNAMO, Layers, N, X, adopted, skew, train
from runtime.models import SkewExp
from runtime.oracles import DTYPE, same
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam as fxp

pytestmark = DYNAMO


def compiled(model: fxp.ParametrizedModule, how: str, backend: Any = "aot_eager") -> Any:
    if how == "torch.compile":
        return torch.compile(model, backend=backend)
    model.compile(backend=backend)
    return model


HOW = pytest.mark.parametrize("how", ["model.compile", "torch.compile"])


@HOW
def test_autocast(how: str) -> None:
    oracle, model = skew()
    oracle.float()
    model.float()
    run = compiled(model, how)
    x = X.float()
    for enabled in (True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            got, want = run(x), oracle(x)
        assert got.dtype == want.dtype
        same(got, want, 2**-7 if enabled else 1e-5)


@HOW
def test_moved_to_another_dtype(how: str) -> None:
    oracle, model = skew()
    run = compiled(model, how)
    same(run(X), oracle(X))
    oracle.float()
    model.float()
    same(run(X.float()), oracle(X.float()), 1e-5)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = (nn.Linear(N, N, dtype=DTYPE) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(self.layer(x)))


def random_maps(net: Any) -> tuple[Any, fxp.ParametrizedModule]:
    parametrize.register_parametrization(net.layer if isinstance(net, Twice) else net.a, "weight", nn.Dropout(0.5))
    parametrize.register_parametrization(net.other if isinstance(net, Twice) else net.b, "weight", SkewExp())
    return adopted(net)


def compare_random(oracle: Any, run: Any) -> None:
    outputs = []
    for call in (oracle, run):
        torch.manual_seed(4)
        outputs.append([call(X) for _ in range(3)])
    same(outputs[1], outputs[0])
    assert not torch.equal(outputs[0][0], outputs[0][1])


@HOW
def test_a_random_map_is_drawn_anew_at_each_forward(how: str) -> None:
    oracle, model = random_maps(Layers())
    run = compiled(model, how, "eager")
    compare_random(oracle, run)
    for net in (oracle, model):
        net.eval()
    same(run(X), oracle(X))


@HOW
def test_a_random_map_is_drawn_anew_at_each_read(how: str) -> None:
    oracle, model = random_maps(Twice())
    compare_random(oracle, compiled(model, how, "eager"))


@HOW
def test_copies_can_be_compiled(how: str) -> None:
    oracle, model = skew()
    run = compiled(model, how)
    train(oracle, model, run, steps=1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        twin = copy.deepcopy(oracle)
        # A copy starts uncompiled, as a copied nn.Module does.
        assert copied._fxp_compiled is None
        train(twin, copied, copied, steps=1)
        train(twin, copied, compiled(copied, how))
        assert copied.stats.refreshes == (1 if how == "torch.compile" else 4)
    train(oracle, model, run, steps=1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor() -> None:
    oracle, model = skew()
    model.compile()
    train(oracle, model, model, steps=2)


@pytest.mark.parametrize("first", range(4))
def test_ways_of_running_can_be_mixed(first: int) -> None:
    ways = ("eager", "model.compile", "export", "torch.compile")
    oracle, model = skew()
    for how in (*ways[first:], *ways[:first]):
        if how == "eager":
            same(model(X), oracle(X))
        elif how == "export":
            same(torch.export.export(model, (X,), strict=False).module()(X), oracle(X))
        else:
            train(oracle, model, compiled(model, how, "eager"), steps=1)
