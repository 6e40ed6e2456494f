"""Deferral with threads and hooks, and what it keeps alive."""

from __future__ import annotations

import gc
import threading
import weakref

from runtime.deferral.common import A, B, X, accumulate, check, grads, pair
from torch import Tensor


def test_threads_have_blocks_of_their_own() -> None:
    oracle, model = pair()
    accumulate(oracle)
    entered, errors = threading.Barrier(2), []

    def work(xs: list[Tensor]) -> None:
        try:
            with model.defer_backward():
                entered.wait(10)
                accumulate(model, xs)
                entered.wait(10)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(xs,)) for xs in (X[:2], X[2:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    check(grads(model), grads(oracle))
    assert model.stats.backwards == 4


def test_a_thread_without_a_block_is_not_deferred() -> None:
    _, model = pair()
    with model.defer_backward():
        thread = threading.Thread(target=accumulate, args=(model,))
        thread.start()
        thread.join()
        assert grads(model)[A] is not None


def test_hooks_on_latents_fire_once() -> None:
    _, model = pair()
    calls: list[str] = []
    for name in (A, B):
        latent = model.get_parameter(name)
        latent.register_hook(lambda gradient, name=name: calls.append(f"hook {name}"))
        latent.register_post_accumulate_grad_hook(lambda latent, name=name: calls.append(f"post {name}"))
    with model.defer_backward():
        accumulate(model)
        assert calls == []
    assert sorted(calls) == sorted(f"{kind} {name}" for kind in ("hook", "post") for name in (A, B))


def test_kept_losses_keep_no_weights() -> None:
    _, model = pair()
    with model.defer_backward():
        loss = model(X[0]).sum()
        held = weakref.ref(model._fxp_runtime._entries[model._fxp_runtime._modes()].published.values[0])
        loss.backward()
    model.invalidate()
    gc.collect()
    assert loss.grad_fn is not None and held() is None


def test_blocks_leave_no_garbage() -> None:
    _, model = pair()
    with model.defer_backward():
        accumulate(model)
        block = weakref.ref(model._fxp_runtime._local.blocks[-1])
    gc.disable()
    try:
        assert block() is None
    finally:
        gc.enable()
