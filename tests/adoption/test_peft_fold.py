"""Folding, exporting, restoring and copying models with LoRA layers."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from adoption.peft_models import (
    CASES,
    TOLERANCE,
    LoraConfig,
    Mlp,
    Net,
    adapted,
    filled,
    line,
    lora_nodes,
    peft,
    tokens,
    with_lora,
)
from torch import Tensor, nn

import fxparam as fxp
from fxparam.api.fold import plain_model

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")


@pytest.mark.parametrize("given", ["transformed", "as it is"])
@pytest.mark.parametrize("case", CASES)
def test_a_fold_has_plain_layers(case: str, given: str) -> None:
    model, x = CASES[case](), tokens()
    folded = fxp.fold(fxp.transform(model) if given == "transformed" else model, example_inputs=(x,))
    plain = [f"base_model.model.{name}" for name, _ in Net().named_parameters()]
    if case == "bias of the adapters":
        plain += ["base_model.model.conv3.bias", "base_model.model.head.bias"]
    assert sorted(name for name, _ in folded.named_parameters()) == sorted(plain)
    assert not lora_nodes(folded.graph)
    torch.testing.assert_close(folded(x), model.eval()(x), **TOLERANCE)
    assert not any(p.requires_grad for p in folded.parameters())


def test_a_fold_is_the_base_model_with_other_weights() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    adapter = LoraConfig(r=2, target_modules=["0", "2"])
    model = filled(peft.inject_adapter_in_model(adapter, copy.deepcopy(net)))
    assert not fxp.diff(fxp.fold(net), fxp.fold(model))


@pytest.mark.parametrize("state", ["disabled", "merged", "disabled and merged"])
def test_a_fold_has_the_weights_in_use(state: str) -> None:
    model, x = adapted(use_dora=True).eval(), tokens()
    if "merged" in state:
        model.merge_adapter()
    if "disabled" in state:
        model.base_model.disable_adapter_layers()
    folded = fxp.fold(fxp.transform(model, trace="live"), example_inputs=(x,))
    assert not lora_nodes(folded.graph)
    torch.testing.assert_close(folded(x), model(x), **TOLERANCE)


def test_a_tied_weight_stays_without_the_adapter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model, x = with_lora(Tied(), "embed"), tokens()
    transformed = fxp.transform(model)
    torch.testing.assert_close(transformed(x), model(x), **TOLERANCE)
    folded = fxp.fold(transformed, example_inputs=(x,))
    torch.testing.assert_close(folded(x), model(x), **TOLERANCE)


def test_weights_of_a_fold_are_rounded_once() -> None:
    model = with_lora(Mlp(), "a").float()
    layer = model.base_model.model.a
    merged: Any = plain_model(fxp.transform(model), torch.float64)
    plain = merged.base_model.model.a
    a, b = layer.lora_A.default.weight.double(), layer.lora_B.default.weight.double()
    assert torch.equal(plain.weight, (layer.base_layer.weight.double() + layer.scaling["default"] * b @ a).float())


def test_an_onnx_file_has_one_weight_for_each_layer(tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = with_lora(Mlp(), "a", "b", use_dora=True, lora_dropout=0.1).float().eval()
    x = line().float()
    transformed = fxp.transform(model)
    file = tmp_path / "model.onnx"
    fxp.export_onnx(transformed, (x,), file)
    graph = onnx.load(file).graph
    shapes = {tensor.name.removeprefix("base_model.model."): tuple(tensor.dims) for tensor in graph.initializer}
    assert shapes == {"a.weight": (6, 4), "a.bias": (6,), "b.weight": (3, 6), "b.bias": (3,)}
    assert [node.op_type for node in graph.node] == ["Gemm", "Relu", "Gemm"]
    with torch.no_grad():
        model.base_model.model.a.lora_A.default.weight.mul_(2)
    fxp.refit_onnx(file, transformed)
    (got,) = runtime.InferenceSession(file).run(None, {graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_restore_gives_the_peft_model_with_its_adapters(case: str) -> None:
    model, x = CASES[case](), tokens()
    transformed = fxp.transform(model, trace="live")
    transformed(x)
    with torch.no_grad():
        model.base_model.model.linear.lora_B.default.weight.add_(1)
    restored: Any = fxp.restore(transformed)
    classes = {path: type(module) for path, module in model.named_modules()}
    assert {path: type(module) for path, module in restored.named_modules()} == classes
    state = model.state_dict()
    assert list(restored.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in restored.state_dict().items())
    assert torch.equal(restored(x), model(x))
    if case != "bias of the adapters":
        wanted = copy.deepcopy(model).merge_and_unload()(x)
        torch.testing.assert_close(restored.merge_and_unload()(x), wanted, **TOLERANCE)
    torch.testing.assert_close(transformed(x), model(x), **TOLERANCE)


@pytest.mark.parametrize("make", [copy.deepcopy, "pickle", "layer"])
def test_copies_compute_with_their_own_adapters(make: Any) -> None:
    model, x = adapted(use_dora=True), tokens()
    transformed = fxp.transform(model, trace="live")
    transformed(x)
    if make == "layer":
        layer, h = copy.deepcopy(transformed.base_model.model.linear), torch.randn(3, 6)
        layer.lora_A.default.weight.data.zero_()
        own = copy.deepcopy(model.base_model.model.linear)
        own.lora_A.default.weight.data.zero_()
        torch.testing.assert_close(layer(h), own(h), **TOLERANCE)
        return
    if make == "pickle":
        buffer = io.BytesIO()
        torch.save(transformed, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    else:
        copied = make(transformed)
    with torch.no_grad():
        for twin in (copied, other := copy.deepcopy(model)):
            twin.base_model.model.linear.lora_A.default.weight.mul_(3)
    torch.testing.assert_close(copied(x), other(x), **TOLERANCE)
    torch.testing.assert_close(transformed(x), model(x), **TOLERANCE)
    assert copied.stats.refreshes == 1


def test_another_dtype() -> None:
    model, x = adapted(use_dora=True, use_rslora=True), tokens()
    transformed = fxp.transform(model, copy=True, trace="live")
    transformed(x)
    transformed.float()
    assert transformed(x).dtype == torch.float32
    torch.testing.assert_close(transformed(x), model.float()(x), rtol=1e-5, atol=1e-5)
