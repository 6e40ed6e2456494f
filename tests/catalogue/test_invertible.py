"""Matrices with an inverse: determinants, what is refused, and the buffers that hold the decomposition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxparam as fxp
from fxparam.declaration import Entry
from fxparam.errors import ImageError, SpecError

DOUBLE = torch.float64
BOTH = pytest.mark.parametrize("entry", [fxp.invertible(), fxp.special_linear()], ids=str)


@BOTH
def test_what_does_not_fit_is_refused(entry: Entry) -> None:
    with pytest.raises(SpecError, match=rf"{entry.name}: got a weight of shape \(3, 4\); expected square matrices"):
        entry.build(torch.ones(3, 4))
    with pytest.raises(SpecError, match=rf"{entry.name}: got a weight of dtype torch.complex64; expected a floating-point"):
        entry.build(torch.ones(3, 3) * 1j)


def test_the_logarithm_of_the_determinant_is_the_sum_of_the_diagonal() -> None:
    """Equation 11 of Kingma and Dhariwal 2018."""
    module: Any = fxp.invertible().build(torch.ones(5, 5, dtype=DOUBLE))
    latent = module.right_inverse(module.sample())
    assert module.permutation.tolist() != list(range(5)) or (module.signs < 0).any()
    torch.testing.assert_close(torch.linalg.slogdet(module(latent)).logabsdet, latent.diagonal().sum())


def test_the_decomposition_is_that_of_torch() -> None:
    weight = torch.randn(3, 6, 6, dtype=DOUBLE)
    module: Any = fxp.invertible().build(weight)
    latent = module.right_inverse(weight)
    order, lower, upper = torch.linalg.lu(weight)
    assert torch.equal(latent.tril(-1), lower.tril(-1)) and torch.equal(latent.triu(1), upper.triu(1))
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    assert torch.equal(module.signs, diagonal.sign())
    torch.testing.assert_close(latent.diagonal(dim1=-2, dim2=-1).exp() * module.signs, diagonal)
    identity = torch.eye(6, dtype=DOUBLE)
    assert torch.equal(identity[module.permutation], order)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_the_determinant_is_never_zero(dtype: torch.dtype, value: float) -> None:
    """Where ``exp`` would underflow or overflow, the diagonal is cut off."""
    for entry in (fxp.invertible(), fxp.special_linear()):
        module: Any = entry.build(torch.ones(3, 3, dtype=dtype))
        latent = torch.diag(torch.tensor([value, 1.0, 2.0], dtype=dtype)).requires_grad_()
        weight = module(latent)
        weight.sum().backward()
        sign, log = torch.linalg.slogdet(weight.detach().double())
        assert sign == 1 and log.isfinite() and latent.grad.isfinite().all()  # type: ignore[union-attr]
        assert entry.name == "invertible" or abs(log) < 1e-3


@BOTH
@pytest.mark.parametrize("singular", [torch.zeros(3, 3), torch.ones(3, 3), torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])])
def test_singular_matrices_are_refused_and_have_a_projection(entry: Entry, singular: torch.Tensor) -> None:
    module: Any = entry.build(singular)
    assert not module.contains(singular)
    with pytest.raises(
        ImageError, match=r"Map: a weight of shape \(3, 3\), torch.float32, is not in the image: .* is missed by 1"
    ):
        module.right_inverse(singular)
    near = module.project(singular)
    assert module.contains(near)
    torch.testing.assert_close(module(module.right_inverse(near)), near)
    if entry.name == "invertible":
        torch.testing.assert_close(near, singular, rtol=0, atol=1e-3 * float(singular.abs().max()) + 1e-6)


def test_a_product_of_thin_factors_counts_as_singular() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 5, dtype=DOUBLE) @ torch.randn(5, 8, dtype=DOUBLE)
    assert not fxp.invertible().build(weight).contains(weight)
    assert fxp.invertible().build(weight).contains(weight + 1e-6 * torch.eye(8, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("weight", "distance"),
    [
        (torch.eye(3), 0.0),
        (torch.eye(3) * 1.25, 0.2),  # scaling by 0.8
        (torch.diag(torch.tensor([1e3, 1e-3])), 0.0),
        (torch.diag(torch.tensor([1e3, 2e-3])), 1e-6),  # the small one halved: 1e-3 of 1e3, counted as doubled: 2e-6
        (torch.diag(torch.tensor([1.0, -1.0])), 2.0),  # a reflection
    ],
)
def test_the_distance_to_determinant_one(weight: torch.Tensor, distance: float) -> None:
    module: Any = fxp.special_linear().build(weight)
    found = float(module.distance(weight.double()))
    assert distance - 1e-9 <= found <= 2 * distance + 1e-9


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_the_determinant_is_one(n: int) -> None:
    torch.manual_seed(n)
    module: Any = fxp.special_linear().build(torch.ones(4, n, n, dtype=DOUBLE))
    for weight in (module.sample(), module.project(torch.randn(4, n, n, dtype=DOUBLE)), module(torch.randn(4, n, n).double())):
        torch.testing.assert_close(torch.linalg.det(weight), torch.ones(4, dtype=DOUBLE), rtol=0, atol=1e-8)


def test_a_negative_determinant_is_refused() -> None:
    weight = torch.eye(4).flip(0)[[1, 0, 2, 3]]
    module: Any = fxp.special_linear().build(weight)
    assert torch.linalg.det(weight) == -1
    with pytest.raises(ImageError, match=r"^SpecialLinearMap: .*determinant 1 \(by which part .*\) is missed by 2"):
        module.right_inverse(weight)
    assert torch.linalg.det(module.project(weight)) > 0.999


def test_a_refused_weight_leaves_the_buffers() -> None:
    module: Any = fxp.special_linear().build(torch.ones(3, 3, dtype=DOUBLE))
    latent = module.right_inverse(module.sample())
    before = module(latent)
    for weight in (2 * before, torch.zeros(3, 3, dtype=DOUBLE)):
        with pytest.raises(ImageError):
            module.right_inverse(weight)
        assert torch.equal(module(latent), before)


@BOTH
def test_training_keeps_the_sign_and_checkpoints_keep_the_buffers(entry: Entry) -> None:
    torch.manual_seed(4)
    layer = nn.Linear(6, 6)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(torch.randn(6, 6)).Q)
    model = fxp.transform(layer, {"weight": entry})
    sign = torch.linalg.slogdet(model.weights()["weight"]).sign.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x, y = torch.randn(32, 6), torch.randn(32, 6)
    for _ in range(200):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    weight = model.weights()["weight"].detach()
    sign_after, log = torch.linalg.slogdet(weight.double())
    assert sign_after == sign and log.isfinite()
    assert entry.name == "invertible" or abs(log) < 1e-3
    twin = fxp.transform(nn.Linear(6, 6), {"weight": entry})
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.weights()["weight"], weight)
    torch.testing.assert_close(twin(x), model(x))


def test_one_matrix_of_special_linear_has_a_single_element() -> None:
    module: Any = fxp.special_linear().build(torch.ones(1, 1))
    assert module(torch.randn(1, 1)) == 1 and module.sample() == 1 and module.contains(torch.ones(1, 1))
    assert not module.contains(torch.full((1, 1), 1.5))


def test_a_sample_of_geotorch_is_in_the_image() -> None:
    geotorch = pytest.importorskip("geotorch")
    torch.manual_seed(5)
    weight = geotorch.SL((5, 5)).sample().detach()
    module: Any = fxp.special_linear().build(weight)
    if torch.linalg.det(weight) < 0:
        weight = weight[[1, 0, 2, 3, 4]]
    assert module.contains(weight)
    torch.testing.assert_close(module(module.right_inverse(weight)), weight, rtol=0, atol=1e-4)


@BOTH
def test_an_assigned_weight_brings_its_own_permutation(entry: Entry) -> None:
    """The buffers change with the latents, and the next forward reads both."""
    torch.manual_seed(6)
    model = fxp.transform(nn.Linear(5, 5), {"weight": entry})
    x = torch.randn(3, 5)
    model(x)
    weight = torch.eye(5)[[1, 2, 0, 4, 3]] @ torch.diag(torch.tensor([-1.0, 2.0, 0.5, 1.0, 1.0]))
    assert torch.linalg.det(weight) == 1
    model.assign("weight", weight)
    assert torch.equal(model.weights()["weight"], weight)
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight, model.state_dict()["bias"]))
    model.retract("weight")
    assert torch.equal(model.weights()["weight"], weight)
    model.assign("weight", torch.ones(5, 5), project=True)
    assert torch.linalg.slogdet(model.weights()["weight"]).logabsdet.isfinite()
