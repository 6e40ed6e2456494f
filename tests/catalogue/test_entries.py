"""The entries as declarations: names, options, files, and the refusal of options and weights that do not fit."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from catalogue.cases import CASES, COMPLEX_ONLY, Case

from fxparam import catalogue as cat
from fxparam.catalogue import ENTRIES
from fxparam.declaration import Chain, Entry, Parametrization
from fxparam.errors import ImageError, SpecError

every = pytest.mark.parametrize("case", CASES, ids=str)
MATRIX = torch.randn(4, 3)
SQUARE = torch.randn(3, 3)


def test_the_names() -> None:
    assert sorted(ENTRIES) == [
        "almost_orthogonal",
        "ball",
        "banded",
        "binary",
        "block_diagonal",
        "bounded",
        "centered",
        "circulant",
        "diagonal_low_rank",
        "dora",
        "doubly_stochastic",
        "fake_quantize",
        "fixed_rank",
        "flat",
        "from_matrix",
        "gate",
        "grassmann",
        "hypernetwork",
        "invertible",
        "kronecker",
        "learned_step",
        "lipschitz",
        "lora",
        "low_rank",
        "mask",
        "mixture",
        "monarch",
        "monotone",
        "noise",
        "orthogonal",
        "permutation",
        "positive",
        "positive_definite",
        "positive_semidefinite",
        "row_stochastic",
        "scale",
        "semi_structured",
        "simplex",
        "skew",
        "special_linear",
        "special_orthogonal",
        "spectral_norm",
        "sphere",
        "standardized",
        "subspace",
        "symmetric",
        "ternary",
        "toeplitz",
        "transpose",
        "triangular",
        "unit_norm",
        "unitary",
        "variational",
        "weight_norm",
    ]
    for name, entry in ENTRIES.items():
        assert entry.__name__ == "".join(part.capitalize() for part in name.split("_"))
        assert getattr(cat, entry.__name__) is entry and entry.__name__ in cat.__all__
        assert entry.name == name


def test_every_entry_has_a_case() -> None:
    assert {case.entry.name for case in [*CASES, *COMPLEX_ONLY]} == set(ENTRIES)


@every
def test_entries_are_frozen_values(case: Case) -> None:
    entry = case.entry
    twin = type(entry)(**{field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)})  # type: ignore[arg-type]
    assert twin == entry and hash(twin) == hash(entry)
    assert entry != cat.Bounded(low=-17.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.name = "other"  # type: ignore[misc]


@every
@pytest.mark.parametrize(
    "through",
    [lambda data: yaml.safe_load(yaml.safe_dump(data)), lambda data: json.loads(json.dumps(data))],
    ids=["yaml", "json"],
)
def test_options_survive_a_file(case: Case, through: Callable[[Any], Any]) -> None:
    options = through(case.entry.options())
    again = ENTRIES[case.entry.name](**options)
    assert again == case.entry
    # As the spec reads them: lists become tuples.
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    assert ENTRIES[case.entry.name](**tuples) == case.entry


@every
def test_build_gives_a_parametrization_and_reads_no_gradient(case: Case) -> None:
    weight = case.weight().requires_grad_()
    module = case.entry.build(weight)
    assert isinstance(module, Parametrization)
    assert not any(buffer.requires_grad for buffer in module.buffers())
    assert repr(module).startswith(type(module).__name__)
    assert all(not name.startswith("_like") for name in module.state_dict())


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (cat.Orthogonal(), "orthogonal()"),
        (cat.Orthogonal(map="cayley", use_trivialization=False), "orthogonal(map='cayley', use_trivialization=False)"),
        (cat.WeightNorm(dim=None), "weight_norm(dim=None)"),
        (cat.LowRank(4), "low_rank(rank=4)"),
        (cat.Mask(density=0.5), "mask(density=0.5)"),
        (cat.Mask(keep=[[1, 0]]), "mask(keep=[[1, 0]])"),
        (cat.Mask(keep=torch.eye(3)), "mask(keep=tensor of shape (3, 3) with 3 kept)"),
        (cat.Subspace(7), "subspace(dim=7)"),
    ],
    ids=str,
)
def test_repr_shows_what_was_given(entry: Entry, text: str) -> None:
    assert repr(entry) == text


def test_entries_chain() -> None:
    assert repr(cat.WeightNorm() >> cat.Mask(density=0.5)) == "weight_norm() >> mask(density=0.5)"
    assert isinstance(cat.Skew() >> cat.Scale(2.0), Chain)


def test_a_tensor_cannot_be_written_to_a_file() -> None:
    entry = cat.Mask(keep=torch.eye(3))
    with pytest.raises(
        SpecError, match=r"mask: keep is a tensor of shape \(3, 3\), and a tensor cannot be written to a spec file"
    ):
        entry.options()
    assert entry == cat.Mask(keep=torch.eye(3)) and entry != cat.Mask(keep=torch.ones(3, 3))
    assert hash(entry) == hash(cat.Mask(keep=torch.eye(3)))


BAD_OPTIONS: list[tuple[Callable[[], Entry], str]] = [
    (lambda: cat.Orthogonal(map="svd"), r"orthogonal: got map='svd'; expected one of 'matrix_exp', 'cayley', 'householder'"),
    (lambda: cat.Orthogonal(use_trivialization=1), r"orthogonal: got use_trivialization=1; expected True or False"),  # type: ignore[arg-type]
    (lambda: cat.WeightNorm(dim="0"), r"weight_norm: got dim='0'; expected an integer"),  # type: ignore[arg-type]
    (lambda: cat.SpectralNorm(n_power_iterations=0), r"got n_power_iterations=0; expected an integer of at least 1"),
    (lambda: cat.SpectralNorm(eps=-1.0), r"spectral_norm: got eps=-1.0; expected a number of at least 0"),
    (lambda: cat.SpectralNorm(dim=True), r"spectral_norm: got dim=True; expected an integer"),
    (lambda: cat.UnitNorm(p=0.5), r"unit_norm: got p=0.5; expected a number of at least 1, or inf"),
    (lambda: cat.UnitNorm(p=math.nan), r"unit_norm: got p=nan; expected a finite number"),
    (lambda: cat.Positive(map="relu"), r"positive: got map='relu'; expected one of 'softplus', 'exp', 'square'"),
    (lambda: cat.Bounded(low=1, high=1), r"bounded: got low=1, high=1; expected low < high"),
    (lambda: cat.Bounded(high=math.inf), r"bounded: got high=inf; expected a finite number"),
    (lambda: cat.Scale(factor=0.0), r"scale: got factor=0; expected a number other than 0"),
    (lambda: cat.Scale(shift="1"), r"scale: got shift='1'; expected a finite number"),  # type: ignore[arg-type]
    (lambda: cat.Scale(trainable="yes"), r"scale: got trainable='yes'; expected True or False"),  # type: ignore[arg-type]
    (lambda: cat.Mask(), r"mask: got neither of density and keep; type fxp.mask\(density=0.5\)"),
    (lambda: cat.Mask(density=0.5, keep=[1]), r"mask: got both of density and keep"),
    (lambda: cat.Mask(density=0), r"mask: got density=0; expected 0 < density <= 1"),
    (lambda: cat.Mask(density=1.5), r"mask: got density=1.5; expected 0 < density <= 1"),
    (lambda: cat.Mask(density=0.5, by="size"), r"mask: got by='size'; expected one of 'magnitude', 'random'"),
    (lambda: cat.Mask(keep=[[1, 2]]), r"mask: got 2 in keep; expected a tensor, or nested lists of 0 and 1"),
    (lambda: cat.LowRank(0), r"low_rank: got rank=0; expected an integer of at least 1"),
    (lambda: cat.LowRank(1.5), r"low_rank: got rank=1.5; expected an integer"),  # type: ignore[arg-type]
    (lambda: cat.Transpose(dim0=0.0), r"transpose: got dim0=0.0; expected an integer"),  # type: ignore[arg-type]
    (lambda: cat.Noise(std=-0.1), r"noise: got std=-0.1; expected a number of at least 0"),
    (lambda: cat.Noise(std=math.inf), r"noise: got std=inf; expected a finite number"),
    (lambda: cat.Noise(relative=1), r"noise: got relative=1; expected True or False"),  # type: ignore[arg-type]
    (lambda: cat.Noise(resample="epoch"), r"noise: got resample='epoch'; expected one of 'call', 'step'"),
    (lambda: cat.Noise(resample=None), r"noise: got resample=None; expected one of 'call', 'step'"),  # type: ignore[arg-type]
    (lambda: cat.Variational(init_std=0), r"variational: got init_std=0; expected a number above 0"),
    (lambda: cat.Variational(init_std="a"), r"variational: got init_std='a'; expected a finite"),  # type: ignore[arg-type]
    (lambda: cat.Variational(resample="steps"), r"variational: got resample='steps'; expected one of 'call', 'step'"),
    (lambda: cat.Subspace(0), r"subspace: got dim=0; expected an integer of at least 1"),
    (lambda: cat.Subspace(3, projection="fast"), r"subspace: got projection='fast'; expected one of 'dense'"),
]


@pytest.mark.parametrize(("make", "text"), BAD_OPTIONS, ids=[text for _, text in BAD_OPTIONS])
def test_bad_options_are_refused_when_given(make: Callable[[], Entry], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        make()


@pytest.mark.parametrize(
    ("entry", "weight", "text"),
    [
        (cat.Orthogonal(), torch.ones(3), r"orthogonal: got a weight of shape \(3,\); expected a matrix or a batch"),
        (cat.Orthogonal(), torch.ones(3, 3, dtype=torch.int64), r"dtype torch.int64; expected a floating-point or complex"),
        (cat.Orthogonal("householder"), torch.ones(3, 3) * 1j, r'got map="householder" for a complex weight'),
        (cat.Orthogonal(), torch.ones(0, 3), r"got an empty weight of shape \(0, 3\); expected at least one element"),
        (
            cat.WeightNorm(dim=2),
            MATRIX,
            r"weight_norm: got dim=2 for a weight of shape \(4, 3\); expected 0 <= dim < 2, or None",
        ),
        (cat.WeightNorm(dim=-2), MATRIX, r"weight_norm: got dim=-2 for a weight of shape \(4, 3\); expected 0 <= dim < 2"),
        (cat.WeightNorm(), torch.tensor(1.0), r"weight_norm: got dim=0 for a weight of shape \(\)"),
        (cat.SpectralNorm(dim=-3), MATRIX, r"spectral_norm: got dim=-3 for a weight of shape \(4, 3\)"),
        (cat.UnitNorm(dim=2), MATRIX, r"unit_norm: got dim=2 for a weight of shape \(4, 3\)"),
        (cat.Symmetric(), MATRIX, r"symmetric: got a weight of shape \(4, 3\); expected square matrices"),
        (cat.Skew(), MATRIX, r"skew: got a weight of shape \(4, 3\); expected square matrices"),
        (cat.PositiveDefinite(), MATRIX, r"positive_definite: got a weight of shape \(4, 3\); expected square matrices"),
        (cat.Positive(), torch.ones(3, dtype=torch.int32), r"positive: got a weight of dtype torch.int32; expected a floating"),
        (cat.Bounded(), torch.ones(3) * 1j, r"bounded: got a weight of dtype torch.complex64; expected a floating"),
        (cat.Bounded(1000.0, 1001.0), torch.ones(3).bfloat16(), r"bounded: torch.bfloat16 cannot tell low=1000.0 from high"),
        (cat.Mask(keep=torch.ones(2, 2)), MATRIX, r"mask: got keep of shape \(2, 2\) for a weight of shape \(4, 3\)"),
        (cat.Mask(density=0.5), MATRIX * math.nan, r'mask: magnitudes of a weight that holds NaN.*use by="random"'),
        (cat.LowRank(4), MATRIX, r"low_rank: got rank=4 for a weight of shape \(4, 3\); expected 1 <= rank <= 3"),
        (cat.LowRank(1), torch.ones(3), r"low_rank: got a weight of shape \(3,\); expected a matrix"),
        (cat.Transpose(), torch.ones(3), r"transpose: got dim0=-2 for a weight of shape \(3,\); expected -1 <= dim0 < 1"),
        (cat.Subspace(13), MATRIX, r"subspace: got dim=13 for 12 elements; expected 1 <= dim <= 12"),
        (cat.Noise(), torch.ones(3) * 1j, r"noise: got a weight of dtype torch.complex64; expected a floating"),
        (
            cat.Variational(),
            torch.ones(3, dtype=torch.int8),
            r"variational: got a weight of dtype torch.int8; expected a float",
        ),
        (cat.Variational(1e5), torch.ones(3).half(), r"got init_std=100000.0, too large for a weight of dtype torch.float16"),
        (cat.Flat(), torch.ones(3, dtype=torch.bool), r"flat: got a weight of dtype torch.bool; expected a floating"),
    ],
    ids=lambda value: repr(value) if isinstance(value, Entry) else "",
)
def test_weights_that_do_not_fit_are_refused_when_built(entry: Entry, weight: torch.Tensor, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        entry.build(weight)


def test_bounds_are_refused_and_clamped_inside() -> None:
    module = cat.Bounded().build(torch.zeros(4))
    weight = torch.tensor([0.5, 1.0, -1.0, 1.0])
    with pytest.raises(
        ImageError, match=r"^BoundedMap: .*3 of 4 elements are on or beyond the bounds -1.0 and 1.0, by up to 0 "
    ):
        module.right_inverse(weight)
    weight[3] = 3.0
    with pytest.raises(ImageError, match=r"^BoundedMap: .*every element between -1.0 and 1.0 .* is missed by 2, tolerance "):
        module.right_inverse(weight)
    inside = module.project(weight)
    assert inside[0] == 0.5 and inside.abs().max() < 1
    torch.testing.assert_close(inside, torch.tensor([0.5, 1.0, -1.0, 1.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(module(module.right_inverse(inside)), inside)


@pytest.mark.parametrize("name", ["softplus", "exp"])
def test_zero_is_refused_where_it_is_only_a_limit(name: str) -> None:
    module = cat.Positive(map=name).build(torch.zeros(3))
    with pytest.raises(ImageError, match=r"^PositiveMap: .*every element above zero is missed by 2 elements that are 0"):
        module.right_inverse(torch.tensor([0.0, 0.0, 1.0]))
    assert (module.project(torch.tensor([0.0, -1.0, 1e-30])) > 0).all()
    assert module.project(torch.tensor([0.0, -1.0, 1e-30]))[2] == 1e-30


@pytest.mark.parametrize("value", [1e-300, 1e-8, 0.5, 19.999999, 20.0, 20.1, 1e6])
def test_softplus_round_trip_is_exact_to_rounding(value: float) -> None:
    """Torch's softplus is the identity above 20, so the textbook inverse would miss there."""
    module = cat.Positive().build(torch.zeros(1, dtype=torch.float64))
    weight = torch.tensor([value], dtype=torch.float64)
    torch.testing.assert_close(module(module.right_inverse(weight)), weight, rtol=1e-12, atol=0)


