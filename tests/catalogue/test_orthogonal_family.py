"""What is special about orthogonal matrices and their relatives: options, known numbers, degenerate latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue.cases.common import Case
from catalogue.cases.manifolds import COMPLEX_ONLY
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxparam as fxp
from fxparam import catalogue as cat
from fxparam.catalogue.orthogonal import RETRACTIONS
from fxparam.declaration import Entry
from fxparam.errors import ImageError, SpecError

DOUBLE = torch.float64
COMPLEX = torch.complex128
SHAPES = [(4, 4), (5, 3), (3, 5), (2, 4, 3)]
retractions = pytest.mark.parametrize("name", RETRACTIONS)


def built(name: str, shape: tuple[int, ...], dtype: torch.dtype = DOUBLE, *, iterations: int = 60) -> Any:
    return cat.Orthogonal(map=name, iterations=iterations if name == "newton_schulz" else None).build(
        torch.zeros(shape, dtype=dtype)
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: cat.Orthogonal(map="svd"), r"orthogonal: got map='svd'; expected one of 'matrix_exp', .*'newton_schulz'"),
        (lambda: cat.Orthogonal(iterations=5), r"orthogonal: got iterations=5 with map=None; only map=\"newton_schulz\" iter"),
        (lambda: cat.Orthogonal("newton_schulz", iterations=0), r"got iterations=0; expected an integer of at least 1"),
        (lambda: cat.SpecialOrthogonal(map="qr"), r"special_orthogonal: got map='qr'; expected one of 'matrix_exp', 'cayley'"),
        (lambda: cat.SpecialOrthogonal(use_trivialization=0), r"special_orthogonal: got use_trivialization=0; expected"),  # type: ignore[arg-type]
        (
            lambda: cat.Unitary(map="householder"),
            r"unitary: got map='householder'; expected one of 'matrix_exp', 'cayley', 'qr'",
        ),
        (lambda: cat.Unitary(map="polar", iterations=3), r"unitary: got iterations=3 with map='polar'; only map="),
        (lambda: cat.Grassmann(map="qr"), r"grassmann: got map='qr'; expected one of 'matrix_exp', 'cayley'"),
        (lambda: cat.AlmostOrthogonal(0), r"almost_orthogonal: got spread=0; expected 0 < spread <= 1"),
        (lambda: cat.AlmostOrthogonal(1.5), r"almost_orthogonal: got spread=1.5; expected 0 < spread <= 1"),
        (lambda: cat.AlmostOrthogonal("a"), r"almost_orthogonal: got spread='a'; expected a finite number"),  # type: ignore[arg-type]
        (
            lambda: cat.AlmostOrthogonal(0.5, squash="relu"),
            r"got squash='relu'; expected one of 'sin', 'tanh', 'scaled_sigmoid'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_are_refused(make: Callable[[], Entry], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        make()


@pytest.mark.parametrize(
    ("entry", "weight", "text"),
    [
        (cat.SpecialOrthogonal(), torch.ones(4, 3), r"special_orthogonal: .*\(4, 3\); expected square matrices"),
        (cat.SpecialOrthogonal(), torch.ones(3, 3) * 1j, r"special_orthogonal: .*complex64; expected a floating-point"),
        (cat.Unitary(), torch.ones(3, 3), r"unitary: got a weight of dtype torch.float32; .*complex.*type fxp.orthogonal"),
        (cat.Unitary(), torch.ones(3) * 1j, r"unitary: got a weight of shape \(3,\); expected a matrix"),
        (cat.Grassmann(), torch.ones(3, 3), r"grassmann: got a square weight of shape \(3, 3\).*type fxp.orthogonal\(\)"),
        (cat.Grassmann(), torch.ones(3, 2).int(), r"grassmann: got a weight of dtype torch.int32"),
        (cat.AlmostOrthogonal(0.5), torch.ones(3), r"almost_orthogonal: got a weight of shape \(3,\); expected a matrix"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(entry: Entry, weight: Tensor, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        entry.build(weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [DOUBLE, COMPLEX], ids=str)
def test_known_factors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against the decompositions of torch."""
    x = torch.randn(shape, dtype=dtype)
    tall = x.mT if shape[-2] < shape[-1] else x
    u, _, vh = torch.linalg.svd(tall, full_matrices=False)
    polar = (u @ vh).mT if shape[-2] < shape[-1] else u @ vh
    torch.testing.assert_close(built("polar", shape, dtype)(x), polar, rtol=0, atol=1e-13)
    torch.testing.assert_close(built("newton_schulz", shape, dtype)(x), polar, rtol=0, atol=1e-12)
    q = built("qr", shape, dtype)(x)
    r = (q.mT if shape[-2] < shape[-1] else q).mH @ tall
    torch.testing.assert_close(r.tril(-1), torch.zeros_like(r), rtol=0, atol=1e-13)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    assert (diagonal.real > 0).all()
    if dtype == COMPLEX:
        torch.testing.assert_close(diagonal.imag, torch.zeros_like(diagonal.imag), rtol=0, atol=1e-13)


