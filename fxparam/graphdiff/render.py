"""A difference as a web page and as a Graphviz graph."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator

from fxparam.graphdiff.graph import Node
from fxparam.graphdiff.result import GraphDiff

_COLORS = {"added": "#1a7f37", "removed": "#cf222e", "changed": "#9a6700", "moved": "#0969da", "same": "#57606a"}
_CONTEXT = 2  # rows shown around a difference
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em;max-width:80em}table{border-collapse:collapse;width:100%}"
    "td{font:12px ui-monospace,monospace;padding:2px 8px;width:50%;vertical-align:top;border-bottom:1px solid #d0d7de}"
    "li{font:13px ui-monospace,monospace;margin:2px 0}"
) + "".join(f".{name}{{color:{color}}}" for name, color in _COLORS.items())

Row = tuple[int | None, int | None]


def to_html(diff: GraphDiff) -> str:
    """A self-contained page: the entries, then both listings side by side, equal stretches left out."""
    state_a, state_b = _states(diff)
    title = html.escape(str(diff).splitlines()[0])
    kinds = {"Added": "added", "Removed": "removed", "Changed": "changed", "Moved": "moved"}
    entries = "".join(f'<li class="{kinds[type(e).__name__]}">{html.escape(str(e))}</li>' for e in diff)

    def cell(nodes: tuple[Node, ...], states: list[str], index: int | None) -> str:
        return "<td></td>" if index is None else f'<td class="{states[index]}">{html.escape(str(nodes[index]))}</td>'

    rows = list(_rows(diff))
    marked = [k for k, (i, j) in enumerate(rows) if i is None or j is None or state_a[i] != "same"]
    near = {k + d for k in marked for d in range(-_CONTEXT, _CONTEXT + 1)}
    lines: list[str] = []
    for k, (i, j) in enumerate(rows):
        if k in near:
            lines.append(f"<tr>{cell(diff.a.nodes, state_a, i)}{cell(diff.b.nodes, state_b, j)}</tr>")
        elif k == 0 or k - 1 in near:
            lines.append('<tr class="same"><td>...</td><td>...</td></tr>')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>"
        f"<body><h1>{title}</h1><ul>{entries}</ul><table>{''.join(lines)}</table></body></html>\n"
    )


def to_dot(diff: GraphDiff, context: int | None = 1) -> str:
    """Both graphs in one: what is common once, removed and added nodes and edges in their colours."""
    _, state_b = _states(diff)
    back = {j: i for i, j in diff.pairs.items()}
    ids_a = {i: f"b{diff.pairs[i]}" if i in diff.pairs else f"a{i}" for i in range(len(diff.a.nodes))}
    nodes = {f"b{j}": (node, state_b[j]) for j, node in enumerate(diff.b.nodes)}
    nodes |= {f"a{i}": (node, "removed") for i, node in enumerate(diff.a.nodes) if i not in diff.pairs}
    old = {(ids_a[e.node], ids_a[i]) for i, n in enumerate(diff.a.nodes) for e in n.inputs}
    new = {(f"b{e.node}", f"b{j}") for j, n in enumerate(diff.b.nodes) for e in n.inputs}
    states = {edge: "same" if edge in old & new else "added" if edge in new else "removed" for edge in old | new}
    shown = {name for name, (_, state) in nodes.items() if state != "same"}
    for _ in range(context or 0):
        shown |= {end for edge in states if shown & set(edge) for end in edge}
    if context is None:
        shown = set(nodes)
    lines = ["digraph difference {", '  node [shape=box, fontname="monospace"];']
    for name, (node, state) in nodes.items():
        if name in shown:
            label = str(node)
            if state == "changed":
                label = f"{diff.a.nodes[back[int(name[1:])]]}\n{node}"
            lines.append(f"  {name} [label={json.dumps(label, ensure_ascii=False)}, color={json.dumps(_COLORS[state])}];")
    for (start, end), state in sorted(states.items()):
        if start in shown and end in shown:
            lines.append(f"  {start} -> {end} [color={json.dumps(_COLORS[state])}];")
    return "\n".join([*lines, "}", ""])


def _states(diff: GraphDiff) -> tuple[list[str], list[str]]:
    """For each node of either graph, what happened to it."""
    a, b = ["removed"] * len(diff.a.nodes), ["added"] * len(diff.b.nodes)
    moved = {id(node) for entry in diff.moved for node in entry.nodes}
    for i, j in diff.pairs.items():
        x, y = diff.a.nodes[i], diff.b.nodes[j]
        a[i] = b[j] = "changed" if x.label != y.label else "moved" if id(y) in moved else "same"
    return a, b


def _rows(diff: GraphDiff) -> Iterator[Row]:
    """Rows of the side-by-side listing in the order of ``b``, each removed node behind the one before it."""
    back = {j: i for i, j in diff.pairs.items()}
    behind: dict[int | None, list[int]] = {}
    last: int | None = None
    for i in range(len(diff.a.nodes)):
        if i in diff.pairs:
            last = diff.pairs[i]
        else:
            behind.setdefault(last, []).append(i)
    yield from ((i, None) for i in behind.get(None, ()))
    for j in range(len(diff.b.nodes)):
        yield back.get(j), j
        yield from ((i, None) for i in behind.get(j, ()))
