"""What is special about simplices, doubly stochastic matrices and soft permutations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from fxparam import catalogue as cat
from fxparam.declaration import Entry
from fxparam.errors import ImageError, SpecError

DOUBLE = torch.float64

BAD_OPTIONS: list[tuple[Callable[[], Entry], str]] = [
    (lambda: cat.Simplex(dim=None), r"simplex: got dim=None; expected an integer"),  # type: ignore[arg-type]
    (lambda: cat.DoublyStochastic(iterations=0), r"doubly_stochastic: got iterations=0; expected an integer of at least 1"),
    (lambda: cat.DoublyStochastic(temperature=0), r"doubly_stochastic: got temperature=0; expected a number above 0"),
    (lambda: cat.Permutation(iterations=1.5), r"permutation: got iterations=1.5; expected an integer"),  # type: ignore[arg-type]
    (lambda: cat.Permutation(temperature="cold"), r"permutation: got temperature='cold'; expected a"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "text"), BAD_OPTIONS, ids=[text for _, text in BAD_OPTIONS])
def test_bad_options_are_refused_when_given(make: Callable[[], Entry], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        make()


@pytest.mark.parametrize(
    ("entry", "shape", "text"),
    [
        (cat.Simplex(dim=2), (4, 3), r"simplex: got dim=2 for a weight of shape \(4, 3\)"),
        (cat.RowStochastic(), (3,), r"row_stochastic: got a weight of shape \(3,\); expected a matrix"),
        (cat.DoublyStochastic(), (4, 3), r"doubly_stochastic: got a weight of shape \(4, 3\); expected square matrices"),
        (cat.Permutation(), (0, 0), r"permutation: got an empty weight of shape \(0, 0\)"),
    ],
    ids=lambda value: repr(value) if isinstance(value, Entry) else "",
)
def test_weights_that_do_not_fit_are_refused_when_built(entry: Entry, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        entry.build(torch.ones(shape))


def test_the_simplex_projection_is_the_nearest() -> None:
    """Optimal: the weight minus its projection has its largest inner product with the simplex at the projection."""
    weight = torch.randn(50, 7, dtype=DOUBLE) * 2
    nearest = cat.Simplex().build(weight).project(weight)
    residual = weight - nearest
    gap = residual.amax(-1) - (residual * nearest).sum(-1)
    torch.testing.assert_close(gap, torch.zeros(50, dtype=DOUBLE), rtol=0, atol=1e-13)
    assert (nearest == 0).any()


def test_the_simplex_projection_of_large_weights_is_in_the_image() -> None:
    weight = torch.tensor([[1e8, 1e8 + 8, -1e8], [3.0, 3.0, 3.0]])
    module = cat.Simplex().build(weight)
    torch.testing.assert_close(module.project(weight), torch.tensor([[0.0, 1.0, 0.0], [1 / 3] * 3]))


def test_a_weight_that_is_no_distribution_starts_as_logits() -> None:
    """Its projection has zeros, which would never train."""
    weight = torch.randn(3, 4)
    module = cat.Simplex().build(weight)
    assert torch.equal(module.start(weight), weight)
    inside = weight.softmax(-1)
    torch.testing.assert_close(module(module.start(inside)), inside)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entry", [cat.Simplex(), cat.DoublyStochastic(), cat.Permutation(temperature=0.05)], ids=repr)
def test_zeros_come_back_as_zeros(entry: Entry, dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.5, 0.0, 0.5]], dtype=dtype)
    module: Any = entry.build(weight)
    latent = module.right_inverse(weight)
    assert latent.isfinite().all()
    assert torch.equal(module(latent), weight)


def test_negative_elements_are_named() -> None:
    weight = torch.tensor([[1.5, -0.5], [-0.5, 1.5]])
    module: Any = cat.DoublyStochastic().build(weight)
    with pytest.raises(ImageError, match=r"^DoublyStochasticMap: .*rows and columns that sum to 1 is missed by 0.5, tolerance"):
        module.right_inverse(weight)
    assert module.contains(module.project(weight))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e6])
@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("size", [1, 2, 17])
def test_sums_are_one_whatever_the_latents(size: int, iterations: int, scale: float, dtype: torch.dtype) -> None:
    latent = (torch.randn(3, size, size, dtype=dtype) * scale).requires_grad_()
    module = cat.DoublyStochastic(iterations=iterations).build(latent)
    weight = module(latent)
    bound = 2 * size * torch.finfo(dtype).eps
    assert (weight >= 0).all()
    assert (weight.sum(-1) - 1).abs().max() <= bound and (weight.sum(-2) - 1).abs().max() <= bound
    assert torch.autograd.grad((weight * torch.randn_like(weight)).sum(), latent)[0].isfinite().all()


def test_enough_iterations_give_the_matrix_of_sinkhorn() -> None:
    """The one doubly stochastic matrix that is the exponential between two diagonal matrices."""
    latent = torch.randn(5, 5, dtype=DOUBLE)
    weight = cat.DoublyStochastic(iterations=200).build(latent)(latent)
    ratio = weight.log() - latent
    mixed = ratio - ratio.mean(0, keepdim=True) - ratio.mean(1, keepdim=True) + ratio.mean()
    torch.testing.assert_close(mixed, torch.zeros_like(mixed), rtol=0, atol=1e-12)


def test_rounding_moves_no_more_than_the_rows_miss() -> None:
    """Altschuler, Weed and Rigollet 2017, lemma 7: at most twice what the sums miss, in the sum of absolute values."""
    latent = torch.randn(6, 6, dtype=DOUBLE) * 5
    for iterations in (1, 3, 10):
        logits = latent
        for _ in range(iterations):
            logits = logits.log_softmax(-1).log_softmax(-2)
        before = logits.exp()
        after = cat.DoublyStochastic(iterations=iterations).build(latent)(latent)
        assert (after - before).abs().sum() <= 2 * (before.sum(-1) - 1).abs().sum() * (1 + 1e-9)


def test_low_temperatures_give_the_best_permutation() -> None:
    """In the limit it has the largest sum of latents (Mena et al. 2018, theorem 1)."""
    latent = torch.randn(4, 4, dtype=DOUBLE)
    best = max(permutations(range(4)), key=lambda columns: float(latent[range(4), columns].sum()))
    expected = torch.zeros(4, 4, dtype=DOUBLE)
    expected[range(4), best] = 1
    weight = cat.Permutation(temperature=0.005, iterations=500).build(latent)(latent)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-3)


def test_gumbel_samples_have_equal_odds() -> None:
    module = cat.Permutation(temperature=0.02, iterations=50).build(torch.ones(3, 3, dtype=DOUBLE))
    generator = torch.Generator().manual_seed(4)
    mean: Tensor = sum(module.sample(generator=generator) for _ in range(600)) / 600  # type: ignore[assignment]
    torch.testing.assert_close(mean, torch.full((3, 3), 1 / 3, dtype=DOUBLE), rtol=0, atol=0.08)


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_weights_without_positive_elements_project_to_equal_ones(value: float) -> None:
    weight = torch.full((4, 4), value)
    torch.testing.assert_close(cat.DoublyStochastic().build(weight).project(weight), torch.full((4, 4), 0.25))
