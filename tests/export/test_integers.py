"""Quantized weights as integers in the file, and fake quantization of activations, bit for bit as PyTorch rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import fxparam as fxp
from fxparam.errors import ExportError
from fxparam.exporters.onnx_verify import _from_ort, _to_ort, check_parity

ENTRIES: dict[str, Any] = {
    "8": fxp.fake_quantize(),
    "8-dim0": fxp.fake_quantize(dim=0),
    "8-dim1": fxp.fake_quantize(dim=1),
    "8-affine": fxp.fake_quantize(symmetric=False),
    "6-affine-dim0": fxp.fake_quantize(bits=6, dim=0, symmetric=False),
    "4": fxp.fake_quantize(bits=4),
    "4-affine-dim1": fxp.fake_quantize(bits=4, dim=1, symmetric=False),
    "2": fxp.fake_quantize(bits=2, dim=0),
    "12": fxp.fake_quantize(bits=12),
    "16-affine": fxp.fake_quantize(bits=16, symmetric=False),
    "learned": fxp.learned_step(bits=4, dim=0),
    "ternary": fxp.ternary(dim=0),
    "binary": fxp.binary(),
    "pruned": fxp.semi_structured() >> fxp.fake_quantize(bits=4, dim=0),
}


class Holder(nn.Module):
    """Multiplies by its weight and returns the weight."""

    def __init__(self, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (6, 4)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape).to(dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T, self.weight


def holder(entry: Any, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (6, 4)) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return fxp.transform(Holder(dtype, shape), {"weight": entry}), torch.randn(3, shape[1]).to(dtype)


def run(path: Path, *inputs: Tensor, **entries: str) -> list[Tensor]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return [*map(_from_ort, session.run_with_ort_values(None, dict(zip(names, map(_to_ort, inputs), strict=True))))]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def nodes(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


# --- weights


@pytest.mark.parametrize("name", ENTRIES)
def test_the_file_holds_the_weight_bit_for_bit_also_after_refits(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model, x = holder(ENTRIES[name])
    report = fxp.export_onnx(model, (x,), path, integers=True, opset=21, output_names=["y", "w"])
    assert list(report.integers) == ["weight"] and not report.notes
    assert all(p.ok for p in report.parity) and {p.max_abs for p in report.parity if p.output == "w"} == {0.0}
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            for latent in model.parameters():
                latent.copy_(torch.randn_like(latent) * 10.0 ** torch.randint(-6, 6, ()))
                latent[..., : seed % 3] = 0
        fxp.refit_onnx(path, model)
        weight = fxp.restore(model).get_parameter("weight")
        assert torch.equal(bits(run(path, x)[1]), bits(weight)), "ONNX Runtime"
        if seed % 5 == 0:
            evaluator: Any = ReferenceEvaluator(str(path))
            evaluated = evaluator.run(["w"], {evaluator.input_names[0]: x.numpy()})[0]
            assert torch.equal(bits(torch.from_numpy(evaluated.copy())), bits(weight)), "the reference evaluator"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [4, 8])
def test_pytorch_rounds_to_the_same_weight(width: int, symmetric: bool, tmp_path: Path) -> None:
    model, x = holder(fxp.fake_quantize(bits=width, dim=0, symmetric=symmetric))
    fxp.export_onnx(model, (x,), tmp_path / "m.onnx", integers=True, opset=21, verify=0)
    stored = {str(i.name): onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / "m.onnx").graph.initializer}
    scale = torch.from_numpy(stored["weight.scale"].copy())
    zero = torch.from_numpy(stored["weight.zero_point"].astype(np.int32))
    latent = model.get_parameter("parametrizations.weight.original").detach()
    ends = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    expected = torch.fake_quantize_per_channel_affine(latent, scale, zero, 0, *ends)
    assert torch.equal(run(tmp_path / "m.onnx", x)[1], expected)
    assert symmetric == bool((zero == 0).all())


def test_one_more_node_and_three_tensors_under_known_names(tmp_path: Path) -> None:
    model, x = holder(fxp.fake_quantize(dim=0))
    plain = fxp.export_onnx(model, (x,), tmp_path / "plain.onnx")
    report = fxp.export_onnx(model, (x,), tmp_path / "m.onnx", integers=True)
    assert not plain.integers and nodes(tmp_path / "m.onnx") == ["DequantizeLinear", *nodes(tmp_path / "plain.onnx")]
    first = onnx.load(tmp_path / "m.onnx").graph.node[0]
    assert [*first.input, *first.output] == ["weight", "weight.scale", "weight.zero_point", "weight.dequantized"]
    assert [a.i for a in first.attribute] == [0]
    stored = report.integers["weight"]
    assert (stored.bits, stored.dtype, stored.axis) == (8, "INT8", 0)
    assert (stored.bytes_before, stored.bytes_after) == (6 * 4 * 4, 6 * 4 + 6 * 4 + 6)
    assert "weight: 8 bits as INT8, a scale for each index of dimension 0, 96 -> 54 bytes" in str(report)


@pytest.mark.parametrize(
    ("entry", "shape", "opset", "dtype"),
    [
        (fxp.fake_quantize(bits=4), (6, 4), 21, "INT4"),
        (fxp.fake_quantize(bits=4), (6, 4), 20, "INT8"),
        (fxp.fake_quantize(bits=4), (5, 3), 21, "INT8"),  # an odd number of elements, which TensorRT refuses as int4
        (fxp.fake_quantize(bits=5), (6, 4), 21, "INT8"),
        (fxp.fake_quantize(bits=9), (6, 4), 21, "INT16"),
        (fxp.ternary(), (6, 4), 24, "INT4"),
    ],
)
def test_the_smallest_integers_that_the_opset_has(entry: Any, shape: Any, opset: int, dtype: str, tmp_path: Path) -> None:
    model, x = holder(entry, shape=shape)
    report = fxp.export_onnx(model, (x,), tmp_path / "m.onnx", integers=True, opset=opset)
    assert report.integers["weight"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_dequantized_in_float32_and_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = holder(fxp.fake_quantize(dim=0, symmetric=False), dtype)
    # ONNX Runtime has no bfloat16 product on the CPU.
    report = fxp.export_onnx(model, (x,), tmp_path / "m.onnx", integers=True, verify=2 if dtype == torch.float16 else 0)
    assert list(report.integers) == ["weight"] and nodes(tmp_path / "m.onnx")[:2] == ["DequantizeLinear", "Cast"]
    if dtype == torch.float16:
        assert torch.equal(bits(run(tmp_path / "m.onnx", x)[1]), bits(fxp.restore(model).get_parameter("weight")))


@pytest.mark.parametrize(
    ("entry", "dtype", "note"),
    [
        (fxp.fake_quantize(bits=12), torch.float32, "12 bits need opset 21 (int16); got 20; pass opset=21"),
        (fxp.fake_quantize(), torch.float64, "its scale is torch.float64, and DequantizeLinear computes in float32"),
        (
            fxp.fake_quantize() >> fxp.mask(density=0.5),
            torch.float32,
            "MaskMap follows the quantization; quantize last (fxp.mask(...) >> fxp.fake_quantize(...))",
        ),
    ],
)
def test_what_stays_floating_point_is_noted(entry: Any, dtype: torch.dtype, note: str, tmp_path: Path) -> None:
    model, x = holder(entry, dtype)
    report = fxp.export_onnx(model, (x,), tmp_path / "m.onnx", integers=True, opset=20)
    assert not report.integers and report.notes == (f"weight stays floating-point: {note}",)
    assert "DequantizeLinear" not in nodes(tmp_path / "m.onnx")


class Net(nn.Module):
    """A tied weight, a convolution, a product over three dimensions, which transposes its weight, a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.mix = nn.Linear(8, 8)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.decode = nn.Linear(8, 10, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.mix(self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2))
        return self.decode(self.gru(hidden)[0])


