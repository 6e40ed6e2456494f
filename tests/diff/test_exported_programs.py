"""Differences between programs of ``torch.export``."""

from __future__ import annotations

from pathlib import Path

import torch
from diff.common import exported
from torch import Tensor, fx, nn

from fxparam.graphdiff import apply, diff


class Stateful(nn.Module):
    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": torch.relu(self.norm(self.fc(x))) + torch.tensor([1.0, 2.0, 3.0, 4.0])}


def test_exported_programs(tmp_path: Path) -> None:
    x = torch.ones(2, 3)
    program = exported(Stateful(), x)
    assert not diff(program, exported(Stateful(), x))
    assert not diff(program, program.module())
    found = diff(program, exported(Stateful(momentum=0.2), x))
    assert [c.fields[0][0] for c in found.changed] == ["arguments"]
    assert diff(program, exported(Stateful().eval(), x))
    assert diff(program, exported(Stateful(), torch.ones(5, 3)))
    torch.export.save(program, tmp_path / "model.pt2")
    assert not diff(program, tmp_path / "model.pt2", values=True)
    assert diff(program, exported(Stateful(), x), values=True)


def test_sizes_that_vary_count_but_not_their_names() -> None:
    def program(name: str | None) -> torch.export.ExportedProgram:
        shapes = {"x": {0: torch.export.Dim(name)}} if name else None
        return exported(Stateful().eval(), torch.ones(2, 3), dynamic_shapes=shapes)

    assert not diff(program("batch"), program("n"))
    assert "type float32[s0, 3] -> float32[2, 3]" in str(diff(program("batch"), program(None)))


def test_an_exported_graph_can_be_patched() -> None:
    x = torch.ones(2, 3)
    a, b = exported(Stateful().eval(), x).module(), exported(Stateful(momentum=0.2).eval(), x).module()
    result = apply(diff(a, b), a)
    assert not diff(result, b)
    torch.testing.assert_close(result(x)["y"], a(x)["y"], rtol=0, atol=0)


def test_a_tracer_can_be_given() -> None:
    def trace(module: nn.Module) -> fx.GraphModule:
        return exported(module, torch.ones(2, 3)).module()

    assert not diff(nn.Linear(3, 3), exported(nn.Linear(3, 3), torch.ones(2, 3)), trace=trace)
