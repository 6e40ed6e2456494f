"""The comparison of the file with the model: random inputs, tolerances, and that a wrong file is not written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from export.common import Mlp, export, program, simple
from torch import Tensor

from fxparam.errors import ExportError
from fxparam.exporters import onnx_verify
from fxparam.exporters.onnx import export_program
from fxparam.exporters.onnx_verify import check_parity, compare, random_like


def test_onnx_runtime_outputs_equal_an_independent_evaluation(tmp_path: Path) -> None:
    report, model = export("decoder", tmp_path / "m.onnx", verify=0)
    assert report.parity == () and "not compared with the model" in str(report)
    tokens, state, scale = torch.randint(0, 10, (2, 3)), torch.randn(2, 16), torch.rand(8)
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    feeds = {"tokens": tokens.numpy(), "state": state.numpy(), "scale": scale.numpy()}
    got = session.run(None, feeds)
    with torch.no_grad():
        want = model(tokens, state, scale=scale)
    for a, b in zip(got, [want["logits"], *want["state"]], strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b)


@pytest.mark.parametrize("external", [False, True])
def test_a_wrong_reference_leaves_the_old_file(tmp_path: Path, external: bool) -> None:
    exported, model, args, _ = program("mlp")
    export_program(exported, tmp_path / "m.onnx", reference=model, args=args, external_data=external)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    torch.manual_seed(123)  # other weights than the cached program's
    changed = torch.export.export(Mlp().eval(), args)
    with pytest.raises(ExportError) as caught:
        export_program(changed, tmp_path / "m.onnx", reference=model, args=args, external_data=external)
    text = str(caught.value)
    for part in ("output 'linear_2' on the given inputs", "times the tolerance of", "No file was changed", "verify=0"):
        assert part in text
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_random_inputs_find_what_the_given_ones_hide(tmp_path: Path) -> None:
    model = Mlp().eval()
    exported = torch.export.export(model, (torch.zeros(2, 6),))
    with pytest.raises(ExportError, match="on the random 1 inputs"):
        export_program(exported, tmp_path / "m.onnx", reference=lambda x: model(x) + x[:, :3], args=(torch.zeros(2, 6),))


@pytest.mark.parametrize(
    ("given", "holds"),
    [
        (torch.tensor([3, 9, 5]), lambda t: 3 <= t.min() < t.max() <= 9),
        (torch.tensor([2**63 - 1]), lambda t: (t >= 2**63 - 2).all()),
        (torch.tensor([7], dtype=torch.uint8), lambda t: (t == 7).all()),
        (torch.tensor([True]), lambda t: 0.3 < t.float().mean() < 0.7),
        (torch.randn(400) * 3 + 50, lambda t: abs(t.mean() - 50) < 1 and abs(t.std() - 3) < 1),
        (torch.rand(400), lambda t: t.min() >= 0),
        (torch.zeros(4), lambda t: abs(t.std() - 1) < 0.2),
        (torch.tensor([0.0, -math.inf, 0.0]), lambda t: set(t.tolist()) == {0.0, -math.inf}),
        (torch.tensor([1.0, 0.0, 0.0]), lambda t: set(t.tolist()) == {0.0, 1.0}),
        (torch.randn(400, dtype=torch.complex64), lambda t: t.imag.std() > 0.3),
        (torch.randn(9, dtype=torch.bfloat16), lambda t: t.isfinite().all()),
        (torch.empty(0), lambda t: (t == 0).all()),
    ],
)
def test_random_inputs_keep_the_kind_of_the_given_ones(given: Tensor, holds: Callable[[Tensor], Any]) -> None:
    drawn = random_like(given, (400,), torch.Generator().manual_seed(0))
    assert drawn.dtype == given.dtype and drawn.shape == (400,) and holds(drawn)


def test_dynamic_sizes_are_drawn_within_their_range() -> None:
    exported, _, args, _ = program("shapes")
    draws = [onnx_verify._draw_shapes(exported, args, __import__("random").Random(seed)) for seed in range(50)]
    shapes = [shapes for shapes, _ in draws]
    assert {b for _, b in shapes} == {(a[0],) for a, _ in shapes}, "one symbol, one size"
    assert len({a for a, _ in shapes}) > 20
    assert all(2 <= a[0] <= 14 and a[1] >= 2 and a[2] == 5 for a, _ in shapes)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("expected", "actual", "ok"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.00005, 2.0], True),
        ([1.0, 2.0], [1.001, 2.0], False),
        ([1000.0, 0.0], [1000.0, 0.01], True),
        ([1.0, 0.0], [1.0, 0.01], False),
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, 2.0], [1.0, NAN], False),
        ([1.0, NAN], [1.0, 2.0], False),
        ([1.0, INF], [1.0, INF], True),
        ([1.0, INF], [1.0, -INF], False),
        ([1.0, INF], [1.0, 3e38], False),
        ([0.0], [1e-9], True),
        ([0.0], [1e-6], False),
        ([1e-5], [1.2e-5], False),
    ],
)
def test_comparison(expected: list[float], actual: list[float], ok: bool) -> None:
    result = compare("given", "y", torch.tensor(expected), torch.tensor(actual), onnx_verify.RTOL[torch.float32])
    assert result.ok == ok


def test_integers_and_booleans_compare_exactly() -> None:
    assert compare("given", "y", torch.tensor([1, 2]), torch.tensor([1, 2]), 0.5).ok
    assert not compare("given", "y", torch.tensor([10**6, 2]), torch.tensor([10**6 + 1, 2]), 0.5).ok
    assert not compare("given", "y", torch.tensor([True]), torch.tensor([False]), 0.5).ok


def test_shapes_and_dtypes_must_agree() -> None:
    with pytest.raises(ExportError, match=r"'y' \(given inputs\) is torch.float32 of shape \(2,\) in ONNX Runtime and torch"):
        compare("given", "y", torch.zeros(3), torch.zeros(2), 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    report = simple(Mlp().to(dtype), tmp_path / "m.onnx", torch.randn(3, 6, dtype=dtype))
    assert all(p.ok for p in report.parity)
    # A float32 output of a half-precision model is as coarse as the model, and no coarser than that for double.
    assert (max(p.tolerance for p in report.parity) < 1e-5) == (dtype == torch.float64)


def test_parity_without_a_program(tmp_path: Path) -> None:
    _, model = export("mlp", tmp_path / "m.onnx", verify=0)
    parity, notes = check_parity(tmp_path / "m.onnx", model, (torch.randn(4, 6),), random_sets=1)
    assert [p.inputs for p in parity] == ["given", "random 1"] and notes == ()
    with pytest.raises(ExportError, match=r"takes 1 inputs \(input\), and 2 were given"):
        check_parity(tmp_path / "m.onnx", lambda a, b: model(a), (torch.randn(4, 6), torch.randn(1)))
    with pytest.raises(ExportError, match="ONNX Runtime cannot run the model on the given inputs"):
        check_parity(tmp_path / "m.onnx", lambda a: a, (torch.randn(4, 7),))
