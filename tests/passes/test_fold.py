"""Fold: only what depends on the input is left, computed wide and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import HOISTED, Net, site_program
from torch import Tensor, nn

from fxparam.passes.fold import Fold
from fxparam.program import Program, run
from fxparam.tracer.symbolic import trace_body


def program_of(net: nn.Module) -> Program:
    traced = trace_body(net, {})
    return Program(
        traced.graph, {**dict(net.named_parameters()), **dict(net.named_buffers()), **traced.tensors}, traced.modules
    )


@pytest.mark.parametrize("net", HOISTED, ids=lambda n: n.__name__)
def test_fold_leaves_only_what_depends_on_the_input(net: type[Net], golden: Callable[[str, str], None], execute: Any) -> None:
    plain = net()
    program = program_of(plain)
    after = run(program, (Fold(),))
    golden(f"fold_{net.__name__}", str(after.graph))
    assert Fold().rewrite(after) is after
    x = torch.randn(2, 3)
    torch.testing.assert_close(execute(after.graph, after.tensors, x), plain(x), rtol=1e-13, atol=1e-13)
    assert not any(after.tensors[n].requires_grad for n in after.tensors if n.startswith("hoisted."))


def test_fold_of_nothing_is_the_same_object() -> None:
    program, _ = site_program()
    bare = program.evolve(sites=(), tensors={"a.weight": torch.ones(3, 3), "b.weight": torch.ones(3, 3)})
    assert Fold().rewrite(bare) is bare


def test_fold_computes_wide_and_rounds_once() -> None:
    class Big(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.matrix_exp(self.weight * 2)

    plain = Big().float()
    (value,) = [t for n, t in run(program_of(plain), (Fold(torch.float64),)).tensors.items() if n.startswith("hoisted.")]
    exact = torch.matrix_exp(plain.weight.detach().double() * 2)
    assert value.dtype == torch.float32 and torch.equal(value, exact.float())
    assert not torch.equal(value, torch.matrix_exp(plain.weight.detach() * 2)), "too easy"


def test_fold_computes_wide_what_makes_its_own_dtype() -> None:
    """A float32 constant in the arithmetic must not bring float32 back, nor break the evaluation."""

    class Mixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            w = torch.matrix_exp(self.weight * 2)
            return x @ (w @ torch.eye(3, dtype=w.dtype) + torch.linspace(0, 1, 3, dtype=torch.float32))

    plain = Mixed().float()
    program = run(program_of(plain), (Fold(torch.float64),))
    (value,) = [t for n, t in program.tensors.items() if n.startswith("hoisted.")]
    w = torch.matrix_exp(plain.weight.detach().double() * 2)
    torch.testing.assert_close(value, (w + torch.linspace(0, 1, 3, dtype=torch.float32)).float(), rtol=1e-6, atol=1e-6)
