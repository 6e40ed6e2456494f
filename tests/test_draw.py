"""Pictures: which node gets which colour and place, and what is written to the file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxparam.draw import COLOURS, draw, layered
from fxparam.errors import ExportError, MissingExtraError


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * torch.exp(self.log_scale).neg()


def kinds(graph: fx.GraphModule) -> dict[str, str]:
    return {at["label"]: at["kind"] for _, at in layered(graph).nodes(data=True)}


def test_kind_says_what_a_value_depends_on() -> None:
    assert kinds(fx.symbolic_trace(Scaled())) == {
        "input": "input",
        "inner": "call",
        "log_scale": "parameter",
        "exp": "computed",
        "neg": "computed",
        "mul": "call",
        "output": "input",
    }


def test_exported_program_is_drawn_with_its_parameter_names() -> None:
    network = layered(torch.export.export(Scaled(), (torch.ones(1, 3),)))
    labels = [at["label"] for _, at in network.nodes(data=True)]
    assert {"inner.weight", "inner.bias", "log_scale", "linear", "exp"} <= set(labels)
    assert {at["kind"] for _, at in network.nodes(data=True)} == set(COLOURS)


def test_every_edge_goes_down_and_a_parameter_stands_before_its_first_reader() -> None:
    network = layered(torch.export.export(Scaled(), (torch.ones(1, 3),)))
    layer = dict(network.nodes(data="layer"))
    assert all(layer[source] < layer[target] for source, target in network.edges)
    for name in network:
        if not network.in_degree(name):
            assert layer[name] == min(layer[user] for user in network[name]) - 1
    places = [(at["layer"], at["x"]) for _, at in network.nodes(data=True)]
    assert len(set(places)) == len(places)


def test_what_nobody_reads_is_left_out() -> None:
    module = fx.symbolic_trace(Scaled())
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        module.graph.get_attr("inner.weight")
    assert "inner.weight" not in kinds(module)


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_ending_chooses_the_format(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = draw(fx.symbolic_trace(Scaled()), tmp_path / f"graph{suffix}")
    assert path == tmp_path / f"graph{suffix}"
    assert path.read_bytes().startswith(magic)


def test_svg_holds_titles_and_labels_and_is_reproducible(tmp_path: Path) -> None:
    graphs = {"before": fx.symbolic_trace(Scaled()), "after": fx.symbolic_trace(nn.Sequential(nn.ReLU()))}
    text = draw(graphs, tmp_path / "a.svg").read_text()
    words = re.findall(r">([^<>]+)</text>", text)
    assert {"before", "after", "log_scale", "exp", "inner", COLOURS["computed"][0]} <= set(words)
    assert COLOURS["computed"][1] in text
    assert draw(graphs, tmp_path / "b.svg").read_text() == text


def test_errors_name_what_is_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fx.symbolic_trace(Scaled())
    with pytest.raises(ExportError, match=r"got the picture 'graph\.gif'; expected a name that ends in \.png, \.svg, \.pdf"):
        draw(module, tmp_path / "graph.gif")
    with pytest.raises(ExportError, match="got no graph to draw"):
        draw({}, tmp_path / "graph.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fxparam\[draw\]'"):
        draw(module, tmp_path / "graph.svg")
    assert not list(tmp_path.iterdir())
