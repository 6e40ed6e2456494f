"""Simplify: common subexpressions, dead code, and what only looks equal."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import operations
from torch import Tensor, fx

from fxparam.passes.simplify import Simplify
from fxparam.program import Program, run


def graph_of(build: Callable[[fx.Graph, fx.Node, fx.Node], Any]) -> tuple[fx.Graph, dict[str, Tensor]]:
    graph = fx.Graph()
    x, p = graph.placeholder("x"), graph.get_attr("p")
    graph.output(build(graph, x, p))
    return graph, {"p": torch.randn(3, requires_grad=True)}


SAME: dict[str, tuple[Any, int]] = {
    # name -> (two expressions, how many nodes are left)
    "equal": (lambda g, x, p: (g.call_function(torch.exp, (p,)), g.call_function(torch.exp, (p,))), 1),
    "int and float": (lambda g, x, p: (g.call_function(torch.mul, (p, 1)), g.call_function(torch.mul, (p, 1.0))), 2),
    "int and bool": (lambda g, x, p: (g.call_function(torch.mul, (p, 1)), g.call_function(torch.mul, (p, True))), 2),
    "zero and minus zero": (lambda g, x, p: (g.call_function(torch.div, (p, 0.0)), g.call_function(torch.div, (p, -0.0))), 2),
    "keyword": (lambda g, x, p: (g.call_function(torch.sum, (p,)), g.call_function(torch.sum, (p,), {"dim": 0})), 2),
    "order": (lambda g, x, p: (g.call_function(torch.sub, (p, x)), g.call_function(torch.sub, (x, p))), 2),
    "random": (lambda g, x, p: (g.call_function(torch.rand_like, (p,)), g.call_function(torch.rand_like, (p,))), 2),
    "slices": (
        lambda g, x, p: (
            g.call_function(operator.getitem, (p, slice(0, 2))),
            g.call_function(operator.getitem, (p, slice(0, 2))),
        ),
        1,
    ),
    "list and tuple": (lambda g, x, p: (g.call_method("view", (p, [3])), g.call_method("view", (p, (3,)))), 2),
    "method and function": (lambda g, x, p: (g.call_method("exp", (p,)), g.call_function(torch.exp, (p,))), 2),
    "dtype": (lambda g, x, p: (g.call_method("to", (p, torch.float32)), g.call_method("to", (p, torch.float64))), 2),
    "factories": (lambda g, x, p: (g.call_function(torch.zeros, (3,)), g.call_function(torch.zeros, (3,))), 1),
}


@pytest.mark.parametrize("name", SAME)
def test_common_subexpressions(name: str) -> None:
    build, left = SAME[name]
    # Added up: what the caller gets twice has to be two.
    graph, tensors = graph_of(lambda g, x, p: g.call_function(torch.add, build(g, x, p)))
    program = Program(graph, tensors)
    after = run(program, (Simplify(),))
    assert len(operations(after.graph)) == left + 1
    assert (after.graph is program.graph) == (left == 2)
    assert len(operations(program.graph)) == 3, "the input was changed"
    assert Simplify().rewrite(after) is after


def test_reads_before_and_after_a_write_differ(execute: Any) -> None:
    def build(g: fx.Graph, x: fx.Node, p: fx.Node) -> Any:
        v = g.call_function(torch.mul, (x, 2))
        a = g.call_function(torch.exp, (v,))
        g.call_method("fill_", (v, 0.5))
        return a, g.call_function(torch.exp, (v,))

    graph, tensors = graph_of(build)
    after = run(Program(graph, tensors), (Simplify(),))
    x = torch.randn(3)
    for found, wanted in zip(execute(after.graph, tensors, x), execute(graph, tensors, x), strict=True):
        torch.testing.assert_close(found, wanted)


def test_fresh_values_that_the_caller_gets_twice_are_two() -> None:
    """``return zeros(3), zeros(3)``: who writes to one does not write to the other."""
    graph, tensors = graph_of(SAME["factories"][0])
    after = run(Program(graph, tensors), (Simplify(),))
    a, b = fx.GraphModule({}, after.graph)(torch.ones(3))
    a.add_(1)
    assert b.sum() == 0


def test_dead_code_goes_and_effects_stay() -> None:
    def build(g: fx.Graph, x: fx.Node, p: fx.Node) -> Any:
        g.call_function(torch.exp, (g.call_function(torch.sin, (p,)),))
        g.call_function(torch.rand, (3,))
        v = g.call_function(torch.mul, (p, 2))
        g.call_method("add_", (v, 1))
        g.call_function(torch._assert, (True, "never"))
        return v

    after = run(Program(*graph_of(build)), (Simplify(),))
    assert operations(after.graph) == ["rand", "mul", "add_", "_assert"]
    assert str(after.trail[-1]) == "simplify: merged 0 common subexpressions, dropped 2 dead nodes"


def _products(node: fx.Node, *factors: fx.Node) -> fx.Node:
    for factor in factors:
        node = node.graph.call_function(torch.mul, (node, factor))
    return node


def masked(**tensors: Tensor) -> tuple[Program, Program]:
    """``p`` times each of the tensors, before and after."""
    graph = fx.Graph()
    factors = [graph.get_attr(name) for name in tensors]
    graph.output(_products(graph.get_attr("p"), *factors))
    program = Program(graph, {"p": torch.randn(4, dtype=torch.float64, requires_grad=True), **tensors})
    return program, run(program, (Simplify(),))


def value_and_gradient(program: Program) -> tuple[Tensor, Tensor]:
    module = fx.GraphModule({**program.tensors}, program.graph)
    value = module()
    return value.detach(), torch.autograd.grad(value.sum(), program.tensors["p"])[0]


def test_masks_of_masks() -> None:
    masks = [torch.tensor(bits, dtype=torch.float64) for bits in ([1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 1])]
    before, after = masked(a=masks[0], b=masks[1], c=masks[2])
    products = [node for node in after.graph.nodes if node.target is torch.mul]
    assert [node.all_input_nodes[0].target == "p" for node in products] == [False, False, True]
    for got, want in zip(value_and_gradient(after), value_and_gradient(before), strict=True):
        assert torch.equal(got, want)
    assert "merged 2 masks of masks" in after.trail[-1].did


@pytest.mark.parametrize(
    "other",
    [
        torch.full((4,), 0.5, dtype=torch.float64),
        torch.tensor([1, 0, 1, 1]),
        torch.ones(4, dtype=torch.float64, requires_grad=True),
    ],
    ids=["fractions", "integers", "trained"],
)
def test_other_products_stay_in_their_order(other: Tensor) -> None:
    before, after = masked(a=torch.tensor([1.0, 0, 0, 1], dtype=torch.float64), b=other)
    assert after.graph is before.graph


def test_double_transposes() -> None:
    graph = fx.Graph()
    p = graph.get_attr("p")
    once = graph.call_function(torch.transpose, (p, 0, 1))
    twice = graph.call_function(torch.transpose, (once, 0, 1))
    other = graph.call_function(torch.transpose, (once, 1, 2))
    graph.output((graph.call_function(torch.exp, (twice,)), graph.call_function(torch.exp, (other,))))
    program = Program(graph, {"p": torch.randn(2, 3, 4)})
    after = run(program, (Simplify(),))
    assert [node.target for node in after.graph.nodes if node.op == "call_function"].count(torch.transpose) == 2
    assert "cancelled 1 double transposes" in after.trail[-1].did
    modules = (fx.GraphModule({**one.tensors}, one.graph) for one in (program, after))
    for got, want in zip(*(module() for module in modules), strict=True):
        assert torch.equal(got, want)