def test_mask_by_magnitude_keeps_the_largest() -> None:
    weight = torch.tensor([[1.0, -5.0, 0.1], [3.0, 1.0, 1.0]])
    module = cat.Mask(density=0.5).build(weight)
    assert torch.equal(module.mask, torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    with pytest.raises(ImageError, match=r"^MaskMap: .*zero off the mask is missed by 1, tolerance 0"):
        module.right_inverse(weight)
    assert torch.equal(module.project(weight), weight * module.mask)


def test_random_masks_depend_on_the_seed_only() -> None:
    first, same, other = (cat.Mask(density=0.4, by="random", seed=s).build(torch.randn(5, 8)).mask for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.sum() == other.sum() == 16


def test_a_pattern_is_copied_and_broadcasts() -> None:
    pattern = torch.tensor([[1], [0], [1]])
    entry = cat.Mask(keep=pattern)
    pattern.fill_(0)
    assert torch.equal(entry.build(torch.ones(3, 2)).mask, torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))


def test_low_rank_start_of_a_deficient_weight_can_train() -> None:
    """Were both factors zero where a singular value is, neither would ever get a gradient."""
    module = cat.LowRank(2).build(torch.zeros(4, 3))
    left, right = (latent.requires_grad_() for latent in module.right_inverse(torch.zeros(4, 3)))
    weight = module(left, right)
    assert torch.equal(weight, torch.zeros(4, 3))
    grads = torch.autograd.grad((weight * torch.randn(4, 3)).sum(), (left, right))
    assert grads[0].abs().amax(0).min() > 1e-3


def test_low_rank_projection_is_the_best_approximation() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64)
    best = cat.LowRank(2).build(weight).project(weight)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.matrix_norm(weight - best, 2), values[2])


