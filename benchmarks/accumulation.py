"""One optimizer step of eight micro-batches through four layers whose matrices are exponentials of skew-symmetric latents.

Contestants: the parametrization evaluated at each read (PyTorch's default), PyTorch's ``cached()`` around each micro-batch and,
with retained graphs, around all of them, fxparam without and with ``defer_backward()``, and layers with plain matrices.

    python benchmarks/accumulation.py [--width 256] [--layers 4] [--micro-batches 8]
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

Backwards = Callable[[nn.Module, list[Tensor]], None]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def each(model: nn.Module, xs: list[Tensor]) -> None:
    for x in xs:
        loss(model, x).backward()


def cached_each(model: nn.Module, xs: list[Tensor]) -> None:
    for x in xs:
        with parametrize.cached():
            loss(model, x).backward()


def cached_all(model: nn.Module, xs: list[Tensor]) -> None:
    with parametrize.cached():
        for x in xs:
            loss(model, x).backward(retain_graph=x is not xs[-1])


def deferred(model: nn.Module, xs: list[Tensor]) -> None:
    assert isinstance(model, fxp.ParametrizedModule)
    with model.defer_backward():
        each(model, xs)


def gradients(model: nn.Module, backwards: Backwards, xs: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    backwards(model, xs)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def optimizer_step(model: nn.Module, backwards: Backwards, xs: list[Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        backwards(model, xs)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain = nn.Sequential(*(nn.Linear(options.width, options.width) for _ in range(options.layers)))
    parametrized = copy.deepcopy(plain)
    for layer in parametrized:
        orthogonal(layer, orthogonal_map="matrix_exp")
    xs = [torch.randn(32, options.width) for _ in range(options.micro_batches)]
    contestants: dict[str, tuple[nn.Module, Backwards]] = {
        "plain matrices": (plain, each),
        "fxparam, deferred": (fxp.transform(parametrized, copy=True), deferred),
        "fxparam": (fxp.transform(parametrized, copy=True), each),
        "cached() around all, retain_graph": (copy.deepcopy(parametrized), cached_all),
        "cached() around each": (copy.deepcopy(parametrized), cached_each),
        "per read": (parametrized, each),
    }
    want = gradients(copy.deepcopy(parametrized), each, xs)
    scale = max(float(gradient.abs().max()) for gradient in want.values())
    for model, backwards in contestants.values():
        if model is not plain:
            torch.testing.assert_close(gradients(model, backwards, xs), want, rtol=1e-4, atol=1e-5 * scale)
    timings = race(
        {name: optimizer_step(model, backwards, xs) for name, (model, backwards) in contestants.items()}, rounds=options.rounds
    )
    title = f"{options.micro_batches} micro-batches, {options.layers} x Linear({options.width}), forward + backward + SGD"
    print(table(title, timings, "plain matrices"))
    baseline = timings["per read"].median
    for name in ("fxparam", "fxparam, deferred"):
        print(f"\n{name}: {baseline / timings[name].median:.1f}x faster than per read", end="")
    print()


if __name__ == "__main__":
    main()
