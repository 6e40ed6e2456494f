"""The time of ``transform`` as a ratio to a plain ``torch.fx.symbolic_trace``, for stacks of weight-normed layers.

python benchmarks/transform_time.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import race, table
from torch import nn

import fxparam as fxp


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for layers in (10, 100, 1000):
        net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
        spec = fxp.Spec({"*.weight": fxp.weight_norm()})
        contestants: dict[str, Callable[[], object]] = {
            "symbolic_trace": partial(torch.fx.symbolic_trace, net),
            "transform(trace='live')": partial(fxp.transform, net, spec, trace="live"),
            "transform": partial(fxp.transform, net, spec),
        }
        print(table(f"{layers} layers", race(contestants, rounds=5, warmup=1), "symbolic_trace"), "\n")


if __name__ == "__main__":
    main()
