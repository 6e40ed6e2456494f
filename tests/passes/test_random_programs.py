"""Random programs: after all passes, prologue and body together are the original, call after call."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from torch import Tensor, fx

from fxparam.passes.fold import Fold
from fxparam.passes.hoist import Hoist
from fxparam.passes.simplify import Simplify
from fxparam.program import Program, run

N = 3

# Each op: (how many values it takes, how it is written in a graph). All values are N x N, so that any op fits any value.
Build = Callable[..., fx.Node]


def function(target: Any, *more: Any, **kwargs: Any) -> Build:
    return lambda g, *values: g.call_function(target, (*values, *more), kwargs)


def method(name: str, *more: Any, **kwargs: Any) -> Build:
    return lambda g, *values: g.call_method(name, (*values, *more), kwargs)


def row_write(g: fx.Graph, a: fx.Node, b: fx.Node) -> fx.Node:
    g.call_function(operator.setitem, (a, 0, g.call_function(operator.getitem, (b, 1))))
    return a


def view_write(g: fx.Graph, a: fx.Node, b: fx.Node) -> fx.Node:
    row = g.call_method("select", (a, 0, 1))
    g.call_method("add_", (row, g.call_function(operator.getitem, (b, 0))))
    return a


def pieces(g: fx.Graph, a: fx.Node) -> fx.Node:
    parts = g.call_function(torch.split, (a, 1), {})
    return g.call_function(torch.cat, ([g.call_function(operator.getitem, (parts, k)) for k in (2, 0, 1)],))


def factored(g: fx.Graph, a: fx.Node) -> fx.Node:
    pair = g.call_function(torch.linalg.qr, (g.call_function(torch.add, (a, g.call_function(torch.eye, (N,)))),))
    return g.call_function(operator.getitem, (pair, 1))


def scaled_by_size(g: fx.Graph, a: fx.Node) -> fx.Node:
    return g.call_function(operator.mul, (a, g.call_method("size", (a, 0))))


def grown(g: fx.Graph, a: fx.Node) -> fx.Node:
    big = g.call_method("repeat", (a, 8, 8))
    return g.call_function(operator.getitem, (big, (slice(0, N), slice(N, 2 * N))))


OPS: dict[str, tuple[int, Build]] = {
    "add": (2, function(torch.add)),
    "mul": (2, function(operator.mul)),
    "matmul": (2, function(torch.matmul)),
    "sub_alpha": (2, function(torch.sub, alpha=2)),
    "sin": (1, method("sin")),
    "tanh": (1, function(torch.tanh)),
    "softmax": (1, function(F.softmax, dim=0)),
    "normalize": (1, function(F.normalize)),
    "mT": (1, function(getattr, "mT")),
    "view": (1, method("view", N, N)),
    "slice": (1, function(operator.getitem, slice(None))),
    "expand": (1, lambda g, a: g.call_method("expand", (g.call_function(operator.getitem, (a, slice(0, 1))), N, N))),
    "contiguous": (1, method("contiguous")),
    "reshape": (1, method("reshape", N, N)),
    "detach": (1, method("detach")),
    "clone": (1, method("clone")),
    "pieces": (1, pieces),
    "qr": (1, factored),
    "size": (1, scaled_by_size),
    "grown": (1, grown),
    "add_": (2, method("add_")),
    "iadd": (2, function(operator.iadd)),
    "relu_": (1, function(torch.relu_)),
    "relu_inplace": (1, function(F.relu, inplace=True)),
    "fill_": (1, method("fill_", 0.5)),
    "row_write": (2, row_write),
    "view_write": (2, view_write),
    "rand_like": (1, function(torch.rand_like)),
    "dropout": (1, function(F.dropout, 0.5, True)),
    "bernoulli": (1, lambda g, a: g.call_function(torch.bernoulli, (g.call_method("sigmoid", (a,)),))),
    "eye": (0, lambda g: g.call_function(torch.eye, (N,))),
    "arange": (0, lambda g: g.call_method("view", (g.call_function(torch.arange, (float(N * N),)), N, N))),
    "randn": (0, lambda g: g.call_function(torch.randn, (N, N))),
}


@st.composite
def programs(draw: st.DrawFn) -> fx.Graph:
    graph = fx.Graph()
    values = [graph.placeholder("x"), *(graph.get_attr(name) for name in ("p", "q", "buffer"))]
    for _ in range(draw(st.integers(1, 12))):
        arity, build = OPS[draw(st.sampled_from(sorted(OPS)))]
        # Reading a tensor again is a node of its own, as exporters write it.
        if draw(st.integers(0, 9)) == 0:
            values.append(graph.get_attr(draw(st.sampled_from(["p", "q", "buffer"]))))
        values.append(build(graph, *(draw(st.sampled_from(values)) for _ in range(arity))))
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    graph.output(tuple([values[-1], *outputs]))
    return graph


def fresh() -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(1)
    p, q, buffer = (torch.randn(N, N, generator=gen, dtype=torch.float64) for _ in range(3))
    return {"p": p.requires_grad_(), "q": q.requires_grad_(), "buffer": buffer}


def call(execute: Any, graph: fx.Graph, tensors: dict[str, Tensor], leaves: dict[str, Tensor], seed: int) -> dict[str, Any]:
    """Outputs, gradients and buffers after one call."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(N, N, generator=gen, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(seed)
    outputs = execute(graph, tensors, x * 1)
    seen = {f"output {k}": o.detach().clone() for k, o in enumerate(outputs)}
    scalar = sum((o * torch.linspace(1, 2, N * N).view(N, N)).sum() for o in outputs)
    wanted = {"x": x, **{name: t for name, t in leaves.items() if t.requires_grad}}
    if scalar.requires_grad:
        grads = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True, materialize_grads=True, retain_graph=True)
        seen |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return seen | {"buffer": leaves["buffer"].clone()}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        torch.testing.assert_close(
            found[key], wanted, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


def expected_calls(execute: Any, graph: fx.Graph) -> list[dict[str, Any]]:
    tensors = fresh()
    try:
        seen = [call(execute, graph, tensors, tensors, seed) for seed in range(3)]
    except RuntimeError:
        # In place on a leaf that trains, or on what a backward needs: no program of PyTorch's either.
        assume(False)
        raise
    # Beyond this, rounding decides.
    assume(all(t.isfinite().all() and t.abs().max() < 1e4 for one in seen for t in one.values()))
    return seen


@given(graph=programs())
def test_prologue_and_body_are_the_program(execute: Any, graph: fx.Graph) -> None:
    expected = expected_calls(execute, graph)
    tensors = fresh()
    program = run(Program(graph, tensors), (Simplify(), Hoist()))
    assert program.prologue is not None and program.body is not None
    values = execute(program.prologue, program.tensors, *(program.tensors[name] for name in program.sources))
    kept = {**program.tensors, **dict(zip(program.values, values, strict=True))}
    for seed, wanted in enumerate(expected):
        same(call(execute, program.body, kept, tensors, seed), wanted)


@given(graph=programs())
def test_simplify_keeps_the_program(execute: Any, graph: fx.Graph) -> None:
    expected = expected_calls(execute, graph)
    tensors = fresh()
    program = run(Program(graph, tensors), (Simplify(),))
    assert Simplify().rewrite(program) is program
    for seed, wanted in enumerate(expected):
        same(call(execute, program.graph, tensors, tensors, seed), wanted)


@given(graph=programs())
def test_fold_keeps_the_values(execute: Any, graph: fx.Graph) -> None:
    # Folded values are contiguous, and these fill memory in the order of their input's strides: another draw, as random.
    assume(not any(str(node).startswith(("dropout", "rand_like", "bernoulli")) for node in graph.nodes))
    expected = expected_calls(execute, graph)
    tensors = {name: t.detach() for name, t in fresh().items()}
    program = run(Program(graph, tensors), (Fold(),))
    assert Fold().rewrite(program) is program
    for seed, wanted in enumerate(expected):
        found = call(execute, program.graph, dict(program.tensors), tensors, seed)
        same(
            {k: v for k, v in found.items() if not k.startswith("gradient")},
            {k: v for k, v in wanted.items() if not k.startswith("gradient")},
        )


def test_the_programs_have_prologues(execute: Any) -> None:
    """The strategy reaches what it is for."""
    seen: set[str] = set()

    @given(graph=programs())
    def look(graph: fx.Graph) -> None:
        program = run(Program(graph, fresh()), (Simplify(), Hoist()))
        seen.update("hoisted" for name in program.values if name.startswith("hoisted."))
        seen.update(record.why.split(" by ")[0] for record in program.trail if record.refused)

    look()
    assert {"hoisted", "its memory is written", "the model returns it", "draws random numbers at each call"} <= seen


pytestmark = pytest.mark.filterwarnings("error")