WEIGHTS = ("embed.weight", "conv.weight", "mix.weight", "gru.weight_hh_l0")


def net(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return fxp.transform(Net(), {name: fxp.fake_quantize(dim=0, **options) for name in WEIGHTS}).eval()


TOKENS = torch.tensor([[1, 4, 2], [0, 9, 9]])


def test_ties_transposes_and_recurrences(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = fxp.export_onnx(net(), (TOKENS,), path, integers=True, external_data=True)
    assert set(report.integers) == {"decode.weight", *WEIGHTS[1:]} and report.tied == {"embed.weight": "decode.weight"}
    assert nodes(path).count("DequantizeLinear") == 4
    other = net(seed=1)
    refit = fxp.refit_onnx(path, other)
    assert {"decode.weight", "decode.weight.scale", "mix.weight.scale"} <= set(refit.replaced) and not refit.kept
    check_parity(path, other, (TOKENS,))
    # What the documentation tells users: with this option the default session keeps the activations in float32.
    torch.testing.assert_close(run(path, TOKENS, qdq_matmulnbits_accuracy_level="1")[0], other(TOKENS).detach())


def test_refit_refuses_what_is_not_on_that_grid(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    fxp.export_onnx(net(), (TOKENS,), path, integers=True, verify=0)
    before = path.read_bytes()
    torch.manual_seed(0)
    spec = {
        "embed.weight": fxp.fake_quantize(dim=0),
        "mix.weight": fxp.fake_quantize(dim=1),
        "conv.weight": fxp.fake_quantize(),
    }
    with pytest.raises(ExportError) as caught:
        fxp.refit_onnx(path, fxp.transform(Net(), spec))
    assert str(caught.value).splitlines()[1:-1] == [
        "  conv.weight: got one scale, expected a scale for each index of dimension 0",
        "  mix.weight: got a scale for each index of dimension 1, expected a scale for each index of dimension 0",
        "  gru.weight_hh_l0: the file stores integers, and the given weight is not quantized as its last step",
    ]
    assert path.read_bytes() == before


def test_refit_refuses_more_bits_than_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model, x = holder(fxp.fake_quantize(bits=4))
    fxp.export_onnx(model, (x,), path, integers=True, opset=21, verify=0)
    with pytest.raises(ExportError, match="weight: got dtype INT8, expected INT4"):
        fxp.refit_onnx(path, holder(fxp.fake_quantize(bits=8))[0])
    fxp.refit_onnx(path, holder(fxp.fake_quantize(bits=3))[0])


def test_weights_computed_from_others_and_of_plain_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    quantized = fxp.fake_quantize().build(model[2].weight.detach())
    model[2].weight = nn.Parameter(quantized.project(model[2].weight.detach()))
    torch.nn.utils.parametrize.register_parametrization(model[2], "weight", quantized)
    spec = {"1.weight": fxp.ref("0.weight") >> fxp.transpose() >> fxp.fake_quantize(bits=4)}
    report = fxp.export_onnx(fxp.transform(model, spec), (torch.randn(2, 4),), tmp_path / "m.onnx", integers=True)
    assert {name: s.bits for name, s in report.integers.items()} == {"1.weight": 4, "2.weight": 8}
    report = fxp.export_onnx(model, (torch.randn(2, 4),), tmp_path / "m.onnx", integers=True)
    assert list(report.integers) == ["2.weight"]


# --- activations


class Quantizes(nn.Module):
    scale: Tensor
    zero: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, operation: Callable[[Quantizes, Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.register_buffer("scale", torch.tensor([0.3]))
        self.register_buffer("zero", torch.tensor([1], dtype=torch.int32))
        self.register_buffer("scales", torch.tensor([0.3, 0.0123, 0.7]))
        self.register_buffer("zeros", torch.tensor([0, 1, 3], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self, x)


RANGES = [(-128, 127), (0, 255), (-8, 7), (0, 127), (-127, 127), (-1, 254), (-32768, 32767)]
FORMS: dict[str, Callable[..., Any]] = {
    "numbers": lambda m, x, ends: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, *ends),
    "tensors": lambda m, x, ends: torch.fake_quantize_per_tensor_affine(x, m.scale, m.zero, *ends),
    "channels": lambda m, x, ends: torch.fake_quantize_per_channel_affine(x, m.scales, m.zeros, 1, *ends),
}
TYPES = [*((torch.float32, ends) for ends in RANGES), *((torch.float16, ends) for ends in RANGES[1:3])]


@pytest.mark.parametrize(("dtype", "ends"), [*TYPES, (torch.bfloat16, (-8, 7)), (torch.float64, (-128, 127))])
@pytest.mark.parametrize("form", FORMS)
def test_activations_round_as_in_pytorch(form: str, dtype: torch.dtype, ends: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    # Multiples of half a step are where a division rounds to another integer than the product with the reciprocal.
    grids = [torch.arange(-450, 450) * step for step in (0.05, 0.15, 0.3 * 1.5, 0.0123 / 2)]
    x = torch.cat([torch.randn(900) * 5, *grids]).double().reshape(-1, 3, 2).to(dtype)
    model = Quantizes(lambda m, x: FORMS[form](m, x, ends))
    fxp.export_onnx(model, (x,), path)
    assert torch.equal(run(path, x)[0], model(x)), "ONNX Runtime's default options"
    assert torch.equal(run(path, x, disable_quant_qdq="1")[0], model(x))
    wide = ends in ((-1, 254), (-32768, 32767)) or (dtype == torch.float64 and form == "channels")
    assert (nodes(path).count("QuantizeLinear"), nodes(path).count("DequantizeLinear")) == ((0, 0) if wide else (1, 1))
    assert wide or nodes(path)[-1 if dtype == torch.float32 else -2] == "DequantizeLinear"


def test_a_scale_that_is_a_whole_number(tmp_path: Path) -> None:
    model, x = Quantizes(lambda m, x: torch.fake_quantize_per_tensor_affine(x, 1, 0, -128, 127)), torch.randn(50) * 9
    fxp.export_onnx(model, (x,), tmp_path / "m.onnx")
    assert torch.equal(run(tmp_path / "m.onnx", x)[0], model(x))


def test_zero_points_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    model = Quantizes(lambda m, x: torch.fake_quantize_per_channel_affine(x, m.scales, m.zeros.float(), 1, 0, 255))
    with pytest.raises(ExportError, match="could not be translated: its zero point is no integer; observe with an integer"):
        fxp.export_onnx(model, (torch.randn(2, 3),), tmp_path / "m.onnx", arithmetic=False)


def observed(seed: int = 0) -> Any:
    from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize, PerChannelMinMaxObserver, disable_observer

    torch.manual_seed(seed)
    channels = FakeQuantize(PerChannelMinMaxObserver, ch_axis=1, dtype=torch.qint8, quant_min=-128, quant_max=127)
    model = nn.Sequential(
        FusedMovingAvgObsFakeQuantize(), nn.Linear(6, 6), FakeQuantize(quant_min=0, quant_max=127), nn.ReLU(), channels
    )
    for _ in range(3):
        model(torch.randn(20, 6) * (1 + seed))
    return model.apply(disable_observer).eval()


def test_calibrated_modules_of_torch_ao(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model, x = observed(), torch.randn(50, 6)
    quantized = fxp.transform(model, {"1.weight": fxp.fake_quantize(dim=0)})
    report = fxp.export_onnx(quantized, (x,), path, integers=True)
    assert nodes(path).count("QuantizeLinear") == 3 and nodes(path).count("DequantizeLinear") == 4
    assert {"0.scale", "0.zero_point", "4.scale", "1.weight.scale"} <= set(report.initializers)
    # One element in some thousands lies so near to a tie that the sum of a product decides.
    assert (run(path, x, disable_quant_qdq="1")[0] != quantized.eval()(x)).double().mean() < 0.02
    other = fxp.transform(observed(seed=1), {"1.weight": fxp.fake_quantize(dim=0)}).eval()
    refit = fxp.refit_onnx(path, other)
    assert {"0.scale", "2.scale", "4.scale", "1.weight"} <= set(refit.replaced)
    assert (run(path, x, disable_quant_qdq="1")[0] != other(x)).double().mean() < 0.02


def test_modules_that_still_observe_are_refused_and_disabled_ones_do_nothing(tmp_path: Path) -> None:
    from torch.ao.quantization import FakeQuantize, disable_fake_quant, enable_observer

    model = observed().apply(enable_observer)
    with pytest.raises(
        ExportError, match=r"'0', '2', '4' still observes.*model.apply\(torch.ao.quantization.disable_observer\)"
    ):
        fxp.export_onnx(model, (torch.randn(2, 6),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    off = observed().apply(disable_fake_quant)
    fxp.export_onnx(off, (torch.randn(2, 6),), tmp_path / "m.onnx")
    assert "QuantizeLinear" not in nodes(tmp_path / "m.onnx") and isinstance(off[0], FakeQuantize), "the model is unchanged"