def test_the_polar_factor_has_the_gradient_of_the_differential() -> None:
    """``Q Ω`` with ``ΩH + HΩ = QᵀdX - dXᵀQ``, solved as one large linear system, also where singular values are close."""
    for spectrum in ([3.0, 2.0, 0.5, 0.1], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 1.0 + 1e-9, 1.0], [1.0, 1e-3, 1e-3, 1e-6]):
        u, v = (torch.linalg.qr(torch.randn(4, 4, dtype=DOUBLE))[0] for _ in range(2))
        x, direction = u @ torch.diag(torch.tensor(spectrum, dtype=DOUBLE)) @ v.mT, torch.randn(4, 4, dtype=DOUBLE)
        got = torch.autograd.functional.jvp(built("polar", (4, 4)), x, direction)[1]
        q = u @ v.mT
        h, eye = q.mT @ x, torch.eye(4, dtype=DOUBLE)
        right = q.mT @ direction - direction.mT @ q
        # Rows first: vec(ΩH) = (I ⊗ Hᵀ) vec Ω and vec(HΩ) = (H ⊗ I) vec Ω.
        omega = torch.linalg.solve(torch.kron(eye, h.mT.contiguous()) + torch.kron(h.contiguous(), eye), right.flatten())
        expected = q @ omega.reshape(4, 4)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@retractions
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [DOUBLE, COMPLEX], ids=str)
def test_derivatives_at_orthonormal_latents(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Where all singular values are equal, and the derivatives of a singular value decomposition are NaN."""
    module = built(name, shape, dtype, iterations=10)
    latent = module.sample(generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(module, latent)
    assert torch.autograd.gradgradcheck(module, latent)


@retractions
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_length_of_the_latent_does_not_count(name: str, shape: tuple[int, ...]) -> None:
    module, x = built(name, shape), torch.randn(shape, dtype=DOUBLE)
    latents = [(x * scale).requires_grad_() for scale in (1.0, 1e-120, 1e120)]
    first, *rest = [module(latent) for latent in latents]
    for other in rest:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad(module(latent)[..., 0].sum(), latent)[0] for latent in latents]
    torch.testing.assert_close(gradients[1] * 1e-120, gradients[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients[2] * 1e120, gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["qr", "polar"])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, COMPLEX], ids=str)
def test_latents_of_lower_rank(name: str, rank: int, dtype: torch.dtype) -> None:
    """Orthonormal still, with finite first and second derivatives; a full column keeps its own."""
    latent = torch.randn(5, rank, dtype=dtype) @ torch.randn(rank, 4, dtype=dtype)
    latent.requires_grad_()
    module = built(name, (5, 4), dtype)
    weight = module(latent)
    assert module.contains(weight.detach())
    gradient = torch.autograd.grad((weight * torch.randn_like(weight)).sum().abs(), latent, create_graph=True)[0]
    assert gradient.isfinite().all()
    assert torch.autograd.grad(gradient.abs().square().sum(), latent)[0].isfinite().all()


@retractions
@pytest.mark.parametrize("dtype", [torch.float32, COMPLEX], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_latents_that_are_not_finite_give_weights_that_are_not(name: str, dtype: torch.dtype, value: float) -> None:
    """Not an error of LAPACK, and nothing that looks orthonormal."""
    latent = torch.randn(5, 3, dtype=dtype)
    latent[1, 1] = value
    assert not built(name, (5, 3), dtype)(latent).isfinite().all()


def test_nilpotent_latents_of_qr() -> None:
    """Every column but the first two depends on nothing before it, yet the diagonal of R is zero."""
    latent = torch.diag(torch.ones(29), 1).requires_grad_()
    module = built("qr", (30, 30), torch.float32)
    weight = module(latent)
    assert module.contains(weight.detach())
    assert torch.autograd.grad(weight.sum(), latent)[0].isfinite().all()


@pytest.mark.parametrize(("ratio", "iterations"), [(1.0, 8), (0.1, 13), (1e-2, 19), (1e-4, 30), (1e-6, 42)])
def test_newton_schulz_converges_as_fast_as_documented(ratio: float, iterations: int) -> None:
    """``log(1 / c) / log(3/2) + 7`` steps for a smallest singular value of ``c`` times the largest."""
    assert iterations <= math.ceil(math.log(1 / ratio) / math.log(1.5) + 7) + 1
    u, v = (torch.linalg.qr(torch.randn(16, 16, dtype=DOUBLE))[0] for _ in range(2))
    x = u @ torch.diag(torch.linspace(ratio, 1, 16, dtype=DOUBLE)) @ v.mT
    module = cat.Orthogonal("newton_schulz", iterations=iterations).build(x)
    assert module.contains(module(x)), module.distance(module(x))
    torch.testing.assert_close(module(x), u @ v.mT, rtol=0, atol=1e-11 / ratio)


def test_newton_schulz_keeps_a_lower_rank_and_says_so() -> None:
    module = built("newton_schulz", (3, 3))
    weight = module(torch.ones(3, 3, dtype=DOUBLE))
    torch.testing.assert_close(weight, torch.full((3, 3), 1 / 3, dtype=DOUBLE))
    assert not module.contains(weight)
    with pytest.raises(ImageError, match="orthonormality .* is missed by"):
        module.right_inverse(weight)
    assert torch.equal(module(torch.zeros(3, 3, dtype=DOUBLE)), torch.eye(3, dtype=DOUBLE))


def test_householder_of_latents_whose_squares_overflow() -> None:
    """As reflections along the same directions; PyTorch's numbers are not orthonormal there."""
    module = cat.Orthogonal("householder").build(torch.zeros(5, 3))
    latent = torch.full((5, 3), 1e25)
    torch.testing.assert_close(module(latent), module(torch.full((5, 3), 1e12)), rtol=0, atol=1e-6)
    theirs: Any = nn.utils.parametrizations.orthogonal(nn.Linear(3, 5))
    assert not module.contains(theirs.parametrizations["weight"][0](latent))


def reflection(n: int) -> Tensor:
    q = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE))[0]
    q[:, 0] *= -torch.linalg.det(q).sign()
    return q


