"""The methods of peft on a transformed model: right numbers, or an error that says what to type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adoption.peft_models import (
    TOLERANCE,
    LoraConfig,
    Mlp,
    adapted,
    assert_same,
    filled,
    line,
    measured,
    peft,
    tokens,
    with_lora,
)
from torch import Tensor, nn

import fxparam as fxp

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*adapter:UserWarning"),
]
OTHER = {"target_modules": ["linear", "head", "conv1"], "r": 2, "lora_alpha": 5}


def lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def pair(**options: Any) -> tuple[Any, Any, Any]:
    """A transformed model with two adapters, the one it was given, and one that shares nothing with them."""
    model = adapted(**options)
    model.add_adapter("second", LoraConfig(**OTHER))
    filled(model)
    other = copy.deepcopy(model)
    return fxp.transform(model, trace="live"), model, other


def use_both(model: Any) -> None:
    model.base_model.set_adapter(["default", "second"])


def scale(model: Any) -> None:
    for layer in lora_layers(model):
        layer.set_scale("default", 2.5)


def scale_dictionary(model: Any) -> None:
    for layer in lora_layers(model):
        layer.scaling["default"] = 0.2


def scale_half_of_the_layers(model: Any) -> None:
    for layer in lora_layers(model)[::2]:
        layer.scaling["default"] = 0.7


def scale_layer(model: Any) -> None:
    for layer in lora_layers(model):
        layer.scale_layer(1.5)


def add(model: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter("third", LoraConfig(**OTHER, init_lora_weights=False))
    model.set_adapter("third")


def delete_active(model: Any) -> None:
    model.delete_adapter("default")
    model.set_adapter("second")


def replace_module(model: Any) -> None:
    torch.manual_seed(5)
    model.base_model.model.linear.lora_A["default"] = nn.Linear(6, 4, bias=False)


def dropout(model: Any) -> None:
    model.base_model.model.linear.lora_dropout["default"] = nn.Dropout(1.0)


def hook(model: Any) -> None:
    model.base_model.model.linear.lora_B["default"].register_forward_hook(lambda module, args, out: out * 2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "set_adapter": lambda model: model.set_adapter("second"),
    "two adapters": use_both,
    "two adapters in the other order": lambda model: model.base_model.set_adapter(["second", "default"]),
    "merge": lambda model: model.merge_adapter(),
    "merge safely": lambda model: model.merge_adapter(safe_merge=True),
    "merge another": lambda model: model.merge_adapter(["second"]),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "set_scale": scale,
    "scaling": scale_dictionary,
    "scaling of half of the layers": scale_half_of_the_layers,
    "scale_layer": scale_layer,
    "add": add,
    "delete the active one": delete_active,
    "delete another": lambda model: model.delete_adapter("second"),
    "another module": replace_module,
    "dropout": dropout,
    "hook": hook,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_followed_at_once(change: str) -> None:
    transformed, _, other = pair(use_dora=change in ("merge", "set_adapter", "two adapters", "set_scale"))
    x = tokens()
    torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)
    for model in (transformed, other):
        CHANGES[change](model)
    assert {name: p.requires_grad for name, p in transformed.named_parameters()} == {
        name: p.requires_grad for name, p in other.named_parameters()
    }
    for _ in range(2):
        trainable = [[p for p in model.parameters() if p.requires_grad] for model in (transformed, other)]
        if trainable[0] and change not in ("merge", "merge safely", "merge another"):
            assert_same(measured(transformed, trainable[0], x), measured(other, trainable[1], x))
        torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)
    torch.testing.assert_close(transformed.eval()(x), other.eval()(x), **TOLERANCE)
    torch.testing.assert_close(fxp.restore(transformed)(x), other(x), **TOLERANCE)
    if change != "hook":
        torch.testing.assert_close(fxp.fold(transformed, example_inputs=(x,))(x), other(x), **TOLERANCE)


LAYERWISE: dict[str, Callable[[Any], Any]] = {
    "merge": lambda layer: layer.merge(),
    "disable": lambda layer: layer.enable_adapters(False),
    "scaling": lambda layer: layer.scaling.update(default=0.3),
    "no adapter": lambda layer: layer.set_adapter([]),
    "dropout": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(1.0)}),
    "hook": lambda layer: layer.lora_A["default"].register_forward_hook(lambda module, args, out: out * 2),
    "delete": lambda layer: layer.delete_adapter("default"),
}


@pytest.mark.parametrize("change", LAYERWISE)
def test_a_change_is_followed_where_a_graph_was_recorded(change: str) -> None:
    model = filled(peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=["a", "b"], use_dora=True), Mlp()))
    other, x = copy.deepcopy(model), line()
    transformed = fxp.transform(model, trace="record")
    for _ in range(3):
        torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)
    assert transformed.report.body == "graph"
    for one in (transformed, other):
        for layer in lora_layers(one):
            LAYERWISE[change](layer)
    for _ in range(3):
        torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)


@pytest.mark.parametrize("use_dora", [False, True])
def test_changes_and_their_contraries(use_dora: bool) -> None:
    transformed, _, other = pair(use_dora=use_dora)
    x = tokens()
    for _ in range(2):
        with transformed.disable_adapter(), other.disable_adapter():
            torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)
        torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)
        for model in (transformed, other):
            model.merge_adapter()
        torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)
        for model in (transformed, other):
            model.unmerge_adapter()
        torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)
        for model in (transformed, other):
            model.set_adapter("second")
        torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)
        for model in (transformed, other):
            model.set_adapter("default")


def test_disabling_in_each_step_costs_no_new_plan() -> None:
    transformed, _, _ = pair()
    x = tokens()
    transformed(x)
    plan = transformed._fxp_runtime.plan
    for _ in range(3):
        with transformed.disable_adapter():
            transformed(x)
        transformed(x)
    assert transformed._fxp_runtime.plan is plan


def test_a_change_costs_one_evaluation() -> None:
    transformed, _, _ = pair()
    x = tokens()
    transformed(x)
    scale_dictionary(transformed)
    transformed(x)
    transformed(x)
    assert transformed.stats.refreshes == 2


def test_weights_are_those_of_the_active_adapters() -> None:
    transformed, model, _ = pair()
    layer = model.base_model.model.linear

    def wanted(name: str) -> Tensor:
        return layer.base_layer.weight + layer.get_delta_weight(name)

    name = "base_model.model.linear.merged_weight"
    torch.testing.assert_close(transformed.weights()[name], wanted("default"), **TOLERANCE)
    transformed.set_adapter("second")
    torch.testing.assert_close(transformed.weights()[name], wanted("second"), **TOLERANCE)
    transformed.merge_adapter()
    torch.testing.assert_close(transformed.weights()[name], wanted("second"), **TOLERANCE)
    with pytest.raises(fxp.ImageError, match="computed from other weights"):
        transformed.assign(name, torch.zeros(8, 6))


def test_one_layer_called_twice_follows_a_change_between() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor, change: bool) -> Tensor:
            layer: Any = self.a
            x = layer(x)
            if change:
                layer.scaling["default"] *= 2
            return layer(x)

    model = with_lora(Twice(), "a")
    other, x = copy.deepcopy(model), line()
    transformed = fxp.transform(model, trace="live")
    for change in (False, True, False):
        torch.testing.assert_close(transformed(x, change), other(x, change), **TOLERANCE)


def test_adapters_for_each_example() -> None:
    model = with_lora(Mlp(), "a", "b")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["a", "b"]))
    filled(model).eval()
    transformed, x = fxp.transform(model), line()
    names = ["default", "second", "__base__", "second", "default"]
    torch.testing.assert_close(transformed(x, adapter_names=names), model(x, adapter_names=names), **TOLERANCE)
    torch.testing.assert_close(transformed(x), model(x), **TOLERANCE)


# --- the model that was given


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("change", ["merge", "merge safely"])
def test_merging_does_not_reach_the_given_model(change: str, p: float) -> None:
    model, x = adapted(lora_dropout=p).eval(), tokens()
    wanted = model(x)
    transformed = fxp.transform(model)
    CHANGES[change](transformed)
    torch.testing.assert_close(transformed(x), wanted, **TOLERANCE)
    assert torch.equal(model(x), wanted)
    transformed.unmerge_adapter()
    torch.testing.assert_close(transformed(x), wanted, **TOLERANCE)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_start_by_moving_the_base_weight(start: str) -> None:
    model = with_lora(Mlp(), "a", "b").float()
    other, x = copy.deepcopy(model), line().float()
    wanted = model(x)
    transformed = fxp.transform(model)
    transformed(x)
    for one in (transformed, other):
        torch.manual_seed(1)
        one.add_adapter("moved", LoraConfig(r=2, target_modules=["a"], init_lora_weights=start))
        one.set_adapter("moved")
    torch.testing.assert_close(transformed(x), other(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), wanted)


def test_a_base_weight_that_trains_or_is_tied_or_computed_is_not_written() -> None:
    model, x = with_lora(Mlp(), "a"), line()
    model.base_model.model.a.base_layer.weight.requires_grad_(True)
    wanted = model(x)
    transformed = fxp.transform(model)
    with pytest.raises(fxp.FxparamError, match=r"which trains and is shared .* fxp.transform\(model, copy=True\)"):
        transformed.merge_adapter()
    torch.testing.assert_close(transformed(x), wanted, **TOLERANCE)
    unshared = fxp.transform(model, copy=True)
    unshared.merge_adapter()
    torch.testing.assert_close(unshared(x), wanted, **TOLERANCE)

    tied = with_lora(Mlp(), "a")
    tied.base_model.model.again = nn.Linear(4, 6)
    tied.base_model.model.again.weight = tied.base_model.model.a.base_layer.weight
    with pytest.raises(fxp.FxparamError, match="is also base_model.model.again.weight"):
        fxp.transform(tied).merge_adapter()

    computed = fxp.transform(with_lora(Mlp(), "a"), {"*.a.base_layer.weight": fxp.weight_norm()})
    wanted = computed(x)
    with pytest.raises(fxp.FxparamError, match=r"which is computed; take fxp.restore\(model\) and type merge\(\) there"):
        computed.merge_adapter()
    torch.testing.assert_close(computed(x), wanted, **TOLERANCE)


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unloading_gives_the_base_model(method: str) -> None:
    transformed, model, other = pair(use_dora=True)
    x = tokens()
    wanted = model(x)
    transformed(x)
    plain, expected = getattr(transformed, method)(), getattr(other, method)()
    assert [type(module) for module in plain.modules()] == [type(module) for module in expected.modules()]
    assert list(plain.state_dict()) == list(expected.state_dict())
    torch.testing.assert_close(plain(x), expected(x), **TOLERANCE)
    assert torch.equal(model(x), wanted)


# --- checkpoints


def test_checkpoints_go_both_ways(tmp_path: Path) -> None:
    transformed, _, other = pair(use_dora=True)
    x = tokens()
    transformed(x)
    filled(other)
    transformed.load_state_dict(other.state_dict())
    torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)
    filled(other)
    peft.set_peft_model_state_dict(transformed, peft.get_peft_model_state_dict(other))
    torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)
    filled(transformed)
    state = peft.get_peft_model_state_dict(transformed)
    assert state.keys() == peft.get_peft_model_state_dict(other).keys()
    peft.set_peft_model_state_dict(other, state)
    torch.testing.assert_close(transformed(x), other(x), **TOLERANCE)
    filled(transformed)
    transformed.save_pretrained(tmp_path)
    for model in (transformed, other):
        model.load_adapter(tmp_path, "loaded")
        model.set_adapter("loaded")
    with torch.no_grad():
        wanted = other(x)
    torch.testing.assert_close(transformed(x), wanted, **TOLERANCE)
    transformed.set_adapter("default")
    torch.testing.assert_close(transformed(x), wanted, rtol=1e-6, atol=1e-6)


# --- transforms of PyTorch's


# Dynamo hides it, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("how", ["whole", "body"])
def test_compiled_models_follow(how: str) -> None:
    model = with_lora(Mlp(), "a", "b", lora_bias=True)
    other, x = copy.deepcopy(model), line()
    transformed = fxp.transform(model, trace="live")
    torch._dynamo.reset()
    if how == "whole":
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    else:
        transformed.compile(fullgraph=True, backend="aot_eager")
        compiled = transformed
    for change in (lambda model: None, scale_dictionary, scale, lambda model: model.base_model.disable_adapter_layers()):
        change(transformed)
        change(other)
        torch.testing.assert_close(compiled(x), other(x), **TOLERANCE)


def test_functional_calls_and_export() -> None:
    model, x = with_lora(Mlp(), "a", "b", use_dora=True), line()
    transformed = fxp.transform(model, trace="live")
    swapped = {name: 1.5 * p.detach() for name, p in model.named_parameters()}

    def loss(net: nn.Module) -> Any:
        return torch.func.grad(lambda tensors, x: torch.func.functional_call(net, tensors, (x,)).square().sum())

    got = torch.func.vmap(loss(transformed), (None, 0))(swapped, x)
    wanted = torch.func.vmap(loss(model), (None, 0))(swapped, x)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, **TOLERANCE)
    exported = torch.export.export(transformed.eval(), (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), model.eval()(x), **TOLERANCE)
