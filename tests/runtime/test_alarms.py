"""What would go wrong in silence is said: lost writes, latents that are not finite, weights that no loss reaches."""
# mypy: disable-error-code="operator,union-attr,arg-type,index,comparison-overlap"
# mypy: warn-unused-ignores=False, warn-unreachable=False

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam as fxp

DTYPE = torch.float64
LATENT = "0.parametrizations.weight.original"


class Heads(nn.Module):
    """The second head is not part of the loss of everyone."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.other = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        return self.head(hidden) + self.other(hidden) if both else self.head(hidden)


def made(**options: Any) -> fxp.ParametrizedModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).to(DTYPE)
    return fxp.transform(net, {"*.weight": fxp.skew() >> fxp.orthogonal(map="cayley")}, **options)


def simple() -> fxp.ParametrizedModule:
    torch.manual_seed(0)
    return fxp.transform(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).to(DTYPE), {"*.weight": fxp.positive()})


X = torch.linspace(-1, 1, 12, dtype=DTYPE).reshape(3, 4)


@pytest.mark.parametrize(
    "write",
    [
        lambda model: nn.init.normal_(model[0].weight),
        lambda model: nn.init.zeros_(model.weights()["0.weight"]),
        lambda model: model[0].weight.detach().mul_(2.0),
    ],
)
@pytest.mark.parametrize("then", ["forward", "read", "eval", "to", "step"])
def test_a_write_to_a_weight_is_said_and_does_not_last(write: Callable[[Any], object], then: str) -> None:
    torch.manual_seed(1)
    model = simple()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = model[0].weight.detach().clone()
    write(model)
    text = (
        r"0\.weight was written in place, and the write does not last: the weight is computed \(positive\(\)\)\. Type "
        r"model\.assign\('0\.weight', value\), or write to its latents: 0\.parametrizations\.weight\.original"
    )
    with pytest.warns(RuntimeWarning, match=text) as caught:
        if then == "forward":
            model(X)
        elif then == "read":
            _ = model[0].weight
        elif then == "eval":
            model.eval()
        elif then == "to":
            model.to(torch.float64)
        else:
            optimizer.step()
            model(X)
    assert caught[0].filename == __file__
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=0, atol=0)


def test_a_layer_that_resets_itself() -> None:
    model = simple()
    with pytest.warns(RuntimeWarning, match=r"0\.weight was written in place"):
        model[0].reset_parameters()


def test_the_other_ways_to_write_are_silent() -> None:
    model = simple()
    model(X)
    with torch.no_grad():
        model.latents()[LATENT].mul_(2.0)
    model.assign("2.weight", torch.full((4, 4), 2.0, dtype=DTYPE))
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model(X)


def test_a_weight_that_is_its_latent_may_be_written() -> None:
    model = fxp.transform(nn.Linear(3, 3, dtype=DTYPE), {"weight": lambda latent: latent.view(3, 3)})
    model(torch.ones(1, 3, dtype=DTYPE))
    with torch.no_grad():
        model.weight.fill_(2.0)
    assert model(torch.ones(1, 3, dtype=DTYPE)).detach().sub(model.bias).sub(6).abs().max() < 1e-12


def test_a_write_in_the_middle_of_a_forward() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, dtype=DTYPE)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.linear.weight.zero_()
            return self.linear(x)

    torch.manual_seed(0)
    net = Writes()
    model = fxp.transform(net, {"linear.weight": fxp.positive()}, trace="live")
    start = model.weights()["linear.weight"].detach().clone()
    with pytest.warns(RuntimeWarning, match=r"linear\.weight was written in place"):
        got = model(X)
    torch.testing.assert_close(got, nn.functional.linear(X, start, net.linear.bias), rtol=1e-12, atol=1e-12)


# --- latents that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("write", ["fill", "load", "step"])
def test_a_latent_that_is_not_finite_is_named_once(value: float, write: str) -> None:
    model = simple()
    model(X)
    latent = model.latents()[LATENT]
    if write == "fill":
        with torch.no_grad():
            latent[0, 1] = value
    elif write == "load":
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state[LATENT][0, 1] = value
        model.load_state_dict(state)
    else:
        latent.grad = torch.zeros_like(latent)
        latent.grad[0, 1] = -value
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    text = (
        r"the latent 0\.parametrizations\.weight\.original of 0\.weight \(positive\(\)\) holds NaN or infinity: "
        "1 of 16 elements; so is what is computed from it"
    )
    with pytest.warns(RuntimeWarning, match=text):
        model(X)
    model.invalidate()
    model(X)
    with torch.no_grad():
        latent.fill_(1.0)
    model(X)
    with torch.no_grad():
        latent.fill_(value)
    with pytest.warns(RuntimeWarning, match="16 of 16 elements"):
        model(X)


def test_large_numbers_of_half_precision_are_finite() -> None:
    model = fxp.transform(nn.Linear(64, 64, dtype=torch.float16), {"weight": fxp.bounded(-1.0, 1.0)})
    with torch.no_grad():
        model.latents()["parametrizations.weight.original"].fill_(60000.0)
    assert torch.equal(model.weight, torch.ones(64, 64, dtype=torch.float16))


def test_complex_latents() -> None:
    model = fxp.transform(nn.Linear(3, 3, dtype=torch.complex128), {"weight": lambda latent: latent * 2})
    with torch.no_grad():
        model.latents()["parametrizations.weight.original"][0, 0] = torch.tensor(complex(0.0, float("nan")))
    with pytest.warns(RuntimeWarning, match="1 of 9 elements"):
        model(torch.ones(1, 3, dtype=torch.complex128))


def test_steps_are_looked_at_now_and_then() -> None:
    """After many evaluations the cost of a look counts; what is not finite stays so and is found soon."""
    model = simple()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        model(X).sum().backward()
        optimizer.step()
    latent = model.latents()[LATENT]
    optimizer.zero_grad()
    latent.grad = torch.full_like(latent, float("nan"))
    optimizer.step()
    with pytest.warns(RuntimeWarning, match="holds NaN or infinity"):
        for _ in range(16):
            optimizer.zero_grad()
            model(X).sum().backward()
            optimizer.step()


def test_an_evaluation_that_fails_names_the_latent() -> None:
    def refuses(latent: Tensor) -> Tensor:
        return torch.linalg.cholesky(latent @ latent.mT)

    torch.manual_seed(0)
    model = fxp.transform(nn.Linear(3, 3, dtype=DTYPE), {"weight": fxp.custom(refuses, init=torch.eye(3, dtype=DTYPE))})
    with torch.no_grad():
        model.latents()["parametrizations.weight.original"][1, 1] = float("nan")
    with pytest.raises(
        fxp.NonFiniteError, match=r"computing the weights raised .*; the latent .*original of weight .* 1 of 9"
    ) as caught:
        model(torch.ones(1, 3, dtype=DTYPE))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_evaluation_that_fails_for_another_reason_raises_its_own_error() -> None:
    class Fails(nn.Module):
        fails = False

        def forward(self, latent: Tensor) -> Tensor:
            if self.fails:
                raise KeyError("its own")
            return latent * 1.0

        def right_inverse(self, weight: Tensor) -> Tensor:
            return weight

    failing = Fails()
    failing.register_forward_hook(lambda module, args, out: None)
    model = fxp.transform(nn.Linear(3, 3, dtype=DTYPE), {"weight": failing})
    model(torch.ones(1, 3, dtype=DTYPE))
    Fails.fails = True
    model.invalidate()
    with pytest.raises(KeyError, match="its own"):
        model(torch.ones(1, 3, dtype=DTYPE))


# --- what no loss reaches


def test_the_report_names_weights_that_no_loss_reaches() -> None:
    torch.manual_seed(0)
    model = fxp.transform(Heads().to(DTYPE), {"*.weight": fxp.weight_norm()}, trace="live")
    assert model.report.unreached == () and {row.reached for row in model.report.sites} == {None}
    model(X).sum().backward()
    assert model.report.unreached == ("other.weight",)
    assert "other.weight: weight_norm() [spec]; weight kept; graph; no loss has reached it" in str(model.report)
    model.zero_grad()
    with model.defer_backward():
        model(X, both=True).sum().backward()
    assert model.report.unreached == () and "no loss" not in str(model.report)


def test_what_is_frozen_is_not_missed() -> None:
    model = fxp.transform(Heads().to(DTYPE), {"*.weight": fxp.weight_norm()}, trace="live")
    model.freeze("other.weight")
    model(X).sum().backward()
    assert model.report.unreached == ()


def test_a_weight_that_another_reads_is_reached_through_it() -> None:
    net = Heads().to(DTYPE)
    spec = {"other.weight": fxp.weight_norm(), "head.weight": fxp.ref("other.weight") >> (lambda weight: weight * 2)}
    model = fxp.transform(net, spec, trace="live")
    model(X).sum().backward()
    assert model.report.unreached == ()


def test_no_alarm_without_reason() -> None:
    model = made()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            model(X).sum().backward()
            optimizer.step()
            with torch.no_grad():
                model.eval()(X)
                model.train()
