"""Autocast casts a computed weight once for a forward where all that reads it would cast it, as it does for a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxparam as fxp

HIDDEN = 5


@pytest.fixture(autouse=True)
def _float() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


class Casts(TorchDispatchMode):
    """Counts casts of square matrices to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += args[0].shape == (HIDDEN, HIDDEN)
        return func(*args, **kwargs)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module] = nn.RNNCell) -> None:
        super().__init__()
        self.cell = cell(3, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], HIDDEN)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return state


class Looped(nn.Module):
    """One layer at several places; a graph where it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.tanh(self.layer(x))
        return x


class ByHand(Looped):
    """Weight arithmetic in the forward, hoisted where the forward is a graph."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight * 0.5
        for _ in range(6):
            x = torch.tanh(F.linear(x, weight))
        return x


class Mixed(Looped):
    """The weight is used in full precision as well."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(F.linear(x, self.layer.weight)) + self.layer.weight.sum()
        return x


INPUTS = {Recurrent: (2, 6, 3), Looped: (2, HIDDEN), ByHand: (2, HIDDEN), Mixed: (2, HIDDEN)}
SPEC = {"*.weight*": fxp.custom(lambda latent: latent * 1.0)}


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], int]:
    """The output, the gradients and the number of casts of one training step under autocast."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16), Casts() as casts:
        output = model(x)
    output.float().square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return output, gradients, casts.count


@pytest.mark.parametrize("trace", ["live", "auto"])
@pytest.mark.parametrize("net", [Recurrent, Looped])
def test_as_for_a_parameter(net: Any, trace: str) -> None:
    plain = net()
    model = fxp.transform(plain, SPEC, trace=trace, copy=True)
    x = torch.randn(INPUTS[net])
    want, wanted, once = run(plain, x)
    got, gradients, casts = run(model, x)
    assert torch.equal(got, want) and casts == once == 1
    by_shape = {tuple(gradient.shape): gradient for gradient in wanted}
    assert len(by_shape) == len({tuple(g.shape) for g in gradients})
    for gradient in gradients:
        if gradient.shape == (HIDDEN, HIDDEN):
            assert torch.equal(gradient, by_shape[tuple(gradient.shape)])


def test_hoisted_arithmetic_is_cast_once_too() -> None:
    net = ByHand()
    x = torch.randn(INPUTS[ByHand])
    model = fxp.transform(net, copy=True)
    assert model.report.hoisted and run(model, x)[2] == 1
    assert torch.equal(run(model, x)[0], run(net, x)[0])


@pytest.mark.parametrize("trace", ["live", "auto"])
def test_what_needs_full_precision_gets_it(trace: str) -> None:
    net = Mixed()
    x = torch.randn(INPUTS[Mixed])
    model = fxp.transform(net, SPEC, trace=trace, copy=True)
    assert torch.equal(run(model, x)[0], run(net, x)[0])


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_other_cells(cell: Any) -> None:
    net = cell(3, HIDDEN)
    model = fxp.transform(net, {"weight*": fxp.custom(lambda latent: latent * 1.0)}, copy=True, trace="live")
    x = torch.randn(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x), net(x), rtol=0, atol=0)


def test_a_read_from_outside_a_layer_is_in_full_precision() -> None:
    model = fxp.transform(Looped(), SPEC, trace="live")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(2, HIDDEN))
        assert model.layer.weight.dtype == torch.float32


def test_double_precision_and_the_switch_of_the_cache() -> None:
    net = Looped()
    x = torch.randn(2, HIDDEN)
    model = fxp.transform(net, SPEC, trace="live", copy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), Casts() as casts:
        assert torch.equal(model(x), net(x))
    assert casts.count == 12
    model.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x.double()).dtype == torch.float64


@pytest.mark.parametrize("how", ["no_grad", "inference", "deferred"])
def test_other_modes(how: str) -> None:
    net = Looped()
    x = torch.randn(2, HIDDEN)
    model = fxp.transform(net, SPEC, trace="live", copy=True)
    if how == "deferred":
        want, wanted, _ = run(net, x)
        with model.defer_backward():
            got, _, casts = run(model, x)
        assert torch.equal(got, want) and casts == 1
        latent = model.latents()["layer.parametrizations.weight.original"]
        assert latent.grad is not None and torch.equal(latent.grad, wanted[0])
        return
    mode = torch.no_grad() if how == "no_grad" else torch.inference_mode()
    with mode, torch.autocast("cpu", dtype=torch.bfloat16), Casts() as casts:
        got = model(x)
    with mode, torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(got, net(x))
    # In inference mode the dispatcher shows a cast under another name.
    assert casts.count == (1 if how == "no_grad" else 0)
