"""Modes and contexts around a read: gradient or none, dtypes, autocast, freezing, hooks, export, ensembles."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from runtime.oracles import TRACES
from runtime.situations.common import Case, X, Y, forget, grads, loss_of, outcome, pair, same
from runtime.tables import collector
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import fxparam as fxp

CASES: dict[str, Case] = {}
case = collector(CASES)


@case
def inference_first_then_training(m: Any) -> list[Any]:
    with torch.inference_mode():
        first = m(X).sum().item()
        _ = m.first.weight
    return [first, *outcome(m)]


@case
def read_without_gradient_first(m: Any) -> list[Any]:
    with torch.no_grad():
        weight = m.first.weight
    loss_of(m).backward()
    return [weight, weight.requires_grad, *grads(m)]


@case
def read_by_another_thread_without_gradient_first(m: Any) -> list[Any]:
    def read() -> None:
        with torch.no_grad():
            m(X)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    return outcome(m)


@case
def dtypes_in_turn(m: Any) -> list[Any]:
    """Layer by layer too; the orthogonal map has no half precision."""
    seen: list[Any] = []
    for dtype in (torch.half, torch.bfloat16, torch.float, torch.double):
        m.first.to(dtype)
        seen += [m.first.weight.double(), m.first.weight.dtype, m.second.weight]
    m.float()
    seen += [m(X.float()).dtype, m.second.weight.dtype]
    return [*seen, *outcome(m.double())]


@case
def autocast_on_off_and_dtypes(m: Any) -> list[Any]:
    m.float()
    seen: list[Any] = []
    for dtype in (None, torch.bfloat16, torch.float16, None, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            seen.append(m(X.float()).detach())
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(1.1)
    return [*seen, *(value.dtype for value in seen), *outcome(m.double())]


@case
def frozen_and_unfrozen_in_between(m: Any) -> list[Any]:
    optimizer = torch.optim.SGD(m.parameters(), 0.1, fused=True)
    seen = []
    for number in range(5):
        for p in m.first.parametrizations.weight.parameters():
            p.requires_grad_(number % 2 == 0)
        optimizer.zero_grad()
        loss_of(m).backward()
        optimizer.step()
        seen += [m(X).detach(), *grads(m)]
    m.requires_grad_(False)
    seen.append(m(X).requires_grad)
    m.requires_grad_(True)
    return [*seen, *outcome(m)]


@case
def lossy_saved_tensor_hooks_around_the_first_read(m: Any) -> list[Any]:
    forget(m)
    with saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.double()):
        m(X)
    return outcome(m)


@case
def counted_flops(m: Any) -> list[Any]:
    with FlopCounterMode(display=False):
        loss = loss_of(m)
    loss.backward()
    return grads(m)


@case
def exported_before_the_first_read(m: Any) -> list[Any]:
    forget(m)
    exported = torch.export.export(m, (X,)).module()(X).detach()
    return [exported, *(type(weight) for weight in (m.first.weight, m.second.weight)), *outcome(m)]


@case
def inside_cached(m: Any) -> list[Any]:
    """PyTorch's own cache is stale in all of these; around a transformed model it does nothing, and so nothing wrong."""
    context = parametrize.cached() if isinstance(m, fxp.ParametrizedModule) else torch.enable_grad()
    optimizer = torch.optim.SGD(m.parameters(), 0.1, fused=True)
    with context:
        with torch.no_grad():
            seen = [m(X)]
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(m).backward()
            loss_of(m, Y).backward()
            optimizer.step()
            seen.append(m(X).detach())
        m.load_state_dict({name: 1.5 * value for name, value in m.state_dict().items()})
        seen.append(m(X).detach())
        m.double()
        return [*seen, *outcome(m)]


@case
def ensemble(m: Any) -> list[Any]:
    other = copy.deepcopy(m)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3)
    stacked, buffers = stack_module_state([m, other])
    base = copy.deepcopy(m).to("meta")
    out = torch.vmap(lambda p, b: functional_call(base, (p, b), (X,)))(stacked, buffers)
    out.sum().backward()
    return [out.detach(), *(value.grad for value in stacked.values()), *outcome(m), other(X).detach()]


# Of vmap, about the ensemble's weight norm.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", list(CASES))
def test_as_uncached(name: str, trace: Any) -> None:
    model, oracle = pair(trace)
    same(CASES[name](model), CASES[name](oracle))
