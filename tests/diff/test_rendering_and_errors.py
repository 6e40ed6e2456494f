"""Differences as text, page and drawing, what errors say, and the examples in the documentation."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch
from diff.common import Net, branches, chain, exported, graph_of, onnx_model
from torch import Tensor, nn

import fxparam.graphdiff
from fxparam.errors import TraceError
from fxparam.graphdiff import GraphDiffError, apply, diff, parse


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_errors_say_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(
        GraphDiffError, match=r"got a dict to compare; expected a torch.fx.GraphModule, .* \.onnx or \.pt2 file"
    ):
        diff({}, {})
    with pytest.raises(GraphDiffError, match=r"got the path '.*model.pt'; expected a file ending in .onnx or .pt2"):
        diff(tmp_path / "model.pt", tmp_path / "model.pt")
    with pytest.raises(
        TraceError, match=r"Branching cannot be traced symbolically .*pass torch.export.export\(model, inputs\)"
    ):
        diff(Branching(), Branching())
    with pytest.raises(GraphDiffError, match=r"cannot compare a module \(torch functions and modules\) with an ONNX model"):
        diff(Net(), onnx_model())
    program = exported(nn.Linear(3, 3), torch.ones(2, 3))
    with pytest.raises(
        GraphDiffError, match=r"an exported program \(aten operators\).*torch.export.export\(model, inputs\) for"
    ):
        diff(nn.Sequential(nn.Linear(3, 3)), program)
    with pytest.raises(
        GraphDiffError, match=r"apply builds torch.fx graphs; got a difference between ONNX model and ONNX model"
    ):
        apply(diff(onnx_model(), onnx_model(alpha=0.1)), Net())


def test_a_page_and_a_drawing_of_a_difference() -> None:
    def a(x: Tensor) -> Tensor:
        return torch.relu(x).view(-1, 2).sum().exp() * 2

    def b(x: Tensor) -> Tensor:
        return torch.sin(torch.relu(x)).view(-1, 3).sum().exp()

    found = diff(graph_of(a), graph_of(b))
    page = found.to_html()
    assert page.startswith("<!doctype html>") and "http" not in page
    assert page.count("<li") == len(found)
    assert '<td class="removed">mul = operator.mul(exp, 2)</td>' in page
    assert "-&gt; (sin, -1, 3)" in page and "(sin, -1, 3)</td>" in page
    dot = found.to_dot()
    assert 'b2 [label="sin = torch.sin(relu)", color="#1a7f37"];' in dot
    assert 'b1 -> b2 [color="#1a7f37"];' in dot
    assert "placeholder" not in dot and "x: input" not in dot
    assert "x: input" in found.to_dot(context=None)
    assert repr(found).startswith("<GraphDiff: ") and "\n" not in repr(found)


def test_long_differences_are_cut() -> None:
    found = diff(chain(3), chain(3, ()), values=False)
    assert not found
    text = str(diff(chain(400), branches(40)))
    assert len(text.splitlines()) == 22 and text.splitlines()[-1].startswith("... and ")


def test_a_listing_that_was_not_written_by_the_library_is_an_error() -> None:
    with pytest.raises(GraphDiffError, match=r"line 1 of a graph listing: got 'nonsense'; expected it to start with '%0'"):
        parse("nonsense\n")


def test_the_documented_examples_run() -> None:
    assert doctest.testmod(fxparam.graphdiff, raise_on_error=True).attempted > 0
    page = Path(__file__).parents[2] / "docs" / "diff.md"
    assert doctest.testfile(str(page), module_relative=False, raise_on_error=True).attempted > 0
