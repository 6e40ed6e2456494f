"""Training loops that a transformed model and its oracle go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from runtime.oracles import check, inputs, pair, same
from torch import Tensor, nn

Loop = Callable[[nn.Module, Tensor], Any]
"""A training loop. What it returns is compared, and the trained model; it calls ``evaluated`` where it likes."""


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """Without gradient, and in the mode the model is in: finds weights that an earlier forward left."""
    with torch.no_grad():
        return model(x)


def compare(run: Loop, trace: str, tolerance: float = 1e-10) -> None:
    model, oracle = pair(trace)
    batches, x = inputs(6, 4), inputs()
    start = model(x).detach()
    same(run(model, batches), run(oracle, batches), tolerance)
    check(model, oracle, x, tolerance)
    assert not torch.allclose(model(x), start, rtol=1e-3)
