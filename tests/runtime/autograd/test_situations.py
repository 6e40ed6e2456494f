"""Autograd situations: as a plain model that computes its weights at each forward, errors included."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from runtime.autograd import backwards, contexts
from runtime.autograd.common import Case, plain, transformed
from torch import Tensor, nn

import fxparam as fxp

CASES: dict[str, Case] = {**backwards.CASES, **contexts.CASES}


def _same(got: Any, want: Any) -> None:
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    else:
        assert got == want


# PyTorch's own decompositions for forward mode are scripted on first use.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("trace", ["live", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_as_plain_pytorch(name: str, trace: str) -> None:
    want = CASES[name](plain())
    warned = pytest.warns(RuntimeWarning, match="written in place") if name.startswith("weight_written") else nullcontext()
    with warned:
        got = CASES[name](transformed(trace))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        _same(one, other)


def test_the_two_traces_differ() -> None:
    assert transformed("live").module.report.body == "live"  # type: ignore[union-attr]
    assert transformed("auto").module.report.body == "graph"  # type: ignore[union-attr]


def test_the_table_holds_every_situation() -> None:
    assert len(CASES) >= 48


@pytest.mark.parametrize("trace", ["live", "auto"])
def test_a_second_order_graph_is_not_shared_with_the_next_forward(trace: str) -> None:
    model = fxp.transform(nn.Linear(4, 4).double(), {"weight": fxp.orthogonal(map="matrix_exp")}, trace=trace)
    oracle = fxp.transform(nn.Linear(4, 4).double(), {"weight": fxp.orthogonal(map="matrix_exp")}, trace=trace)
    oracle.load_state_dict(model.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64)
    for m in (model, oracle):
        found = torch.autograd.grad(m(x).square().sum(), list(m.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in found).backward()  # type: ignore[union-attr]
        if m is oracle:
            m.invalidate()
        # The backward above freed what the second order saved; this one has a graph of its own.
        m(x).sin().sum().backward()
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
