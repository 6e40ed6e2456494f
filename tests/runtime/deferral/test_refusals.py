"""What deferral refuses, and what an error leaves."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from runtime.deferral.common import A, B, N, X, accumulate, check, grads, pair
from runtime.models import ThreeLayers
from torch import Tensor

import fxparam as fxp


@pytest.fixture
def model() -> Iterator[fxp.ParametrizedModule]:
    yield pair()[1]


def test_step_inside_is_refused(model: fxp.ParametrizedModule) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.get_parameter(A).detach().clone()
    text = "optimizer.step() while gradients are deferred: leave the block of model.defer_backward() first"
    with pytest.raises(fxp.DeferralError, match=re.escape(text)), model.defer_backward():
        accumulate(model)
        optimizer.step()
    check(model.get_parameter(A).detach(), before)
    # The error ended the block: the next step is an ordinary one.
    optimizer.zero_grad()
    with model.defer_backward():
        accumulate(model)
    optimizer.step()


@pytest.mark.parametrize("inside", ["no backward", "other parameters", "inner block"])
def test_steps_that_lose_nothing_are_allowed(model: fxp.ParametrizedModule, inside: str) -> None:
    optimizer = torch.optim.SGD([model.c.weight] if inside == "other parameters" else list(model.parameters()), 0.1)
    with model.defer_backward():
        if inside == "no backward":
            model(X[0])
        elif inside == "other parameters":
            accumulate(model)
        else:
            with model.defer_backward():
                accumulate(model)
        optimizer.step()


def test_step_of_a_scaler_and_of_another_thread_is_refused(model: fxp.ParametrizedModule) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(fxp.DeferralError), model.defer_backward():
        scaler.scale(model(X[0]).sum()).backward()
        scaler.step(optimizer)
    found: list[BaseException] = []

    def step() -> None:
        try:
            optimizer.step()
        except fxp.DeferralError as error:
            found.append(error)

    with model.defer_backward():
        accumulate(model)
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert len(found) == 1


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_discards(model: fxp.ParametrizedModule, error: type[BaseException]) -> None:
    with pytest.raises(error), model.defer_backward():
        accumulate(model)
        raise error
    assert grads(model)[A] is None and grads(model)[B] is None
    with model.defer_backward():
        accumulate(model)
    model.zero_grad()
    oracle = copy.deepcopy(model)
    accumulate(oracle)
    with model.defer_backward():
        accumulate(model)
    check(grads(model), grads(oracle))


def test_an_exception_keeps_later_losses(model: fxp.ParametrizedModule) -> None:
    oracle = copy.deepcopy(model)
    with pytest.raises(KeyError), model.defer_backward():
        late = model(X[0]).square().mean()
        accumulate(model, X[1:])
        raise KeyError
    model.zero_grad()
    late.backward()
    accumulate(oracle, X[:1])
    check(grads(model), grads(oracle))


def test_an_exception_of_an_inner_block_discards_only_its_own(model: fxp.ParametrizedModule) -> None:
    oracle = copy.deepcopy(model)
    with model.defer_backward():
        accumulate(model, X[:2])
        with contextlib.suppress(KeyError), model.defer_backward():
            accumulate(model, X[2:])
            raise KeyError
    accumulate(oracle, X[:2])
    check((grads(model)[A], grads(model)[B]), (grads(oracle)[A], grads(oracle)[B]))


def test_a_second_backward_is_refused_as_in_pytorch() -> None:
    oracle, model = pair()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss = oracle.a.weight.sum()
        loss.backward()
        loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"), model.defer_backward():
        loss = model.a.weight.sum()
        loss.backward()
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("loss", [lambda m: m.a.weight.sum(), lambda m: m(X[0]).square().sum()], ids=["linear", "square"])
def test_create_graph_is_refused(model: fxp.ParametrizedModule, loss: Callable[[Any], Tensor]) -> None:
    text = (
        "backward(create_graph=True) inside defer_backward() would have to differentiate the deferred part; take this loss out "
        "of the block"
    )
    with pytest.raises(fxp.DeferralError, match=re.escape(text)), model.defer_backward():
        loss(model).backward(create_graph=True)
    model.zero_grad()


@pytest.mark.parametrize("create_graph", [False, True])
def test_grad_to_latents_inside_is_refused(model: fxp.ParametrizedModule, create_graph: bool) -> None:
    latents = list(model.latents().values())
    with model.defer_backward():
        loss = model(X[0]).sum()
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(loss, latents, create_graph=create_graph)


def test_a_latent_written_inside_that_its_map_needs_is_refused() -> None:
    model = fxp.transform(ThreeLayers(N), {"a.weight": fxp.custom(lambda latent: latent @ latent.mT, init=lambda w: w)})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), model.defer_backward():
        accumulate(model)
        with torch.no_grad():
            model.get_parameter(A).mul_(2.0)


def test_a_hook_that_raises_at_the_exit_is_heard_and_leaves_nothing(model: fxp.ParametrizedModule) -> None:
    def fail(gradient: Tensor) -> None:
        raise KeyError("from the hook")

    handle = model.get_parameter(A).register_hook(fail)
    with pytest.raises(KeyError, match="from the hook"), model.defer_backward():
        accumulate(model)
    handle.remove()
    model.zero_grad()
    oracle = copy.deepcopy(model)
    accumulate(oracle)
    with model.defer_backward():
        accumulate(model)
    check(grads(model), grads(oracle))
