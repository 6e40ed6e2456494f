"""Errors have the types and texts they have in PyTorch."""
# mypy: disable-error-code="misc,operator"

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from runtime.oracles import TRACES
from runtime.situations.common import Case, X, Y, attempt, grads, latents, loss_of, outcome, pair, same
from runtime.tables import collector
from torch import Tensor, nn

import fxparam as fxp

ERRORS: dict[str, Case] = {}
error = collector(ERRORS)


@error
def second_backward(m: Any) -> list[Any]:
    loss = loss_of(m)
    loss.backward()
    return [attempt(loss.backward), *grads(m)]


@error
def second_grad(m: Any) -> list[Any]:
    loss, parameters = loss_of(m), list(m.parameters())
    torch.autograd.grad(loss, parameters)
    return [attempt(lambda: torch.autograd.grad(loss, parameters))]


@error
def second_backward_of_a_weight(m: Any) -> list[Any]:
    weight = m.first.weight
    weight.sum().backward()
    return [attempt(weight.sum().backward)]


@error
def latents_written_before_backward(m: Any) -> list[Any]:
    found = []
    for latent in latents(m):
        loss = loss_of(m)
        with torch.no_grad():
            latent.mul_(1.1)
        found.append(attempt(loss.backward))
    return [*found, *outcome(m)]


@error
def latents_loaded_before_backward(m: Any) -> list[Any]:
    loss = loss_of(m)
    m.load_state_dict(m.state_dict())
    return [attempt(loss.backward), *outcome(m)]


@error
def stepped_before_backward(m: Any) -> list[Any]:
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    first, second = loss_of(m), loss_of(m, Y)
    first.backward()
    optimizer.step()
    m(X)
    return [attempt(second.backward), *outcome(m)]


@error
def weights_written_before_backward(m: Any) -> list[Any]:
    found = []
    for gradient in (True, False):
        weight = m.first.weight
        loss = weight.pow(2).sum()
        with torch.set_grad_enabled(gradient):
            weight.add_(1.0)
        found.append(attempt(loss.backward))
    return [*found, *outcome(m)]


@error
def gradients_of_what_was_not_used(m: Any) -> list[Any]:
    weight = m.first.weight
    found = [attempt(lambda: torch.autograd.grad(loss_of(m), weight))]
    m.first.bias.requires_grad_(False)
    found.append(attempt(lambda: torch.autograd.grad(loss_of(m), m.first.bias)))
    m.requires_grad_(False)
    return [*found, attempt(loss_of(m).backward)]


@error
def without_gradient(m: Any) -> list[Any]:
    with torch.no_grad():
        loss = loss_of(m)
    with torch.inference_mode():
        other = loss_of(m)
    return [attempt(loss.backward), attempt(other.backward), *outcome(m)]


@error
def what_a_computed_weight_refuses(m: Any) -> list[Any]:
    return [
        attempt(lambda: m.first.weight.numpy()),
        attempt(lambda: copy.deepcopy(m.first.weight)),
        attempt(lambda: m.first.weight.requires_grad_(False)),
        attempt(lambda: m(torch.randn(3, 7))),
        attempt(lambda: m.first(X, X).sum()).replace("ParametrizedLinear", "Linear"),
        *outcome(m),
    ]


@error
def missing_and_unexpected_keys(m: Any) -> list[Any]:
    state = m.state_dict()
    del state["first.bias"]
    with_more = {**m.state_dict(), "third.weight": torch.ones(2)}
    wrong = {**m.state_dict(), "second.bias": torch.ones(7)}
    return [attempt(lambda given=given: m.load_state_dict(given)) for given in (state, with_more, wrong)] + outcome(m)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", list(ERRORS))
def test_errors_are_those_of_pytorch(name: str, trace: Any) -> None:
    model, oracle = pair(trace)
    warned = pytest.warns(RuntimeWarning, match="written in place") if name.startswith("weights_written") else nullcontext()
    want = ERRORS[name](oracle)
    with warned:
        got = ERRORS[name](model)
    assert any(isinstance(one, str) and "Error: " in one for one in want)
    same(got, want)


class _Shared(nn.Module):
    """Two weights through a node that both need for their backward."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        shared = a.exp()
        return shared * b, shared + 1.0


def test_losses_of_two_weights_that_share_a_node() -> None:
    net = nn.Module()
    net.a, net.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    start = [net.a.detach().clone(), net.b.detach().clone()]
    model = fxp.transform(net, {fxp.joint("a", "b"): fxp.custom(_Shared(), init=lambda weights: tuple(start))}, trace="live")
    own = [value.clone().requires_grad_() for value in start]
    results = []
    for latent, (first, second) in ((list(model.parameters()), model.weights().values()), (own, _Shared()(*own))):
        first.sum().backward()
        results.append([attempt(second.sum().backward), *(p.grad for p in latent)])
    same(*results)
    assert "a second time" in results[1][0]