@pytest.mark.parametrize("name", ["matrix_exp", "cayley"])
@pytest.mark.parametrize("trivial", [True, False])
def test_rotations(name: str, trivial: bool) -> None:
    """Never a reflection: refused, and started from the nearest rotation."""
    weight = reflection(4)
    module = cat.SpecialOrthogonal(name, use_trivialization=trivial).build(weight)
    for latent in (torch.randn(4, 4, dtype=DOUBLE), 10 * torch.randn(4, 4, dtype=DOUBLE)):
        torch.testing.assert_close(torch.linalg.det(module(latent)), torch.tensor(1.0, dtype=DOUBLE))
    assert not module.contains(weight)
    with pytest.raises(ImageError, match=r"^SpecialOrthogonalMap: .*being a rotation .* is missed by 2, tolerance"):
        module.right_inverse(weight)
    nearest = module.project(weight)
    assert module.contains(nearest)
    # At distance 2, the least there is: one singular direction of the reflection turns around.
    torch.testing.assert_close(torch.linalg.matrix_norm(nearest - weight), torch.tensor(2.0, dtype=DOUBLE))
    torch.testing.assert_close(module(module.start(nearest)), nearest)
    dets = torch.stack([torch.linalg.det(module.sample()) for _ in range(20)])
    torch.testing.assert_close(dets, torch.ones(20, dtype=DOUBLE))


