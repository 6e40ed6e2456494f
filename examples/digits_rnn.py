"""An RNN with an orthogonal recurrent matrix reads handwritten digits pixel by pixel, and is shipped as a plain model.

It is trained beside an unconstrained RNN of the same size, then folded, exported to ONNX, checked in ONNX Runtime, and given
new weights there. The file, and a picture of the graph before and after folding, go to demo-output/.

Run it with ``make demo`` or ``python examples/digits_rnn.py``; FXPARAM_EXAMPLE_QUICK=1 runs a tiny version.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fxparam as fxp
from fxparam.draw import Drawable, draw

QUICK = os.environ.get("FXPARAM_EXAMPLE_QUICK", "") not in ("", "0")
HIDDEN = 16 if QUICK else 128
EPOCHS = 1 if QUICK else 25
BATCH = 64
SEED = 0
OUTPUT = Path("demo-output")
RECURRENT = "cell.weight_hh"


class DigitReader(nn.Module):
    """Reads ``(batch, pixels)`` one pixel at a time and names the digit: ``(batch, 10)``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = nn.RNNCell(1, hidden)
        self.readout = nn.Linear(hidden, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        state = pixels.new_zeros(pixels.shape[0], self.cell.hidden_size)
        for step in range(pixels.shape[1]):
            state = self.cell(pixels[:, step : step + 1], state)
        return self.readout(state)


class Images(NamedTuple):
    pixels: Tensor
    digits: Tensor


def load() -> tuple[Images, Images]:
    """The 1,797 digits of scikit-learn, a quarter of them kept for the test."""
    data = load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32) / 16
    digits = torch.tensor(data.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(SEED))
    order = order[:256] if QUICK else order
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    return Images(pixels[train], digits[train]), Images(pixels[test], digits[test])


def train(model: nn.Module, data: Images, epochs: int, title: str, console: Console) -> float:
    """Train with Adam and cross entropy; returns the seconds it took."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    shuffle = torch.Generator().manual_seed(SEED)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    began = perf_counter()
    model.train()
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        task = progress.add_task(f"{title:<13}", total=epochs, loss=float("nan"))
        for _ in range(epochs):
            for batch in torch.randperm(len(data.digits), generator=shuffle).split(BATCH):
                loss = F.cross_entropy(model(data.pixels[batch]), data.digits[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            progress.update(task, advance=1, loss=loss.item())
    return perf_counter() - began


@torch.no_grad()
def accuracy(classify: Callable[[Tensor], Tensor], data: Images) -> float:
    return (classify(data.pixels).argmax(1) == data.digits).float().mean().item()


def orthogonality_error(weight: Tensor) -> float:
    """The largest element of ``|WᵀW - I|``, in double precision."""
    wide = weight.detach().double()
    return (wide.T @ wide - torch.eye(len(wide), dtype=torch.float64)).abs().max().item()


def in_onnx_runtime(path: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda pixels: torch.from_numpy(np.asarray(session.run(None, {name: pixels.numpy()})[0]))


@dataclass
class Count:
    calls: int = 0


@contextmanager
def counting(module: nn.Module) -> Iterator[Count]:
    """Counts the calls of a module: an RNNCell reads its recurrent matrix once in each."""
    count = Count()

    def called(*_: object) -> None:
        count.calls += 1

    handle = module.register_forward_hook(called)
    try:
        yield count
    finally:
        handle.remove()


def main() -> None:
    console = Console()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the matrices are small: a second thread would only wait
    training, test = load()
    plain = DigitReader(HIDDEN)
    spec = fxp.Spec({RECURRENT: fxp.orthogonal(map="cayley")})
    model = fxp.transform(plain, spec, copy=True)  # copy: the two share no tensor and train apart
    print(model.report)

    with counting(model.cell) as reads:
        model_time = train(model, training, EPOCHS, "orthogonal", console)
    refreshes = model.stats.refreshes
    plain_time = train(plain, training, EPOCHS, "unconstrained", console)
    model.eval()
    plain.eval()

    table = Table("", "orthogonal", "unconstrained", title=f"{HIDDEN} units, {EPOCHS} epochs, {training.pixels.shape[1]} steps")
    table.add_row("test accuracy", f"{accuracy(model, test):.1%}", f"{accuracy(plain, test):.1%}")
    errors = (orthogonality_error(weight) for weight in (model.weights()[RECURRENT], plain.cell.weight_hh))
    table.add_row("largest |WᵀW - I|", *(f"{error:.1e}" for error in errors))
    table.add_row("seconds of training", f"{model_time:.1f}", f"{plain_time:.1f}")
    console.print(table)
    print(f"{RECURRENT} was read {reads.calls:,} times and computed {refreshes:,} times.\n")

    folded = fxp.fold(model, example_inputs=(test.pixels,))
    difference = (folded(test.pixels) - model(test.pixels)).abs().max().item()
    print(f"folded: {len(list(folded.parameters()))} plain parameters, off by at most {difference:.1e}")

    OUTPUT.mkdir(exist_ok=True)
    path = OUTPUT / "digits.onnx"
    batch = torch.export.Dim("batch")
    print(fxp.export_onnx(model, (test.pixels,), path, dynamic_shapes=({0: batch},), output_names=["digit"]))
    runtime = accuracy(in_onnx_runtime(path), test)
    print(f"test accuracy: ONNX Runtime {runtime:.1%}, PyTorch {accuracy(model, test):.1%}\n")

    train(model, training, 1, "one more", console)
    model.eval()
    print(fxp.refit_onnx(path, model))
    runtime = accuracy(in_onnx_runtime(path), test)
    print(f"test accuracy: ONNX Runtime {runtime:.1%}, PyTorch {accuracy(model, test):.1%}\n")

    few = (test.pixels[:, :3],)  # the graph repeats with every pixel: three show it
    graphs: dict[str, Drawable] = {"before": torch.export.export(model, few), "after": fxp.fold(model, example_inputs=few)}
    print(f"the graph on three pixels, before and after folding: {draw(graphs, OUTPUT / 'graph.png')}")


if __name__ == "__main__":
    main()
