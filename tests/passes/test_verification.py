"""A pass that breaks a program, or runs without what it needs, is an error that shows the place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from programs import site_program
from torch import fx

import fxparam as fxp
from fxparam.passes.hoist import Hoist
from fxparam.passes.substitute import Substitute
from fxparam.program import Pass, Program, deliver, run


class Broken(Pass):
    name: ClassVar[str] = "broken"

    def __init__(self, rewrite: Callable[[Program], Program]) -> None:
        self._rewrite = rewrite

    def rewrite(self, program: Program) -> Program:
        return self._rewrite(program)


def unknown_tensor(program: Program) -> Program:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, graph.get_attr("nowhere.weight"))))
    return program.evolve(graph=graph)


def unknown_module(program: Program) -> Program:
    graph = fx.Graph()
    graph.output(graph.call_module("nowhere", (graph.placeholder("x"),)))
    return program.evolve(graph=graph)


def use_before_definition(program: Program) -> Program:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.sin, (x,))
    b = graph.call_function(torch.cos, (x,))
    graph.output(b)
    a.args = (b,)
    return program.evolve(graph=graph)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (unknown_tensor, r"pass broken: no tensor is named 'nowhere.weight'; around the fault:\n(.*\n)*--> %nowhere_weight"),
        (unknown_module, r"pass broken: no module is named 'nowhere'; around the fault:\n(.*\n)*--> %nowhere"),
        (use_before_definition, r"pass broken: the graph is ill-formed: .*cos"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_result_is_an_error_that_shows_the_place(fault: Any, text: str) -> None:
    program, _ = site_program()
    with pytest.raises(fxp.PassError, match=text):
        run(program.evolve(sites=()), (Broken(fault),))


def test_a_pass_that_needs_what_nobody_gave() -> None:
    class Needs(Broken):
        name: ClassVar[str] = "needs"
        requires: ClassVar[frozenset[str]] = frozenset({"hoisted"})

    with pytest.raises(fxp.PassError, match="pass needs needs hoisted; run the pass that gives it first"):
        run(site_program()[0], (Needs(lambda p: p),))


def test_substitute_that_forgets_a_read_is_caught() -> None:
    program, fragments = site_program()
    with pytest.raises(fxp.PassError, match=r"a\.weight is still read as a tensor"):
        Substitute(fragments).verify(program, program)


def test_a_weight_that_depends_on_an_input_is_refused() -> None:
    program, _ = site_program()
    graph = fx.Graph()
    x = graph.placeholder("x")
    w = graph.call_function(torch.exp, (x,))
    graph.call_function(deliver, ("a.weight", w))
    graph.output(w)
    with pytest.raises(fxp.TraceError, match=r"the weight a\.weight cannot be computed ahead: it depends on an input"):
        Hoist({}).rewrite(program.evolve(graph=graph))


def test_a_weight_that_the_body_writes_is_refused() -> None:
    program, fragments = site_program()
    graph = fx.Graph()
    x = graph.placeholder("x")
    w = graph.get_attr("a.weight")
    graph.call_method("add_", (w, x))
    graph.output(w)
    with pytest.raises(fxp.TraceError, match=r"the weight a\.weight cannot be computed ahead: .*its memory is written by add_"):
        run(program.evolve(graph=graph), (Substitute(fragments), Hoist({"a.weight": torch.zeros(3, 3)})))
