"""Threads that read one entry, with and without gradient."""

from __future__ import annotations

import threading

import torch
from runtime.cache.common import pair, same
from runtime.oracles import loss_of
from torch import Tensor


def test_threads_read_one_entry() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    want = oracle(x).detach()
    before = model.stats.refreshes
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def read() -> None:
        try:
            start.wait()
            for _ in range(50):
                with torch.no_grad():
                    same(model(x), want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert model.stats.refreshes - before == 1


def test_threads_with_gradients_sum_up() -> None:
    model, oracle = pair()
    inputs = [torch.randn(4, 5) for _ in range(4)]
    failures: list[BaseException] = []
    found: dict[int, tuple[Tensor, ...]] = {}

    def train(number: int) -> None:
        try:
            for _ in range(10):
                found[number] = torch.autograd.grad(loss_of(model, inputs[number]), list(model.parameters()))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for number, x in enumerate(inputs):
        want = torch.autograd.grad(loss_of(oracle, x), list(oracle.parameters()))
        for a, b in zip(found[number], want, strict=True):
            same(a, b)


def test_grad_mode_of_one_thread_is_not_that_of_another() -> None:
    model, _ = pair()
    x = torch.randn(4, 5)
    flags: list[bool] = []
    with torch.no_grad():
        model(x)
        thread = threading.Thread(target=lambda: flags.append(model(x).requires_grad))
        thread.start()
        thread.join()
        flags.append(model(x).requires_grad)
    assert flags == [True, False]
