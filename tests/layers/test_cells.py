"""Recurrent cells in a loop of Python: one evaluation of the weight per step, however many calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers.common import (
    FLAT,
    TRACES,
    Case,
    Check,
    check_training,
    every_check,
    made,
    step,
)
from torch import Tensor, nn

import fxparam as fxp


class Loop(nn.Module):
    """Runs a cell over time, from its own start or a given state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, state: Any = None) -> list[Tensor]:
        outputs = []
        for x_t in x:
            state = self.cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return outputs


def steps() -> tuple[Any, ...]:
    return (torch.randn(6, 3, 4),)


def alive() -> nn.RNNCell:
    """A rectified cell of which, with positive inputs, some units are on."""
    cell = nn.RNNCell(4, 4, nonlinearity="relu")
    nn.init.uniform_(cell.weight_ih, 1.0, 2.0)
    return cell


CELLS = {"RNN": nn.RNNCell, "LSTM": nn.LSTMCell, "GRU": nn.GRUCell}
CASES: dict[str, Case] = {
    **{f"{name} hidden": Case(lambda cls=cls: Loop(cls(4, 4)), ("cell.weight_hh",), steps) for name, cls in CELLS.items()},  # type: ignore[misc]
    **{f"{name} all": Case(lambda cls=cls: Loop(cls(4, 5)), ("cell.*",), steps, FLAT) for name, cls in CELLS.items()},  # type: ignore[misc]
    "no bias": Case(lambda: Loop(nn.GRUCell(4, 5, bias=False)), ("cell.weight_?h",), steps),
    "relu": Case(lambda: Loop(alive()), ("cell.weight_hh",), lambda: (torch.rand(6, 3, 4),)),
    "bare": Case(lambda: nn.GRUCell(4, 5), ("weight_hh", "bias_ih"), lambda: (torch.randn(3, 4), torch.randn(3, 5)), FLAT),
    "bare LSTM": Case(
        lambda: nn.LSTMCell(4, 5), ("weight_hh",), lambda: (torch.randn(3, 4), (torch.randn(3, 5), torch.randn(3, 5)))
    ),
    "state": Case(lambda: Loop(nn.RNNCell(4, 5)), ("cell.weight_hh",), lambda: (*steps(), torch.randn(3, 5))),
}


@every_check(CASES, kinds=3)
def test_what_every_layer_must_do(check: Check, case: Case, kind: str, trace: str) -> None:
    check(case, kind, trace)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("cls", CELLS.values())
def test_one_evaluation_per_optimizer_step(cls: Any, trace: str) -> None:
    model = fxp.transform(Loop(cls(4, 4)), {"cell.weight_hh": fxp.orthogonal()}, trace=trace)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for done in range(3):
        for _ in range(2):
            torch.stack(model(*steps())).sin().sum().backward()
        assert model.stats.refreshes == done + 1
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("trace", TRACES)
def test_one_cell_for_two_directions(trace: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forwards = self.backwards = nn.GRUCell(4, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a = b = x.new_zeros(x.shape[1], 5)
            for i in range(x.shape[0]):
                a, b = self.forwards(x[i], a), self.backwards(x[-1 - i], b)
            return a, b

    case = Case(Both, ("backwards.weight_hh",), steps)
    check_training(case, "weight_norm", trace)
    model, oracle = made(case, "orthogonal", trace)
    step(model, oracle, case, 0)
    assert model.forwards.weight_hh.data_ptr() == model.backwards.weight_hh.data_ptr()
