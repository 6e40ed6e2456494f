"""Differences between ONNX models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diff.common import onnx_model
from torch import nn

from fxparam.graphdiff import GraphDiffError, diff

ONNX_CHANGES = [
    ({"weight": "v"}, "~ v: name w -> v"),
    ({"alpha": 0.25}, "~ h: arguments (m, alpha=0.5) -> (m, alpha=0.25)"),
    ({"constant": 2.0}, "~ k: arguments (value=float[1] [1.0]) -> (value=float[1] [2.0])"),
    ({"opset": 19}, "~ ai.onnx: arguments (18) -> (19)"),
    ({"then": "Neg"}, "~ i: arguments (c, else_branch=graph "),
    ({"body": "Abs"}, "~ f: function "),
    ({"batch": 3}, "~ x: type float[s0, 2] -> float[3, 2]"),
    ({"swap": True}, "> y: reads k, f, was f, k"),
]


@pytest.mark.parametrize("change, text", ONNX_CHANGES)
def test_what_counts_in_onnx(change: dict[str, Any], text: str) -> None:
    found = diff(onnx_model(), onnx_model(**change))
    assert found
    assert text in str(found)


def test_what_does_not_count_in_onnx(tmp_path: Path) -> None:
    model = onnx_model()
    assert not diff(model, onnx_model(names="_other", batch="n", values=(3.0, 4.0)))
    assert str(diff(model, onnx_model(values=(3.0, 2.0)), values=True).changed[0]) == "~ w: value [1.0, 2.0] -> [3.0, 2.0]"
    onnx.save(onnx_model(), tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0)
    assert not diff(str(tmp_path / "model.onnx"), model, values=True)
    with pytest.raises(GraphDiffError, match=r"the values of 'w' are in another file.*pass the path of the model"):
        diff(onnx.load(tmp_path / "model.onnx", load_external_data=False), model, values=True)


def test_models_from_the_exporter(tmp_path: Path) -> None:
    def program(activation: nn.Module) -> Any:
        model = nn.Sequential(nn.Linear(3, 4), activation).eval()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|copyreg|onnxscript")
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
            return torch.onnx.export(model, (torch.ones(2, 3),), dynamo=True, verbose=False, optimize=False)

    relu = program(nn.ReLU())
    relu.save(tmp_path / "relu.onnx")
    assert not diff(relu, tmp_path / "relu.onnx", values=True)
    assert not diff(relu.model_proto, program(nn.ReLU()))
    assert str(diff(relu, program(nn.Sigmoid()))) == "1 difference: 1 changed\n~ sigmoid: op Relu -> Sigmoid"


def test_an_invalid_onnx_model_is_an_error() -> None:
    model = onnx_model()
    model.graph.node[0].input[0] = "missing"
    with pytest.raises(GraphDiffError, match="Mul node 'm' reads 'missing', which nothing before it produces"):
        diff(model, model)
