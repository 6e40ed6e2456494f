"""The random matrices of subspaces: their statistics, that a seed is all there is to them, and products with large ones."""

from __future__ import annotations

import copy
import math
import pickle
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxparam as fxp
from fxparam.catalogue import Subspace
from fxparam.catalogue._hashing import mixed, normals, random_bits, signs
from fxparam.catalogue._projections import (
    Dense,
    Fastfood,
    Projection,
    Sparse,
    hadamard,
    make_projection,
    pieces,
    walsh_hadamard,
)
from fxparam.errors import ImageError, SpecError

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", ["dense", "sparse", "fastfood"])
SEED = torch.tensor(3)


def projection(kind: str, total: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Projection:
    return make_projection(kind, total, dim, seed, nonzeros=2, device=CPU, dtype=dtype)


# --- random numbers


def test_the_mixer_is_the_published_one() -> None:
    """Values of ``lowbias32`` by its C source, in unsigned arithmetic of 32 bits."""

    def lowbias32(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    words = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 12345]
    assert mixed(torch.tensor(words)).tolist() == [lowbias32(word) for word in words] == [mixed(word) for word in words]


def test_no_product_overflows() -> None:
    """In int64 as in Python's integers of any size, at the largest words."""
    words = torch.full((4,), 0xFFFFFFFF) - torch.arange(4)
    keys = torch.tensor([0, 0xFFFFFFFF, 5, 1 << 31])
    expected = [mixed(word, key) for word, key in zip(words.tolist(), keys.tolist(), strict=True)]
    assert mixed(words, keys).tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_words_are_uniform_and_independent(seed: int) -> None:
    count = 1 << 16
    bits = random_bits(torch.tensor(seed), 0, count)
    assert bits.dtype == torch.int64 and bits.min() >= 0 and bits.max() < 2**32
    # A bijection of the positions: no word twice.
    assert len(bits.unique()) == count
    each = bits.unsqueeze(-1) >> torch.arange(32) & 1
    assert (each.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / count**0.5
    centred = each.double() - 0.5
    for step in (1, 2, 64, 4096):
        correlation = centred[step:].mT @ centred[:-step] / count * 4
        assert correlation.abs().max() < 5.5 / count**0.5
    bytes_ = torch.bincount(bits >> 24, minlength=256).double()
    # Chi-squared with 255 degrees of freedom: 255 ± 22.6.
    assert abs(float(((bytes_ - count / 256) ** 2 / (count / 256)).sum()) - 255) < 5 * 22.6


def test_streams_and_seeds_have_nothing_in_common() -> None:
    drawn = [
        signs(random_bits(torch.tensor(seed), stream, 1 << 13), torch.float64)
        for seed in (0, 1, 2, 1 << 31)
        for stream in range(4)
    ]
    gram = torch.stack(drawn) @ torch.stack(drawn).mT / (1 << 14)
    assert (gram - torch.eye(16)).abs().max() < 5 / 2**7


def test_a_shorter_draw_is_the_start_of_a_longer_one() -> None:
    assert torch.equal(random_bits(SEED, 1, 5000), random_bits(SEED, 1, 20000)[:5000])
    assert torch.equal(random_bits(SEED, 1, 5000, start=8192), random_bits(SEED, 1, 20000)[8192:13192])
    assert torch.equal(random_bits(SEED, 1, 5, start=8192), random_bits(SEED, 1, 20000)[8192:8197])


def test_normal_numbers_have_the_moments_of_normal_numbers() -> None:
    count = 1 << 18
    drawn = normals(random_bits(SEED, 0, count // 2), torch.float64)
    assert drawn.shape == (count,)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float(drawn.pow(power).mean()) - moment) < 5 * math.sqrt(spread / count), power
    edges = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    below = (drawn.unsqueeze(-1) < edges).double().mean(0)
    torch.testing.assert_close(below, torch.special.ndtr(edges), rtol=0, atol=5 * 0.5 / count**0.5)
    assert 4 < drawn.abs().max() < 4.72
    one, other = drawn.chunk(2)
    # The two of a word, and the squares, which share its radius.
    assert abs(float((one * other).mean())) < 5 / (count / 2) ** 0.5
    assert abs(float(((one**2 - 1) * (other**2 - 1)).mean())) < 5 * 2 / (count / 2) ** 0.5
    single = normals(random_bits(SEED, 0, count // 2), torch.float32)
    torch.testing.assert_close(single.double(), drawn, rtol=0, atol=5e-6)


def test_signs_are_fair_and_independent_of_normal_numbers() -> None:
    bits = random_bits(SEED, 0, 1 << 16)
    drawn, gauss = signs(bits, torch.float64), normals(bits, torch.float64)
    assert torch.equal(drawn.abs(), torch.ones(1 << 17, dtype=torch.float64))
    spread = 5 / 2**8
    assert abs(float(drawn.mean())) < spread and abs(float((drawn[: 1 << 16] * drawn[1 << 16 :]).mean())) < spread
    for power in (1, 2):
        assert abs(float((drawn * gauss**power).mean())) < 2 * spread


def test_extreme_words_give_finite_normal_numbers() -> None:
    bits = torch.tensor([0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0, 0xFFFFFFFF, 0, 0xFFFFFFFF])
    for dtype in (torch.float32, torch.float64):
        assert normals(bits, dtype).isfinite().all()


# --- their parts


@pytest.mark.parametrize("bits", range(1, 13))
def test_permutations_are_bijections(bits: int) -> None:
    size = 1 << bits
    made = Fastfood(5 * size, size, 7, CPU).permutations()
    assert made.shape == (5, size)
    assert torch.equal(made.sort().values, torch.arange(size).expand(5, size))
    if bits > 5:
        assert len({tuple(row) for row in made.tolist()}) == 5


def test_permutations_scatter() -> None:
    size = 1 << 10
    made = Fastfood(200 * size, size, 1, CPU).permutations().double()
    position = torch.arange(size, dtype=torch.float64)
    assert (torch.corrcoef(torch.cat([position[None], made]))[0, 1:].abs() < 5 / size**0.5).all()
    # A fixed point is as likely as any: 1 on average for each permutation.
    fixed = (made == position).sum(1).double()
    assert abs(float(fixed.mean()) - 1) < 5 / 200**0.5


@pytest.mark.parametrize("bits", range(13))
def test_the_transform_is_a_product_with_a_hadamard_matrix(bits: int) -> None:
    size = 1 << bits
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(bits):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    x = torch.randn(3, size, dtype=torch.float64)
    made = walsh_hadamard(x, hadamard(x))
    torch.testing.assert_close(made, x @ matrix, rtol=0, atol=1e-11)
    torch.testing.assert_close(walsh_hadamard(made, hadamard(x)), x * size, rtol=0, atol=1e-9)


# --- the matrices


@KINDS
@pytest.mark.parametrize(("total", "dim"), [(5000, 1), (5000, 3), (5000, 50), (4096, 64), (7000, 130)])
def test_columns_have_norm_one_and_are_nearly_orthogonal(kind: str, total: int, dim: int) -> None:
    matrix = projection(kind, total, dim, seed=2).matrix()
    gram = matrix.mT @ matrix
    norms = gram.diagonal().sqrt()
    # A column of a sparse matrix has total · nonzeros / dim elements, give or take the root of that.
    spread = {"dense": 1e-5, "fastfood": 5 / (2 * total) ** 0.5, "sparse": 2.5 * (dim / (2 * total)) ** 0.5 + 1e-6}
    assert (norms - 1).abs().max() < spread[kind]
    cosines = (gram / norms / norms.unsqueeze(-1)).fill_diagonal_(0)
    # The eigenvalues of the square of a block of fastfood, χ², vary twice as much as those of a Gaussian block.
    assert cosines.abs().max() < (5.5 * 2**0.5 if kind == "fastfood" else 5.5) / total**0.5
    # Taken together as well: lengths in the subspace are those of d up to √(dim / total), for fastfood √2 times that.
    values = torch.linalg.svdvals(matrix / norms)
    reach = (2 if kind == "fastfood" else 1.3) * (dim / total) ** 0.5 + 1e-6
    assert values.max() < 1 + reach and values.min() > 1 - reach


@pytest.mark.parametrize("kind", ["dense", "fastfood"])
def test_elements_look_normal(kind: str) -> None:
    matrix = projection(kind, 6000, 96, seed=5).matrix() * 6000**0.5
    # The rows of a block of fastfood have one length, which varies by 1 / √(2 · 128) from block to block.
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs(float(matrix.pow(power).mean()) - moment) < 0.15, power
    assert abs(float((matrix.mean(1) * 96**0.5).square().mean()) - 1) < 0.1


def test_rows_of_a_sparse_matrix_read_one_column_of_each_group() -> None:
    matrix = Sparse(300, 7, 1, CPU, nonzeros=3).matrix()
    for low, high in ((0, 2), (2, 4), (4, 7)):
        group = matrix[:, low:high]
        assert torch.equal((group != 0).sum(1), torch.ones(300, dtype=torch.int64))
        values = group[group != 0]
        torch.testing.assert_close(values.abs(), torch.full_like(values, ((high - low) / 300) ** 0.5), rtol=1e-12, atol=0)
        assert abs(float(values.sign().mean())) < 5 / 300**0.5


def test_groups_too_large_for_one_word_draw_several() -> None:
    """Radices whose product exceeds what a word has to give."""
    matrix = Sparse(20000, 20000, 1, CPU, nonzeros=4)
    read = torch.stack(matrix.digits(0, 20000)).double()
    assert (torch.corrcoef(read) - torch.eye(4)).abs().max() < 5 / 20000**0.5
    assert ((read.mean(1) - 4999.5).abs() < 5 * 10000 / 12**0.5 / 20000**0.5).all()


def test_more_nonzeros_than_dimensions_are_as_many_as_there_are() -> None:
    made: Any = Subspace(2, "sparse", nonzeros=5).build(torch.zeros(6))
    assert made.projection.nonzeros == 2 and "sparse2.seed" in made.state_dict()


@pytest.mark.parametrize("kind", ["sparse", "fastfood"])
@pytest.mark.parametrize("dim", [1, 3, 100, 9000])
def test_pieces_make_the_same_product(kind: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, latent = projection(kind, 50000, dim), torch.randn(dim, dtype=torch.float64)
    whole = made(latent)
    monkeypatch.setattr("fxparam.catalogue._projections._PIECE", 1)
    assert len(pieces(50000)) == 7
    torch.testing.assert_close(made(latent), whole, rtol=0, atol=1e-15 * dim**0.5)


def test_pieces_cover_the_rows() -> None:
    assert pieces(5) == [(0, 5)] and pieces(1 << 20) == [(0, 1 << 20)]
    for total, unit in ((10_000_000, 4096), (10_010_624, 16384), (3_000_000, 8192), (1 << 32, 4096)):
        found = pieces(total, unit)
        assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])] and found[-1][1] == total
        assert len(found) <= 8 and all(start % unit == 0 for start, _ in found)


# --- the seed is all there is


@KINDS
def test_equal_seeds_give_equal_matrices(kind: str) -> None:
    state = torch.get_rng_state()
    built = [Subspace(3, kind, seed=s).build(torch.zeros(4, 6)) for s in (1, 1, 2)]
    first, same, other = (module.projection.matrix() for module in built)
    assert torch.equal(first, same) and not torch.isclose(first, other).all()
    # Not of the weights: neither of their values nor of their shapes.
    assert torch.equal(Subspace(3, kind, seed=1).build(torch.ones(24)).projection.matrix(), first)
    joint = Subspace(3, kind, seed=1).build_joint((torch.ones(20), torch.ones(4)))
    assert torch.equal(joint.projection.matrix(), first)
    for twin in (copy.deepcopy(built[0]), pickle.loads(pickle.dumps(built[0]))):
        assert torch.equal(twin.projection.matrix(), first)
    assert torch.equal(torch.get_rng_state(), state)


@KINDS
def test_dtypes_differ_by_rounding(kind: str) -> None:
    latent = torch.randn(40, dtype=torch.float64)
    made = {
        dtype: Subspace(40, kind, seed=4).build(torch.zeros(1000, dtype=dtype))(latent.to(dtype)).double()
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    largest = float(made[torch.float64].abs().max())
    torch.testing.assert_close(made[torch.float32], made[torch.float64], rtol=0, atol=1e-5 * largest)
    torch.testing.assert_close(made[torch.bfloat16], made[torch.float64], rtol=0, atol=2e-2 * largest)


@KINDS
def test_a_module_that_changes_its_dtype_keeps_its_matrix(kind: str) -> None:
    module = Subspace(3, kind).build(torch.zeros(50))
    before = module.projection.matrix()
    assert torch.equal(module.bfloat16().float().projection.matrix(), before)
    assert torch.equal(module.double().float().projection.matrix(), before)
    assert module.half().projection.seed.dtype == torch.int64


@KINDS
def test_a_checkpoint_brings_its_projection(kind: str) -> None:
    saved = Subspace(3, kind, seed=11).build(torch.randn(30))
    state = saved.state_dict()
    assert sorted(state) == sorted([f"{saved.label}.seed", "origin"]) and state[f"{saved.label}.seed"].shape == ()
    latent = torch.randn(3)
    for assign in (False, True):
        other = Subspace(3, kind, seed=12).build(torch.randn(30))
        assert not torch.allclose(other(latent), saved(latent))
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(latent), saved(latent))
    empty = Subspace(3, kind, seed=12).build(torch.zeros(30, device="meta")).to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty(latent), saved(latent))


def test_a_checkpoint_of_another_kind_does_not_fit() -> None:
    entries = [Subspace(3), Subspace(3, "fastfood"), Subspace(3, "sparse"), Subspace(3, "sparse", nonzeros=3)]
    built = [entry.build(torch.randn(30)) for entry in entries]
    for saved in built:
        for other in built:
            if other is not saved:
                with pytest.raises(
                    RuntimeError, match=rf'Missing key.*"{other.label}.seed".*\n.*Unexpected.*"{saved.label}.seed"'
                ):
                    other.load_state_dict(saved.state_dict())


def test_a_dense_matrix_is_in_no_state_dict() -> None:
    module = Dense(10, 3, 0, CPU, torch.float32)
    assert list(module.state_dict()) == ["seed"] and module.basis.shape == (10, 3)


def test_a_dense_matrix_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dense, "_CHUNK", 64)
    matrix = Dense(500, 5, 0, CPU, torch.float64).matrix()
    assert len(matrix.flatten().unique()) == 2500
    assert ((matrix.mT @ matrix) - torch.eye(5)).abs().max() < 5 / 500**0.5


# --- products with large ones


@KINDS
@pytest.mark.parametrize(("total", "dim"), [(40, 40), (300, 17), (33, 1)])
def test_conjugate_gradients_equal_the_decomposition(kind: str, total: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, target = projection(kind, total, dim), torch.randn(total, dtype=torch.float64)
    small = made.nearest(target)
    monkeypatch.setattr("fxparam.catalogue._projections._SMALL", 0)
    large = made.nearest(target)
    # Compared where both are unique: in the weights.
    torch.testing.assert_close(made(large), made(small), rtol=0, atol=1e-8)
    with torch.inference_mode():
        torch.testing.assert_close(made.nearest(target.clone()), large, rtol=0, atol=1e-12)
    assert torch.equal(made.nearest(torch.zeros_like(target)), torch.zeros(dim, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["sparse", "fastfood"])
def test_right_inverse_of_a_large_subspace(kind: str) -> None:
    module: Any = Subspace(1000, kind).build(torch.randn(30000))
    latent = torch.randn(1000)
    weight = module(latent)
    assert module.contains(weight)
    torch.testing.assert_close(module.right_inverse(weight), latent, rtol=0, atol=1e-3)
    outside = weight + torch.randn(30000) / 50
    with pytest.raises(ImageError, match=r"the subspace of 1000 dimensions is missed by 0.0\d+ "):
        module.right_inverse(outside)
    rest = (outside - module.project(outside)).double()
    (pulled,) = torch.autograd.functional.vjp(module, torch.zeros(1000), rest.float())[1:]
    assert pulled.abs().max() < 1e-3


# --- options and places


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"projection": "fast"}, r"subspace: got projection='fast'; expected one of 'dense', 'sparse', 'fastfood'"),
        ({"seed": -1}, r"subspace: got seed=-1; expected an integer of at least 0"),
        ({"seed": 2**32}, r"subspace: got seed=4294967296; expected an integer below 2\*\*32"),
        ({"nonzeros": 0}, r"subspace: got nonzeros=0; expected an integer of at least 1"),
        ({"nonzeros": 3}, r"subspace: got nonzeros=3 with projection='dense'; type projection='sparse'"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        Subspace(4, **options)


def test_a_projection_has_a_largest_size() -> None:
    with pytest.raises(SpecError, match=r"subspace: got 4294967296 elements; expected at most 4294967292"):
        Subspace(4, "fastfood").build(torch.empty(2**32, device="meta"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(20, 20), nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


@KINDS
def test_places_have_projections_of_their_own(kind: str) -> None:
    model: Any = fxp.transform(Net(), {"*.weight": fxp.subspace(4, kind, seed=9)})
    seeds = {name: int(value) for name, value in model.state_dict().items() if name.endswith(".seed")}
    label = {"sparse": "sparse2"}.get(kind, kind)
    assert seeds == {
        f"{layer}.parametrizations.weight.0.{label}.seed": zlib.crc32(f"{layer}.weight".encode(), 9) for layer in ("one", "two")
    }
    again = fxp.transform(Net(), {"*.weight": fxp.subspace(4, kind, seed=10)})
    x = torch.randn(3, 20)
    with torch.no_grad():
        for latent in model.parameters():
            latent.add_(1)
    # Also where weights of another projection have been computed already.
    assert not torch.allclose(again(x), model(x))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


@KINDS
def test_training_a_model_in_a_subspace(kind: str) -> None:
    """Against the plain model with ``E d + θ₀`` written into it, over two steps; then folded."""
    net = Net()
    model = fxp.transform(net, {fxp.joint("*"): fxp.subspace(6, kind)})
    (latent,) = model.parameters()
    site: Any = model.get_submodule(model.sites[0].home)
    matrix = site[0].projection.matrix(torch.float32)
    plain = dict(net.named_parameters())
    order = [plain[name].detach() for name in model.sites[0].names]
    start = torch.cat([weight.flatten() for weight in order])
    own = torch.zeros(6, requires_grad=True)
    x = torch.randn(8, 20)
    ours, theirs = torch.optim.SGD([latent], 0.5), torch.optim.SGD([own], 0.5)
    for step in range(2):
        ours.zero_grad()
        theirs.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        parts = (start + matrix @ own).split([weight.numel() for weight in order])
        named = {
            name: part.reshape(weight.shape) for name, part, weight in zip(model.sites[0].names, parts, order, strict=True)
        }
        expected = torch.func.functional_call(net, named, (x,)).square().mean()
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(latent.grad, own.grad, rtol=1e-4, atol=1e-6)
        ours.step()
        theirs.step()
        assert model.stats.refreshes == step + 1
    assert not [node for node in model.prologue.graph.nodes if node.op == "call_module"]
    folded = fxp.fold(model, example_inputs=(x,))
    assert sorted(name for name, _ in folded.named_parameters()) == sorted(model.sites[0].names)
    torch.testing.assert_close(folded(x), model.eval()(x))


@pytest.mark.parametrize("kind", ["sparse", "fastfood"])
def test_the_trace_keeps_no_large_constant(kind: str) -> None:
    """Everything of the size of the weights depends on the seed, a buffer, so that it is computed again in each evaluation."""
    net = nn.Linear(200, 200, bias=False)
    model = fxp.transform(net, {"weight": fxp.subspace(10, kind)})
    model(torch.randn(1, 200))
    constants = [tensor for name, tensor in model.prologue.named_buffers() if name.startswith("constants")]
    assert constants and max(tensor.numel() for tensor in constants) <= 4096


@pytest.mark.parametrize("kind", ["sparse", "fastfood"])
def test_a_trace_is_flat(kind: str) -> None:
    graph = make_fx(Subspace(20, kind).build(torch.zeros(100)), pre_dispatch=True)(torch.zeros(20))
    assert {node.op for node in graph.graph.nodes} <= {"placeholder", "get_attr", "call_function", "output"}


@KINDS
def test_second_derivatives_pass_through(kind: str) -> None:
    module = Subspace(5, kind).build(torch.randn(12, dtype=torch.float64))
    assert torch.autograd.gradgradcheck(
        lambda d: module(d).pow(3).sum(), torch.randn(5, dtype=torch.float64, requires_grad=True)
    )
