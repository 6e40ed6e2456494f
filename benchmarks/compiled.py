"""Training steps under ``torch.compile``: what it makes of computed weights.

Contestants, compiled and not: a plain model with the same weights, the model under ``torch.nn.utils.parametrize``, fxparam.
Compiled, fxparam is ``model.compile()`` (the weights stay cached and are computed outside), the same with ``prologue=True``
(their computation is compiled, apart from the rest), and ``torch.compile(model)`` (it is in the graph, at each forward).

    python benchmarks/compiled.py [--rounds 31] [--model rnn]
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from harness import race, table
from recurrence import Reader
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.nn.utils.parametrizations import orthogonal, weight_norm

import fxparam as fxp

PLAIN, REFERENCE = "plain, compiled", "parametrize"
BATCH = 32
WARMUP = 20  # fxparam looks at the latents of the first 16 evaluations for NaN, later at those of every 16th


@dataclass(frozen=True)
class Runner:
    """A model and how it is called, which a compiler may have changed."""

    model: nn.Module
    call: Callable[[Tensor], Tensor]

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        self.model.zero_grad()
        self.call(x).square().mean().backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def training_step(self, x: Tensor) -> Callable[[], None]:
        optimizer = torch.optim.SGD(self.model.parameters(), 1e-4)

        def step() -> None:
            optimizer.zero_grad()
            self.call(x).square().mean().backward()
            optimizer.step()

        return step


def rnn() -> tuple[str, nn.Module, Tensor]:
    model = Reader(64)
    orthogonal(model.cell, "weight_hh", orthogonal_map="matrix_exp")
    return "Recurrence, hidden 64, 20 steps, matrix_exp", model, torch.randn(BATCH, 20, 28)


def weight_normed() -> tuple[str, nn.Module, Tensor]:
    model = nn.Sequential(*(weight_norm(nn.Linear(128, 128)) for _ in range(8)))
    return "8 x Linear(128), weight norm", model, torch.randn(BATCH, 128)


def orthogonal_layers() -> tuple[str, nn.Module, Tensor]:
    model = nn.Sequential(*(orthogonal(nn.Linear(128, 128), orthogonal_map="matrix_exp") for _ in range(4)))
    return "4 x Linear(128), matrix_exp", model, torch.randn(BATCH, 128)


MODELS = {"rnn": rnn, "weight_norm": weight_normed, "orthogonal": orthogonal_layers}


def eager(model: nn.Module) -> Runner:
    return Runner(model, model)


def compiled(model: nn.Module, backend: str) -> Runner:
    return Runner(model, torch.compile(model, backend=backend, fullgraph=True))


def body_compiled(model: fxp.ParametrizedModule, backend: str, *, prologue: bool) -> Runner:
    model.compile(backend=backend, fullgraph=True, prologue=prologue)
    return Runner(model, model)


def contestants(parametrized: nn.Module, backend: str) -> dict[str, Callable[[], Runner]]:
    """What makes each anew, with tensors of its own."""

    def ours() -> fxp.ParametrizedModule:
        return fxp.transform(parametrized, copy=True)

    return {
        "plain": lambda: eager(fxp.restore(ours())),
        REFERENCE: lambda: eager(copy.deepcopy(parametrized)),
        "fxparam": lambda: eager(ours()),
        PLAIN: lambda: compiled(fxp.restore(ours()), backend),
        "parametrize, torch.compile(model)": lambda: compiled(copy.deepcopy(parametrized), backend),
        "fxparam, torch.compile(model)": lambda: compiled(ours(), backend),
        "fxparam, model.compile()": lambda: body_compiled(ours(), backend, prologue=False),
        "fxparam, model.compile(prologue=True)": lambda: body_compiled(ours(), backend, prologue=True),
    }


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Compilers find no code of earlier ones, neither in memory nor on disk."""
    torch.compiler.reset()
    with fresh_cache():
        yield


def compile_time(build: Callable[[], Runner], x: Tensor) -> float:
    """Seconds of the first step."""
    with nothing_compiled():
        step = build().training_step(x)
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


def check(runners: dict[str, Runner], x: Tensor) -> None:
    """All compute the same; those with latents have the same gradients. This compiles what is compiled."""
    want, want_gradients = runners[REFERENCE].call(x), runners[REFERENCE].gradients(x)
    scale = max(float(gradient.abs().max()) for gradient in want_gradients.values())
    for name, runner in runners.items():
        same = partial(torch.testing.assert_close, rtol=1e-3, msg=f"{name} differs from {REFERENCE}".__add__)
        same(runner.call(x), want, atol=1e-5)
        if not name.startswith("plain"):
            same(runner.gradients(x), want_gradients, atol=1e-4 * scale)


def measure(title: str, parametrized: nn.Module, x: Tensor, backend: str, rounds: int) -> None:
    builders = contestants(parametrized, backend)
    seconds = {name: compile_time(build, x) for name, build in builders.items() if "compile" in name}
    with nothing_compiled():
        runners = {name: build() for name, build in builders.items()}
        check(runners, x)
        timings = race({name: runner.training_step(x) for name, runner in runners.items()}, rounds=rounds, warmup=WARMUP)
    print(table(f"{title}, {backend}, forward + backward + SGD", timings, PLAIN))
    print("\nfirst step, compiling, nothing cached: " + "; ".join(f"{name} {s:.1f} s" for name, s in seconds.items()))
    best = min((name for name in timings if name.startswith("fxparam")), key=lambda name: timings[name].median)
    peer = min((name for name in timings if name.startswith("parametrize")), key=lambda name: timings[name].median)
    print(
        f"best of fxparam ({best}) against best of parametrize ({peer}): {timings[peer].median / timings[best].median:.2f}x\n"
    )


def usable_backend() -> str:
    """Inductor, if it works on this machine."""
    compiler = os.environ.get("CXX", "g++")
    print(f"C++ compiler: {shutil.which(compiler) or f'no {compiler}'}")
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    try:
        # This also compiles what every use of inductor shares, so that it counts for nobody.
        torch.compile(model)(x).sum().backward()
    except Exception as error:
        print(f"inductor does not work here ({type(error).__name__}); aot_eager instead, WHICH GENERATES NO CODE\n")
        return "aot_eager"
    print("backend: inductor\n")
    return "inductor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this one; may be given several times")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Dynamo reads .grad of what is no leaf, and hides that it warns, unless warnings are shown.
    warnings.filterwarnings("ignore", "The .grad attribute")
    backend = usable_backend()
    for name in options.model or MODELS:
        title, model, x = MODELS[name]()
        measure(title, model, x, backend, options.rounds)


if __name__ == "__main__":
    main()
