"""Matrices of fixed and of bounded rank: what happens at the edge of their image, and that training can start there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fxparam as fxp
from fxparam import catalogue as cat
from fxparam.errors import ImageError, SpecError

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)


def of_rank(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    *batch, m, n = shape
    return torch.randn(*batch, m, rank, dtype=dtype) @ torch.randn(*batch, rank, n, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 6), (3, 3)], ids=str)
def test_fixed_rank_has_the_singular_values_of_its_latent(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *batch, m, n = shape
    left, right = torch.randn(*batch, m, 2, dtype=dtype), torch.randn(*batch, n, 2, dtype=dtype)
    values = torch.randn(*batch, 2, dtype=dtype)
    weight = cat.FixedRank(2).build(torch.zeros(shape, dtype=dtype))(left, values, right)
    expected = F.softplus(values.real).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(weight)[..., :2], expected)
    assert torch.linalg.svdvals(weight)[..., 2:].max() < 1e-14


@DTYPES
def test_fixed_rank_refuses_a_smaller_rank_and_raises_it(dtype: torch.dtype) -> None:
    weight = of_rank(1, 5, 4, dtype=dtype)
    module: Any = cat.FixedRank(2).build(weight)
    with pytest.raises(
        ImageError,
        match=r"^FixedRankMap: .* is not in the image: its rank is below 2: singular value 2 is .*; type model.assign",
    ):
        module.right_inverse(weight)
    raised = module.project(weight)
    torch.testing.assert_close(raised, weight, rtol=0, atol=1e-11)
    torch.testing.assert_close(module(*module.right_inverse(raised)), raised)
    assert torch.equal(module.project(raised), raised)
    assert int(torch.linalg.matrix_rank(raised)) == 2
    # A start that trains: every latent that has a say gets a gradient.
    latents = tuple(latent.requires_grad_() for latent in module.start(weight))
    grads = torch.autograd.grad((module(*latents) * torch.randn_like(weight)).sum().abs(), latents)
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fixed_rank_starts_from_zero(dtype: torch.dtype) -> None:
    zero = torch.zeros(2, 4, 3, dtype=dtype)
    module: Any = cat.FixedRank(2).build(zero)
    with pytest.raises(ImageError, match="its rank is below 2: singular value 2 is 0 of the largest"):
        module.right_inverse(zero)
    weight = module(*module.start(zero))
    assert 0 < weight.abs().max() <= 2 * torch.finfo(dtype).eps
    assert module.contains(weight)


@pytest.mark.parametrize("least", [1e-3, 1e-6, 1e-12])
def test_fixed_rank_keeps_small_singular_values(least: float) -> None:
    u, v = (torch.linalg.qr(torch.randn(n, 2, dtype=torch.float64))[0] for n in (5, 4))
    weight = (u * torch.tensor([1.0, least], dtype=torch.float64)) @ v.T
    module: Any = cat.FixedRank(2).build(weight)
    values = torch.linalg.svdvals(module(*module.right_inverse(weight)))
    assert abs(float(values[1]) / least - 1) < 1e-15 / least


def test_products_of_numbers_that_underflow_are_of_low_rank() -> None:
    """They are multiples of the least number, and of any rank relative to it."""
    module = cat.LowRank(1).build(torch.zeros(4, 3))
    weight = module(torch.randn(4, 1) * 1e-22, torch.randn(1, 3) * 1e-22)
    assert weight.any() and module.contains(weight)
    assert not module.contains(torch.eye(4, 3) * 1e-36)


@DTYPES
@pytest.mark.parametrize("rank", [None, 1, 2])
def test_semidefinite_projection_is_the_nearest(rank: int | None, dtype: torch.dtype) -> None:
    weight = torch.randn(2, 4, 4, dtype=dtype)
    near = cat.PositiveSemidefinite(rank).build(weight).project(weight)
    for matrix, found in zip(weight.numpy(), near.numpy(), strict=True):
        values, vectors = np.linalg.eigh((matrix + matrix.conj().T) / 2)
        expected = np.zeros_like(matrix)
        for j in sorted(range(4), key=lambda j: -values[j])[: rank or 4]:
            expected += max(values[j], 0) * np.outer(vectors[:, j], vectors[:, j].conj())
        np.testing.assert_allclose(found, expected, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("present", [0, 1])
def test_a_semidefinite_start_of_smaller_rank_can_train(present: int, dtype: torch.dtype) -> None:
    """A column of zeros in B would stay zero: the gradient of B Bᴴ vanishes there."""
    column = torch.randn(4, 1).to(dtype)
    weight = column @ column.mH * present
    module: Any = cat.PositiveSemidefinite(rank=3).build(weight)
    latent = module.right_inverse(weight).requires_grad_()
    value = module(latent)
    atol = 4 * torch.finfo(dtype).eps * max(1.0, float(weight.abs().max()))
    torch.testing.assert_close(value, weight, rtol=0, atol=atol)
    grad = torch.autograd.grad((value * torch.randn(4, 4)).sum().real, latent)[0]
    assert (latent.abs().amax(0) > 0).all() and (grad.abs().amax(0) > 0).all()


@pytest.mark.parametrize("size", [1e-40, 1e-35, 1e-20, 1e20, 1e30])
def test_semidefinite_matrices_of_any_size(size: float) -> None:
    weight = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0])) * size
    module: Any = cat.PositiveSemidefinite(rank=2).build(weight)
    torch.testing.assert_close(module(module.right_inverse(weight)), weight, rtol=1e-5, atol=0)
    assert module.contains(weight) and (size < 1e-38 or not module.contains(weight + size * torch.eye(4)))


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (
            torch.diag(torch.tensor([1.0, -0.25])),
            r"with no eigenvalue below zero \(relative to the largest\) is missed by 0.25,",
        ),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), r"Wᴴ = W .* is missed by 0.5,"),
    ],
)
def test_semidefinite_refuses_by_how_far(weight: Tensor, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        cat.PositiveSemidefinite().build(weight).right_inverse(weight)


def test_semidefinite_refuses_too_many_eigenvalues() -> None:
    module = cat.PositiveSemidefinite(rank=1).build(torch.eye(3))
    with pytest.raises(ImageError, match=r"at most 1 eigenvalues above and none below zero .* is missed by 0.5,"):
        module.right_inverse(torch.diag(torch.tensor([0.5, 1.0, 0.0])))


def test_options_that_do_not_fit() -> None:
    loose: Any = cat  # for options of the wrong type
    for make, text in [
        (lambda: loose.FixedRank(0), r"fixed_rank: got rank=0; expected an integer of at least 1"),
        (lambda: loose.FixedRank(4).build(torch.ones(3, 5)), r"fixed_rank: got rank=4 .* \(3, 5\); expected 1 <= rank <= 3"),
        (lambda: loose.FixedRank(1).build(torch.ones(3)), r"fixed_rank: got a weight of shape \(3,\); expected a matrix"),
        (
            lambda: loose.LowRank(1).build(torch.ones(3, 3).int()),
            r"low_rank: got a weight of dtype torch.int32; expected a float",
        ),
        (lambda: loose.PositiveSemidefinite(0), r"positive_semidefinite: got rank=0; expected an integer of at least 1"),
        (lambda: loose.PositiveSemidefinite(True), r"positive_semidefinite: got rank=True; expected an integer"),
        (
            lambda: loose.PositiveSemidefinite(4).build(torch.ones(3, 3)),
            r"positive_semidefinite: got rank=4 for a weight of shape \(3, 3\); expected 1 <= rank <= 3",
        ),
        (lambda: loose.PositiveSemidefinite().build(torch.ones(3, 4)), r"positive_semidefinite: .*expected square matrices"),
    ]:
        with pytest.raises(SpecError, match=text):
            make()


def test_repr_and_files(tmp_path: Path) -> None:
    assert repr(cat.PositiveSemidefinite().build(torch.eye(3))) == "PositiveSemidefiniteMap(rank=3)"
    assert repr(cat.FixedRank(2).build(torch.eye(3))).startswith("FixedRankMap(\n  rank=2")
    spec = fxp.Spec({"a": fxp.fixed_rank(2), "b": fxp.positive_semidefinite(), "c": fxp.positive_semidefinite(rank=3)})
    spec.save(tmp_path / "spec.yaml")
    assert fxp.Spec.load(tmp_path / "spec.yaml") == spec
