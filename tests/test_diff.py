"""``fxparam.graphdiff``: against networkx on random graphs, and case by case for each kind of model."""

from __future__ import annotations

import doctest
import itertools
import operator
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

import fxparam.graphdiff
from fxparam.errors import TraceError
from fxparam.graphdiff import GraphDiffError, apply, diff, parse, read
from fxparam.graphdiff.myers import common_subsequence, increasing_subsequence

SEEDS = st.integers(0, 10**6)
UNARY: list[Callable[..., Any]] = [torch.relu, torch.sin, torch.neg]
BINARY: list[Callable[..., Any]] = [torch.add, torch.sub, operator.mul]


# ---------------------------------------------------------------------- random graphs and edits


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc1 = nn.Linear(3, 3), nn.Linear(3, 3)
        self.w0, self.w1 = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))


def random_graph(seed: int, size: int) -> fx.GraphModule:
    """Two inputs, ``size`` operations over a few labels (so that many nodes look alike), some of them dead."""
    rng, graph = random.Random(seed), fx.Graph()
    values = [graph.placeholder("x"), graph.placeholder("y")]
    for _ in range(size):
        a, b = (rng.choice(values[-6:]) for _ in range(2))
        kind = rng.randrange(8)
        if kind < 3:
            values.append(graph.call_function(rng.choice(UNARY), (a,)))
        elif kind < 5:
            values.append(graph.call_function(rng.choice(BINARY), (a, b)))
        elif kind == 5:
            values.append(graph.call_function(torch.mul, (a, rng.choice([2.0, 3.0]))))
        elif kind == 6:
            values.append(graph.call_module(rng.choice(["fc0", "fc1"]), (a,)))
        else:
            values.append(graph.call_function(torch.cat, ([a, graph.get_attr(rng.choice(["w0", "w1"]))],), {"dim": 0}))
    graph.output(tuple(values[-2:]))
    return fx.GraphModule(Root(), graph)


def shuffled(module: fx.GraphModule, seed: int) -> fx.GraphModule:
    """The same graph with other names in another topological order."""
    rng, graph = random.Random(seed), fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    left = list(module.graph.nodes)
    inputs = [n for n in left if n.op == "placeholder"]
    while left:
        ready = [n for n in left if n.op not in {"placeholder", "output"} and all(m in made for m in n.all_input_nodes)]
        ready += [n for n in inputs if n in left][:1]
        node = rng.choice(ready) if ready else left[0]
        left.remove(node)
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].name = f"n{rng.randrange(10**9)}"
    return fx.GraphModule(module, graph)


def calls(graph: fx.Graph, *functions: Callable[..., Any]) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and (not functions or n.target in functions)]


def change_op(graph: fx.Graph, rng: random.Random) -> None:
    node = rng.choice(calls(graph, *UNARY, *BINARY))
    family = UNARY if node.target in UNARY else BINARY
    node.target = rng.choice([f for f in family if f is not node.target])


def change_constant(graph: fx.Graph, rng: random.Random) -> None:
    node = rng.choice(calls(graph, torch.mul))
    node.update_arg(1, 5.0)


def drop(graph: fx.Graph, rng: random.Random) -> None:
    node = rng.choice(calls(graph, *UNARY))
    node.replace_all_uses_with(node.all_input_nodes[0])
    graph.erase_node(node)


def insert(graph: fx.Graph, rng: random.Random) -> None:
    node = rng.choice(calls(graph))
    users = list(node.users)
    with graph.inserting_after(node):
        added = graph.call_function(rng.choice(UNARY), (node,))
    for user in users:
        user.replace_input_with(node, added)


def duplicate(graph: fx.Graph, rng: random.Random) -> None:
    node = rng.choice([n for n in calls(graph) if n.users])
    with graph.inserting_after(node):
        copy = graph.node_copy(node)
    next(iter(node.users)).replace_input_with(node, copy)


def rename_parameter(graph: fx.Graph, rng: random.Random) -> None:
    for node in graph.find_nodes(op="get_attr", target="w0"):
        node.target = "w2"


EDITS = [change_op, change_constant, drop, insert, duplicate, rename_parameter]


def edited(module: fx.GraphModule, seed: int, edits: list[Callable[[fx.Graph, random.Random], None]]) -> fx.GraphModule:
    rng, graph = random.Random(seed), fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    for edit in edits:
        edit(graph, rng)
    root = Root()
    root.w2 = nn.Parameter(torch.ones(3))
    return fx.GraphModule(root, graph)


