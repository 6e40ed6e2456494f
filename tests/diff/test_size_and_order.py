"""Large, symmetric and repetitive graphs, and the order of effects."""

from __future__ import annotations

import itertools
import operator
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diff.common import branches, chain, graph_of
from torch import fx, nn

from fxparam.graphdiff import apply, diff


def test_large_graphs_take_seconds_and_give_small_differences() -> None:
    start = time.perf_counter()
    long = chain(5000)
    assert not diff(long, long)
    found = diff(long, chain(5000, (100, 2000, 4000)))
    assert [len(found.added), len(found.moved), len(found)] == [3, 3, 6]
    wide = branches(2000)
    assert not diff(wide, wide)
    found = diff(wide, branches(2000, without=(5, 1000), last=torch.stack))
    assert [len(found.removed), len(found.changed), len(found)] == [2, 1, 3]
    assert time.perf_counter() - start < 30


def test_a_value_with_many_users_is_one_entry() -> None:
    def fan(through: bool) -> fx.GraphModule:
        graph = fx.Graph()
        value = graph.call_function(torch.sin, (graph.placeholder("x"),))
        if through:
            value = graph.call_function(torch.exp, (value,))
        graph.output([graph.call_function(torch.mul, (value, float(k))) for k in range(100)])
        return fx.GraphModule({}, graph)

    found = diff(fan(False), fan(True))
    assert [len(found.added), len(found.moved), len(found)] == [1, 1, 2]
    assert len(found.moved[0].nodes) == 100
    assert str(found.moved[0]) == "> mul, mul_1, mul_2, mul_3 and 96 more: reads exp, was sin"


@pytest.mark.parametrize("rings", [(6,), (3, 3), (3, 6)])
def test_symmetric_dead_nodes_are_matched_by_search(rings: tuple[int, ...]) -> None:
    """Rings of dead sums over equal values: colour refinement cannot tell one ring of six from two of three."""

    def ring(sizes: tuple[int, ...], seed: int) -> fx.GraphModule:
        graph = fx.Graph()
        x = graph.placeholder("x")
        values = [graph.call_function(torch.relu, (x,)) for _ in range(sum(sizes))]
        random.Random(seed).shuffle(values)
        for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
            part = values[start : start + size]
            for k in range(size):
                graph.call_function(torch.add, (part[k], part[(k + 1) % size]))
        graph.output(x)
        return fx.GraphModule({}, graph)

    assert not diff(ring(rings, 1), ring(rings[::-1], 2))
    other = {(6,): (3, 3), (3, 3): (6,), (3, 6): (4, 5)}[rings]
    assert diff(ring(rings, 1), ring(other, 2))


def test_repeated_and_shared_computations_differ() -> None:
    once = graph_of(lambda x: (lambda y: y + y)(torch.relu(x)))
    twice = graph_of(lambda x: torch.relu(x) + torch.relu(x))
    found = diff(once, twice)
    assert len(found.added) == 1
    assert not diff(apply(found, once), twice)


ORDER = [
    pytest.param(lambda x, y: (x.add_(1), y.mul_(2)), lambda x, y: (lambda b, a: (a, b))(y.mul_(2), x.add_(1)), id="in-place"),
    pytest.param(
        lambda x, y: (torch.rand_like(x), torch.randn_like(y)),
        lambda x, y: (lambda b, a: (a, b))(torch.randn_like(y), torch.rand_like(x)),
        id="random",
    ),
    pytest.param(
        lambda x, y: (nn.functional.relu(x, True), nn.functional.dropout(y)),
        lambda x, y: (lambda b, a: (a, b))(nn.functional.dropout(y), nn.functional.relu(x, True)),
        id="positional-inplace",
    ),
]


@pytest.mark.parametrize("first, second", ORDER)
def test_the_order_of_effects_counts(first: Callable[..., Any], second: Callable[..., Any]) -> None:
    found = diff(graph_of(first), graph_of(second))
    assert [m.reason for m in found.moved] == ["order"]
    assert not diff(apply(found, graph_of(first)), graph_of(second))


def test_the_order_of_pure_operations_does_not_count() -> None:
    first = graph_of(lambda x, y: (x.add(1), y.mul(2)))
    assert not diff(first, graph_of(lambda x, y: (lambda b, a: (a, b))(y.mul(2), x.add(1))))


def test_reading_memory_before_and_after_a_write_differs_also_through_a_view() -> None:
    def graph(write_first: bool) -> fx.GraphModule:
        result = fx.Graph()
        x = result.placeholder("x")
        view = result.call_method("view", (x, -1))
        steps = [
            lambda: result.call_function(operator.setitem, (x, 0, 5.0)),
            lambda: result.call_function(torch.add, (view, 1)),
        ]
        made = [step() for step in (steps if write_first else steps[::-1])]
        result.output(made[write_first])
        return fx.GraphModule({}, result)

    found = diff(graph(False), graph(True))
    assert [m.reason for m in found.moved] == ["after"]
    assert str(found.moved[0]) == "> add: reads memory written by setitem, was nothing"
    assert not diff(apply(found, graph(False)), graph(True))
