"""Nothing is kept alive that is no longer needed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from runtime.cache.common import pair, same
from runtime.oracles import loss_of
from torch import Tensor

import fxparam as fxp


def refs_to_entry(model: fxp.ParametrizedModule) -> list[weakref.ref[Tensor]]:
    """Weak references to the cached values of the present entry."""
    entry = next(iter(model._fxp_runtime._entries.values()))
    assert entry is not None
    return [weakref.ref(value) for value in entry.published.values]


def test_kept_losses_do_not_keep_old_weights() -> None:
    model, _ = pair()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses, weights = [], []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, torch.randn(4, 5))
        weights.append(refs_to_entry(model))
        loss.backward()
        optimizer.step()
        losses.append(loss)
    model(torch.randn(4, 5))
    gc.collect()
    assert [[value() for value in refs] for refs in weights] == [[None, None]] * 3


def test_kept_losses_do_not_keep_old_weights_when_another_forward_was_dropped() -> None:
    model, _ = pair()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses, weights = [], []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5))
        loss = loss_of(model, torch.randn(4, 5))
        weights.append(refs_to_entry(model))
        loss.backward()
        optimizer.step()
        losses.append(loss)
    model(torch.randn(4, 5))
    gc.collect()
    assert [[value() for value in refs] for refs in weights] == [[None, None]] * 3


def test_dropped_losses_and_kept_outputs_keep_nothing() -> None:
    model, _ = pair()
    weights, outputs = [], []
    for _ in range(3):
        loss_of(model, torch.randn(4, 5))
        outputs.append(model(torch.randn(4, 5)).detach())
        weights.append(refs_to_entry(model))
        model.invalidate()
    gc.collect()
    assert [[value() for value in refs] for refs in weights] == [[None, None]] * 3


def test_a_loss_before_its_backward_keeps_its_graph() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    loss = loss_of(model, x)
    model.invalidate()
    model(x)
    gc.collect()
    loss.backward()
    loss_of(oracle, x).backward()
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        same(p.grad, q.grad)


@pytest.mark.parametrize("graph", [True, False])
def test_a_model_is_collected(graph: bool) -> None:
    model, _ = pair()
    with torch.set_grad_enabled(graph):
        model(torch.randn(4, 5))
    latent = weakref.ref(next(iter(model.latents().values())))
    del model
    gc.collect()
    assert latent() is None
