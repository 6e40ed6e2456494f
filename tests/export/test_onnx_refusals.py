"""What the ONNX exporter refuses, with the reason, and what it notes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export.common import export, program, simple
from torch import Tensor, nn

from fxparam.errors import ExportError, MissingExtraError
from fxparam.exporters.onnx import export_program


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "got opset=17; expected 18 to 24"),
        ({"verify": -1}, "got verify=-1; expected how many sets"),
        ({"input_names": ["a", "b"]}, r"got 2 input_names \(a, b\); the model has 1 inputs"),
        ({"output_names": ["0.weight"]}, "'0.weight' is empty, given twice, or the name of a parameter"),
        ({"output_names": [""]}, "'' is empty"),
    ],
)
def test_bad_options_are_explained(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export("mlp", tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_draws_random_numbers_is_told_so(tmp_path: Path) -> None:
    exported, model, args, _ = program("mlp")
    with pytest.raises(ExportError, match=r"draws random numbers or keeps state.*call model.eval\(\) first"):
        export_program(exported, tmp_path / "m.onnx", reference=lambda x: model(x) + torch.rand(1), args=args)


def test_inputs_of_another_structure_are_refused(tmp_path: Path) -> None:
    exported, model, args, _ = program("mlp")
    with pytest.raises(ExportError, match="another structure than those the model was exported with"):
        export_program(exported, tmp_path / "m.onnx", reference=model, args=(*args, *args))


class Input(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.w = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


class Weight(Input):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.operation(self.w)


ON_INPUT = "It depends on the input x: what depends on an input stays in the file"


ON_WEIGHT = r"It depends on parameters only: fold it into a constant first \(fxp.fold\(model\)"


@pytest.mark.parametrize(
    ("kind", "operation", "op", "advice"),
    [
        (Weight, torch.matrix_exp, "linalg_matrix_exp", ON_WEIGHT),
        (Weight, torch.linalg.inv, "linalg_inv_ex", ON_WEIGHT),
        (Input, lambda a: torch.linalg.qr(a)[0], "linalg_qr", ON_INPUT),
    ],
)
def test_operations_without_an_onnx_form(kind: type[Input], operation: Any, op: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"aten\.{op}\.\w+ has no ONNX form, at .*test_onnx_refusals\.py:\d+ `.*{advice}"):
        simple(kind(operation), tmp_path / "m.onnx", torch.eye(3))
    assert list(tmp_path.iterdir()) == []


def test_python_numbers_among_the_outputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the model returns 3 \(int\); an ONNX file returns tensors only"):
        simple(Input(lambda x: (x, 3)), tmp_path / "m.onnx", torch.eye(3))  # type: ignore[arg-type,return-value]


class Counter(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


def test_written_buffers_are_noted(tmp_path: Path) -> None:
    report = simple(Counter(), tmp_path / "m.onnx", torch.randn(3))
    assert report.notes == ("the model writes to its buffers calls; in the file they keep the values they have now",)
    assert "note: the model writes" in str(report)


def test_what_the_model_refuses_is_noted_not_compared(tmp_path: Path) -> None:
    def picky(x: Tensor) -> Tensor:
        if not torch.equal(x, x.round()):
            raise ValueError("whole numbers only")
        return x * 2

    report = simple(
        Input(lambda x: x * 2), tmp_path / "m.onnx", torch.eye(3) * 4 + torch.arange(9.0).view(3, 3), reference=picky
    )
    assert {p.inputs for p in report.parity} == {"given"}
    assert report.notes == ("the model refused random inputs (whole numbers only); none were compared",)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported, model, args, _ = program("mlp")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is needed to export ONNX files .* 'fxparam\[onnx\]'"):
        export_program(exported, tmp_path / "m.onnx", reference=model, args=args)
