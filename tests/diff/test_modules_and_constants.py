"""Modules, attributes, functions, constants and inputs: what counts as a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diff.common import Net, graph_of
from torch import Tensor, fx, nn

from fxparam.graphdiff import GraphDiffError, apply, diff, parse, read


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