def test_the_nearest_rotation_beats_others() -> None:
    weight = torch.randn(3, 3, dtype=DOUBLE)
    weight[:, 0] *= -torch.linalg.det(weight).sign()
    module = cat.SpecialOrthogonal().build(weight)
    least = torch.linalg.matrix_norm(module.project(weight) - weight)
    assert all(torch.linalg.matrix_norm(module.sample() - weight) >= least for _ in range(200))


@pytest.mark.parametrize("n", [2, 3])
def test_samples_of_rotations_are_uniform(n: int) -> None:
    """Mean 0 and mean square 1/n of each element, which a fixed column with a sign correction must not spoil."""
    module = cat.SpecialOrthogonal().build(torch.zeros(n, n))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([module.sample(generator=generator) for _ in range(2000)])
    assert drawn.mean(0).abs().max() < 4 / math.sqrt(2000 * n)
    torch.testing.assert_close((drawn**2).mean(0), torch.full((n, n), 1 / n), rtol=0, atol=0.04)


@pytest.mark.parametrize("name", ["matrix_exp", "cayley"])
@pytest.mark.parametrize("shape", [(5, 2), (2, 5)], ids=str)
def test_grassmann_moves_the_subspace_at_right_angles(name: str, shape: tuple[int, int]) -> None:
    """The first order of the movement has no part within the subspace; the unread rows of the latent have no gradient."""
    module = cat.Grassmann(name).build(torch.randn(shape, dtype=DOUBLE))
    start = module.sample()
    zero = module.right_inverse(start)
    assert isinstance(zero, Tensor)
    assert torch.equal(zero, torch.zeros_like(start)) and torch.equal(module(zero), start)
    movement = torch.autograd.functional.jvp(module, zero, torch.randn(shape, dtype=DOUBLE))[1]
    inside = start.mT @ movement if shape[0] > shape[1] else movement @ start.mT
    torch.testing.assert_close(inside, torch.zeros_like(inside), rtol=0, atol=1e-14)
    latent = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    gradient = torch.autograd.grad((module(latent) * torch.randn(shape, dtype=DOUBLE)).sum(), latent)[0]
    unread = gradient[:2] if shape[0] > shape[1] else gradient[:, :2]
    assert not unread.any() and gradient.any()


@pytest.mark.parametrize("squash", ["sin", "tanh", "scaled_sigmoid"])
@pytest.mark.parametrize("name", ["matrix_exp", "cayley"])
def test_singular_values_stay_within_the_spread(squash: str, name: str) -> None:
    module = cat.AlmostOrthogonal(0.3, squash, name).build(torch.zeros(5, 3, dtype=DOUBLE))
    for scale in (0.0, 1.0, 30.0):
        values = torch.linalg.svdvals(module(scale * torch.randn(5, 3, dtype=DOUBLE)))
        assert ((values - 1).abs() <= 0.3 + 1e-12).all()
    weight = 3 * torch.randn(5, 3, dtype=DOUBLE)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    projected = module.project(weight)
    torch.testing.assert_close(projected, u @ torch.diag(s.clamp(0.7, 1.3)) @ vh)
    # On the bounds, too, where tanh never arrives.
    torch.testing.assert_close(module(module.right_inverse(projected)), projected, rtol=0, atol=1e-13)
    drawn = torch.stack([torch.linalg.svdvals(module.sample()) for _ in range(500)])
    assert drawn.min() < 0.72 and drawn.max() > 1.28 and abs(float(drawn.mean()) - 1) < 0.03


