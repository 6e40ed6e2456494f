"""What a site depends on besides its latents (options, hooks, dtypes, modes), and which sites may share a trace."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from tracing.maps import (
    BufferReplaced,
    Counts,
    Dropped,
    KeepsLast,
    Modes,
    N,
    NoGradInside,
    Options,
    OwnParameter,
    PlainAttribute,
    PowerIteration,
    PythonRandom,
    Random,
    Same,
    StraightThrough,
    observe,
    pair,
    same,
    story,
)

import fxparam as fxp


@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook", "full backward hook"])
def test_hooks_on_a_map_run(kind: str) -> None:
    eager, model = pair(OwnParameter)
    for one in (eager, model):
        site = one[0].parametrizations["weight"]
        if kind == "forward hook":
            site[0].register_forward_hook(lambda module, args, out: out * 2)
        elif kind == "forward pre-hook":
            site[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        else:
            site[0].register_full_backward_hook(lambda module, before, after: (before[0] * 2,))
    story(eager, model)
    assert "hooks" in model.report.sites[0].reason


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "eps", 2.0),
        lambda m: m.more.update(scale=3.0),
        lambda m: m.list.append(2.0) or m.list.pop(0),
        lambda m: setattr(m, "more", {"scale": 5.0}),
    ],
    ids=["attribute", "dict", "list", "dict replaced"],
)
def test_options_changed_after_the_transform_count(change: Callable[[Any], None]) -> None:
    eager, model = pair(Options)
    same(observe(model, 0), observe(eager, 0), "before")
    for grad in (True, False):
        for one in (eager, model):
            one.eval()
        same(observe(model, 1, grad=grad), observe(eager, 1, grad=grad), "before, eval")
    for one in (eager, model):
        change(one[0].parametrizations["weight"][0])
    same(observe(model, 2, grad=False), observe(eager, 2, grad=False), "after")
    same(observe(model, 2), observe(eager, 2), "after")


def test_a_plain_tensor_of_a_map_changed_after_the_transform_counts() -> None:
    eager, model = pair(PlainAttribute)
    same(observe(model, 0), observe(eager, 0), "before")
    for one in (eager, model):
        one[0].parametrizations["weight"][0].table.mul_(3)
    same(observe(model, 1), observe(eager, 1), "written")
    for one in (eager, model):
        one[0].parametrizations["weight"][0].table = torch.ones(N)
    same(observe(model, 2), observe(eager, 2), "replaced")


def test_a_random_map_is_drawn_at_each_read() -> None:
    net = nn.LSTM(N, N)
    model = fxp.transform(net, {"weight_hh_l0": Random()})
    with torch.no_grad():
        a, b = model(torch.zeros(2, 1, N))[0], model(torch.zeros(2, 1, N))[0]
    assert not torch.equal(a, b)
    assert model.report.sites[0].layer == "per read"


def test_equal_sites_share_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxparam.tracer import site_tracing

    count = 0
    real = site_tracing.make_fx

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(site_tracing, "make_fx", counting)
    eager, model = pair(OwnParameter, layers=5)
    assert count == 1
    story(eager, model)


def test_sites_with_different_options_do_not_share() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(N, N) for _ in range(3)))
    eager = copy.deepcopy(net)
    eps = [0.5, 0.25, 0.5]
    for layer, e in zip(eager, eps, strict=True):
        register_parametrization(layer, "weight", Options(e))
    story(eager, fxp.transform(net, {f"{k}.weight": Options(e) for k, e in enumerate(eps)}))


def test_closures_over_different_tensors_do_not_share() -> None:
    def scaled(table: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda w: w * table

    class By(Same):
        def __init__(self, table: Tensor) -> None:
            super().__init__()
            self.map = scaled(table)

        def forward(self, w: Tensor) -> Tensor:
            return self.map(w)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N))
    eager = copy.deepcopy(net)
    tables = [torch.rand(N), torch.rand(N)]
    for layer, table in zip(eager, tables, strict=True):
        register_parametrization(layer, "weight", By(table))
    story(eager, fxp.transform(net, {f"{k}.weight": By(table) for k, table in enumerate(tables)}))


def test_one_instance_for_several_weights_shares_its_state() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N))
    eager = copy.deepcopy(net)
    one = OwnParameter()
    for layer in eager:
        register_parametrization(layer, "weight", one)
    story(eager, fxp.transform(net, {"*.weight": OwnParameter()}))


@pytest.mark.parametrize("make", [Options, Modes, StraightThrough], ids=lambda m: m.__name__)
def test_casting_specializes_again(make: Callable[[], nn.Module]) -> None:
    eager, model = pair(make)
    same(observe(model, 0), observe(eager, 0), "float64")
    eager.float(), model.float()
    same(observe(model, 1), observe(eager, 1), "float32")
    assert model.weights()["0.weight"].dtype == torch.float32
    eager.double(), model.double()
    same(observe(model, 2), observe(eager, 2), "float64 again")


def test_autocast_inside_a_map_is_that_of_the_caller() -> None:
    class Product(Same):
        def forward(self, w: Tensor) -> Tensor:
            return w @ w

    eager, model = pair(Product)
    eager.float(), model.float()
    x = torch.randn(3, N, dtype=torch.float32)
    for low in (True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            found, wanted = model(x), eager(x)
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=0 if low else 1e-6)


def test_a_map_that_reads_no_grad_mode_survives_being_refreshed_without_grad() -> None:
    eager, model = pair(NoGradInside)
    with torch.no_grad():
        model(torch.ones(1, N))
        eager(torch.ones(1, N))
    story(eager, model)


@pytest.mark.parametrize(
    "make",
    [
        PowerIteration,
        Counts,
        KeepsLast,
        BufferReplaced,
        PythonRandom,
        Dropped,
    ],
)
def test_looking_leaves_no_mark(make: Callable[[], nn.Module]) -> None:
    """A look at the weights advances no state, draws no numbers, and leaves no attribute behind."""
    net = nn.Sequential(nn.Linear(N, N))
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    given = make()
    before = copy.deepcopy({**given.__dict__, **dict(given.named_buffers())})
    model = fxp.transform(net, {"0.weight": given})
    site: Any = model[0].parametrizations["weight"][0]
    assert torch.equal(torch_state, torch.get_rng_state()), make
    assert random.getstate() == python_state, make
    for name in ("u", "count", "last"):
        if name in before or name in before.get("_buffers", {}):
            found, wanted = getattr(site, name), before.get(name, before["_buffers"].get(name))
            assert type(found) is type(wanted), (make, name)
            assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted, (make, name)
