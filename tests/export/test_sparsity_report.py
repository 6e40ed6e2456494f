"""Zeros among the weights of an exported file: counted in the tensors, stated in the report and in the metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxparam as fxp
from fxparam.exporters.sparsity import SPARSITY, sparsity_of


def eager(weight: np.ndarray, dim: int) -> bool:
    """2:4 by its definition, one group after the other."""
    rows = weight.swapaxes(dim, -1)
    size = rows.shape[-1]
    groups = [rows[at][k : k + 4] for at in np.ndindex(rows.shape[:-1]) for k in range(0, size, 4)]
    return size % 4 == 0 and all(np.count_nonzero(group) <= 2 for group in groups)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(4, 8), (8, 4), (3, 4, 2, 2), (4, 6), (12,)]), st.integers(0, 1), st.booleans())
def test_the_pattern_is_that_of_the_definition(seed: int, shape: tuple[int, ...], dim: int, pruned: bool) -> None:
    torch.manual_seed(seed)
    dim = min(dim, len(shape) - 1)
    weight = torch.randn(shape)
    if pruned and shape[dim] % 4 == 0:
        weight = fxp.semi_structured(dim=dim).build(weight)(weight)
        if seed % 3 == 0:  # a single element too many
            weight.flatten()[seed % weight.numel()] = 1
    elif pruned:
        weight = fxp.mask(density=0.4).build(weight)(weight)
    found = sparsity_of(weight.numpy(), dim)
    assert found.density == np.count_nonzero(weight) / weight.numel()
    assert found.semi_structured == eager(weight.numpy(), dim)


def test_edges() -> None:
    assert sparsity_of(np.zeros((2, 8)), 1).semi_structured and sparsity_of(np.zeros((2, 8))).density == 0
    assert not sparsity_of(np.zeros((2, 6))).semi_structured, "groups of four need a multiple of four"
    assert not sparsity_of(np.zeros((8, 8)), None).semi_structured
    assert sparsity_of(np.empty((0, 4))).density == 1
    integers = np.array([[3, 3, 5, 6], [7, 3, 3, 3]], dtype=np.int8)
    assert sparsity_of(integers, 1, zero=3).semi_structured and sparsity_of(integers, 1, zero=3).density == 3 / 8
    assert not sparsity_of(integers, 1, zero=np.array([[3], [7]])).semi_structured


class Layers(nn.Module):
    """The layers whose dimension of inputs is found in the graph: three inputs to a linear layer make a MatMul."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.three = nn.Linear(8, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 4, 3)
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.embed = nn.Embedding(6, 4)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        hidden = self.three(self.linear(x).unsqueeze(1))
        return self.up(self.conv(hidden.transpose(1, 2))).transpose(1, 2) @ self.matrix + self.embed(tokens)


DIMS = {"linear.weight": 1, "three.weight": 1, "conv.weight": 1, "up.weight": 0, "matrix": 0}


def export(path: Path, spec: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = fxp.transform(Layers(), spec)
    return model, fxp.export_onnx(model, (torch.randn(2, 8), torch.tensor([[1], [4]])), path, **options)


@pytest.mark.parametrize("integers", [False, True])
def test_each_layer_by_the_dimension_it_sums_over(integers: bool, tmp_path: Path) -> None:
    spec = {name: fxp.semi_structured(dim=dim) >> fxp.fake_quantize(symmetric=False) for name, dim in DIMS.items()}
    _, report = export(tmp_path / "m.onnx", spec, integers=integers)
    assert len(report.integers) == (5 if integers else 0)
    assert {name: (s.dim, s.semi_structured) for name, s in report.sparsity.items()} == {n: (d, True) for n, d in DIMS.items()}
    assert all(0.4 < s.density <= 0.5 for s in report.sparsity.values())
    assert "matrix: 50.0% zeros, 2:4 along dimension 0" in str(report)


def test_the_file_says_so_and_a_dense_one_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    _, report = export(path, {"linear.weight": fxp.semi_structured(), "embed.weight": fxp.mask(density=0.5)})
    stated = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(stated[SPARSITY]) == {
        "linear.weight": {"density": 0.5, "dim": 1, "2:4": True},
        "embed.weight": {"density": 0.5, "dim": None, "2:4": False},
    }
    assert "embed.weight: 50.0% zeros" in str(report).splitlines()[-1]
    _, dense = export(path, {})
    assert dense.sparsity == {} and not onnx.load(path).metadata_props


def test_refit_states_what_is_in_the_file_then(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model, _ = export(path, {"linear.weight": fxp.mask(density=0.5)})
    plain = fxp.restore(model)
    fxp.refit_onnx(path, plain)
    assert SPARSITY in {p.key for p in onnx.load(path).metadata_props}
    nn.init.ones_(plain.get_parameter("linear.weight"))
    fxp.refit_onnx(path, plain)
    assert not onnx.load(path).metadata_props
