"""Hoist: weight arithmetic leaves the body without any spec, and what has to stay there, and why."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import HOISTED, Net, operations
from torch import Tensor, nn

import fxparam as fxp


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