@pytest.mark.parametrize("case", COMPLEX_ONLY, ids=str)
def test_unitary(case: Case) -> None:
    """What ``test_maps`` asks of every entry, for complex weights."""
    module, latents = case.build(COMPLEX), case.draw(dtype=COMPLEX)
    value, expected = module(*latents), case.oracle(module, *latents)
    # Beyond the tolerance of the first map: its rounding grows with the norm of the latent.
    assert value.dtype == COMPLEX and module.contains(value.detach(), 1e-13)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    graph = make_fx(module, pre_dispatch=True)(*latents)
    other = case.draw(seed=8, dtype=COMPLEX)
    assert torch.equal(graph(*other), module(*other))
    assert sum(node.op == "call_function" for node in graph.graph.nodes) <= case.nodes
    assert torch.autograd.gradcheck(module, case.draw(seed=2, dtype=COMPLEX))
    for inside in (module.project(case.weight(COMPLEX, seed=7)), module.sample()):
        assert module.contains(inside)
        if case.exact or case.entry.map != "matrix_exp":  # type: ignore[attr-defined]
            torch.testing.assert_close(module(module.right_inverse(inside)), inside, rtol=0, atol=1e-13)
    assert case.outside is not None
    with pytest.raises(ImageError, match=r"^UnitaryMap: .*orthonormality"):
        module.right_inverse(case.outside(value.detach()))


@pytest.mark.parametrize("dtype", [torch.complex64, COMPLEX], ids=str)
@pytest.mark.parametrize("name", ["qr", "polar", "newton_schulz"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_unitary_at_extreme_latents(name: str, dtype: torch.dtype, size: float) -> None:
    module = cat.Unitary(name).build(torch.zeros(4, 3, dtype=dtype))
    latent = (size * torch.randn(4, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))).requires_grad_()
    weight = module(latent)
    assert module.contains(weight.detach())
    assert torch.autograd.grad(weight.abs().sum(), latent)[0].isfinite().all()


ENTRIES: list[tuple[Entry, tuple[int, int]]] = [
    *[(cat.Orthogonal(map=name), shape) for name in RETRACTIONS for shape in ((6, 6), (3, 5), (5, 3))],
    (cat.SpecialOrthogonal(), (4, 4)),
    (cat.Grassmann(), (5, 3)),
    (cat.AlmostOrthogonal(0.2), (3, 5)),
]


@pytest.mark.parametrize(("entry", "shape"), ENTRIES, ids=str)
def test_in_a_model(entry: Entry, shape: tuple[int, int]) -> None:
    """Trains within the set, is folded and restored."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.Tanh())
    model = fxp.transform(net, fxp.Spec({"0.weight": entry}))
    x = torch.randn(7, shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - torch.ones(7, shape[0])).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    map_of = entry.build(torch.zeros(shape))
    weight = model.weights()["0.weight"].detach()
    assert map_of.contains(weight)  # type: ignore[operator]
    torch.testing.assert_close(fxp.fold(model, example_inputs=(x,))(x), model.eval()(x))
    torch.testing.assert_close(fxp.restore(model).get_parameter("0.weight").detach(), weight)
    model.retract()
    torch.testing.assert_close(model.weights()["0.weight"].detach(), weight)


def test_a_spec_with_them_survives_a_file() -> None:
    spec = fxp.Spec(
        {
            "a": fxp.orthogonal(map="newton_schulz", iterations=12),
            "b": fxp.special_orthogonal(map="cayley"),
            "c": fxp.unitary(map="qr"),
            "d": fxp.grassmann(),
            "e": fxp.almost_orthogonal(spread=0.1, squash="tanh"),
        }
    )
    assert fxp.Spec.from_dict(spec.to_dict()).to_dict() == spec.to_dict()
