"""The maps that PyTorch has as well give its numbers, names and random draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fxparam.catalogue import Orthogonal, SpectralNorm, WeightNorm

SHAPES = [(4, 4), (5, 3), (3, 5), (2, 4, 4), (2, 3, 5)]
DTYPES = [torch.float32, torch.float64]


def holder(weight: Tensor) -> Any:
    """A module with a weight and nothing else."""
    module = nn.Module()
    module.weight = nn.Parameter(weight.clone())
    return module


def gradients(value: Tensor, latents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(5)).to(value.dtype)
    return torch.autograd.grad((value * direction).sum(), latents)


def same(got: Tensor, expected: Tensor) -> None:
    """Equal up to the order in which a kernel adds."""
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got, expected, rtol=16 * eps, atol=16 * eps)


def same_map(ours: nn.Module, theirs: Any, latents: tuple[Tensor, ...]) -> None:
    """Equal weights and gradients for equal latents and buffers."""
    ours.load_state_dict(theirs[0].state_dict())
    mine = tuple(latent.clone().requires_grad_() for latent in latents)
    yours = tuple(latent.clone().requires_grad_() for latent in latents)
    value, expected = ours(*mine), theirs[0](*yours)
    same(value, expected)
    for got, wanted in zip(gradients(value, mine), gradients(expected, yours), strict=True):
        same(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trivial", [True, False])
@pytest.mark.parametrize("name", [None, "matrix_exp", "cayley", "householder"])
def test_orthogonal(name: str | None, trivial: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    module = holder(weight)
    parametrizations.orthogonal(module, orthogonal_map=name, use_trivialization=trivial)
    theirs: Any = module.parametrizations["weight"]
    ours = Orthogonal(map=name, use_trivialization=trivial).build(weight)
    assert ours.map == theirs[0].orthogonal_map.name
    assert list(ours.state_dict()) == list(theirs[0].state_dict()) == (["base"] if trivial else [])
    latent = torch.randn(shape, dtype=dtype)
    latent.diagonal(dim1=-2, dim2=-1).sign_()
    same_map(ours, theirs, (latent,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [None, "matrix_exp", "cayley", "householder"])
def test_orthogonal_starts_where_torch_starts(name: str | None, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    module = holder(weight)
    torch.manual_seed(3)
    parametrizations.orthogonal(module, orthogonal_map=name)
    theirs: Any = module.parametrizations["weight"]
    ours = Orthogonal(map=name).build(weight)
    torch.manual_seed(3)
    latent = ours.start(weight)
    same(latent, theirs.original)
    same(ours(latent), module.weight)
    torch.testing.assert_close(ours.base, theirs[0].base, rtol=0, atol=1e-13)


def test_weight_decay_does_not_break_householder() -> None:
    """Where torch truncates the diagonal of the latent to an integer: 0 after the first decay."""
    ours = Orthogonal(map="householder").build(torch.randn(5, 3))
    latent = ours.start(torch.randn(5, 3))
    assert torch.equal(ours(latent * 0.99), ours(latent))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 0), ((4, 3), 1), ((4, 3, 2), 1), ((4, 3), None), ((4, 3), -1), ((3,), 0)])
def test_weight_norm(shape: tuple[int, ...], dim: int | None, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    module = holder(weight)
    parametrizations.weight_norm(module, dim=dim)  # type: ignore[arg-type]
    theirs: Any = module.parametrizations["weight"]
    ours = WeightNorm(dim=dim).build(weight)
    for got, wanted in zip(ours.right_inverse(weight), (theirs.original0, theirs.original1), strict=True):
        assert torch.equal(got, wanted)
    latents = tuple(torch.randn_like(latent) for latent in (theirs.original0, theirs.original1))
    same_map(ours, theirs, latents)


def test_weight_norm_of_a_zero_row_is_finite() -> None:
    """There torch divides zero by zero."""
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    ours = WeightNorm().build(weight)
    g, v = ours.right_inverse(weight)
    torch.testing.assert_close(ours(g, v), weight)
    g.requires_grad_()
    assert gradients(ours(g, v), (g,))[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 0), ((3, 4, 2), 1), ((5,), 0)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_spectral_norm(shape: tuple[int, ...], dim: int, iterations: int, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    # In training mode the registration itself would evaluate the weight, and so advance the vectors.
    module = holder(weight).eval()
    torch.manual_seed(7)
    parametrizations.spectral_norm(module, n_power_iterations=iterations, dim=dim)
    drawn = torch.get_rng_state()
    theirs: Any = module.parametrizations["weight"]
    torch.manual_seed(7)
    ours = SpectralNorm(n_power_iterations=iterations, dim=dim).build(weight)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert list(ours.state_dict()) == list(theirs[0].state_dict()) == ([] if len(shape) == 1 else ["_u", "_v"])
    same(ours.start(weight), theirs.original)
    theirs.eval()
    ours.eval()
    same(ours(weight), module.weight)
    theirs.train()
    ours.train()
    for _ in range(3):
        same(ours(weight), module.weight)
        for name, buffer in theirs[0].state_dict().items():
            same(ours.state_dict()[name], buffer)
    same_map(ours, theirs, (torch.randn(shape, dtype=dtype),))


def test_spectral_norm_advances_in_training_only() -> None:
    weight = torch.randn(6, 5)
    module = SpectralNorm().build(weight)
    latent = torch.randn(6, 5)
    before = module._u.clone()
    module.eval()(latent)
    assert torch.equal(module._u, before)
    module.train()(latent)
    assert not torch.equal(module._u, before)


def test_backward_of_two_training_forwards() -> None:
    """The second forward moves the vectors; backward through the first must not see that."""
    module = SpectralNorm().build(torch.randn(6, 5, dtype=torch.float64))
    latent = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    first, second = module(latent), module(latent)
    u, v = module._u.clone(), module._v.clone()
    matrix = latent.detach().requires_grad_()
    expected = torch.autograd.grad((matrix / torch.einsum("i,ij,j->", u, matrix, v)).sum(), matrix)[0]
    assert torch.autograd.grad(first.sum(), latent)[0].isfinite().all()
    torch.testing.assert_close(torch.autograd.grad(second.sum(), latent)[0], expected)


def test_spectral_norm_of_an_exactly_normed_weight_is_taken() -> None:
    """Its singular vectors replace the estimate, so that the weight is kept in eval and in training."""
    module = SpectralNorm().build(torch.randn(6, 5, dtype=torch.float64))
    weight = torch.randn(6, 5, dtype=torch.float64)
    weight /= torch.linalg.matrix_norm(weight, 2)
    latent = module.right_inverse(weight)
    torch.testing.assert_close(module.eval()(latent), weight)
    torch.testing.assert_close(module.train()(latent), weight)
