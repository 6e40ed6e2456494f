"""Substitute, simplify, hoist, fold: printed graphs, exact counts, values and gradients, refusals and their reasons."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxparam as fxp
from fxparam.passes.fold import Fold
from fxparam.passes.hoist import Hoist
from fxparam.passes.simplify import Simplify
from fxparam.passes.substitute import Substitute
from fxparam.program import Fragment, Pass, Program, Site, deliver, run
from fxparam.tracer.symbolic import trace_body

N = 4


def program_of(net: nn.Module) -> Program:
    traced = trace_body(net, {})
    return Program(
        traced.graph, {**dict(net.named_parameters()), **dict(net.named_buffers()), **traced.tensors}, traced.modules
    )


def operations(graph: fx.Graph) -> list[str]:
    names = {"placeholder", "get_attr", "output"}
    return [str(getattr(n.target, "__name__", n.target)) for n in graph.nodes if n.op not in names]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.bias = nn.Parameter(torch.randn(3))
        self.register_buffer("scale", torch.rand(3))


# --- weight arithmetic with an empty spec


class WeightStandardized(Net):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True) + 1e-5).sqrt()
        return F.linear(x, w, self.bias)


class Normalized(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1)) + self.bias


class Softmaxed(Net):
    def forward(self, x: Tensor) -> Tensor:
        alphas = self.bias.softmax(0)
        return alphas[0] * x + alphas[1] * x.relu() + alphas[2] * (x @ self.weight)


class EqualizedRate(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (2 / self.weight.size(1)) ** 0.5, self.bias * 0.5)


class TupleValued(Net):
    def forward(self, x: Tensor) -> Tensor:
        q, r = torch.linalg.qr(self.weight)
        a, b = torch.split(self.weight * 2, (1, 2))
        return x @ q + x @ r.tanh() + x @ torch.cat((b, a))


class LowRank(Net):
    def forward(self, x: Tensor) -> Tensor:
        delta = torch.outer(self.bias, self.bias)
        return F.linear(x, self.weight + delta)


class Einsummed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.einsum("ij,kj,k->ik", self.weight, self.weight, self.bias)


class BufferScaled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale.exp())


class WithConstant(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + torch.eye(3) * 2) + torch.arange(3.0).exp()


HOISTED = (
    WeightStandardized,
    Normalized,
    Softmaxed,
    EqualizedRate,
    TupleValued,
    LowRank,
    Einsummed,
    BufferScaled,
    WithConstant,
)


def story(eager: nn.Module, model: fxp.ParametrizedModule, *, calls: int = 3) -> None:
    """Training of both, side by side: outputs and gradients at each step, several calls a step."""
    optimizers = [torch.optim.SGD(one.parameters(), 0.05) for one in (eager, model)]
    for step in range(3):
        for call in range(calls):
            x = torch.randn(2, 3, generator=torch.Generator().manual_seed(10 * step + call), dtype=torch.float64)
            outs = []
            for one in (eager, model):
                torch.manual_seed(step)
                outs.append(one(x))
                outs[-1].square().sum().backward()
            torch.testing.assert_close(outs[1], outs[0], rtol=1e-12, atol=1e-12)
        theirs = dict(eager.named_parameters())
        for name, parameter in model.named_parameters():
            wanted = theirs[name].grad
            assert (parameter.grad is None) == (wanted is None), name
            if wanted is not None:
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-11, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("net", HOISTED, ids=lambda n: n.__name__)
def test_weight_arithmetic_leaves_the_body_without_any_spec(net: type[Net], golden: Callable[[str, str], None]) -> None:
    plain = net()
    eager = copy.deepcopy(plain)
    model = fxp.transform(plain)
    assert model.report.body == "graph", model.report.why_live
    assert model.report.hoisted
    golden(f"hoist_{net.__name__}", f"prologue\n{model.prologue.graph}\n\nbody\n{model.body.graph}")
    # In the body, whatever is computed depends on the input, apart from views of what was hoisted.
    body: Any = model.body
    per_call = set(body.graph.find_nodes(op="placeholder"))
    for node in body.graph.nodes:
        if per_call & set(node.all_input_nodes):
            per_call.add(node)
        elif node.op in ("call_function", "call_method"):
            assert node.target in (operator.getitem, "size"), f"{node.format_node()} is computed per call"
    before = model.stats.refreshes
    story(eager, model)
    assert model.stats.refreshes - before == 3


@dataclass(frozen=True)
class Kept:
    """Something that has to stay in the body."""

    name: str
    forward: Callable[[Any, Tensor], Any]
    why: str
    ops: tuple[str, ...]


def written_view(self: Any, x: Tensor) -> Tensor:
    v = (self.weight * 2).view(9)
    v[0] += x.mean()
    return x @ v.view(3, 3)


def expanded(self: Any, x: Tensor) -> Tensor:
    return x + self.bias.exp().expand(2, 3)


def repeated(self: Any, x: Tensor) -> Tensor:
    return x.repeat(20, 1) + self.bias.repeat(40, 1)


def random_weight(self: Any, x: Tensor) -> Tensor:
    return x @ F.dropout(self.weight, 0.5, True)


def random_like(self: Any, x: Tensor) -> Tensor:
    return x @ (self.weight + torch.randn_like(self.weight))


KEPT = (
    Kept("written view", written_view, "its memory is written by", ("mul", "view")),
    Kept("expand", expanded, "a view costs nothing per call", ("expand",)),
    Kept("repeat", repeated, "would keep", ("repeat",)),
    Kept("dropout", random_weight, "draws random numbers at each call", ("dropout",)),
    Kept("randn_like", random_like, "draws random numbers at each call", ("randn_like",)),
)


@pytest.mark.parametrize("case", KEPT, ids=lambda c: c.name)
def test_what_stays_in_the_body_and_why(case: Kept) -> None:
    plain = type("Kept", (Net,), {"forward": case.forward})()
    eager = copy.deepcopy(plain)
    model = fxp.transform(plain)
    assert model.report.body == "graph", model.report.why_live
    body: Any = model.body
    found = operations(body.graph)
    assert set(case.ops) <= set(found), found
    assert any(case.why in record.why for record in model.report.refusals), list(map(str, model.report.refusals))
    story(eager, model)


def test_an_expand_is_hoisted_up_to_the_view() -> None:
    model = fxp.transform(type("Expanded", (Net,), {"forward": expanded})())
    assert operations(model.prologue.graph) == ["exp"]


def test_returned_arithmetic_is_the_callers_own() -> None:
    class Returned(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            w = self.weight * 2
            return x @ w, w

    plain = Returned()
    eager = copy.deepcopy(plain)
    model = fxp.transform(plain)
    x = torch.randn(2, 3)
    for _ in range(3):
        (a, w), (b, v) = model(x), eager(x)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(w, v)
        with torch.no_grad():
            w.zero_(), v.zero_()
    assert any("the model returns it" in record.why for record in model.report.refusals)


def test_buffers_of_batch_norm_read_explicitly_are_read_per_call() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) * (self.norm.running_var + 1).sqrt()

    plain = Read()
    eager = copy.deepcopy(plain)
    model = fxp.transform(plain)
    for seed in range(4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        torch.testing.assert_close(model(x), eager(x), rtol=1e-12, atol=1e-12)
    assert not model.report.hoisted


# --- simplify


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


# --- substitute


def site_program() -> tuple[Program, dict[str, Fragment]]:
    body = fx.Graph()
    x = body.placeholder("x")
    y = body.call_function(F.linear, (x, body.get_attr("a.weight")))
    body.output(body.call_function(F.linear, (y, body.get_attr("b.weight"))))
    inner = fx.Graph()
    latent = inner.placeholder("latent")
    inner.output((inner.call_function(torch.tanh, (latent,)),))
    site = Site(
        names=("a.weight",),
        aliases=(("a.weight", "b.weight"),),
        home="a.parametrizations.weight",
        latents=("a.parametrizations.weight.original",),
        reads=(),
        declaration="tanh",
        origin="spec",
        start="",
    )
    tensors = {"a.parametrizations.weight.original": torch.randn(3, 3, requires_grad=True)}
    fragments = {site.home: Fragment(inner, ("a.parametrizations.weight.original",))}
    return Program(body, tensors, sites=(site,)), fragments


def test_substitute_computes_a_tied_weight_once(golden: Callable[[str, str], None], execute: Any) -> None:
    program, fragments = site_program()
    before = str(program.graph)
    after = run(program, (Substitute(fragments),))
    golden("substitute_tied", str(after.graph))
    assert operations(after.graph) == ["tanh", "deliver", "linear", "linear"]
    assert "substituted" in after.facts
    assert str(program.graph) == before
    x, latent = torch.randn(2, 3), program.tensors["a.parametrizations.weight.original"]
    found = execute(after.graph, after.tensors, x)
    wanted = F.linear(F.linear(x, latent.tanh()), latent.tanh())
    torch.testing.assert_close(found, wanted)
    (a,) = torch.autograd.grad(found.square().sum(), latent)
    (b,) = torch.autograd.grad(wanted.square().sum(), latent)
    torch.testing.assert_close(a, b)


def test_substitute_without_sites_is_the_same_object() -> None:
    program, _ = site_program()
    bare = program.evolve(sites=())
    assert Substitute({}).rewrite(bare) is bare


def test_the_pipeline_on_a_site(golden: Callable[[str, str], None]) -> None:
    program, fragments = site_program()
    weight = program.tensors["a.parametrizations.weight.original"].detach().tanh()
    after = run(program, (Substitute(fragments), Simplify(), Hoist({"a.weight": weight, "b.weight": weight})))
    golden("pipeline_tied", f"prologue\n{after.prologue}\n\nbody\n{after.body}")
    assert after.values == ("a.weight",) and after.sources == ("a.parametrizations.weight.original",)


# --- verification


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


# --- fold


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
