"""Pictures of graphs: what is computed from parameters only stands out, so that before and after can be told at a glance.

Each node stands right before its first reader, as late as possible; within a layer, nodes are ordered by the mean position of
their neighbours (Sugiyama, Tagawa and Toda 1981).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.export import ExportedProgram

from fxparam.errors import ExportError, missing_extra

if TYPE_CHECKING:
    import networkx as nx

Drawable = fx.GraphModule | fx.Graph | ExportedProgram

COLOURS = {
    "parameter": ("parameter or buffer", "#cfe2f3"),
    "computed": ("computed from parameters only", "#f6b26b"),
    "call": ("computed per call", "#ffffff"),
    "input": ("input or output", "#d9d9d9"),
}
"""For each kind of node its meaning, as the legend says it, and its colour."""

_SUFFIXES = (".png", ".svg", ".pdf")
_SWEEPS = 8
_COLUMN, _ROW = 1.25, 0.5  # inches


def draw(graphs: Drawable | Mapping[str, Drawable], path: str | os.PathLike[str]) -> Path:
    """Draw graphs side by side.

    Args:
        graphs: a graph module, a graph or an exported program; or several by their titles,
            ``{"before": a, "after": b}``.
        path: the file to write: ``.png``, ``.svg`` or ``.pdf``.

    Returns:
        The path.

    Raises:
        ExportError: another ending, or nothing to draw.
        MissingExtraError: matplotlib is not installed.
    """
    target = Path(path)
    panels = dict(graphs) if isinstance(graphs, Mapping) else {"": graphs}
    if target.suffix not in _SUFFIXES:
        raise ExportError(f"got the picture {target.name!r}; expected a name that ends in {', '.join(_SUFFIXES)}")
    if not panels:
        raise ExportError("got no graph to draw; expected a graph module, or several by their titles")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "draw", "to draw graphs") from error
    networks = {title: layered(graph) for title, graph in panels.items()}
    widths = [1 + max(abs(at["x"]) for _, at in network.nodes(data=True)) for network in networks.values()]
    height = 1 + max(at["layer"] for network in networks.values() for _, at in network.nodes(data=True))
    # Equal graphs give equal bytes: no date, and names that do not depend on addresses.
    with mpl.rc_context({"svg.hashsalt": "fxparam", "svg.fonttype": "none"}):
        figure = Figure(figsize=(2 * _COLUMN * max(2.5, sum(widths)), _ROW * (height + 2)), layout="constrained")
        axes = figure.subplots(1, len(networks), squeeze=False, width_ratios=widths)[0]
        for axis, width, (title, network) in zip(axes, widths, networks.items(), strict=True):
            _panel(axis, network, title, width, height)
        _legend(figure)
        figure.savefig(target, dpi=150, metadata={} if target.suffix == ".png" else {_DATE[target.suffix]: None})
    return target


_DATE = {".svg": "Date", ".pdf": "CreationDate"}


def layered(graph: Drawable) -> nx.DiGraph:
    """The graph with a ``label``, a ``kind`` (of ``COLOURS``), a ``layer`` and a place ``x`` in it for each node."""
    import networkx as nx

    nodes = _shown(graph)
    network: nx.DiGraph = nx.DiGraph()
    for node in nodes:
        network.add_node(node.name, label=_label(node), kind="call")
        network.add_edges_from((other.name, node.name) for other in node.all_input_nodes)
    inputs = [node.name for node in nodes if node.op == "placeholder"]
    per_call = set(inputs).union(*(nx.descendants(network, name) for name in inputs))
    for node in nodes:
        at = network.nodes[node.name]
        if node.op in ("placeholder", "output"):
            at["kind"] = "input"
        elif node.op == "get_attr":
            at["kind"] = "parameter"
        elif node.name not in per_call:
            at["kind"] = "computed"
    _place(network)
    return network


def _shown(graph: Drawable) -> list[fx.Node]:
    """The nodes worth showing: without parameters that nobody reads and checks of inputs."""
    if isinstance(graph, ExportedProgram):
        found: Any = graph.module(check_guards=False)
        graph = found
    nodes = graph.graph.nodes if isinstance(graph, fx.GraphModule) else graph.nodes  # type: ignore[union-attr]
    return [node for node in nodes if node.users or node.op in ("output", "placeholder")]


def _label(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return node.op.replace("placeholder", "input")
    if node.op != "call_function":
        return str(node.target)
    name = str(getattr(node.target, "__name__", node.target))
    return name.removesuffix(".default").partition(".")[0] if "." in name else name


def _place(network: nx.DiGraph) -> None:
    import networkx as nx

    generations = list(nx.topological_generations(network.reverse(copy=False)))
    for layer, names in enumerate(reversed(generations)):
        for name in names:
            network.nodes[name]["layer"] = layer
    rows: dict[int, list[str]] = {}
    for name, layer in network.nodes(data="layer"):
        rows.setdefault(layer, []).append(name)
    for row in rows.values():
        _spread(network, row)
    for _ in range(_SWEEPS):
        for layer in sorted(rows):
            rows[layer].sort(key=lambda name: _mean_of_neighbours(network, name))
            _spread(network, rows[layer])


def _spread(network: nx.DiGraph, row: list[str]) -> None:
    for position, name in enumerate(row):
        network.nodes[name]["x"] = position - (len(row) - 1) / 2


def _mean_of_neighbours(network: nx.DiGraph, name: str) -> float:
    places = [network.nodes[other]["x"] for other in (*network.predecessors(name), *network.successors(name))]
    return sum(places) / len(places) if places else 0.0


def _panel(axis: Any, network: nx.DiGraph, title: str, width: float, height: int) -> None:
    axis.set(xlim=(-width, width), ylim=(-height, 0.5), title=title)
    axis.axis("off")
    place = {name: (at["x"], -at["layer"]) for name, at in network.nodes(data=True)}
    for source, target in network.edges:
        bend = 0.0 if place[source][1] - place[target][1] == 1 else 0.15
        axis.annotate(
            "",
            xy=place[target],
            xytext=place[source],
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#888888",
                "linewidth": 0.7,
                "shrinkA": 7,
                "shrinkB": 8,
                "connectionstyle": f"arc3,rad={bend}",
            },
        )
    for name, at in network.nodes(data=True):
        box = {"boxstyle": "round,pad=0.3", "facecolor": COLOURS[at["kind"]][1], "edgecolor": "#444444", "linewidth": 0.7}
        axis.text(*place[name], _wrapped(at["label"]), ha="center", va="center", fontsize=6, bbox=box)


def _wrapped(label: str) -> str:
    """A long dotted name on two lines."""
    path, _, last = label.rpartition(".")
    return f"{path}\n.{last}" if len(label) > 24 and path else label


def _legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, edgecolor="#444444", label=meaning) for meaning, colour in COLOURS.values()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=7, frameon=False)
