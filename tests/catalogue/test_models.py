"""Every entry in a model: training against the eager map, flat nodes, fold, files, state dicts, ONNX."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from catalogue import table
from catalogue.cases import CASES, Case, parametrized
from torch import Tensor, nn

import fxparam as fxp

DRAWS = ("gate", "noise", "variational")
"""Entries that draw random numbers in training mode."""

OPAQUE = {
    "gate": "draws random numbers",
    "noise": "draws random numbers",
    "spectral_norm": "writes its buffers in this mode",
    "variational": "draws random numbers",
}
"""Entries that are not written into the prologue's graph in training mode, and why; in eval mode every entry is."""


def _first() -> list[Case]:
    """The first case of each entry and set of options."""
    first: dict[str, Case] = {}
    for case in CASES:
        first.setdefault(repr(case.entry), case)
    return list(first.values())


each = parametrized(_first(), 1)


class Holder(nn.Module):
    """A weight of any shape and nothing else."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def made(case: Case, seed: int = 0) -> Any:
    torch.manual_seed(17)
    return fxp.transform(Holder(case.weight(seed=seed)), {"weight": case.entry})


def draw(model: Any, case: Case) -> None:
    """Latents as training would have them."""
    with torch.no_grad():
        for latent, drawn in zip(model.latents().values(), case.draw(seed=4), strict=True):
            latent.copy_(drawn)


@each
def test_training_equals_the_eager_map(case: Case) -> None:
    model = made(case)
    draw(model, case)
    if case.entry.name in DRAWS:
        model.eval()
    site = copy.deepcopy(model.get_submodule(model.sites[0].home))
    ours = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    theirs = torch.optim.SGD(site.parameters(), lr=0.01, momentum=0.5)
    for step in range(4):
        x = case.weight(seed=20 + step)
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        refreshes = model.stats.refreshes
        out, want = model(x), x * site()
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
        out.sum().backward()
        want.sum().backward()
        assert model.stats.refreshes == refreshes + 1
        named = dict(site.named_parameters())
        for (name, got), expected in zip(model.named_parameters(), named.values(), strict=True):
            gradients = [torch.zeros(()) if one.grad is None else one.grad for one in (got, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10, msg=name)
        for optimizer in (ours, theirs):
            optimizer.step()


@each
def test_the_prologue_is_flat(case: Case) -> None:
    model = made(case)
    reason = model.report.sites[0].reason or ""
    assert not reason or reason.startswith(OPAQUE.get(case.entry.name, "nothing"))
    for training in (True, False):
        calls = [node for node in model.train(training).prologue.graph.nodes if node.op == "call_module"]
        assert not calls or (reason and training)


@each
def test_fold_restore_and_state_dict(case: Case, tmp_path: Path) -> None:
    model = made(case).eval()
    draw(model, case)
    x = case.weight(seed=9)
    want = model(x).detach()
    plain = fxp.fold(model, example_inputs=(x,))
    assert torch.equal(plain(x), want)
    assert [name for name, _ in plain.named_parameters()] == ["weight"]
    assert torch.equal(fxp.restore(model)(x), want)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    # Another weight at the start, other random draws: all that matters has to come with the file.
    torch.manual_seed(23)
    other = fxp.transform(Holder(case.weight(seed=5)), {"weight": case.entry}).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(x), want)


@parametrized(_first(), len(CASES))
def test_a_declaration_survives_a_file(case: Case, tmp_path: Path) -> None:
    spec = fxp.Spec({"weight": case.entry})
    for name in ("spec.yaml", "spec.json"):
        spec.save(tmp_path / name)
        assert fxp.Spec.load(tmp_path / name) == spec


class Everything(nn.Module):
    """All entries in one model: an export takes seconds, whatever its size."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.holders = nn.ModuleList(Holder(case.weight(torch.float32)) for case in cases)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(holder(x) for holder in self.holders)


def test_every_entry_is_exported_to_onnx(tmp_path: Path) -> None:
    cases = [case for case in _first() if case.weight().dtype == torch.float64]
    net = Everything(cases)
    model = fxp.transform(net, {f"holders.{at}.weight": case.entry for at, case in enumerate(cases)}).eval()
    report = fxp.export_onnx(model, (torch.tensor([0.7]),), tmp_path / "model.onnx")
    assert report.parity
    import onnx

    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {initializer.name for initializer in graph.initializer} >= {f"holders.{at}.weight" for at in range(len(cases))}
    assert {node.op_type for node in graph.node} == {"Mul"}


def test_the_table_in_the_documentation_is_what_is_measured() -> None:
    """``python tests/catalogue/table.py`` writes it."""
    assert table.written() == table.table()
