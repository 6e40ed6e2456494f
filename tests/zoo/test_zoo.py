"""Small public architectures: outputs, gradients, one optimizer step, fold, restore, ONNX and the report of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo.checks import (
    check_fold,
    check_onnx,
    check_outputs,
    check_report,
    check_restore,
    check_training,
    folded,
    pair,
    weight_only_nodes,
)
from zoo.entry import Entry, Inputs
from zoo.everything import ENTRIES

pytestmark = [
    # What the packages' own forwards say, of themselves and of PyTorch.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def cases(check: str) -> pytest.MarkDecorator:
    """Every architecture, the heavy ones under the mark ``zoo``."""
    rows = []
    for entry in ENTRIES:
        marks: list[pytest.MarkDecorator] = [] if entry.light else [pytest.mark.zoo]
        if check in entry.limits:
            marks.append(pytest.mark.xfail(strict=True, reason=entry.limits[check]))
        rows.append(pytest.param(entry, id=entry.name, marks=marks))
    return pytest.mark.parametrize("entry", rows)


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    entry = request.getfixturevalue("entry") if "entry" in request.fixturenames else None
    if isinstance(entry, Entry) and (reason := entry.absent()):
        pytest.skip(reason)


def calls(entry: Entry) -> list[Inputs]:
    """The same inputs twice, then others: what was made at a first call must hold for the next ones."""
    return [entry.given(), entry.given(), entry.given(seed=4)]


@cases("outputs")
def test_transformed_model_has_the_same_outputs(entry: Entry) -> None:
    check_outputs(pair(entry), calls(entry))


@cases("training")
def test_gradients_and_optimizer_steps_are_the_same(entry: Entry) -> None:
    check_training(pair(entry), calls(entry))


@cases("fold")
def test_folded_graph_has_the_same_outputs_and_no_weight_arithmetic(entry: Entry) -> None:
    check_fold(entry, pair(entry), calls(entry)[1:])


@cases("restore")
def test_restored_model_has_its_class_and_the_same_outputs(entry: Entry) -> None:
    check_restore(entry, pair(entry), entry.given())


@cases("onnx")
def test_onnx_file_computes_the_same_or_the_reason_is_the_exporters(entry: Entry, tmp_path: Path) -> None:
    check_onnx(entry, tmp_path / "model.onnx")


@cases("report")
def test_report_names_the_layer_and_the_reasons(entry: Entry) -> None:
    check_report(pair(entry), entry.given())


def test_names_are_unique() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def test_what_fold_takes_away_is_counted() -> None:
    entry = next(entry for entry in ENTRIES if entry.name == "MADE")
    graph = folded(pair(entry).model, entry.given(), arithmetic=False)
    assert len(weight_only_nodes(graph.graph)) == 3
