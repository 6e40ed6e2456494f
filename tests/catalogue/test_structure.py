"""Structured matrices: known numbers, best approximations, and structure that a chain hands to a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam as fxp
from fxparam.declaration import Entry
from fxparam.errors import ImageError, SpecError

DOUBLE = torch.float64


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: fxp.block_diagonal(0), r"block_diagonal: got blocks=0; expected an integer of at least 1"),
        (lambda: fxp.banded(-1, 1), r"banded: got lower=-1; expected an integer of at least 0"),
        (lambda: fxp.banded(1, 1.5), r"banded: got upper=1.5; expected an integer of at least 0"),  # type: ignore[arg-type]
        (lambda: fxp.triangular(upper="yes"), r"triangular: got upper='yes'; expected True or False"),  # type: ignore[arg-type]
        (lambda: fxp.triangular(unit_diagonal=1), r"triangular: got unit_diagonal=1; expected True or False"),  # type: ignore[arg-type]
        (lambda: fxp.kronecker(4), r"kronecker: got shape=4; expected two integers, the shape \(a, b\) of the left"),  # type: ignore[arg-type]
        (lambda: fxp.kronecker((2, 0)), r"kronecker: got shape\[...\]=0; expected an integer of at least 1"),
        (lambda: fxp.kronecker((2, 2), terms=0), r"kronecker: got terms=0; expected an integer of at least 1"),
        (lambda: fxp.monarch(0), r"monarch: got blocks=0; expected an integer of at least 1"),
        (lambda: fxp.monarch(2, rank=0.5), r"monarch: got rank=0.5; expected an integer of at least 1"),  # type: ignore[arg-type]
        (lambda: fxp.diagonal_low_rank(0), r"diagonal_low_rank: got rank=0; expected an integer of at least 1"),
        (lambda: fxp.from_matrix(dim="0"), r"from_matrix: got dim='0'; expected an integer"),  # type: ignore[arg-type]
    ],
)
def test_bad_options_are_refused_when_given(make: Callable[[], Entry], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        make()


@pytest.mark.parametrize(
    ("entry", "shape", "text"),
    [
        (fxp.block_diagonal(2), (4, 3), r"block_diagonal: got blocks=2 .* shape \(4, 3\); expected a divisor of 4 and 3"),
        (fxp.banded(1, 1), (4,), r"banded: got a weight of shape \(4,\); expected a matrix or a batch"),
        (fxp.circulant(), (4, 3), r"circulant: got a weight of shape \(4, 3\); expected square matrices"),
        (fxp.toeplitz(), (0, 3), r"toeplitz: got an empty weight of shape \(0, 3\)"),
        (fxp.kronecker((2, 2)), (4, 3), r"kronecker: got shape=\(2, 2\) .* shape \(4, 3\); expected divisors of 4 and 3"),
        (fxp.kronecker((2, 2), 5), (4, 4), r"kronecker: got terms=5 .* shape \(2, 2\); expected 1 <= terms <= 4"),
        (fxp.monarch(3), (9, 8), r"monarch: got blocks=3 .* shape \(9, 8\); expected a divisor of 9 and 8"),
        (fxp.monarch(2, 3), (4, 8), r"monarch: got rank=3 .* in 2 x 2 blocks; expected 1 <= rank <= 2"),
        (fxp.diagonal_low_rank(2), (4, 4), r"diagonal_low_rank: got rank=2 .* expected 2 \* rank \+ 1 <= 4"),
        (fxp.diagonal_low_rank(1), (4, 3), r"diagonal_low_rank: got a weight of shape \(4, 3\); expected square"),
        (fxp.from_matrix(), (4,), r"from_matrix: got a weight of shape \(4,\); expected at least two dimensions"),
        (fxp.from_matrix(3), (4, 3), r"from_matrix: got dim=3 for a weight of shape \(4, 3\); expected -2 <= dim < 2"),
    ],
)
def test_weights_that_do_not_fit_are_refused_when_built(entry: Entry, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        entry.build(torch.ones(shape))


@pytest.mark.parametrize(
    "entry",
    [
        fxp.block_diagonal(2),
        fxp.banded(1, 0),
        fxp.triangular(),
        fxp.circulant(),
        fxp.toeplitz(),
        fxp.kronecker((2, 2)),
        fxp.monarch(2),
        fxp.diagonal_low_rank(1),
    ],
    ids=str,
)
def test_integers_are_refused(entry: Entry) -> None:
    with pytest.raises(SpecError, match="got a weight of dtype torch.int64; expected a floating-point or complex dtype"):
        entry.build(torch.ones(4, 4, dtype=torch.int64))


def test_blocks_are_those_of_torch() -> None:
    blocks = torch.randn(3, 2, 4)
    assert torch.equal(fxp.block_diagonal(3).build(torch.ones(6, 12))(blocks), torch.block_diag(*blocks))


def test_a_circulant_matrix_is_a_circular_convolution() -> None:
    c, x = torch.randn(2, 7, dtype=DOUBLE)
    weight = fxp.circulant().build(torch.ones(7, 7, dtype=DOUBLE))(c)
    assert torch.equal(weight[:, 0], c)
    torch.testing.assert_close(weight @ x, torch.fft.ifft(torch.fft.fft(c) * torch.fft.fft(x)).real)


def test_a_toeplitz_matrix_is_a_convolution() -> None:
    kernel, x = torch.randn(6, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    weight = fxp.toeplitz().build(torch.ones(4, 3, dtype=DOUBLE))(kernel)
    full = torch.nn.functional.conv1d(kernel[None, None], x.flip(0)[None, None])[0, 0]
    torch.testing.assert_close(weight @ x, full)
    assert weight[0, 2] == kernel[0] and weight[3, 0] == kernel[5]


@pytest.mark.parametrize(
    "entry", [fxp.banded(1, 0), fxp.triangular(unit_diagonal=True), fxp.toeplitz(), fxp.circulant()], ids=str
)
def test_projections_are_orthogonal(entry: Entry) -> None:
    """What the projection takes away is orthogonal to every difference of two such matrices."""
    weight = torch.randn(5, 5, dtype=DOUBLE)
    module: Any = entry.build(weight)
    gap = weight - module.project(weight)
    direction = module.sample() - module.sample()
    assert abs(float((gap * direction).sum())) < 1e-12


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.float16], ids=str)
def test_means_of_huge_elements_do_not_overflow(dtype: torch.dtype) -> None:
    weight = torch.full((6, 6), torch.finfo(dtype).max, dtype=dtype)
    for entry in (fxp.circulant(), fxp.toeplitz()):
        module: Any = entry.build(weight)
        assert torch.equal(module(module.right_inverse(weight)), weight)


def test_a_constraint_that_is_missed_says_by_how_far() -> None:
    module: Any = fxp.banded(1, 1).build(torch.ones(4, 4))
    with pytest.raises(ImageError, match=r"^BandedMap: .*zero off the band .* is missed by 1, tolerance 0"):
        module.right_inverse(torch.ones(4, 4))
    with pytest.raises(ImageError, match=r"^TriangularMap: .*zero below the diagonal and one on it is missed by 2"):
        fxp.triangular(upper=True, unit_diagonal=True).build(torch.ones(2, 2)).right_inverse(3 * torch.eye(2))


def test_kronecker_is_that_of_torch() -> None:
    a, b = torch.randn(2, 3, 2, dtype=DOUBLE), torch.randn(2, 2, 4, dtype=DOUBLE)
    weight = fxp.kronecker((3, 2), terms=2).build(torch.ones(6, 8, dtype=DOUBLE))(a, b)
    torch.testing.assert_close(weight, torch.kron(a[0], b[0]) + torch.kron(a[1], b[1]))


def test_kronecker_projection_is_the_best_approximation() -> None:
    """The error is what the singular values of the rearranged matrix say, blocks as rows (Van Loan and Pitsianis 1993)."""
    weight = torch.randn(6, 8, dtype=DOUBLE)
    rows = torch.stack([weight[3 * i : 3 * i + 3, 2 * j : 2 * j + 2].reshape(-1) for i in range(2) for j in range(4)])
    for terms in (1, 2, 3):
        module: Any = fxp.kronecker((2, 4), terms=terms).build(weight)
        left = torch.linalg.svdvals(rows)[terms:]
        torch.testing.assert_close(torch.linalg.norm(weight - module.project(weight)), torch.linalg.norm(left))


@pytest.mark.parametrize("entry", [fxp.kronecker((2, 2), terms=2), fxp.monarch(2, rank=2), fxp.diagonal_low_rank(1)], ids=str)
def test_the_start_of_a_zero_weight_can_train(entry: Entry) -> None:
    module: Any = entry.build(torch.zeros(4, 4))
    latents = tuple(latent.requires_grad_() for latent in module.right_inverse(torch.zeros(4, 4)))
    weight = module(*latents)
    assert not weight.any()
    grads = torch.autograd.grad((weight * torch.randn(4, 4)).sum(), latents)
    assert grads[-2].abs().min() > 1e-6


def test_the_fourier_transform_is_a_monarch_matrix() -> None:
    """With its columns in strides it is a product of two sparse factors: the step of Cooley and Tukey for ``n = b²``."""
    b, n = 4, 16
    index = torch.arange(n)
    fourier = torch.exp(-2j * math.pi * (index[:, None] * index).double() / n)
    strided = fourier[:, index.reshape(b, b).T.reshape(-1)]
    module: Any = fxp.monarch(b).build(fourier)
    assert module.contains(strided) and not module.contains(fourier)
    left, right = module.right_inverse(strided)
    assert left.numel() + right.numel() == 2 * n**1.5
    torch.testing.assert_close(module(left, right), strided)


def test_monarch_projection_is_the_best_approximation() -> None:
    weight = torch.randn(6, 4, dtype=DOUBLE)
    module: Any = fxp.monarch(2).build(weight)
    tails = [torch.linalg.svdvals(weight[j::2, 2 * k : 2 * k + 2])[1:] for j in range(2) for k in range(2)]
    torch.testing.assert_close(torch.linalg.norm(weight - module.project(weight)), torch.linalg.norm(torch.cat(tails)))


@pytest.mark.parametrize(("n", "rank"), [(3, 1), (7, 3), (12, 2), (30, 5)])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16, torch.complex128], ids=str)
def test_the_low_rank_part_is_found_next_to_a_large_diagonal(n: int, rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    module: Any = fxp.diagonal_low_rank(rank).build(torch.ones(n, n, dtype=dtype))
    weight = module.sample() + torch.diag(100 * torch.randn(n).to(dtype))
    again = module(*module.right_inverse(weight))
    assert (again - weight).abs().max() <= 4 * module.tolerance(weight) * weight.abs().max()


def test_a_low_rank_part_that_is_only_on_the_diagonal_belongs_to_it() -> None:
    module: Any = fxp.diagonal_low_rank(1).build(torch.ones(5, 5, dtype=DOUBLE))
    weight = torch.diag(torch.tensor([1.0, 2.0, 0.0, -3.0, 1e-9], dtype=DOUBLE))
    diagonal, left, _ = module.right_inverse(weight)
    assert torch.equal(diagonal, weight.diagonal()) and not left.any()


def test_the_split_with_many_zeros_is_found() -> None:
    module: Any = fxp.diagonal_low_rank(2).build(torch.ones(8, 8, dtype=DOUBLE))
    u = torch.zeros(8, 2, dtype=DOUBLE)
    u[1:4, 0] = torch.tensor([1.0, 2.0, -1.0])
    u[4:7, 1] = torch.tensor([3.0, 1.0, 1.0])
    weight = u @ u.mT + torch.diag(torch.arange(8.0, dtype=DOUBLE))
    torch.testing.assert_close(module(*module.right_inverse(weight)), weight)


def test_alternating_projections_are_no_worse_than_either_part_alone() -> None:
    torch.manual_seed(3)
    weight = torch.randn(9, 9, dtype=DOUBLE) + 3 * torch.eye(9, dtype=DOUBLE)
    module: Any = fxp.diagonal_low_rank(2).build(weight)
    gap = torch.linalg.norm(weight - module.project(weight))
    low = fxp.low_rank(2).build(weight)
    assert gap < torch.linalg.norm(weight - low.project(weight))
    diagonal = weight.diagonal()
    rest = weight - torch.diag(diagonal)
    assert gap < torch.linalg.norm(rest - low.project(rest))


def _as_matrix(weight: Tensor, dim: int) -> Tensor:
    return torch.stack([part.reshape(-1) for part in weight.unbind(dim)])


@pytest.mark.parametrize(
    ("layer", "dim", "shape"),
    [(nn.Conv2d(3, 8, 3), 0, (2, 3, 6, 6)), (nn.ConvTranspose2d(8, 3, 2), 1, (2, 8, 4, 4)), (nn.Conv1d(2, 9, 2), 0, (1, 2, 5))],
    ids=["Conv2d", "ConvTranspose2d", "Conv1d"],
)
def test_a_convolution_takes_the_map_of_a_matrix(layer: nn.Module, dim: int, shape: tuple[int, ...]) -> None:
    model = fxp.transform(layer, {"weight": fxp.orthogonal() >> fxp.from_matrix(dim=dim)})
    x = torch.randn(shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    matrix = _as_matrix(model.weights()["weight"].detach(), dim)
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
    (latent,) = (latent for name, latent in model.latents().items() if "weight" in name)
    assert latent.shape == matrix.shape
    model.eval()
    plain = fxp.fold(model, example_inputs=(x,))
    torch.testing.assert_close(plain(x), model(x))
    torch.testing.assert_close(dict(plain.named_parameters())["weight"], model.weights()["weight"])


def test_blocks_of_a_layer_are_orthogonal() -> None:
    model = fxp.transform(nn.Linear(6, 6), {"weight": fxp.orthogonal() >> fxp.block_diagonal(3)})
    weight = model.weights()["weight"].detach()
    torch.testing.assert_close(weight @ weight.mT, torch.eye(6), rtol=0, atol=1e-5)
    assert weight[0, 2:].count_nonzero() == 0


@pytest.mark.parametrize(
    "entry",
    [
        fxp.block_diagonal(2),
        fxp.banded(1, 2),
        fxp.triangular(unit_diagonal=True),
        fxp.circulant(),
        fxp.toeplitz(),
        fxp.kronecker((2, 4), terms=2),
        fxp.monarch(2),
        fxp.diagonal_low_rank(2),
        fxp.invertible(),
        fxp.special_linear(),
    ],
    ids=str,
)
def test_layers_train_and_fold(entry: Entry) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model = fxp.transform(net, {"*.weight": entry})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, losses = torch.randn(16, 8), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    weights = model.weights()
    for name in ("0.weight", "2.weight"):
        module: Any = entry.build(weights[name])
        assert module.contains(weights[name].detach())
    model.eval()
    plain = fxp.fold(model, example_inputs=(x,))
    torch.testing.assert_close(plain(x), model(x))
    assert fxp.Spec.from_dict(fxp.Spec({"*": entry}).to_dict()).to_dict() == fxp.Spec({"*": entry}).to_dict()
