"""Time and memory of random subspaces over the number of weights: dense, sparse and fastfood projections.

Timed is one forward and backward of the map, from the latent to the weights and back. Each row is a process of its own, so that
its peak of resident memory is that of this row: growth counts from before the weights exist, and so includes them, the origin
(4 bytes a weight each) and, for a dense projection, the matrix. The last rows go through ``fxp.transform``: a network of about
10 million parameters behind one latent, and a step of training it, with the peak of transforming it included.

    python benchmarks/subspace_scaling.py [--dim 1000] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from harness import race
from torch import Tensor, nn

import fxparam as fxp

KINDS = ("dense", "sparse", "fastfood")
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
MOST_NUMBERS = 300_000_000  # of a dense matrix: 1.2 GB
FROM = 100_000  # the fit leaves out sizes at which the calls themselves count


@dataclass(frozen=True)
class Row:
    """What one process found.

    Attributes:
        total: weights.
        build: seconds to build the map or to transform the model.
        median: milliseconds of a forward and backward; of a step of training.
        low: their lower quartile.
        high: their upper quartile.
        growth: MB by which the peak of resident memory grew.
        saved: kB of the state dict apart from origin and weights.
    """

    total: int
    build: float
    median: float
    low: float
    high: float
    growth: float
    saved: float


def peak() -> float:
    """The peak of this process's resident memory, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def of_map(kind: str, total: int, dim: int) -> tuple[nn.Module, Callable[[], object], int]:
    module = fxp.subspace(dim, kind).build(torch.randn(total))
    latent, gradient = torch.zeros(dim, requires_grad=True), torch.ones(total)
    return module, lambda: torch.autograd.grad(module(latent), latent, gradient), total


def of_model(kind: str, total: int, dim: int) -> tuple[nn.Module, Callable[[], object], int]:
    width = math.isqrt(total // 4)
    net = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())))
    model = fxp.transform(net, {fxp.joint("*"): fxp.subspace(dim, kind)})
    optimizer, x = torch.optim.SGD(model.parameters(), 1e-3), torch.randn(8, width)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    assert not [node for node in model.prologue.graph.nodes if node.op == "call_module"]
    return model, step, sum(parameter.numel() for parameter in net.parameters())


def measure(kind: str, total: int, dim: int, rounds: int, *, model: bool) -> Row:
    torch.set_num_threads(1)
    torch.randn(8, requires_grad=True).sum().backward()
    before, start = peak(), time.perf_counter()
    module, run, total = (of_model if model else of_map)(kind, total, dim)
    build = time.perf_counter() - start
    timing = race({"step": run}, rounds=rounds, warmup=2)["step"]
    kept: dict[str, Tensor] = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("origin")}
    saved = sum(tensor.numel() * tensor.element_size() for tensor in kept.values()) / 1024
    return Row(total, build, timing.median, timing.low, timing.high, peak() - before, saved)


def in_a_process(kind: str, total: int, dim: int, rounds: int, *, model: bool = False) -> Row:
    arguments = [str(value) for value in (kind, total, dim, rounds)] + (["--model"] if model else [])
    found = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True, check=True)
    return Row(**json.loads(found.stdout.splitlines()[-1]))


def line(kind: str, dim: int, row: Row) -> str:
    return (
        f"| {kind} | {row.total:,} | {dim:,} | {row.median:.2f} [{row.low:.2f}, {row.high:.2f}] | {row.growth:.0f} | "
        f"{row.saved:.2f} | {row.build:.2f} |"
    )


def exponent(rows: list[Row]) -> float:
    """The slope of log time over log weights, by least squares."""
    points = [(math.log(row.total), math.log(row.median)) for row in rows if row.total >= FROM]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", nargs=4, metavar=("KIND", "TOTAL", "DIM", "ROUNDS"), help=argparse.SUPPRESS)
    parser.add_argument("--model", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, *numbers = options.one
        print(json.dumps(asdict(measure(kind, *map(int, numbers), model=options.model))))
        return
    columns = "| projection | weights | dim | {} | peak growth, MB | saved apart from the origin, kB | {}, s |"
    print("### Random subspaces\n")
    print(f"torch {torch.__version__}, 1 thread, float32; medians with quartiles in brackets, each row a process of its own\n")
    print(columns.format("forward + backward, ms", "build"))
    print("| --- | --- | --- | --- | --- | --- | --- |")
    found: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for total in SIZES:
            if kind != "dense" or total * options.dim <= MOST_NUMBERS:
                found[kind].append(in_a_process(kind, total, options.dim, options.rounds))
                print(line(kind, options.dim, found[kind][-1]), flush=True)
    for kind in ("sparse", "fastfood"):
        print(line(kind, 10_000, in_a_process(kind, 10_000_000, 10_000, options.rounds)), flush=True)
    print(f"\nTime grows as the number of weights to the power (fit from {FROM:,} weights up):\n")
    for kind, rows in found.items():
        print(f"- {kind}: {exponent(rows):.2f}")
    print("\nA model of about 10 million parameters through `fxp.transform`, all of them behind one latent:\n")
    print(columns.format("step of training, ms", "transform and first step"))
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind in ("sparse", "fastfood"):
        print(line(kind, 10_000, in_a_process(kind, 10_000_000, 10_000, options.rounds, model=True)), flush=True)


if __name__ == "__main__":
    main()
