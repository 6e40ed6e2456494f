"""Quantized weights: against torch's own kernels and observers, as integers, and through transform, fold and export."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam as fxp
from fxparam import catalogue as cat
from fxparam.catalogue.quantization import QuantizedMap, least_step
from fxparam.declaration import Entry
from fxparam.errors import ImageError, SpecError

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
GRIDS = pytest.mark.parametrize(("dim", "symmetric"), [(None, True), (None, False), (0, True), (1, False)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
ENTRIES: list[Entry] = [
    cat.FakeQuantize(),
    cat.FakeQuantize(bits=4, dim=1, symmetric=False),
    cat.FakeQuantize(bits=16),
    cat.LearnedStep(),
    cat.LearnedStep(bits=3, dim=0),
    cat.Ternary(),
    cat.Ternary(dim=0),
    cat.Ternary(threshold=0.5, scale="absmean"),
    cat.Binary(),
    cat.Binary(dim=None),
]
entries = pytest.mark.parametrize("entry", ENTRIES, ids=str)


def as_tuple(latents: Any) -> tuple[Tensor, ...]:
    return latents if isinstance(latents, tuple) else (latents,)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def kernel(x: Tensor, module: Any) -> Tensor:
    """The value by the kernels of torch, in float32, with the grid of the map."""
    _, scale, zero_point = module.integers(x)
    zero = zero_point.flatten().int()
    low, high = -(2 ** (module.bits - 1)) + module.symmetric, 2 ** (module.bits - 1) - 1
    if module.dim is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero[0], low, high)
    return torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero, module.dim, low, high)


@BITS
@GRIDS
def test_values_and_gradients_are_those_of_torch(bits: int, dim: int | None, symmetric: bool) -> None:
    for seed in range(10):
        latent = (drawn(6, 5, 4, seed=seed) * 10 ** (seed - 5)).requires_grad_()
        module = cat.FakeQuantize(bits, dim, symmetric).build(latent)
        value, expected = module(latent), kernel(latent, module)
        assert torch.equal(value, expected)
        direction = drawn(6, 5, 4, seed=seed + 100)
        got, wanted = (torch.autograd.grad((out * direction).sum(), latent)[0] for out in (value, expected))
        assert torch.equal(got, wanted) and torch.equal(got, direction)


@GRIDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dim: int | None, symmetric: bool, dtype: torch.dtype) -> None:
    latent = drawn(6, 5, dtype=dtype)
    module = cat.FakeQuantize(8, dim, symmetric).build(latent)
    assert torch.equal(module(latent), kernel(latent.float(), module).to(dtype))
    assert module.integers(latent).scale.dtype == torch.float32


@BITS
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*must now be specified", "ignore:.*reduce_range:UserWarning")
def test_the_grid_is_that_of_torchs_observers(bits: int, symmetric: bool, dim: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.ao.quantization import FakeQuantize, MinMaxObserver, PerChannelMinMaxObserver

    scheme = f"per_{'tensor' if dim is None else 'channel'}_{'symmetric' if symmetric else 'affine'}"
    kind = MinMaxObserver if dim is None else PerChannelMinMaxObserver
    options: dict[str, Any] = {} if dim is None else {"ch_axis": dim}
    theirs = FakeQuantize(
        observer=kind,
        quant_min=-(2 ** (bits - 1)) + symmetric,
        quant_max=2 ** (bits - 1) - 1,
        # What it checks the bounds by; the numbers depend on these alone.
        dtype=torch.qint8 if bits <= 8 else torch.qint32,
        qscheme=getattr(torch, scheme),
        **options,
    )
    latent = drawn(5, 7, seed=bits)
    module: Any = cat.FakeQuantize(bits, dim, symmetric).build(latent)
    expected = theirs(latent)
    _, scale, zero_point = module.integers(latent)
    assert torch.equal(scale.flatten(), theirs.scale) and torch.equal(zero_point.flatten().int(), theirs.zero_point.int())
    assert torch.equal(module(latent), expected)


@entries
@DTYPES
def test_a_weight_is_its_integers(entry: Entry, dtype: torch.dtype) -> None:
    weight = drawn(6, 8, dtype=dtype)
    module: Any = entry.build(weight)
    assert isinstance(module, QuantizedMap)
    latents = as_tuple(module.start(weight))
    assert torch.equal(latents[0], weight)
    made = module(*latents)
    values, scale, zero_point = module.integers(*latents)
    assert torch.equal(((values - zero_point.to(scale.dtype)) * scale).to(dtype), made)
    assert values.dtype == zero_point.dtype == (torch.int8 if module.bits <= 8 else torch.int16)
    assert values.shape == weight.shape and scale.shape == zero_point.shape
    assert scale.shape == (() if module.dim is None else tuple(n if d == module.dim else 1 for d, n in enumerate((6, 8))))
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and (scale > 0).all()
    assert -(2 ** (module.bits - 1)) <= values.min() and values.max() <= 2 ** (module.bits - 1) - 1
    assert not zero_point.any() or not module.symmetric


@entries
def test_many_weights_in_one_batch(entry: Entry) -> None:
    weights = drawn(3, 6, 8)
    module: Any = entry.build(weights[0])
    latents = [as_tuple(module.start(weight)) for weight in weights]
    together = torch.vmap(module)(*(torch.stack(parts) for parts in zip(*latents, strict=True)))
    assert torch.equal(together, torch.stack([module(*each) for each in latents]))


# Halves and small integers are where ranges tie; the rest is of any size, so that grids are small or skewed.
numbers = st.one_of(st.integers(-300, 300).map(lambda n: n / 2), st.floats(-(2.0**100), 2.0**100, width=32))
rows = st.lists(numbers, min_size=1, max_size=12)


@given(rows, st.sampled_from([2, 3, 4, 7, 8, 12]), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_quantizing_twice_is_quantizing_once(row: list[float], bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    latent = torch.tensor(row, dtype=dtype)
    module: Any = cat.FakeQuantize(bits, symmetric=symmetric).build(latent)
    once = module(latent)
    assert module.contains(once), module.distance(once)
    first, second = module.integers(latent), module.integers(once)
    assert torch.equal(first.values, second.values) and torch.equal(first.zero_point, second.zero_point)
    torch.testing.assert_close(module(once), once, rtol=4 * torch.finfo(dtype).eps, atol=0)
    # Nothing is farther from its place than half a step, up to the rounding of a range that ends in ties.
    assert ((once - latent).abs() <= first.scale * 0.5001 + 1e-6 * latent.abs()).all()


@entries
@given(rows=st.lists(rows.map(lambda row: (row * 4)[:4]), min_size=2, max_size=3))
def test_what_a_map_makes_is_in_its_image(entry: Entry, rows: list[list[float]]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        latent = torch.tensor(rows, dtype=dtype)
        module: Any = entry.build(latent)
        made = module(*as_tuple(module.start(latent)))
        assert module.contains(made), module.distance(made)
        again = module(*as_tuple(module.right_inverse(made)))
        torch.testing.assert_close(again, made, rtol=16 * torch.finfo(dtype).eps, atol=least_step(dtype))


def test_a_range_that_ends_in_two_ties_keeps_all_its_integers() -> None:
    """Rounded to even, -0.5 and 254.5 are 254 apart, and the weight would be on another grid when quantized again."""
    latent = torch.tensor([-0.5, 254.5, 3.2])
    module: Any = cat.FakeQuantize(symmetric=False).build(latent)
    values, scale, zero_point = module.integers(latent)
    assert values.tolist() == [-128, 127, -124] and zero_point == -127
    assert 1 - 1e-5 < float(scale) < 1
    # -127.5 and 127.5 are 256 apart: the upper one is clipped, and still is half a step off. Its gradient passes.
    latent = torch.tensor([-127.5, 127.5, 3.2], requires_grad=True)
    made = module(latent)
    assert made.tolist() == [-128, 127, 3] and module.contains(made.detach())
    assert torch.autograd.grad(made.sum(), latent)[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-31, 1e-20, 3.3e38])
def test_weights_at_the_ends_of_float32(symmetric: bool, size: float) -> None:
    latent = (torch.tensor([[-1.0, 0.3], [0.7, 1.0]]) * size).requires_grad_()
    module: Any = cat.FakeQuantize(symmetric=symmetric).build(latent)
    made = module(latent)
    _, scale, _ = module.integers(latent)
    assert made.isfinite().all() and scale.isfinite() and scale >= least_step(torch.float32) * (1 - 1e-5)
    assert module.contains(made.detach())
    assert (made - latent).abs().max() <= 0.51 * scale
    assert torch.autograd.grad(made.sum(), latent)[0].eq(1).all()


def test_second_derivatives_pass_rounding_as_first_ones_do() -> None:
    latent = drawn(3, 4, dtype=torch.float64).requires_grad_()
    made = cat.FakeQuantize().build(latent)(latent)
    (first,) = torch.autograd.grad(made.square().sum(), latent, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(3).sum(), latent)
    assert torch.equal(first, 2 * made) and torch.equal(second, 6 * first.square())


# --- learned steps


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [None, 0])
def test_a_learned_step_starts_as_in_the_paper(bits: int, dim: int | None) -> None:
    weight = drawn(4, 50)
    module: Any = cat.LearnedStep(bits, dim).build(weight)
    latent, step = module.start(weight)
    mean = weight.abs().mean() if dim is None else weight.abs().mean(1, keepdim=True)
    assert torch.equal(latent, weight) and latent is not weight
    torch.testing.assert_close(step, 2 * mean / math.sqrt(2 ** (bits - 1) - 1))
    _, fallback = module.start(torch.zeros_like(weight))
    assert torch.equal(fallback, torch.ones_like(step))


def test_the_gradients_of_a_learned_step_by_hand() -> None:
    module: Any = cat.LearnedStep(bits=3).build(torch.zeros(4))
    latent = torch.tensor([0.6, -0.7, 9.0, -9.0], dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    made = module(latent, step)
    assert made.tolist() == [0.5, -0.5, 1.5, -2.0]
    to_latent, to_step = torch.autograd.grad((made * torch.tensor([1.0, 2.0, 4.0, 8.0])).sum(), (latent, step))
    torch.testing.assert_close(to_latent, torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    expected = (1 * (1 - 1.2) + 2 * (-1 + 1.4) + 4 * 3 - 8 * 4) / math.sqrt(4 * 3)
    assert float(to_step) == pytest.approx(expected, rel=1e-12)


def test_steps_that_cross_zero_and_quotients_that_overflow() -> None:
    module: Any = cat.LearnedStep(bits=4).build(torch.zeros(3))
    latent = torch.tensor([1e38, -1.0, 0.1], requires_grad=True)
    for size in (0.1, -0.1, 0.0, 1e-45, 1e-30, -1e30):
        step = torch.tensor(size, requires_grad=True)
        made = module(latent, step)
        grads = torch.autograd.grad(made.sum(), (latent, step))
        assert made.isfinite().all() and all(grad.isfinite().all() for grad in grads)
        assert torch.equal(made, module(latent, -step)) and module.contains(made.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_step_is_found_from_the_weight(dtype: torch.dtype) -> None:
    integers = torch.tensor([[3, -7, 0, 5], [2, 4, -128, 127], [6, 12, -18, 0], [0, 0, 0, 0]])
    steps = torch.tensor([[0.37], [1e-20], [1.1], [1.0]], dtype=dtype)
    weight = integers * steps
    module: Any = cat.LearnedStep(dim=0).build(weight)
    latent, found = module.right_inverse(weight)
    # The third row is 1, 2 and -3 steps of six times the size.
    torch.testing.assert_close(found, steps * torch.tensor([[1], [1], [6], [1]]))
    torch.testing.assert_close(module(latent, found), weight)
    assert not cat.LearnedStep(bits=7, dim=0).build(weight).contains(weight)


def test_a_step_is_found_among_many_elements() -> None:
    """The few elements looked at first are multiples of four; the step is that of the others."""
    weight = torch.full((1000,), 4.0)
    weight[::16] = 8.0
    weight[3], weight[5] = 41.0, 100.0
    module: Any = cat.LearnedStep().build(weight)
    assert float(module.right_inverse(weight)[1]) == 1
    weight[7] = 41.5
    with pytest.raises(ImageError, match=r"^LearnedStepMap: .*a whole number of steps is missed by 0.375, tolerance"):
        module.right_inverse(weight)


# --- ternary and binary weights


def test_ternary_weights_by_hand() -> None:
    latent = torch.tensor([[3.0, -1.0, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    module: Any = cat.Ternary().build(latent)
    # The mean is 0.525, the threshold 0.3675, and what is above has mean 2.
    assert module(latent).tolist() == [[2.0, -2.0, 0.0, 0.0], [0.0] * 4]
    rows: Any = cat.Ternary(dim=0).build(latent)
    # The mean of the first row is 1.05, the threshold 0.735.
    assert rows(latent).tolist() == [[2.0, -2.0, 0.0, 0.0], [0.0] * 4]
    assert module.integers(latent).values.tolist() == [[1, -1, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(ImageError, match=r"^TernaryMap: .*every element -α, 0 or α is missed by 0.333, tolerance"):
        rows.right_inverse(latent)


def test_bitnet() -> None:
    """As in the paper's listing: ``weight_quant``, scaled back."""
    latent = drawn(20, 30)
    scale = 1 / latent.abs().mean().clamp(min=1e-5)
    expected = (latent * scale).round().clamp(-1, 1) / scale
    module: Any = cat.Ternary(threshold=0.5, scale="absmean").build(latent)
    torch.testing.assert_close(module(latent), expected)
    # Its image is that of the other scale; the latent of a weight has the right mean.
    again = module.right_inverse(module(latent))
    torch.testing.assert_close(again.abs().mean(), latent.abs().mean())
    assert cat.Ternary().build(latent).contains(module(latent))


