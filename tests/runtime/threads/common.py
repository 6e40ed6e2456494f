"""Calls in threads that begin together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

PATIENCE = 60.0


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls return, each run in a thread of its own; all begin together."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait(PATIENCE)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(run, call) for call in calls]]


def change_by_write(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.1)
