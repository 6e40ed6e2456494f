"""Dynamic sizes have the names that the user gave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxparam as fxp

BATCH, TIME = Dim("batch", min=2, max=64), Dim("time", min=2, max=64)


class Many(nn.Module):
    """Nested, keyword and repeated sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        mixed = self.linear(x) + pair[0] + extra["shift"]
        return mixed, torch.cat([pair[1], pair[1]])


def inputs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(4, 5, 3), (torch.randn(4, 5, 3), torch.randn(7, 2))), {"extra": {"shift": torch.randn(4, 1, 3)}}


def sizes(path: Path) -> dict[str, list[Any]]:
    graph = onnx.load(path).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


SHAPES: dict[str, Any] = {
    "by name": {
        "x": {0: BATCH, 1: TIME},
        "pair": ({0: BATCH, 1: TIME}, {0: Dim("rows", min=2)}),
        "extra": {"shift": {0: BATCH}},
    },
    "sequences": {
        "x": (BATCH, TIME, None),
        "pair": ([BATCH, TIME, None], [Dim("rows", min=2), None]),
        "extra": {"shift": (BATCH, None, None)},
    },
}


@pytest.mark.parametrize("form", SHAPES)
def test_names_of_dimensions_are_those_of_the_file(form: str, tmp_path: Path) -> None:
    args, kwargs = inputs()
    model = fxp.transform(Many(), {"linear.weight": fxp.orthogonal()})
    path = tmp_path / "model.onnx"
    report = fxp.export_onnx(
        model, args, path, kwargs=kwargs, dynamic_shapes=SHAPES[form], input_names=["x", "a", "b", "c"], output_names=["y", "z"]
    )
    assert all(parity.excess <= 1 for parity in report.parity)
    assert sizes(path) == {
        "x": ["batch", "time", 3],
        "a": ["batch", "time", 3],
        "b": ["rows", 2],
        "c": ["batch", 1, 3],
        "y": ["batch", "time", 3],
        "z": ["2*rows", 2],
    }


def test_positional_shapes_and_sizes_without_a_name(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fxp.export_onnx(nn.Linear(3, 3), (torch.randn(4, 3),), path, dynamic_shapes=({0: BATCH},), output_names=["y"])
    assert sizes(path) == {"input": ["batch", 3], "y": ["batch", 3]}
    fxp.export_onnx(nn.Linear(3, 3), (torch.randn(4, 3),), path, dynamic_shapes=({0: Dim.AUTO},), output_names=["y"])
    first, rest = sizes(path)["input"]
    assert isinstance(first, str) and rest == 3


def test_derived_sizes_are_written_with_the_name_of_their_root(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def forward(self, whole: Tensor, half: Tensor) -> Tensor:
            return whole.reshape(2, -1) * half

    path = tmp_path / "model.onnx"
    half = Dim("half", min=2, max=32)
    shapes = ({0: 2 * half}, {0: half})
    fxp.export_onnx(Halves(), (torch.randn(8), torch.randn(4)), path, dynamic_shapes=shapes, output_names=["y"])
    assert sizes(path) == {"whole": ["2*half"], "half": ["half"], "y": [2, "half"]}
