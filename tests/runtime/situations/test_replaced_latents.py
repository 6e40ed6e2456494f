"""Latents that are replaced: assigned, exchanged, loaded, swapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from runtime.oracles import TRACES
from runtime.situations.common import Case, X, Y, latents, loss_of, outcome, pair, same
from runtime.tables import collector
from torch import nn

CASES: dict[str, Case] = {}
case = collector(CASES)


@case
def vector_to_parameters(m: Any) -> list[Any]:
    m(X)
    nn.utils.vector_to_parameters(1.5 * nn.utils.parameters_to_vector(m.parameters()).detach(), m.parameters())
    return outcome(m)


@case
def data_assigned_again_and_again(m: Any) -> list[Any]:
    seen = []
    for number in range(6):
        m.train(number % 2 == 0)
        with torch.no_grad():
            m(X)
        for p in latents(m):
            for _ in range(3):
                p.data = p.data.roll(1, 0).cos()
        seen.append(m(X).detach())
    return [*seen, *outcome(m.train())]


@case
def addresses_exchanged(m: Any) -> list[Any]:
    """No sum over addresses, versions or shapes tells."""
    a = m.first.parametrizations.weight.original1
    b = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(5)))
    first = m(X).detach()
    a.data, b.data = b.data, a.data
    second = outcome(m)
    a.data, b.data = b.data, a.data
    return [first, *second, *outcome(m)]


@case
def new_latents(m: Any) -> list[Any]:
    loss_of(m).backward()
    m.first.parametrizations.weight.original1 = nn.Parameter(torch.eye(5) + 0.5)
    found = outcome(m)
    m.first.parametrizations.weight.original0 = nn.Parameter(torch.full((5, 1), 2.0), requires_grad=False)
    return [*found, *outcome(m)]


@case
def new_latents_of_another_shape(m: Any) -> list[Any]:
    m(X)
    latent = m.first.parametrizations.weight
    latent.original0, latent.original1 = nn.Parameter(torch.ones(7, 1)), nn.Parameter(torch.ones(7, 5).cumsum(0).cos())
    m.first.bias = nn.Parameter(torch.ones(7))
    m.second = nn.Linear(7, 2)
    nn.init.constant_(m.second.weight, 0.3)
    nn.init.zeros_(m.second.bias)
    return outcome(m)


def _loaded(m: Any, **options: Any) -> list[Any]:
    loss_of(m).backward()
    m.load_state_dict({name: 1.5 * value for name, value in m.state_dict().items()}, **options)
    return outcome(m)


@case
def load_state_dict(m: Any) -> list[Any]:
    return _loaded(m)


@case
def load_state_dict_assigned(m: Any) -> list[Any]:
    return _loaded(m, assign=True)


@case
def load_state_dict_of_inference_tensors(m: Any) -> list[Any]:
    m(X)
    with torch.inference_mode():
        state = {name: 1.5 * value for name, value in m.state_dict().items()}
    m.load_state_dict(state)
    return outcome(m)


@case
def load_state_dict_assigned_of_another_dtype(m: Any) -> list[Any]:
    m(X)
    m.load_state_dict({name: value.bfloat16().double() for name, value in m.state_dict().items()}, assign=True)
    first = outcome(m)
    m.load_state_dict({name: value.float() for name, value in m.state_dict().items()}, assign=True)
    return [*first, m(X.float()).dtype, *(weight.dtype for weight in (m.first.weight, m.second.weight))]


@case
def made_under_inference_mode(m: Any) -> list[Any]:
    with torch.inference_mode():
        values = [p * 1.5 for p in m.parameters()]
        state = dict(zip(dict(m.named_parameters()), values, strict=True))
        m.load_state_dict({**m.state_dict(), **state}, assign=True)
        return [m(X).clone(), m(Y).clone()]


@contextmanager
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@case
def swapped_by_to(m: Any) -> list[Any]:
    loss_of(m).backward()
    m.zero_grad()
    with swapping():
        m.to(torch.float32)
        m.to(torch.float64)
    return outcome(m)


@case
def swapped_by_to_of_a_submodule(m: Any) -> list[Any]:
    loss_of(m).backward()
    m.zero_grad()
    with swapping():
        m.first.to(torch.float32)
        m.first.to(torch.float64)
    return outcome(m)


@case
def swapped_by_load_state_dict(m: Any) -> list[Any]:
    with swapping():
        return _loaded(m)


@case
def swapped_by_load_state_dict_of_a_submodule(m: Any) -> list[Any]:
    loss_of(m).backward()
    with swapping():
        m.first.load_state_dict({name: 1.5 * value for name, value in m.first.state_dict().items()})
    return outcome(m)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", list(CASES))
def test_as_uncached(name: str, trace: Any) -> None:
    model, oracle = pair(trace)
    same(CASES[name](model), CASES[name](oracle))
