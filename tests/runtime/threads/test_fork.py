"""A fork in the middle of a refresh."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtime.oracles import DTYPE, TRACES, gradients, inputs, loss_of, same
from runtime.threads.common import PATIENCE, change_by_write
from torch import Tensor, nn

import fxparam as fxp


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("trace", TRACES)
def test_a_fork_while_a_thread_refreshes(trace: str) -> None:
    inside, leave, parent = threading.Event(), threading.Event(), [True]

    class Waits(torch.autograd.Function):
        """Stays a call in every trace, and waits there, in this process."""

        @staticmethod
        def forward(ctx: Any, latent: Tensor) -> Tensor:
            if parent[0]:
                inside.set()
                leave.wait(PATIENCE)
            return latent * 0.5

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 0.5

    leave.set()
    net = nn.Linear(5, 3, dtype=DTYPE)
    model = fxp.transform(net, {"weight": lambda latent: Waits.apply(latent)}, trace=trace)
    x = inputs()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child() -> None:
        parent[0] = False
        with torch.no_grad():
            first = model(x).tolist()
            change_by_write(model)
            results.put((first, model(x).tolist()))

    for _ in range(3):
        change_by_write(model)
        inside.clear()
        leave.clear()
        thread = threading.Thread(target=lambda: model(x))
        thread.start()
        assert inside.wait(PATIENCE)
        process = context.Process(target=child)
        process.start()
        process.join(PATIENCE)
        alive = process.is_alive()
        if alive:
            process.kill()
        leave.set()
        thread.join(PATIENCE)
        assert not alive and process.exitcode == 0
        with torch.no_grad():
            latent = model.latents()["parametrizations.weight.original"]
            want = [F.linear(x, latent * rate * 0.5, model.bias * rate) for rate in (1.0, 1.1)]
            same([torch.tensor(one, dtype=DTYPE) for one in results.get()], want)
        loss_of(model, x).backward()
    assert gradients(model, x).keys() == {"bias", "parametrizations.weight.original"}