def test_a_latent_that_overflows_is_refused() -> None:
    weight = torch.zeros(2000, dtype=torch.float16)
    weight[0] = 100.0
    module: Any = cat.Ternary(scale="absmean").build(weight)
    with pytest.raises(ImageError, match=r'with so many zeros the latent of scale="absmean" overflows torch.float16'):
        module.right_inverse(weight)
    assert torch.equal(cat.Ternary().build(weight).right_inverse(weight), weight)  # type: ignore[arg-type]


def test_binary_weights_by_hand() -> None:
    latent = torch.tensor([[3.0, -1.0, 0.0, -0.0], [0.0, 0.0, 0.0, 0.0]])
    module: Any = cat.Binary().build(latent)
    assert module(latent).tolist() == [[1.0, -1.0, 1.0, 1.0], [0.0] * 4]
    assert module.integers(latent).values.tolist() == [[1, -1, 1, 1], [1, 1, 1, 1]]
    with pytest.raises(ImageError, match=r"^BinaryMap: .*every element -α or α is missed by 1, tolerance"):
        module.right_inverse(latent)
    other = drawn(40, 30)
    expected = torch.stack([row.sign() * row.abs().mean() for row in other])
    torch.testing.assert_close(cat.Binary().build(other)(other), expected)


# --- in a model


