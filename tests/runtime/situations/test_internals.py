"""What the cache is made of: autograd nodes, locks across forks, addresses of storages."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtime.oracles import TRACES
from runtime.situations.common import X, pair
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations

import fxparam as fxp


@pytest.mark.parametrize("trace", TRACES)
def test_reads_of_one_forward_share_their_way_to_the_latents(trace: Any) -> None:
    class Often(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.layer, self.times = parametrizations.weight_norm(nn.Linear(4, 4)), times

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = torch.tanh(F.linear(x, self.layer.weight))
            return x

    def functions(times: int) -> int:
        loss, found = fxp.transform(Often(times), trace=trace)(torch.randn(2, 4)).sum(), set()
        nodes: list[Any] = [loss.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in found:
                found.add(node)
                nodes += [other for other, _ in node.next_functions]
        return sum(isinstance(node, torch.autograd.function.BackwardCFunction) for node in found)

    assert functions(100) == functions(1) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_while_another_thread_computes() -> None:
    model = fxp.transform(nn.Linear(4, 4), {"weight": fxp.skew()})
    want = model.weight.detach()
    model._fxp_runtime.drop_entries()
    computing, finish = threading.Event(), threading.Event()

    def compute() -> None:
        with model._fxp_runtime._lock:
            computing.set()
            finish.wait(60)

    thread = threading.Thread(target=compute)
    thread.start()
    assert computing.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if torch.equal(model.weight.detach(), want) else 1)
    _, status = os.waitpid(child, 0)
    finish.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_storages_are_kept_while_their_address_is_a_key() -> None:
    """A freed one is soon had again, at the same address and with other values."""
    model, _ = pair("live")
    model.eval()
    with torch.no_grad():
        model(X)
    latent = model.first.parametrizations.weight.original1
    before = StorageWeakRef(latent.untyped_storage())
    latent.data = latent.detach() * 2
    assert not before.expired()
    with torch.no_grad():
        model(X)
    assert before.expired()
