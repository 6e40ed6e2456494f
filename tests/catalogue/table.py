"""What every entry can do, measured: the table in docs/catalogue.md. ``python tests/catalogue/table.py`` writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from catalogue.cases import CASES, COMPLEX_ONLY, Case
from torch.fx.experimental.proxy_tensor import make_fx

import fxparam as fxp

PAGE = Path(__file__).parents[2] / "docs" / "catalogue.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


class Holder(nn.Module):
    """A weight of any shape and nothing else."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.weight = nn.Parameter(case.weight(_dtype(case)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def _dtype(case: Case) -> torch.dtype:
    return torch.complex128 if case in COMPLEX_ONLY else torch.float64


def table() -> str:
    """The table as Markdown."""
    by_entry: dict[str, list[Case]] = {}
    for case in [*CASES, *COMPLEX_ONLY]:
        by_entry.setdefault(case.entry.name, []).append(case)
    lines = [
        "| entry | right inverse | of weights | `sample`, `contains` | nodes, eval | in training | batched | complex |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(name, cases) for name, cases in sorted(by_entry.items())]
    return "\n".join(lines)


def _row(name: str, cases: list[Case]) -> str:
    cells = [
        f"`{name}`",
        _inverse(cases),
        "any" if all(case.outside is None for case in cases) else "in the image",
        "yes" if all(map(_samples, cases)) else "no",
        _span(map(_nodes, cases)),
        _training(cases),
        "yes" if any(len(case.shape) > 2 for case in cases) else "",
        "only" if cases[0] in COMPLEX_ONLY else "yes" if any(case.complex for case in cases) else "",
    ]
    return f"| {' | '.join(cells)} |"


def _inverse(cases: list[Case]) -> str:
    if all(case.invertible for case in cases):
        return "bit for bit" if all(case.exact for case in cases) else "to rounding"
    return "not for all options"


def _samples(case: Case) -> bool:
    module = case.build(_dtype(case))
    return bool(module.contains(module.sample(generator=torch.Generator().manual_seed(1))))


def _nodes(case: Case) -> int:
    dtype = _dtype(case)
    graph = make_fx(case.build(dtype), pre_dispatch=True)(*case.draw(dtype=dtype)).graph
    return sum(node.op == "call_function" for node in graph.nodes)


def _span(counts: Iterable[int]) -> str:
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _training(cases: list[Case]) -> str:
    """Whether the maps are written into the prologue's graph in training mode, or called, and why."""
    some = cases[:3]
    reasons = {fxp.transform(Holder(case), {"weight": case.entry}).report.sites[0].reason or "" for case in some} - {""}
    return "called: " + "; ".join(sorted(reasons)) if reasons else "flat"


def written() -> str:
    """The table that the page has."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def write() -> None:
    """Put the table into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    write()