def _net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))


@entries
def test_training_equals_eager_parametrization(entry: Entry) -> None:
    net, x = _net(), drawn(2, 3, 8, 8)
    model: Any = fxp.transform(net, {"*.weight": entry})
    eager = copy.deepcopy(net)
    maps: list[Any] = []
    for index in (0, 3):
        layer: Any = eager[index]
        module: Any = entry.build(layer.weight)
        # torch starts from the right inverse alone, so from a weight on the grid; then at our latents.
        layer.weight = nn.Parameter(module.project(layer.weight.detach()))
        parametrize.register_parametrization(layer, "weight", module)
        maps.append(module)
    eager.load_state_dict(model.state_dict())
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = torch.optim.SGD(eager.parameters(), lr=0.1)
    for _ in range(3):
        got, wanted = model(x), eager(x)
        assert torch.equal(got, wanted)
        for loss, optimizer in ((got.square().sum(), ours), (wanted.square().sum(), theirs)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name, latent in eager.named_parameters():
            ours_grad: Any = model.get_parameter(name).grad
            assert latent.grad is not None and torch.equal(ours_grad, latent.grad), name
    folded: Any = fxp.fold(model, example_inputs=(x,))
    for index, module in zip((0, 3), maps, strict=True):
        values, scale, zero_point = module.integers(*(p.detach() for p in _originals(eager[index])))
        weight = folded.get_parameter(f"{index}.weight")
        assert torch.equal(weight, (values - zero_point.float()) * scale)


def _originals(layer: Any) -> list[Tensor]:
    """The latents of a weight, in their order."""
    return [latent for _, latent in layer.parametrizations.weight.named_parameters(recurse=False)]


def test_the_report_says_how_far_quantization_moves_a_weight() -> None:
    model = fxp.transform(_net(), {"0.weight": fxp.fake_quantize(dim=0), "3.weight": fxp.learned_step(bits=4)})
    starts = [site.start for site in model.sites]
    assert "weight moved by 0.00" in starts[0] and "not in the image of FakeQuantizeMap by 0.49" in starts[0]
    assert "weight moved by 0.19" in starts[1] and "not in the image of LearnedStepMap by 0." in starts[1]
    again = fxp.transform(fxp.restore(model), {"0.weight": fxp.fake_quantize(dim=0), "3.weight": fxp.learned_step(bits=4)})
    assert [site.start for site in again.sites] == ["weight kept", "weight kept"]
    fresh = drawn(4, 3, 3, 3, seed=5)
    with pytest.raises(ImageError, match="every element a whole number of steps is missed by"):
        model.assign("0.weight", fresh)
    model.assign("0.weight", fresh, project=True)
    module: Any = fxp.fake_quantize(dim=0).build(fresh)
    torch.testing.assert_close(model.weights()["0.weight"], module(fresh))


@pytest.mark.parametrize(
    "entry", [cat.FakeQuantize(dim=0), cat.FakeQuantize(4, 0, False), cat.LearnedStep(4), cat.Ternary(), cat.Binary()], ids=str
)
def test_the_exported_file_holds_the_weights(entry: Entry, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model: Any = fxp.transform(_net(), {"*.weight": entry})
    report = fxp.export_onnx(model, (drawn(2, 3, 8, 8),), tmp_path / "model.onnx")
    assert report.parity and all(parity.ok for parity in report.parity)
    stored = {i.name: torch.tensor(onnx.numpy_helper.to_array(i)) for i in onnx.load(report.path).graph.initializer}
    for name, weight in model.weights().items():
        assert torch.equal(stored[name], weight), name


# --- options


BAD_OPTIONS: list[tuple[Callable[[], Entry], str]] = [
    (lambda: cat.FakeQuantize(bits=1), r"^fake_quantize: got bits=1; expected an integer of at least 2"),
    (lambda: cat.FakeQuantize(bits=17), r"^fake_quantize: got bits=17; expected an integer from 2 to 16"),
    (lambda: cat.FakeQuantize(bits=8.0), r"^fake_quantize: got bits=8.0; expected an integer"),  # type: ignore[arg-type]
    (lambda: cat.FakeQuantize(dim="0"), r"^fake_quantize: got dim='0'; expected an integer"),  # type: ignore[arg-type]
    (lambda: cat.FakeQuantize(symmetric=1), r"^fake_quantize: got symmetric=1; expected True or False"),  # type: ignore[arg-type]
    (lambda: cat.LearnedStep(bits=16), r"^learned_step: got bits=16; expected an integer from 2 to 8"),
    (lambda: cat.LearnedStep(dim=0.5), r"^learned_step: got dim=0.5; expected an integer"),  # type: ignore[arg-type]
    (lambda: cat.Ternary(threshold=1), r"^ternary: got threshold=1; expected 0 <= threshold < 1"),
    (lambda: cat.Ternary(threshold=math.nan), r"^ternary: got threshold=nan; expected a finite number"),
    (lambda: cat.Ternary(dim=True), r"^ternary: got dim=True; expected an integer"),
    (lambda: cat.Ternary(scale="mean"), r"^ternary: got scale='mean'; expected one of 'kept', 'absmean'"),
    (lambda: cat.Binary(dim=[0]), r"^binary: got dim=\[0\]; expected an integer"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "text"), BAD_OPTIONS, ids=[text for _, text in BAD_OPTIONS])
def test_bad_options_are_refused_when_given(make: Callable[[], Entry], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        make()


@pytest.mark.parametrize("make", [cat.FakeQuantize, cat.LearnedStep, cat.Ternary, cat.Binary], ids=lambda m: m.name)
def test_weights_that_do_not_fit_are_refused_when_built(make: Any) -> None:
    name = make.name
    for dim, weight, text in (
        (2, torch.ones(4, 3), rf"^{name}: got dim=2 for a weight of shape \(4, 3\); expected -2 <= dim < 2"),
        (0, torch.ones(5), rf"^{name}: got dim=0 for a weight of shape \(5,\), .*type fxp.{name}\(dim=None\)"),
        (None, torch.ones(3) * 1j, rf"^{name}: got a weight of dtype torch.complex64; expected a floating-point dtype"),
        (None, torch.ones(3).int(), rf"^{name}: got a weight of dtype torch.int32; expected a floating-point dtype"),
        (None, torch.ones(0, 3), rf"^{name}: got an empty weight of shape \(0, 3\); expected at least one element"),
    ):
        with pytest.raises(SpecError, match=text):
            make(dim=dim).build(weight)


def test_the_maps_say_their_options() -> None:
    weight = torch.ones(4, 3)
    shown = [
        repr(entry.build(weight))
        for entry in (cat.FakeQuantize(4, -1, False), cat.LearnedStep(), cat.Ternary(), cat.Binary(dim=None))
    ]
    assert shown == [
        "FakeQuantizeMap(bits=4, dim=1, symmetric=False)",
        "LearnedStepMap(bits=8, dim=None)",
        "TernaryMap(threshold=0.7, dim=None, scale='kept')",
        "BinaryMap(dim=None)",
    ]
