"""Inverses of the orthogonal maps without a trivialization, where eigenvalues come near -1, and the Haar measure."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxparam.catalogue import Orthogonal
from fxparam.catalogue._rotations import inverse_cayley, inverse_exp
from fxparam.errors import ImageError

EPS = torch.finfo(torch.float64).eps
GAPS = [0.0, 1e-16, 1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 0.3]


def rotation(n: int) -> Tensor:
    """A random rotation."""
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    q[:, 0] *= torch.linalg.det(q).sign()
    return q


def turned(angles: list[float], n: int) -> Tensor:
    """A rotation of ``n`` dimensions by these angles, in planes of a random basis."""
    q = torch.eye(n, dtype=torch.float64)
    for j, angle in enumerate(angles):
        c, s = math.cos(angle), math.sin(angle)
        q[2 * j : 2 * j + 2, 2 * j : 2 * j + 2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    basis = rotation(n)
    return basis @ q @ basis.mT


@pytest.mark.parametrize(
    "q",
    [
        *[rotation(n) for n in (1, 2, 3, 8, 40)],
        *[turned([math.pi - gap, math.pi - 2 * gap, 1.0], 9) for gap in GAPS],
        *[turned([angle] * 4, 8) for angle in (0.0, 2.5, 2.69, 2.9, math.pi)],
        -torch.eye(6, dtype=torch.float64),
        torch.eye(7, dtype=torch.float64)[[1, 2, 0, 4, 5, 6, 3]][[1, 0, 2, 3, 4, 5, 6]],
    ],
    ids=lambda q: f"n={len(q)}",
)
def test_logarithm_of_any_rotation(q: Tensor) -> None:
    log = inverse_exp(q)
    torch.testing.assert_close(log, -log.mT, rtol=0, atol=0)
    torch.testing.assert_close(torch.matrix_exp(log), q, rtol=0, atol=100 * len(q) * EPS)


def test_logarithm_of_unitary_matrices() -> None:
    q = torch.linalg.qr(torch.randn(3, 6, 6, dtype=torch.complex128))[0]
    q[2] = -torch.eye(6)
    log = inverse_exp(q)
    torch.testing.assert_close(log, -log.mH, rtol=0, atol=1e-15)
    torch.testing.assert_close(torch.matrix_exp(log), q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (6, 2), (2, 5, 3)], ids=str)
def test_cayley_blocks_are_skew(shape: tuple[int, ...]) -> None:
    k = shape[-1]
    q = torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0] if shape != (4, 4) else rotation(4)
    blocks = inverse_cayley(q)
    torch.testing.assert_close(blocks[..., :k, :], -blocks[..., :k, :].mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["matrix_exp", "cayley"])
def test_reflections_are_outside_without_a_trivialization(name: str) -> None:
    weight = rotation(4)
    weight[0] *= -1
    module = Orthogonal(map=name, use_trivialization=False).build(weight)
    assert not module.contains(weight)
    with pytest.raises(ImageError, match=r"^OrthogonalMap: .*is missed by 2, tolerance .*type model.assign"):
        module.right_inverse(weight)
    assert module.contains(module.project(weight))
    kept = Orthogonal(map=name).build(weight)
    assert torch.equal(kept(kept.right_inverse(weight)), weight)


def test_the_cayley_map_does_not_reach_an_eigenvalue_of_minus_one() -> None:
    weight = turned([math.pi, 1.0], 4)
    module = Orthogonal(map="cayley", use_trivialization=False).build(weight)
    with pytest.raises(
        ImageError, match=r"an eigenvalue near -1, which the cayley map does not reach; type orthogonal\(use_triv"
    ):
        module.right_inverse(weight)


def test_exponential_of_tall_weights_starts_at_the_weight_itself() -> None:
    """As in PyTorch; the error names the maps that do have an inverse."""
    weight = torch.linalg.qr(torch.randn(5, 3))[0]
    module = Orthogonal(map="matrix_exp", use_trivialization=False).build(weight)
    with pytest.raises(ImageError, match=r'no known closed-form inverse for 5 x 3 .*type orthogonal\(map="cayley"\)'):
        module.right_inverse(weight)
    assert torch.equal(module.start(weight), weight)


@pytest.mark.parametrize("name", ["matrix_exp", "cayley"])
@pytest.mark.parametrize("trivial", [True, False])
@pytest.mark.parametrize("shape", [(4, 4), (2, 5, 3), (3, 5)], ids=str)
def test_unitary_weights(name: str, trivial: bool, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.complex128)
    module = Orthogonal(map=name, use_trivialization=trivial).build(weight)
    assert module.contains(module(weight))
    assert torch.autograd.gradcheck(module, weight.clone().requires_grad_())
    for inside in (module.project(weight), module.sample()):
        assert module.contains(inside)
        if trivial or name == "cayley" or shape[-1] == shape[-2]:
            torch.testing.assert_close(module(module.right_inverse(inside)), inside, rtol=0, atol=1e-12)


def test_zero_weights_are_projected_to_the_identity() -> None:
    """Where PyTorch's start is the zero matrix, which is not orthogonal."""
    module = Orthogonal().build(torch.zeros(3, 3))
    assert torch.equal(module(module.start(torch.zeros(3, 3))), torch.eye(3))


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4)], ids=str)
def test_samples_are_uniform(shape: tuple[int, ...]) -> None:
    """Under the Haar measure elements have mean 0 and mean square 1/n; without the sign correction the first has not."""
    module = Orthogonal().build(torch.zeros(shape))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([module.sample(generator=generator) for _ in range(2000)])
    assert drawn.mean(0).abs().max() < 4 / math.sqrt(2000 * max(shape))
    torch.testing.assert_close((drawn**2).mean(0), torch.full(shape, 1 / max(shape)), rtol=0, atol=0.04)
    if shape == (3, 3):
        reflections = (torch.linalg.det(drawn) < 0).float().mean()
        assert 0.45 < reflections < 0.55
