"""Gates in training mode: the hard concrete distribution, its gradient and its penalty (Louizos et al. 2018)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam as fxp
from fxparam import catalogue as cat
from fxparam.errors import SpecError

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def seeded(module: Any, *latents: Tensor) -> Tensor:
    torch.manual_seed(7)
    return module(*latents)


@DTYPES
@pytest.mark.parametrize(("shape", "dim", "gates"), [((), None, ()), ((4, 3), None, (4, 3)), ((2, 4, 3), 1, (1, 4, 1))])
def test_training_draws_by_the_paper(
    shape: tuple[int, ...], dim: int | None, gates: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    latents = [
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in (shape, gates)
    ]
    module = cat.Gate(dim, temperature=0.5, stretch=(-0.2, 1.3)).build(latents[0].detach())
    weight = seeded(module, *latents)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(7)
    u = torch.rand(gates, dtype=wide)
    x, log_alpha = (tensor.detach().to(wide).requires_grad_() for tensor in latents)
    s = 1 / (1 + torch.exp(-(torch.log(u) - torch.log(1 - u) + log_alpha) / 0.5))
    stretched = s * 1.5 - 0.2
    expected = x * torch.where(stretched < 0, 0.0, torch.where(stretched > 1, 1.0, stretched))
    assert weight.dtype == dtype and weight.shape == shape
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(weight, expected.to(dtype), rtol=tolerance, atol=tolerance)
    for got, wanted in zip(
        torch.autograd.grad(weight.sum(), latents), torch.autograd.grad(expected.sum(), (x, log_alpha)), strict=True
    ):
        torch.testing.assert_close(got, wanted.to(dtype), rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("value", [-3.0, -0.5, 0.0, 2.0, 4.0])
@pytest.mark.parametrize(("temperature", "stretch"), [(2 / 3, (-0.1, 1.1)), (0.3, (-0.5, 1.2))])
def test_the_penalty_is_how_often_gates_are_not_shut(value: float, temperature: float, stretch: tuple[float, float]) -> None:
    ones = torch.ones(100_000)
    module = cat.Gate(temperature=temperature, stretch=stretch).build(ones)
    log_alpha = torch.full_like(ones, value)
    drawn = seeded(module, ones, log_alpha)
    expected = float(module.expected_l0(log_alpha)) / ones.numel()
    error = math.sqrt(max(expected * (1 - expected), 1e-3) / ones.numel())
    assert abs(float((drawn != 0).float().mean()) - expected) < 5 * error
    assert drawn.min() >= 0 and drawn.max() <= 1
    # By hand, eq. 12.
    by_hand = 1 / (1 + math.exp(-(value - temperature * math.log(-stretch[0] / stretch[1]))))
    assert abs(expected - by_hand) < 1e-5


def test_the_penalty_of_slices_counts_elements() -> None:
    weight = torch.randn(2, 4, 3, dtype=torch.float64)
    module, log_alpha = cat.Gate(dim=1).build(weight), torch.randn(1, 4, 1, dtype=torch.float64, requires_grad=True)
    each = cat.Gate().build(weight).expected_l0(log_alpha.expand(2, 4, 3))
    torch.testing.assert_close(module.expected_l0(log_alpha), each)
    assert torch.autograd.gradcheck(module.expected_l0, log_alpha)
    assert module.expected_l0(log_alpha).shape == ()


@DTYPES
@pytest.mark.parametrize("stretch", [(-0.1, 1.1), (-0.01, 1.01), (-2, 1.5)])
def test_the_start_keeps_the_weight_with_all_gates_open(stretch: tuple[float, float], dtype: torch.dtype) -> None:
    weight = torch.randn(4, 3, dtype=torch.float64).to(dtype)
    module = cat.Gate(dim=0, stretch=stretch).build(weight)
    latent, log_alpha = module.right_inverse(weight)
    assert torch.equal(latent, weight) and log_alpha.shape == (4, 1) and log_alpha.dtype == dtype
    assert torch.equal(module.estimate(log_alpha), torch.ones_like(log_alpha))
    state = torch.get_rng_state()
    assert torch.equal(module.eval()(latent, log_alpha), weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.expected_l0(log_alpha) > 0.85 * weight.numel()


def test_a_start_with_gates_half_open_keeps_the_weight_too() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    module: Any = cat.Gate(init=0.0).build(weight).eval()
    latent, log_alpha = module.right_inverse(weight)
    torch.testing.assert_close(latent, 2 * weight)
    torch.testing.assert_close(module(latent, log_alpha), weight)


def test_a_shut_gate_has_no_gradient_and_no_nan() -> None:
    """Also where the uniform number is 0, whose logarithm is not finite."""
    module = cat.Gate().build(torch.ones(3))
    latents = [torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand_like", torch.zeros_like)
        weight = module(*latents)
    assert torch.equal(weight, torch.zeros(3))
    for grad in torch.autograd.grad(weight.sum(), latents):
        assert torch.equal(grad, torch.zeros(3))


def test_training_shuts_gates_that_do_not_pay() -> None:
    """A regression in which two of four inputs count: the penalty removes the other two, exactly."""
    torch.manual_seed(0)
    net, inputs = nn.Linear(4, 1, bias=False), torch.randn(256, 4)
    target = inputs @ torch.tensor([[2.0], [0.0], [-3.0], [0.0]])
    model = fxp.transform(net, fxp.Spec({"weight": fxp.gate(dim=1)}))
    site: Any = model.get_submodule("parametrizations.weight")
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (model(inputs) - target).square().mean() + 0.05 * site[0].expected_l0(site.original1)
        loss.backward()
        optimizer.step()
    weight = dict(fxp.fold(model, example_inputs=(inputs,)).named_parameters())["weight"]
    assert (weight != 0).tolist() == [[True, False, True, False]]
    assert torch.equal(model.eval()(inputs), inputs @ weight.T)


def test_options_that_do_not_fit() -> None:
    loose: Any = cat  # for options of the wrong type
    for make, text in [
        (lambda: loose.Gate(dim=0.5), r"gate: got dim=0.5; expected an integer"),
        (lambda: loose.Gate(temperature=0), r"gate: got temperature=0; expected a number above 0"),
        (lambda: loose.Gate(stretch=0.1), r"gate: got stretch=0.1; expected two numbers such as \(-0.1, 1.1\)"),
        (lambda: loose.Gate(stretch=(0, 1.1)), r"gate: got stretch=\(0, 1.1\); expected one number below 0 and one above 1"),
        (lambda: loose.Gate(stretch=("a", 2)), r"gate: got stretch='a'; expected a finite number"),
        (lambda: loose.Gate(resample="epoch"), r"gate: got resample='epoch'; expected one of 'call', 'step'"),
        (lambda: loose.Gate(init="a"), r"gate: got init='a'; expected a finite number"),
        (
            lambda: loose.Gate(init=-3),
            r"gate: got init=-3, at which all gates are shut; expected a number above -2.398, and 2.398 for gates of 1",
        ),
        (
            lambda: loose.Gate(stretch=(-0.1, 1.4), init=-2.639).build(torch.ones(3).bfloat16()),
            r"gate: got init=-2.639, at which all gates are shut in a weight of dtype torch.bfloat16",
        ),
        (lambda: loose.Gate(dim=1).build(torch.ones(3)), r"gate: got dim=1 for a weight of shape \(3,\)"),
        (lambda: loose.Gate().build(torch.ones(0)), r"gate: got an empty weight"),
    ]:
        with pytest.raises(SpecError, match=text):
            make()


def test_resampling_is_an_attribute_and_shown() -> None:
    module: Any = cat.Gate(0, resample="call").build(torch.ones(2, 3))
    assert module.resample == "call"
    assert repr(module) == "GateMap(dim=0, temperature=0.666667, stretch=(-0.1, 1.1), resample='call', init=2.8979)"


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_files(tmp_path: Path, ending: str) -> None:
    spec = fxp.Spec({"a": fxp.gate(), "b": fxp.gate(1, 0.5, (-0.2, 1.2), "call", 1.0)})
    path = tmp_path / f"spec.{ending}"
    spec.save(path)
    assert fxp.Spec.load(path) == spec