def test_scale_trains_factor_and_shift() -> None:
    module: Any = cat.Scale(factor=2.0, shift=1.0, trainable=True).build(torch.zeros(3))
    assert [(name, p.shape) for name, p in module.named_parameters()] == [("factor", ()), ("shift", ())]
    module(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert module.factor.grad == 6 and module.shift.grad == 3
    with torch.no_grad():
        module.factor.zero_()
    with pytest.raises(ImageError, match=r"the factor has become 0.0 by training; give it another value first"):
        module.right_inverse(torch.zeros(3))


@pytest.mark.parametrize(("entry", "text"), [(cat.UnitNorm(), "4 of 4 slices"), (cat.SpectralNorm(), "is zero and cannot")])
def test_zero_has_no_direction(entry: Entry, text: str) -> None:
    module: Any = entry.build(torch.ones(4, 3))
    with pytest.raises(ImageError, match=text):
        module.project(torch.zeros(4, 3))


def test_positive_definite_needs_a_cholesky_factor() -> None:
    module = cat.PositiveDefinite().build(SQUARE)
    singular = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(
        ImageError, match=r"^PositiveDefiniteMap: .*the smallest eigenvalue is .*no Cholesky factor; type model.assign"
    ):
        module.right_inverse(singular)
    near = module.project(singular)
    torch.testing.assert_close(near, singular, rtol=0, atol=1e-4)
    torch.testing.assert_close(module(module.right_inverse(near)), near)
    assert module.contains(module.project(torch.zeros(3, 3)))
    module.right_inverse(module.project(torch.zeros(3, 3)))


def test_start_is_the_weight_or_its_projection() -> None:
    module = cat.Symmetric().build(SQUARE)
    torch.testing.assert_close(module(module.start(SQUARE)), (SQUARE + SQUARE.mT) / 2)
    kept = SQUARE + SQUARE.mT
    assert torch.equal(module(module.start(kept)), kept)
