"""Training steps of feed-forward stacks with weight norm: a map that costs next to nothing, read once per forward.

Here the cache has little to save, unless several micro-batches share an evaluation, and what it costs shows. Contestants: the
parametrization evaluated at each read (PyTorch's default), fxparam, and plain layers.

    python benchmarks/cheap_maps.py [--rounds 51] [--micro-batches 4]
"""

from __future__ import annotations

import argparse
import copy

import torch
from accumulation import Backwards, deferred, each, gradients, optimizer_step
from harness import race, table
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fxparam as fxp

BATCH = 32
WARMUP = 20  # fxparam looks at the latents of the first 16 evaluations for NaN, later at those of every 16th


def stack(layers: int, width: int) -> nn.Sequential:
    """Weight-normed layers that neither blow up nor shrink what goes through, however many there are."""
    linears = [nn.Linear(width, width) for _ in range(layers)]
    for layer in linears:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*map(weight_norm, linears))


def measure(layers: int, width: int, micro_batches: int, rounds: int) -> None:
    parametrized = stack(layers, width)
    xs = [torch.randn(BATCH, width) for _ in range(micro_batches)]
    contestants: dict[str, tuple[nn.Module, Backwards]] = {
        "plain": (fxp.restore(fxp.transform(parametrized, copy=True)), each),
        "parametrize": (copy.deepcopy(parametrized), each),
        "fxparam": (fxp.transform(parametrized, copy=True), each),
    }
    if micro_batches > 1:
        contestants["fxparam, deferred"] = (fxp.transform(parametrized, copy=True), deferred)
    want = gradients(copy.deepcopy(parametrized), each, xs)
    scale = max(float(gradient.abs().max()) for gradient in want.values())
    for name, (model, backwards) in contestants.items():
        torch.testing.assert_close(model(xs[0]), parametrized(xs[0]), rtol=1e-4, atol=1e-5)
        if name != "plain":
            torch.testing.assert_close(gradients(model, backwards, xs), want, rtol=1e-4, atol=1e-5 * scale)
    timings = race({name: optimizer_step(*pair, xs) for name, pair in contestants.items()}, rounds=rounds, warmup=WARMUP)
    batches = "one batch" if micro_batches == 1 else f"{micro_batches} micro-batches"
    print(table(f"{layers} x Linear({width}), weight norm, {batches} of {BATCH}, forward + backward + SGD", timings, "plain"))
    ours = {name: timing.median for name, timing in timings.items() if name.startswith("fxparam")}
    peer = timings["parametrize"].median
    print("\nparametrize / fxparam: " + "; ".join(f"{name} {peer / median:.2f}" for name, median in ours.items()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--micro-batches", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for layers, width in ((10, 32), (100, 32), (20, 256)):
        for micro_batches in (1, options.micro_batches):
            measure(layers, width, micro_batches, options.rounds)


if __name__ == "__main__":
    main()
