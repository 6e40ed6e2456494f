"""One training step of a recurrent cell that reads an orthogonal matrix at each of 100 time steps.

The matrix is the exponential of a skew-symmetric latent. Contestants: the parametrization evaluated at each read (PyTorch's
default), PyTorch's ``cached()``, the matrix hoisted out of the loop by hand, fxparam, and the cell with a plain matrix.

    python benchmarks/recurrence.py [--hidden 190] [--steps 100]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from harness import race, table
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

import fxparam as fxp


class Reader(nn.Module):
    """Reads a sequence with a recurrent cell."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = nn.RNNCell(28, hidden)
        self.out = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.out(h)


class HoistedByHand(nn.Module):
    """The same, with the matrix read once before the loop and put in the place of the weight."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        self.plain = nn.RNNCell(28, reader.cell.hidden_size)
        self.plain.weight_ih, self.plain.bias_ih = reader.cell.weight_ih, reader.cell.bias_ih
        self.plain.bias_hh = reader.cell.bias_hh
        del self.plain.weight_hh

    def forward(self, x: Tensor) -> Tensor:
        self.plain.weight_hh = self.reader.cell.weight_hh
        h = x.new_zeros(x.shape[0], self.plain.hidden_size)
        for t in range(x.shape[1]):
            h = self.plain(x[:, t], h)
        return self.reader.out(h)


def training_step(model: nn.Module, x: Tensor, *, cached: bool = False) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def loss_and_backward() -> None:
        model(x).square().mean().backward()

    def step() -> None:
        optimizer.zero_grad()
        if cached:
            with parametrize.cached():
                loss_and_backward()
        else:
            loss_and_backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=190)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain = Reader(options.hidden)
    per_read = copy.deepcopy(plain)
    orthogonal(per_read.cell, "weight_hh", orthogonal_map="matrix_exp")
    transformed = fxp.transform(per_read, copy=True)
    x = torch.randn(32, options.steps, 28)
    contestants = {
        "plain matrix": training_step(plain, x),
        "hoisted by hand": training_step(HoistedByHand(copy.deepcopy(per_read)), x),
        "fxparam": training_step(transformed, x),
        "cached()": training_step(copy.deepcopy(per_read), x, cached=True),
        "per read": training_step(copy.deepcopy(per_read), x),
    }
    timings = race(contestants, rounds=options.rounds)
    print(
        table(
            f"Recurrence, hidden {options.hidden}, {options.steps} steps, forward + backward + SGD", timings, "hoisted by hand"
        )
    )
    stats = transformed.stats
    calls = options.rounds + 3
    print(f"\nprologue per optimizer step: {stats.refreshes / calls:g} evaluations, {stats.backwards / calls:g} backwards")
    print(f"speed-up over per-read: {timings['per read'].median / timings['fxparam'].median:.1f}x")


if __name__ == "__main__":
    main()
