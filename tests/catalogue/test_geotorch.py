"""GeoTorch's classes in a spec, unchanged, and our entries against those of its classes that are the same map."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam as fxp
from fxparam import catalogue as cat
from fxparam.declaration import Entry

geotorch = pytest.importorskip("geotorch")

Make = Callable[[torch.Size], Any]

CLASSES: dict[str, tuple[Make, tuple[int, int]]] = {
    "Rn": (lambda size: geotorch.Rn(size), (4, 3)),
    "Skew": (lambda size: geotorch.Skew(size), (4, 4)),
    "Skew, upper": (lambda size: geotorch.Skew(size, lower=False), (4, 4)),
    "Symmetric": (lambda size: geotorch.Symmetric(), (4, 4)),
    "SO": (lambda size: geotorch.SO(size), (4, 4)),
    "SO, cayley": (lambda size: geotorch.SO(size, triv="cayley"), (4, 4)),
    "Stiefel": (lambda size: geotorch.Stiefel(size), (5, 3)),
    "Stiefel, wide": (lambda size: geotorch.Stiefel(size), (3, 5)),
    "Grassmannian": (lambda size: geotorch.Grassmannian(size), (5, 3)),
    "AlmostOrthogonal": (lambda size: geotorch.AlmostOrthogonal(size, 0.3), (5, 3)),
    "AlmostOrthogonal, tanh": (lambda size: geotorch.AlmostOrthogonal(size, 0.3, f="tanh"), (3, 3)),
    "LowRank": (lambda size: geotorch.LowRank(size, 2), (5, 3)),
    "FixedRank": (lambda size: geotorch.FixedRank(size, 2), (5, 3)),
    "GLp": (lambda size: geotorch.GLp(size), (4, 4)),
    "SL": (lambda size: geotorch.SL(size), (4, 4)),
    "PSD": (lambda size: geotorch.PSD(size), (4, 4)),
    "PSSD": (lambda size: geotorch.PSSD(size), (4, 4)),
    "PSSDLowRank": (lambda size: geotorch.PSSDLowRank(size, 2), (4, 4)),
    "PSSDFixedRank": (lambda size: geotorch.PSSDFixedRank(size, 2), (4, 4)),
    "Sphere": (lambda size: geotorch.Sphere(size), (4, 3)),
    "SphereEmbedded": (lambda size: geotorch.SphereEmbedded(size, radius=2.0), (4, 3)),
    "Hurwitz": (lambda size: geotorch.Hurwitz(size, 0.5), (4, 4)),
}
every = pytest.mark.parametrize("name", CLASSES)


def test_every_public_class_is_here() -> None:
    """Except for the product of manifolds, whose value is a tuple and no weight."""
    public = {name for name in geotorch.__all__ if inspect.isclass(getattr(geotorch, name))}
    assert {name.split(",")[0] for name in CLASSES} == public - {"ProductManifold"}


def start_of(module: Any, size: tuple[int, int]) -> Tensor:
    """A weight in the manifold; symmetric ones and all of ``Rn`` have no sampler."""
    if hasattr(module, "sample"):
        return module.sample()
    drawn = torch.randn(size)
    return drawn if size[0] != size[1] else (drawn + drawn.mT) / 2


def layer_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


@every
@pytest.mark.parametrize("form", ["instance", "factory"])
def test_in_a_spec_as_under_parametrize(name: str, form: str) -> None:
    """Same weight, output and gradients for the same latents and buffers; folded and restored as well."""
    make, size = CLASSES[name]
    torch.manual_seed(0)
    module = make(torch.Size(size))
    start = start_of(module, size)
    layer = layer_of(start)
    theirs = copy.deepcopy(layer)
    parametrize.register_parametrization(theirs, "weight", copy.deepcopy(module))
    declaration = module if form == "instance" else lambda weight: make(weight.size())
    ours = fxp.transform(layer, fxp.Spec({"weight": declaration}))
    torch.testing.assert_close(ours.weights()["weight"], start)

    # Checkpoints go both ways: the names of latents and buffers are the same.
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for (_, latent), (_, other) in zip(sorted(ours.latents().items()), latents_of(theirs), strict=True):
            latent.copy_(torch.randn_like(latent))
            other.copy_(latent)
    ours.load_state_dict(theirs.state_dict())

    x = torch.randn(2, size[1])
    torch.testing.assert_close(ours.weights()["weight"], theirs.weight)
    got, wanted = ours(x), theirs(x)
    torch.testing.assert_close(got, wanted)
    got.square().sum().backward()
    wanted.square().sum().backward()
    for (_, latent), (_, other) in zip(sorted(ours.latents().items()), latents_of(theirs), strict=True):
        assert other.grad is not None
        torch.testing.assert_close(latent.grad, other.grad)

    folded = fxp.fold(ours, example_inputs=(x,))
    torch.testing.assert_close(folded(x), wanted)
    restored = fxp.restore(ours)
    assert type(restored) is nn.Linear and not parametrize.is_parametrized(restored)
    torch.testing.assert_close(restored.weight, theirs.weight)


def latents_of(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return sorted((name, tensor) for name, tensor in layer.named_parameters() if "original" in name)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("Rn", "Symmetric")])  # those have no sampler
def test_assign_sample_and_retract(name: str) -> None:
    make, size = CLASSES[name]
    torch.manual_seed(1)
    module = make(torch.Size(size))
    model = fxp.transform(layer_of(module.sample()), fxp.Spec({"weight": module}))
    drawn = module.sample()
    model.assign("weight", drawn)
    torch.testing.assert_close(model.weights()["weight"], drawn, rtol=1e-4, atol=1e-5)
    assert model.sample("weight").shape == size
    with torch.no_grad():
        for latent in model.latents().values():
            latent.add_(0.1 * torch.randn_like(latent))
    moved = model.weights()["weight"].detach().clone()
    model.retract("weight")
    torch.testing.assert_close(model.weights()["weight"], moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("Rn", "Symmetric", "GLp")])
def test_a_weight_outside_the_manifold_starts_at_a_sample(name: str) -> None:
    """As GeoTorch recommends; the report says so."""
    make, size = CLASSES[name]
    torch.manual_seed(2)
    layer = nn.Linear(size[1], size[0])
    with torch.no_grad():
        layer.weight.copy_(torch.randn(size) * 3)
    module = make(torch.Size(size))
    model = fxp.transform(layer, fxp.Spec({"weight": module}))
    assert "sampled: right_inverse raised InManifoldError" in str(model.report.sites[0].start)
    module.right_inverse(model.weights()["weight"].detach())


@pytest.mark.parametrize(
    ("apply", "size"),
    [
        (lambda layer: geotorch.orthogonal(layer, "weight"), (4, 4)),
        (lambda layer: geotorch.orthogonal(layer, "weight"), (5, 3)),
        (lambda layer: geotorch.grassmannian(layer, "weight"), (5, 3)),
        (lambda layer: geotorch.low_rank(layer, "weight", rank=2), (5, 3)),
        (lambda layer: geotorch.positive_definite(layer, "weight"), (4, 4)),
        (lambda layer: geotorch.sphere(layer, "weight"), (4, 3)),
        (lambda layer: geotorch.alpha_stable(layer, "weight", 0.5), (4, 4)),
    ],
    ids=["SO", "Stiefel", "Grassmannian", "LowRank", "PSD", "Sphere", "Hurwitz"],
)
def test_a_model_that_geotorch_parametrized_is_adopted(apply: Callable[[nn.Module], None], size: tuple[int, int]) -> None:
    torch.manual_seed(3)
    layer = nn.Linear(size[1], size[0])
    apply(layer)
    model = fxp.transform(layer, copy=True)
    x = torch.randn(2, size[1])
    expected, got = layer(x), model(x)
    torch.testing.assert_close(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    for (_, latent), (_, other) in zip(sorted(model.latents().items()), latents_of(layer), strict=True):
        torch.testing.assert_close(latent.grad, other.grad)
    torch.testing.assert_close(fxp.fold(model, example_inputs=(x,))(x), expected)


SAME: list[tuple[Entry, Make, tuple[int, ...], dict[str, str]]] = [
    (cat.SpecialOrthogonal(), lambda size: geotorch.SO(size), (4, 4), {"base": "base"}),
    (cat.SpecialOrthogonal(), lambda size: geotorch.SO(size), (2, 3, 3), {"base": "base"}),
    (cat.SpecialOrthogonal("cayley"), lambda size: geotorch.SO(size, triv="cayley"), (4, 4), {"base": "base"}),
    (cat.Orthogonal(), lambda size: geotorch.SO(size), (4, 4), {"base": "base"}),
    (cat.Orthogonal("matrix_exp"), lambda size: geotorch.Stiefel(size), (5, 3), {"base": "base"}),
    (cat.Orthogonal("matrix_exp"), lambda size: geotorch.Stiefel(size), (2, 3, 5), {"base": "base"}),
    (cat.Orthogonal("cayley"), lambda size: geotorch.Stiefel(size, triv="cayley"), (5, 3), {"base": "base"}),
    (cat.Grassmann(), lambda size: geotorch.Grassmannian(size), (5, 3), {"base": "base"}),
    (cat.Grassmann(), lambda size: geotorch.Grassmannian(size), (2, 3, 5), {"base": "base"}),
    (cat.Grassmann("cayley"), lambda size: geotorch.Grassmannian(size, triv="cayley"), (5, 2), {"base": "base"}),
    *[
        (
            cat.AlmostOrthogonal(0.3, squash, name),
            lambda size, squash=squash, triv=triv: geotorch.AlmostOrthogonal(size, 0.3, f=squash, triv=triv),
            size,
            {"left": "0.base", "right": "2.base"},
        )
        for squash, name, triv, size in [
            ("sin", "matrix_exp", "expm", (5, 3)),
            ("sin", "matrix_exp", "expm", (3, 5)),
            ("tanh", "cayley", "cayley", (2, 3, 3)),
            ("scaled_sigmoid", "matrix_exp", "expm", (4, 4)),
        ]
    ],
    (cat.Skew(), lambda size: geotorch.Skew(size, lower=False), (4, 4), {}),
    (cat.Symmetric(), lambda size: geotorch.Symmetric(lower=False), (4, 4), {}),
    (cat.UnitNorm(dim=-1), lambda size: geotorch.SphereEmbedded(size), (4, 3), {}),
    (cat.Sphere(2.0), lambda size: geotorch.SphereEmbedded(size, radius=2.0), (6,), {}),
]


@pytest.mark.parametrize(
    ("entry", "make", "size", "buffers"), SAME, ids=lambda value: repr(value) if isinstance(value, Entry) else ""
)
def test_the_same_map(entry: Entry, make: Make, size: tuple[int, ...], buffers: dict[str, str]) -> None:
    """The same latents and bases give the same weight and the same gradient."""
    torch.manual_seed(4)
    theirs = make(torch.Size(size)).double()
    ours = entry.build(torch.zeros(size, dtype=torch.float64))
    state = theirs.state_dict()
    assert set(ours.state_dict()) == set(buffers)
    ours.load_state_dict({mine: state[other] for mine, other in buffers.items()})
    first, second = (torch.randn(size, dtype=torch.float64).requires_grad_() for _ in range(2))
    with torch.no_grad():
        second.copy_(first)
    got, wanted = ours(first), theirs(second)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    direction = torch.randn(size, dtype=torch.float64)
    mine, other = (
        torch.autograd.grad((got * direction).sum(), first)[0],
        torch.autograd.grad((wanted * direction).sum(), second)[0],
    )
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


SAME_SET: list[tuple[Entry, Make, tuple[int, int]]] = [
    (cat.SpecialOrthogonal(), lambda size: geotorch.SO(size), (4, 4)),
    (cat.Orthogonal("householder"), lambda size: geotorch.Stiefel(size), (5, 3)),
    (cat.Orthogonal("qr"), lambda size: geotorch.Stiefel(size), (5, 3)),
    (cat.Orthogonal("polar"), lambda size: geotorch.Stiefel(size), (3, 5)),
    (cat.Grassmann(), lambda size: geotorch.Grassmannian(size), (5, 3)),
    (cat.AlmostOrthogonal(0.3), lambda size: geotorch.AlmostOrthogonal(size, 0.3), (5, 3)),
    (cat.LowRank(2), lambda size: geotorch.LowRank(size, 2), (5, 3)),
    (cat.FixedRank(2), lambda size: geotorch.FixedRank(size, 2), (5, 3)),
    (cat.PositiveDefinite(), lambda size: geotorch.PSD(size), (4, 4)),
    (cat.PositiveSemidefinite(), lambda size: geotorch.PSSD(size), (4, 4)),
    (cat.PositiveSemidefinite(rank=2), lambda size: geotorch.PSSDLowRank(size, 2), (4, 4)),
    (cat.UnitNorm(dim=-1), lambda size: geotorch.Sphere(size), (4, 3)),
]


@pytest.mark.parametrize(("entry", "make", "size"), SAME_SET, ids=lambda value: repr(value) if isinstance(value, Entry) else "")
def test_the_same_set(entry: Entry, make: Make, size: tuple[int, int]) -> None:
    """What one makes the other takes, whether or not the maps are the same."""
    torch.manual_seed(5)
    theirs: Any = make(torch.Size(size)).double()
    ours: Any = entry.build(torch.randn(size, dtype=torch.float64))
    drawn = theirs.sample()
    latents = ours.right_inverse(drawn)
    again = ours(*(latents if isinstance(latents, tuple) else (latents,)))
    torch.testing.assert_close(again, drawn, rtol=0, atol=1e-12)
    mine = ours.sample()
    torch.testing.assert_close(theirs(theirs.right_inverse(mine)), mine, rtol=0, atol=1e-6)
