"""Memory that cached weights keep for their backward, and what ``transform(..., recompute=True)`` makes of it, in weight sizes.

Kept is what one evaluation of the weight leaves allocated, apart from the weight itself; latents were there before. The time is
that of one evaluation and its backward alone, so it bounds from above what recomputing adds to a training step.

    python benchmarks/memory.py [--width 256]
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import torch
from harness import Timing, race
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fxparam as fxp

WARMUP = 20  # fxparam looks at the latents of the first 16 evaluations for NaN, later at those of every 16th


class Bjorck(nn.Module):
    """Orthogonalizes by iteration (Björck and Bowie 1971), and keeps every step for its backward."""

    def forward(self, latent: Tensor) -> Tensor:
        weight = latent / torch.linalg.matrix_norm(latent)
        for _ in range(15):
            weight = 1.5 * weight - 0.5 * weight @ weight.mT @ weight
        return weight


def declarations(width: int) -> dict[str, object]:
    return {
        "weight_norm()": fxp.weight_norm(),
        "spectral_norm()": fxp.spectral_norm(),
        "positive()": fxp.positive(),
        f"low_rank({width // 8})": fxp.low_rank(width // 8),
        'orthogonal(map="matrix_exp")': fxp.orthogonal(map="matrix_exp"),
        'orthogonal(map="cayley")': fxp.orthogonal(map="cayley"),
        'orthogonal(map="householder")': fxp.orthogonal(map="householder"),
        "symmetric()": fxp.symmetric(),
        "positive_definite()": fxp.positive_definite(),
        f"subspace({width // 4})": fxp.subspace(width // 4),
        "Bjorck, 15 iterations": Bjorck(),
    }


def transformed(width: int, declaration: object, *, recompute: bool) -> fxp.ParametrizedModule:
    torch.manual_seed(0)
    return fxp.transform(nn.Linear(width, width, bias=False), {"weight": declaration}, recompute=recompute)


def kept(model: fxp.ParametrizedModule) -> float:
    """Bytes that an evaluation leaves, apart from the weight, per byte of the weight."""
    # The first evaluation also traces; a change of mode drops what it left, and only that.
    _ = model.weight
    model.eval().train()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        weight = model.weight
    left = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    return left / (weight.numel() * weight.element_size()) - 1


def step(model: fxp.ParametrizedModule) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    gradient = torch.randn_like(model.weight) / model.weight.numel()

    def run() -> None:
        optimizer.zero_grad()
        model.weight.backward(gradient)
        optimizer.step()

    return run


def row(name: str, usual: fxp.ParametrizedModule, again: fxp.ParametrizedModule, timings: dict[str, Timing]) -> str:
    default, recomputed = timings["default"], timings["recompute"]
    # What has a state is never computed twice, whatever was asked for.
    note = "" if again.report.sites[0].recomputed else " (not recomputed)"
    memory = f"{kept(usual):.2f} | {kept(again):.2f}{note}"
    time = f"{default.median:.2f} [{default.low:.2f}, {default.high:.2f}] | {recomputed.median / default.median:.2f}"
    return f"| {name} | {memory} | {time} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"### Memory kept for the backward of a {options.width} x {options.width} weight, in sizes of the weight\n")
    threads = f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    print(f"{threads}; medians of interleaved rounds, quartiles in brackets\n")
    print("| map | kept | kept, `recompute=True` | evaluation + backward + SGD, ms | `recompute=True`, ratio |")
    print("| --- | --- | --- | --- | --- |")
    for name, declaration in declarations(options.width).items():
        usual, again = (transformed(options.width, declaration, recompute=recompute) for recompute in (False, True))
        timings = race({"default": step(usual), "recompute": step(again)}, rounds=options.rounds, warmup=WARMUP)
        print(row(name, usual, again, timings), flush=True)


if __name__ == "__main__":
    main()
