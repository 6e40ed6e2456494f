"""Prints the table of the zoo and writes it to ``docs/zoo.md``: ``python tests/zoo/table.py [part of a name]``.

With a name it only prints. Times are of float32 models, one thread, medians of interleaved rounds.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from zoo.checks import Pair, exported, folded, layer_of, loss_of, pair, run, weight_only_nodes  # noqa: E402
from zoo.entry import Entry, Inputs  # noqa: E402
from zoo.everything import ENTRIES  # noqa: E402

import fxparam as fxp  # noqa: E402

ROUNDS = 15
HEAD = "architecture | source | parameters | sites | traced | moved | folded | left | forward | step | ONNX"

TEXT = """# Zoo

Small instances of public architectures with random weights. For each of them the tests compare the transformed model with
what PyTorch computes alone: outputs, gradients, one optimizer step, `fold`, `restore`, and the ONNX file in ONNX Runtime.
`make zoo` runs all of them, `make unit` the light ones. `python tests/zoo/table.py` makes this page.

- *sites*: computed weights. Models that carry parametrizations, legacy hooks or pruning, and models that compute weights in
  their forward, get no spec. The others get weight norm, orthogonal, low-rank or LoRA weights on some layers, and are
  compared with the same by `torch.nn.utils.parametrize`.
- *traced*: the model as a whole, by symbolic tracing or by recording a call; in parts (a module around them does what no graph
  shows); or not at all (live). A recorded graph runs only where there is weight arithmetic to move out of the call.
- *moved*: operations of the prologue, which run once per optimizer step. *folded*: operations on weights alone that `fold`
  takes out of the exported plain model besides; *left*: how many of them it leaves.
- *forward*, *step*: time of a forward without gradient, and of a training step, relative to the model as PyTorch computes it.
  The models are tiny: what is measured is overhead, not what large weights gain. Medians of {rounds} interleaved rounds,
  torch {torch}, one thread.

{summary}

{table}
"""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        entry: the architecture.
        cells: the columns after name and source.
        why: why it is not traced as a whole.
        refused: why a stage was not possible.
    """

    entry: Entry
    cells: tuple[str, ...]
    why: str = ""
    refused: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        return "| " + " | ".join((self.entry.name, self.entry.source, *self.cells)) + " |"


def measured(entry: Entry) -> Row:
    """Everything the table says about one architecture."""
    if reason := entry.absent():
        return Row(entry, ("not installed", *("",) * 8), refused=(reason,))
    both, inputs = pair(entry, torch.float32), entry.given(torch.float32)
    forward, step = times(both, inputs)
    both.train(False)
    run(both.model, inputs)
    report = both.model.report
    refused: list[str] = []
    found, left = folding(both, inputs, refused)
    cells = (
        f"{sum(p.numel() for p in both.model.parameters()):,}",
        str(len(both.model.sites)),
        layer_of(report),
        str(report.prologue_nodes),
        found,
        left,
        f"{forward:.2f}",
        f"{step:.2f}",
        onnx(both, inputs, refused),
    )
    first = report.layers[0]
    return Row(entry, cells, first.reason if first.layer == "live" else "", tuple(dict.fromkeys(refused)))


def times(both: Pair, inputs: Inputs) -> tuple[float, float]:
    """Forward and training step, relative to the oracle."""
    both.train(False)
    with torch.no_grad():
        forward = ratio(lambda: run(both.model, inputs), lambda: run(both.oracle, inputs))
    both.train(True)
    return forward, ratio(training(both.model, inputs), training(both.oracle, inputs))


def training(model: torch.nn.Module, inputs: Inputs) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(run(model, inputs)).backward()
        optimizer.step()

    return step


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    samples: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 3):
        for call, seconds in zip((ours, theirs), samples, strict=True):
            start = time.perf_counter()
            call()
            if number >= 3:
                seconds.append(time.perf_counter() - start)
    return statistics.median(samples[0]) / statistics.median(samples[1])


def folding(both: Pair, inputs: Inputs, refused: list[str]) -> tuple[str, str]:
    """Operations on weights alone in the exported plain model, less those that are left after ``fold``; and those."""
    try:
        left = len(weight_only_nodes(folded(both.model, inputs).graph))
    except Exception as error:  # a table of everything goes on
        refused.append(f"fold: {first_line(error)}")
        return "", ""
    plain = exported(both.model, inputs)
    found = len(weight_only_nodes(plain.module().graph)) if plain is not None else left
    return str(max(0, found - left)), str(left)


def onnx(both: Pair, inputs: Inputs, refused: list[str]) -> str:
    args, kwargs = inputs
    with tempfile.TemporaryDirectory() as folder:
        try:
            fxp.export_onnx(both.model, args, Path(folder, "model.onnx"), kwargs=kwargs)
        except Exception as error:  # a table of everything goes on
            refused.append(f"ONNX: {first_line(error)}")
            return "refused"
    return "ok"


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0].removesuffix(". No file was changed") if str(error) else type(error).__name__


def summary(rows: list[Row]) -> str:
    here = [row for row in rows if row.cells[0] != "not installed"]
    bodies = Counter(row.cells[2] for row in here)
    kinds = ", ".join(f"{count} {kind}" for kind, count in bodies.most_common())
    left = sum(int(row.cells[5] or 0) for row in here)
    exports = sum(row.cells[8] == "ok" for row in here)
    medians = [statistics.median(float(row.cells[at]) for row in here) for at in (6, 7)]
    return (
        f"{len(here)} architectures work; traced: {kinds}. {left} operations on weights alone are left after `fold`, "
        f"{exports} models are written as ONNX. Median ratios: forward {medians[0]:.2f}, step {medians[1]:.2f}."
    )


def notes(rows: list[Row]) -> Iterator[str]:
    """The reasons, each with the architectures it holds for."""
    for title, reasons in (
        ("Why a model is not traced as a whole", [(row.why, row.entry.name) for row in rows if row.why]),
        ("What was refused", [(reason, row.entry.name) for row in rows for reason in row.refused]),
    ):
        grouped: dict[str, list[str]] = {}
        for reason, name in reasons:
            grouped.setdefault(reason, []).append(name)
        if grouped:
            yield f"\n## {title}\n"
            yield from (f"- {', '.join(names)}: `{reason}`" for reason, names in grouped.items())


def page(rows: list[Row]) -> str:
    table = "\n".join([f"| {HEAD} |", "| --- | --- " + "| ---: " * 9 + "|", *(row.line for row in rows)])
    text = TEXT.format(rounds=ROUNDS, torch=torch.__version__.partition("+")[0], summary=summary(rows), table=table)
    return text + "\n".join([*notes(rows), ""])


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    wanted = " ".join(sys.argv[1:]).lower()
    rows = []
    for entry in ENTRIES:
        if wanted in f"{entry.source} {entry.name}".lower():
            print(f"{entry.name} ...", file=sys.stderr)
            rows.append(measured(entry))
    text = page(rows)
    print(text)
    if not wanted:
        (ROOT / "docs" / "zoo.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
