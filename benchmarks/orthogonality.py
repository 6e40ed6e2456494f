"""Orthogonal weights: how orthogonal they are in single precision, and what a forward and a backward cost.

Contestants: every map of ``fxp.orthogonal`` and ``fxp.special_orthogonal``, ``torch.nn.utils.parametrizations.orthogonal`` with
each of its maps, and, where it is installed, GeoTorch's ``SO``. Errors are ``max |WᵀW - I|``: for latents as at the start
(the map's own, for a random orthogonal weight, moved by a little), and for latents of norm ``10 √n``, as long training leaves
them. Times are those of one evaluation with its gradient, at the first of these latents.

    python benchmarks/orthogonality.py [--sizes 32 128 512] [--rounds 9]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from harness import race
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxparam as fxp

FLOOR = "torch matrix_exp"
MOVED = 0.01  # standard deviation of the elements added to the latents of the start

Map = tuple[nn.Module, Tensor]


def of_entry(entry: fxp.Entry, weight: Tensor) -> Map:
    """A map of the catalogue and its latent for a weight."""
    module: Any = entry.build(weight)
    return module, module.right_inverse(weight)


def of_torch(name: str, weight: Tensor) -> Map:
    """A map of PyTorch and its latent."""
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    parametrizations.orthogonal(layer, orthogonal_map=name)
    chain = layer.parametrizations["weight"]
    return chain[0], chain.original


def of_geotorch(triv: str, weight: Tensor) -> Map:
    """GeoTorch's rotations and their latent."""
    module = importlib.import_module("geotorch").SO(weight.shape, triv=triv)
    return module, module.right_inverse(weight)


def contestants(size: int) -> dict[str, Map]:
    """Every map at the same rotation."""
    start = fxp.special_orthogonal().build(torch.zeros(size, size)).sample()
    maps = {f"torch {name}": of_torch(name, start) for name in ("matrix_exp", "cayley", "householder")}
    if importlib.util.find_spec("geotorch"):
        maps |= {f"geotorch SO {triv}": of_geotorch(triv, start) for triv in ("expm", "cayley")}
    for name in ("matrix_exp", "cayley", "householder", "qr", "polar", "newton_schulz"):
        maps[f"fxparam {name}"] = of_entry(fxp.orthogonal(map=name), start)
    maps["fxparam special_orthogonal"] = of_entry(fxp.special_orthogonal(), start)
    return maps


def error(module: nn.Module, latent: Tensor) -> float:
    """``max |WᵀW - I|``, computed in double precision."""
    with torch.no_grad():
        weight = module(latent).double()
    return float((weight.mT @ weight - torch.eye(weight.shape[-1], dtype=torch.float64)).abs().amax())


def evaluation(module: nn.Module, latent: Tensor) -> Callable[[], object]:
    """A forward and a backward."""
    direction = torch.randn_like(latent)
    leaf = latent.detach().clone().requires_grad_()
    return lambda: torch.autograd.grad((module(leaf) * direction).sum(), leaf)


def measure(size: int, rounds: int) -> None:
    """One size, printed as a table."""
    moved: dict[str, Map] = {}
    grown: dict[str, float] = {}
    for name, (module, latent) in contestants(size).items():
        # Not the diagonal, which of reflections holds signs: PyTorch truncates what is there to an integer.
        moved[name] = module, latent.detach() + MOVED * torch.randn(size, size).fill_diagonal_(0)
        drawn = torch.randn(size, size).fill_diagonal_(0) - torch.eye(size)
        longer = drawn * (10 * size**0.5 / torch.linalg.matrix_norm(drawn))
        grown[name] = error(module, longer.fill_diagonal_(-1))
    timings = race({name: evaluation(*pair) for name, pair in moved.items()}, rounds=rounds, warmup=2)
    print(f"### {size} x {size}, float32, forward + backward\n")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); medians of {rounds} interleaved rounds, quartiles\n"
    )
    print(f"| map | error | error, latents of norm 10 √n | ms | ratio to {FLOOR} |")
    print("| --- | --- | --- | --- | --- |")
    for name, pair in moved.items():
        timing = timings[name]
        cost = f"{timing.median:.2f} [{timing.low:.2f}, {timing.high:.2f}] | {timing.median / timings[FLOOR].median:.2f}"
        print(f"| {name} | {error(*pair):.1e} | {grown[name]:.1e} | {cost} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for size in options.sizes:
        measure(size, options.rounds)


if __name__ == "__main__":
    main()