def isomorphic(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    """The oracle: networkx on a graph made directly from fx nodes (attribute reads of one name are one node)."""

    def plain(module: fx.GraphModule) -> Any:
        result, inputs = nx.DiGraph(), 0
        for node in module.graph.nodes:
            key = f"@{node.target}" if node.op == "get_attr" else node
            label = [
                node.op,
                "" if node.op == "placeholder" else str(node.target),
                str(inputs) * (node.op == "placeholder"),
            ]
            inputs += node.op == "placeholder"
            at: dict[Any, list[int]] = {}
            leaves: list[Any] = []
            fx.node.map_aggregate((node.args, node.kwargs), leaves.append)
            for position, leaf in enumerate(leaves):
                if isinstance(leaf, fx.Node):
                    at.setdefault(f"@{leaf.target}" if leaf.op == "get_attr" else leaf, []).append(position)
                else:
                    label.append(f"{position}: {leaf!r}")
            result.add_node(key, label="|".join(label))
            for source, positions in at.items():
                result.add_edge(source, key, at=tuple(positions))
        return result

    from networkx.algorithms.isomorphism import categorical_edge_match, categorical_node_match

    return nx.is_isomorphic(plain(a), plain(b), categorical_node_match("label", ""), categorical_edge_match("at", ()))


@given(seed=SEEDS, size=st.integers(1, 40))
def test_a_renamed_and_reordered_graph_is_the_same(seed: int, size: int) -> None:
    graph = random_graph(seed, size)
    other = shuffled(graph, seed)
    assert not diff(graph, graph)
    found = diff(graph, other)
    assert not found, str(found)
    assert len(found) == 0
    assert str(found) == f"no difference ({len(read(graph).nodes)} nodes)"
    assert read(graph).text == read(other).text


@pytest.mark.parametrize("edit", EDITS)
@given(seed=SEEDS)
def test_each_single_edit_is_a_small_difference_that_can_be_applied(edit: Callable[..., None], seed: int) -> None:
    graph = random_graph(seed, 40)
    try:
        other = edited(graph, seed, [edit])
    except IndexError:  # nothing in this graph that the edit is for
        return
    if edit is rename_parameter and not graph.graph.find_nodes(op="get_attr", target="w0"):
        return
    other = shuffled(other, seed)
    found = diff(graph, other)
    assert found
    assert len(found) <= 6, str(found)
    assert len(found) == len(found.added) + len(found.removed) + len(found.changed) + len(found.moved)
    result = apply(found, graph)
    assert not diff(result, other)
    assert isomorphic(result, other)


@given(seed=SEEDS, edits=st.lists(st.sampled_from(EDITS), min_size=1, max_size=6))
def test_k_edits_give_at_most_a_multiple_of_k_entries(seed: int, edits: list[Callable[..., None]]) -> None:
    graph = random_graph(seed, 150)
    other = shuffled(edited(graph, seed, edits), seed)
    found = diff(graph, other)
    assert len(found) <= 8 * len(edits), str(found)
    assert not diff(apply(found, graph), other)


@given(seed=SEEDS, size=st.integers(2, 9))
def test_empty_means_isomorphic_as_networkx_sees_it(seed: int, size: int) -> None:
    """Exchanging the arguments of one node: in small graphs of few labels this is often, not always, the same graph."""
    graph = random_graph(seed, size)
    other = edited(graph, seed, [])
    nodes = calls(other.graph, *BINARY)
    if nodes:
        node = random.Random(seed).choice(nodes)
        node.args = node.args[::-1]
    assert bool(diff(graph, other)) != isomorphic(graph, other)


# ---------------------------------------------------------------------- size, symmetry, order


def chain(length: int, extra: tuple[int, ...] = ()) -> fx.GraphModule:
    graph = fx.Graph()
    value = graph.placeholder("x")
    for k in range(length):
        if k in extra:
            value = graph.call_function(torch.tanh, (value,))
        value = graph.call_function(UNARY[k % 3], (value,))
    graph.output(value)
    return fx.GraphModule({}, graph)


def branches(count: int, without: tuple[int, ...] = (), last: Callable[..., Any] = torch.cat) -> fx.GraphModule:
    graph, values = fx.Graph(), []
    x = graph.placeholder("x")
    for k in range(count):
        value = graph.call_function(torch.relu, (x,))
        values.append(value if k in without else graph.call_function(torch.mul, (value, 2.0)))
    graph.output(graph.call_function(last, (values,)))
    return fx.GraphModule({}, graph)


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


def graph_of(function: Callable[..., Any]) -> fx.GraphModule:
    return fx.symbolic_trace(function)


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


# ---------------------------------------------------------------------- modules, attributes, constants


class Net(nn.Module):
    def __init__(self, size: int = 4, dtype: torch.dtype = torch.float32, shift: float = 2.0, heads: int = 2) -> None:
        super().__init__()
        self.fc = nn.Linear(3, size, dtype=dtype)
        self.attention = nn.MultiheadAttention(size, heads, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(size, dtype=dtype))
        self.shift = shift

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.fc(x) * self.scale + torch.tensor([1.0, self.shift, 3.0, 4.0])
        return self.attention(y, y, y)[0]


def renamed() -> nn.Module:
    net = Net()
    net.gain = net.scale
    del net.scale

    class Renamed(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.fc(x) * self.gain + torch.tensor([1.0, self.shift, 3.0, 4.0])
            return self.attention(y, y, y)[0]

    net.__class__ = Renamed
    return net


MODULES = [
    pytest.param(Net(dtype=torch.float64), "~ scale: type float32[4] -> float64[4]", id="dtype"),
    pytest.param(Net(shift=2.5), "value [1.0, 2.0, 3.0, 4.0] -> [1.0, 2.5, 3.0, 4.0]", id="lifted constant"),
    pytest.param(Net(heads=4), "~ attention: head_dim 2 -> 1; num_heads 2 -> 4", id="option not in extra_repr"),
    pytest.param(renamed(), "~ gain: name scale -> gain", id="parameter name"),
]


@pytest.mark.parametrize("other, text", MODULES)
def test_what_counts_about_modules(other: nn.Module, text: str) -> None:
    found = diff(Net(), other)
    assert text in str(found)
    assert not diff(apply(found, Net()), other)
    assert not diff(Net().eval(), Net())


def test_a_parametrized_module_is_not_the_plain_one() -> None:
    plain, other = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrizations.weight_norm(other[0])
    found = diff(plain, other)
    assert "parametrizations.weight.original0 (none) -> float32[3, 1]" in str(found)


def test_values_count_on_request() -> None:
    a, b = Net(), Net()
    b.load_state_dict(a.state_dict())
    assert not diff(a, b, values=True)
    with torch.no_grad():
        b.scale[0] = -0.0
        a.scale[0] = 0.0
    assert not diff(a, b)
    found = diff(a, b, values=True)
    assert str(found.changed[0]) == "~ scale: value [0.0, 1.0, 1.0, 1.0] -> [-0.0, 1.0, 1.0, 1.0]"


def test_apply_takes_what_is_common_from_its_argument() -> None:
    a, b, c = Net(), Net(shift=7.0), Net()
    result = apply(diff(a, b), c)
    assert result.fc is c.fc
    assert result.scale is c.scale
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    c.shift = 7.0
    torch.testing.assert_close(result(x), c(x), rtol=0, atol=0)
    c.shift = 2.0
    with pytest.raises(
        GraphDiffError, match=r"(?s)another graph than the one given: \d+ differences.*was the first argument of diff"
    ):
        apply(diff(a, b), nn.Sequential(nn.Linear(3, 4)))


def test_nested_graphs_count_whatever_their_names() -> None:
    def outer(inner: nn.Module) -> fx.GraphModule:
        root, graph = nn.Module(), fx.Graph()
        root.inner = fx.symbolic_trace(inner)
        graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
        return fx.GraphModule(root, graph)

    assert not diff(outer(nn.ReLU()), outer(nn.ReLU()))
    assert [c.fields[0][0] for c in diff(outer(nn.Linear(2, 2)), outer(nn.Linear(2, 3))).changed] == ["graph"]


def test_functions_are_compared_by_qualified_name() -> None:
    def make() -> Callable[[Tensor], Tensor]:
        def op(x: Tensor) -> Tensor:
            return x

        return op

    def graph(target: Callable[..., Any]) -> fx.GraphModule:
        result = fx.Graph()
        result.output(result.call_function(target, (result.placeholder("x"),)))
        return fx.GraphModule({}, result)

    assert not diff(graph(make()), graph(make()))
    assert str(diff(graph(torch.relu), graph(torch.sin))) == "1 difference: 1 changed\n~ sin: op torch.relu -> torch.sin"


CONSTANTS = [(1, 1.0), (1, True), (0.0, -0.0), ("%", r"\x25"), ([1], (1,)), (None, 0), (torch.float32, torch.float64)]


@pytest.mark.parametrize("x, y", CONSTANTS)
def test_constants_that_compare_equal_or_look_alike_differ(x: object, y: object) -> None:
    def graph(value: Any) -> fx.GraphModule:
        result = fx.Graph()
        result.output(result.call_function(torch.add, (result.placeholder("x"), value)))
        return fx.GraphModule({}, result)

    assert diff(graph(x), graph(y))
    assert not diff(graph(x), graph(x))
    assert parse(read(graph(x)).text).text == read(graph(x)).text


def test_inputs_count_by_position_default_and_known_type() -> None:
    def graph(*shape: int, default: Any = None, known: bool = True) -> fx.GraphModule:
        result = fx.symbolic_trace(nn.ReLU())
        node = next(iter(result.graph.nodes))
        if known:
            node.meta["val"] = torch.empty(shape, device="meta")
        node.args = (default,) if default is not None else ()
        return result

    assert str(diff(graph(2), graph(3)).changed[0]).endswith("type float32[2] -> float32[3]")
    assert not diff(graph(2), graph(known=False))
    assert diff(graph(2), graph(2, default=1.0))
    assert diff(graph_of(lambda x, y: x - y), graph_of(lambda y, x: x - y))
    assert not diff(graph_of(lambda x, y: x - y), graph_of(lambda y, x: y - x))


# ---------------------------------------------------------------------- exported programs


def exported(module: nn.Module, *inputs: Tensor, **options: Any) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|copyreg")
        return torch.export.export(module, inputs, **options)


class Stateful(nn.Module):
    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": torch.relu(self.norm(self.fc(x))) + torch.tensor([1.0, 2.0, 3.0, 4.0])}


def test_exported_programs(tmp_path: Path) -> None:
    x = torch.ones(2, 3)
    program = exported(Stateful(), x)
    assert not diff(program, exported(Stateful(), x))
    assert not diff(program, program.module())
    found = diff(program, exported(Stateful(momentum=0.2), x))
    assert [c.fields[0][0] for c in found.changed] == ["arguments"]
    assert diff(program, exported(Stateful().eval(), x))
    assert diff(program, exported(Stateful(), torch.ones(5, 3)))
    torch.export.save(program, tmp_path / "model.pt2")
    assert not diff(program, tmp_path / "model.pt2", values=True)
    assert diff(program, exported(Stateful(), x), values=True)


def test_sizes_that_vary_count_but_not_their_names() -> None:
    def program(name: str | None) -> torch.export.ExportedProgram:
        shapes = {"x": {0: torch.export.Dim(name)}} if name else None
        return exported(Stateful().eval(), torch.ones(2, 3), dynamic_shapes=shapes)

    assert not diff(program("batch"), program("n"))
    assert "type float32[s0, 3] -> float32[2, 3]" in str(diff(program("batch"), program(None)))


def test_an_exported_graph_can_be_patched() -> None:
    x = torch.ones(2, 3)
    a, b = exported(Stateful().eval(), x).module(), exported(Stateful(momentum=0.2).eval(), x).module()
    result = apply(diff(a, b), a)
    assert not diff(result, b)
    torch.testing.assert_close(result(x)["y"], a(x)["y"], rtol=0, atol=0)


# ---------------------------------------------------------------------- ONNX


def onnx_model(
    *,
    names: str = "",
    weight: str = "w",
    values: tuple[float, ...] = (1.0, 2.0),
    constant: float = 1.0,
    alpha: float = 0.5,
    opset: int = 18,
    then: str = "Relu",
    body: str = "Neg",
    batch: str = "batch",
    swap: bool = False,
) -> onnx.ModelProto:
    """Each feature once: initializer, tensor attribute, subgraphs with captures, local function, symbolic size."""

    def branch(op: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"r{names}", TensorProto.FLOAT, ["n", 2])
        return helper.make_graph([helper.make_node(op, [f"h{names}"], [f"r{names}"])], f"g{names}", [], [output])

    scale = helper.make_tensor("anything" + names, TensorProto.FLOAT, [1], [constant])
    nodes = [
        helper.make_node("Mul", [f"x{names}", weight], [f"m{names}"], name=f"n{names}"),
        helper.make_node("Constant", [], [f"k{names}"], value=scale),
        helper.make_node("LeakyRelu", [f"m{names}"], [f"h{names}"], alpha=alpha),
        helper.make_node("If", [f"c{names}"], [f"i{names}"], then_branch=branch(then), else_branch=branch("Abs")),
        helper.make_node("twice", [f"i{names}"], [f"f{names}"], domain="local"),
        helper.make_node("Sub", [f"f{names}", f"k{names}"][:: -1 if swap else 1], [f"y{names}"]),
    ]
    if names:  # an order as good as the first
        nodes.insert(0, nodes.pop(1))
    graph = helper.make_graph(
        nodes,
        f"graph{names}",
        [
            helper.make_tensor_value_info(f"x{names}", TensorProto.FLOAT, [batch, 2]),
            helper.make_tensor_value_info(f"c{names}", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info(f"y{names}", TensorProto.FLOAT, ["n", 2])],
        [onnx.numpy_helper.from_array(np.array(values, np.float32), weight)],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    steps = [helper.make_node(body, ["a"], ["b"]), helper.make_node("Add", ["b", "b"], ["out"])]
    function = helper.make_function("local", "twice", ["a"], ["out"], steps, opsets)
    model = helper.make_model(graph, opset_imports=opsets, functions=[function])
    onnx.checker.check_model(model)
    return model


ONNX_CHANGES = [
    ({"weight": "v"}, "~ v: name w -> v"),
    ({"alpha": 0.25}, "~ h: arguments (m, alpha=0.5) -> (m, alpha=0.25)"),
    ({"constant": 2.0}, "~ k: arguments (value=float[1] [1.0]) -> (value=float[1] [2.0])"),
    ({"opset": 19}, "~ ai.onnx: arguments (18) -> (19)"),
    ({"then": "Neg"}, "~ i: arguments (c, else_branch=graph "),
    ({"body": "Abs"}, "~ f: function "),
    ({"batch": 3}, "~ x: type float[s0, 2] -> float[3, 2]"),
    ({"swap": True}, "> y: reads k, f, was f, k"),
]


@pytest.mark.parametrize("change, text", ONNX_CHANGES)
def test_what_counts_in_onnx(change: dict[str, Any], text: str) -> None:
    found = diff(onnx_model(), onnx_model(**change))
    assert found
    assert text in str(found)


def test_what_does_not_count_in_onnx(tmp_path: Path) -> None:
    model = onnx_model()
    assert not diff(model, onnx_model(names="_other", batch="n", values=(3.0, 4.0)))
    assert str(diff(model, onnx_model(values=(3.0, 2.0)), values=True).changed[0]) == "~ w: value [1.0, 2.0] -> [3.0, 2.0]"
    onnx.save(onnx_model(), tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0)
    assert not diff(str(tmp_path / "model.onnx"), model, values=True)
    with pytest.raises(GraphDiffError, match=r"the values of 'w' are in another file.*pass the path of the model"):
        diff(onnx.load(tmp_path / "model.onnx", load_external_data=False), model, values=True)


def test_models_from_the_exporter(tmp_path: Path) -> None:
    def program(activation: nn.Module) -> Any:
        model = nn.Sequential(nn.Linear(3, 4), activation).eval()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|copyreg|onnxscript")
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
            return torch.onnx.export(model, (torch.ones(2, 3),), dynamo=True, verbose=False, optimize=False)

    relu = program(nn.ReLU())
    relu.save(tmp_path / "relu.onnx")
    assert not diff(relu, tmp_path / "relu.onnx", values=True)
    assert not diff(relu.model_proto, program(nn.ReLU()))
    assert str(diff(relu, program(nn.Sigmoid()))) == "1 difference: 1 changed\n~ sigmoid: op Relu -> Sigmoid"


def test_an_invalid_onnx_model_is_an_error() -> None:
    model = onnx_model()
    model.graph.node[0].input[0] = "missing"
    with pytest.raises(GraphDiffError, match="Mul node 'm' reads 'missing', which nothing before it produces"):
        diff(model, model)


# ---------------------------------------------------------------------- errors and rendering


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_errors_say_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(
        GraphDiffError, match=r"got a dict to compare; expected a torch.fx.GraphModule, .* \.onnx or \.pt2 file"
    ):
        diff({}, {})
    with pytest.raises(GraphDiffError, match=r"got the path '.*model.pt'; expected a file ending in .onnx or .pt2"):
        diff(tmp_path / "model.pt", tmp_path / "model.pt")
    with pytest.raises(
        TraceError, match=r"Branching cannot be traced symbolically .*pass torch.export.export\(model, inputs\)"
    ):
        diff(Branching(), Branching())
    with pytest.raises(GraphDiffError, match=r"cannot compare a module \(torch functions and modules\) with an ONNX model"):
        diff(Net(), onnx_model())
    program = exported(nn.Linear(3, 3), torch.ones(2, 3))
    with pytest.raises(
        GraphDiffError, match=r"an exported program \(aten operators\).*torch.export.export\(model, inputs\) for"
    ):
        diff(nn.Sequential(nn.Linear(3, 3)), program)
    with pytest.raises(
        GraphDiffError, match=r"apply builds torch.fx graphs; got a difference between ONNX model and ONNX model"
    ):
        apply(diff(onnx_model(), onnx_model(alpha=0.1)), Net())


def test_a_tracer_can_be_given() -> None:
    def trace(module: nn.Module) -> fx.GraphModule:
        return exported(module, torch.ones(2, 3)).module()

    assert not diff(nn.Linear(3, 3), exported(nn.Linear(3, 3), torch.ones(2, 3)), trace=trace)


def test_a_page_and_a_drawing_of_a_difference() -> None:
    def a(x: Tensor) -> Tensor:
        return torch.relu(x).view(-1, 2).sum().exp() * 2

    def b(x: Tensor) -> Tensor:
        return torch.sin(torch.relu(x)).view(-1, 3).sum().exp()

    found = diff(graph_of(a), graph_of(b))
    page = found.to_html()
    assert page.startswith("<!doctype html>") and "http" not in page
    assert page.count("<li") == len(found)
    assert '<td class="removed">mul = operator.mul(exp, 2)</td>' in page
    assert "-&gt; (sin, -1, 3)" in page and "(sin, -1, 3)</td>" in page
    dot = found.to_dot()
    assert 'b2 [label="sin = torch.sin(relu)", color="#1a7f37"];' in dot
    assert 'b1 -> b2 [color="#1a7f37"];' in dot
    assert "placeholder" not in dot and "x: input" not in dot
    assert "x: input" in found.to_dot(context=None)
    assert repr(found).startswith("<GraphDiff: ") and "\n" not in repr(found)


def test_long_differences_are_cut() -> None:
    found = diff(chain(3), chain(3, ()), values=False)
    assert not found
    text = str(diff(chain(400), branches(40)))
    assert len(text.splitlines()) == 22 and text.splitlines()[-1].startswith("... and ")


def test_a_listing_that_was_not_written_by_the_library_is_an_error() -> None:
    with pytest.raises(GraphDiffError, match=r"line 1 of a graph listing: got 'nonsense'; expected it to start with '%0'"):
        parse("nonsense\n")


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_common_subsequences_are_longest(a: list[int], b: list[int]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    found = common_subsequence(a, b)
    assert len(found) == table[-1][-1]
    assert all(a[i] == b[j] for i, j in found)
    assert found == sorted(found) and len({i for i, _ in found} & set(range(len(a)))) == len({j for _, j in found}) == len(
        found
    )
    kept = increasing_subsequence(a)
    values = [a[k] for k in kept]
    assert kept == sorted(kept) and values == sorted(set(values))
    best = [0] * len(a)
    for i in range(len(a)):
        best[i] = 1 + max((best[j] for j in range(i) if a[j] < a[i]), default=0)
    assert len(kept) == max(best, default=0)


def test_alignment_beyond_the_limit_is_still_common() -> None:
    found = common_subsequence([0] * 3 + [1] * 1500, [0] * 3 + [2] * 1500)
    assert found[:3] == [(0, 0), (1, 1), (2, 2)] and len(found) == 3


def test_the_documented_examples_run() -> None:
    assert doctest.testmod(fxparam.graphdiff, raise_on_error=True).attempted > 0
    page = Path(__file__).parents[1] / "docs" / "diff.md"
    assert doctest.testfile(str(page), module_relative=False, raise_on_error=True).attempted > 0
