"""What must hold for every architecture: fxparam against the model as PyTorch alone computes it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from zoo.entry import Entry, Inputs

import fxparam as fxp

RTOL = 1e-10
VIEWS = frozenset(
    "alias chunk detach diagonal expand expand_as flatten getitem movedim narrow permute reshape select slice split "
    "split_with_sizes squeeze t T transpose unbind unflatten unsqueeze view view_as".split()
)
"""Operations that cost nothing per call."""


@dataclass(frozen=True)
class Pair:
    """The transformed model and its oracle, with equal values in separate memory.

    Attributes:
        model: the transformed model.
        oracle: what PyTorch alone computes.
        parameters: name in the oracle to name in the model, each parameter once.
        buffers: the same for buffers.
    """

    model: fxp.ParametrizedModule
    oracle: nn.Module
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]

    def train(self, mode: bool) -> None:
        self.model.train(mode)
        self.oracle.train(mode)


def pair(entry: Entry, dtype: torch.dtype = torch.float64) -> Pair:
    """Transform the architecture."""
    oracle = entry.oracle(dtype)
    if entry.spec is not None:
        model = fxp.transform(entry.make(dtype), entry.declared())
        oracle.load_state_dict(model.state_dict())
        parameters = {name: name for name, _ in model.named_parameters()}
        assert parameters.keys() == dict(oracle.named_parameters()).keys()
        return Pair(model, oracle, parameters, {name: name for name, _ in oracle.named_buffers()})
    # Without copying, the tensors of the given model are in the transformed one: that tells which is which.
    shared = fxp.transform(oracle)
    parameters = _by_identity(dict(oracle.named_parameters()), dict(shared.named_parameters()))
    assert len(parameters) == len(list(shared.parameters()))
    buffers = _by_identity(dict(oracle.named_buffers()), dict(shared.named_buffers()))
    return Pair(fxp.transform(entry.make(dtype), copy=True), oracle, parameters, buffers)


def _by_identity(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, str]:
    names = {id(tensor): name for name, tensor in theirs.items()}
    return {name: names[id(tensor)] for name, tensor in ours.items()}


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating outputs, with the same random numbers each time."""
    torch.manual_seed(3)
    args, kwargs = inputs
    return [
        leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A scalar in which every element has a weight of its own."""
    terms = [(leaf * torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).view_as(leaf)).sum() for leaf in outputs]
    return torch.stack([term.double() for term in terms]).sum()


def assert_near(got: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
    """Equal up to ``RTOL`` of each tensor's largest magnitude.

    What cancels to zero has the rounding errors of what it is a sum of: hence a thousandth of it, relative to all.
    """
    assert got.keys() == expected.keys()
    assert [name for name in got if got[name] is None] == [name for name in expected if expected[name] is None]
    scale = max((float(t.detach().abs().amax()) for t in expected.values() if t is not None and t.numel()), default=0.0)
    assert math.isfinite(scale)
    for name, wanted in expected.items():
        actual = got[name]
        if wanted is None or actual is None or not wanted.numel():
            continue
        atol = RTOL * (float(wanted.detach().abs().amax()) + 1e-3 * scale)
        message = f"{name} differs by {float((actual - wanted).detach().abs().amax()):.2e}, allowed are {atol:.2e}"
        torch.testing.assert_close(actual, wanted, rtol=0, atol=atol, msg=message)


def listed(outputs: list[Tensor]) -> dict[str, Tensor | None]:
    return {f"output {number}": leaf for number, leaf in enumerate(outputs)}


def check_outputs(both: Pair, calls: Sequence[Inputs]) -> None:
    """Outputs in eval mode, with and without gradient mode, and what the forwards left in the buffers."""
    both.train(False)
    for grad in (True, False):
        for inputs in calls:
            with torch.set_grad_enabled(grad):
                outputs = run(both.oracle, inputs)
                assert outputs
                assert_near(listed(run(both.model, inputs)), listed(outputs))
    check_buffers(both)


def check_buffers(both: Pair) -> None:
    theirs, ours = dict(both.oracle.named_buffers()), dict(both.model.named_buffers())
    floating = {a: b for a, b in both.buffers.items() if theirs[a].is_floating_point()}
    assert_near({a: ours[b] for a, b in floating.items()}, {a: theirs[a] for a in floating})


def check_training(both: Pair, calls: Sequence[Inputs]) -> None:
    """Outputs, gradients and buffers of one training step for each call; outputs in eval mode after the last."""
    both.train(True)
    optimizers = [torch.optim.SGD(module.parameters(), lr=1e-3) for module in (both.oracle, both.model)]
    theirs, ours = dict(both.oracle.named_parameters()), dict(both.model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in theirs.items()}
    for inputs in calls:
        outputs = [run(module, inputs) for module in (both.oracle, both.model)]
        assert_near(listed(outputs[1]), listed(outputs[0]))
        for optimizer, each in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            loss_of(each).backward()
        assert_near({a: ours[b].grad for a, b in both.parameters.items()}, {a: theirs[a].grad for a in both.parameters})
        for optimizer in optimizers:
            optimizer.step()
        check_buffers(both)
    assert any(not torch.equal(theirs[name], value) for name, value in before.items())
    check_outputs(both, calls[-1:])


def folded(model: nn.Module, inputs: Inputs, *, arithmetic: bool = True) -> fx.GraphModule:
    """``fold`` on these inputs."""
    args, kwargs = inputs
    return fxp.fold(model.eval(), example_inputs=kwargs or args, arithmetic=arithmetic)


def weight_only_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes computed from parameters and buffers alone, views left out."""
    known: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            known[node] = False
        elif node.op == "get_attr":
            known[node] = True
        else:
            known[node] = bool(node.all_input_nodes) and all(known[other] for other in node.all_input_nodes)
    return [node for node, alone in known.items() if alone and node.op != "get_attr" and _name(node) not in VIEWS]


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def check_fold(entry: Entry, both: Pair, calls: Sequence[Inputs]) -> None:
    """The graph gives the eval output, and nothing in it is left to compute from weights alone.

    Or neither fxparam nor PyTorch can look through the plain model, for the reason given.
    """
    both.train(False)
    if reason := entry.refused.get("fold"):
        with pytest.raises(fxp.TraceError, match=re.escape(reason)):
            folded(both.model, calls[0])
        assert exported(both.model, calls[0]) is None
        return
    graph = folded(both.model, calls[0])
    assert not any(parameter.requires_grad for parameter in graph.parameters())
    with torch.no_grad():
        for inputs in calls:
            assert_near(listed(run(graph, inputs)), listed(run(both.oracle, inputs)))
    left = weight_only_nodes(graph.graph)
    assert not left, f"{len(left)} weight-only nodes left, the first: {left[0].format_node()}"


def check_restore(entry: Entry, both: Pair, inputs: Inputs) -> None:
    """The class that was given, no computed weight, the same outputs."""
    both.train(False)
    plain = fxp.restore(both.model)
    assert type(plain) is type(entry.make())
    assert not any(nn.utils.parametrize.is_parametrized(module) for module in plain.modules())
    assert not fxp.transform(plain).sites
    with torch.no_grad():
        assert_near(listed(run(plain, inputs)), listed(run(both.oracle, inputs)))


def check_onnx(entry: Entry, path: Path) -> None:
    """The file computes what the model computes; or neither fxparam nor PyTorch can write it, for the reason given."""
    both, (args, kwargs) = pair(entry, torch.float32), entry.given(torch.float32)
    both.train(False)
    if reason := entry.refused.get("onnx"):
        with pytest.raises(fxp.ExportError, match=re.escape(reason)):
            fxp.export_onnx(both.model, args, path, kwargs=kwargs)
        assert not path.exists()
        program = exported(both.model, (args, kwargs))
        assert program is None or not _runs(program)
        return
    report = fxp.export_onnx(both.model, args, path, kwargs=kwargs)
    assert {parity.inputs for parity in report.parity} >= {"given"}
    assert all(parity.ok for parity in report.parity)


def exported(model: fxp.ParametrizedModule, inputs: Inputs) -> torch.export.ExportedProgram | None:
    """What PyTorch's own exporter makes of the model with plain weights; None if it refuses."""
    args, kwargs = inputs
    try:
        return torch.export.export(fxp.restore(model).eval(), args, kwargs, strict=False)
    except Exception:  # its errors share no base class
        return None


def _runs(program: torch.export.ExportedProgram) -> bool:
    """Whether PyTorch can write this as ONNX, and ONNX Runtime can load what it writes."""
    import onnxruntime

    try:
        written = torch.onnx.export(program, (), dynamo=True, verbose=False)
        assert written is not None
        onnxruntime.InferenceSession(written.model_proto.SerializeToString())
    except Exception:  # each stage has its own errors
        return False
    return True


def layer_of(report: Any) -> str:
    """Traced as a whole, in parts, or not at all."""
    first = report.layers[0].layer
    if first != "live":
        return {"symbolic": "whole, symbolic", "record": "whole, recorded"}[first]
    return "parts" if any(layer.layer == "record" for layer in report.layers) else "live"


def check_report(both: Pair, inputs: Inputs) -> None:
    """It says what each weight is and which layer the body got; a body that is not one graph has a reason."""
    both.train(False)
    run(both.model, inputs)
    report = both.model.report
    text = str(report)
    assert layer_of(report) in ("whole, symbolic", "whole, recorded", "parts", "live")
    if report.body != "graph":
        assert report.why_live
        assert report.why_live in text
    for layer in report.layers:
        assert layer.layer != "live" or layer.reason, layer
    assert len(report.sites) == len(both.model.sites)
    for row in report.sites:
        assert row.weights[0] in text
        assert row.layer == "graph" or row.reason
