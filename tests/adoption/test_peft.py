"""LoRA layers of the package peft: the same numbers from one weight per layer, and what is left as it is."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from adoption.peft_models import (
    CASES,
    LAYERS,
    TOLERANCE,
    LoraConfig,
    Mlp,
    adapted,
    assert_same,
    filled,
    get_peft_model,
    line,
    lora_nodes,
    measured,
    peft,
    tokens,
    with_lora,
)
from torch import Tensor, nn

import fxparam as fxp
from fxparam.api.fold import plain_model

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")


@pytest.mark.parametrize("trace", ["live", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_names_and_parameters_are_those_of_the_given_model(case: str, trace: str) -> None:
    model, x = CASES[case](), tokens()
    named = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in named.items()}
    transformed = fxp.transform(model, trace=trace)
    assert {name: id(p) for name, p in transformed.named_parameters()} == {name: id(p) for name, p in named.items()}
    assert {name: p.requires_grad for name, p in transformed.named_parameters()} == flags
    assert list(transformed.state_dict()) == list(model.state_dict())
    trainable = [parameter for parameter in named.values() if parameter.requires_grad]
    for _ in range(2):
        assert_same(measured(transformed, trainable, x), measured(model, trainable, x))
    model.requires_grad_(True)
    everything = list(named.values())
    assert_same(measured(transformed, everything, x), measured(model, everything, x))


def test_weights_are_computed_once_and_no_lora_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), tokens()
    wanted = model(x)
    transformed = fxp.transform(model, trace="live")
    layers = peft.tuners.lora.layer
    for cls in (layers.Linear, layers.Embedding, layers._ConvNd):
        monkeypatch.setattr(cls, "forward", lambda *_: pytest.fail("the layer's own forward runs"))
    transformed(x)
    torch.testing.assert_close(transformed(x), wanted, **TOLERANCE)
    assert transformed.stats.refreshes == 1
    assert [site.names[0] for site in transformed.sites] == [f"base_model.model.{name}.merged_weight" for name in LAYERS]


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_the_given_model_stays_as_it_was(case: str) -> None:
    model, x = CASES[case](), tokens()
    before, wanted = {path: (type(m), dict(vars(m))) for path, m in model.named_modules()}, model(x)
    transformed = fxp.transform(model)
    transformed(x).sum().backward()
    fxp.fold(transformed, example_inputs=(x,))
    assert {path: (type(m), dict(vars(m))) for path, m in model.named_modules()} == before
    assert torch.equal(model(x), wanted)


def test_an_optimizer_built_before_trains_the_transformed_model() -> None:
    model, x = adapted(use_dora=True), tokens()
    other = copy.deepcopy(model)
    optimizers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, other)]
    transformed = fxp.transform(model, trace="live")
    for _ in range(4):
        for net, optimizer in zip((transformed, other), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(transformed(x), other(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x), transformed(x), **TOLERANCE)
    assert transformed.stats.refreshes == 5


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_gpt2_with_transposed_weights() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {
        "vocab_size": 31,
        "n_positions": 16,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    dropouts: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    base = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, pad_token_id=0))
    config = LoraConfig(r=3, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, use_dora=True)
    model, ids = filled(get_peft_model(base, config)).train(), torch.randint(1, 31, (2, 5))
    transformed = fxp.transform(model, trace="live")
    assert len(transformed.sites) == 8
    parameters = [p for p in model.parameters() if p.requires_grad]

    class Logits(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(input_ids=ids).logits

    assert_same(measured(Logits(transformed), parameters, ids), measured(Logits(model), parameters, ids))
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(transformed.eval().generate(**options), model.eval().generate(**options))
    plain = plain_model(transformed)
    assert not [name for name in plain.state_dict() if "lora_" in name]
    torch.testing.assert_close(Logits(plain)(ids), Logits(model)(ids), **TOLERANCE)


# --- what is left as it is


def test_dropout_leaves_the_layer_alone_in_training_and_not_in_a_fold() -> None:
    model, x = adapted(lora_dropout=0.3), tokens()
    transformed = fxp.transform(model)
    assert transformed.sites == ()
    torch.manual_seed(3)
    wanted = model(x)
    torch.manual_seed(3)
    assert torch.equal(transformed(x), wanted)
    folded = fxp.fold(transformed, example_inputs=(x,))
    assert not lora_nodes(folded.graph)
    torch.testing.assert_close(folded(x), model.eval()(x), **TOLERANCE)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x[None], x[None], x[None])[0])


def with_hook() -> Any:
    model = filled(get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["a"])))
    model.base_model.model.a.lora_A.default.register_forward_hook(lambda module, args, out: out * 2)
    return model


def own_class() -> Any:
    net = nn.Sequential(Doubled(4, 4), nn.Linear(4, 3))
    return with_lora(net, "0")


LEFT: dict[str, tuple[Any, Any, str]] = {
    "a base layer with a forward of its own": (own_class, line, "its base layer, a Doubled, has a forward of its own"),
    "hooks": (with_hook, line, "modules in it have hooks"),
    "groups": (
        lambda: with_lora(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), "0"),
        lambda: torch.randn(2, 4, 5),
        "has groups=2",
    ),
    "padding that adapters do not have": (
        lambda: with_lora(nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")), "0"),
        lambda: torch.randn(2, 4, 5),
        "does not read its input as the base layer does",
    ),
    "max_norm": (
        lambda: with_lora(nn.Sequential(nn.Embedding(11, 4, max_norm=1e9)), "0"),
        tokens,
        "max_norm=1000000000.0 writes the weight",
    ),
    "scaled gradients": (
        lambda: with_lora(nn.Sequential(nn.Embedding(11, 4, scale_grad_by_freq=True)), "0"),
        tokens,
        "sparse or scaled gradients",
    ),
    "a targeted parameter": (
        lambda: with_lora(Mlp(), target_parameters=["a.weight"]),
        line,
        "a ParamWrapper registers torch parametrizations inside its forward",
    ),
    "a whole attention": (lambda: with_lora(Attention(), "attention"), line, "a MultiheadAttention has a forward of its own"),
    "weights that attention reads": (lambda: with_lora(Attention(), "out_proj"), line, "the attention around it reads"),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("case", LEFT)
def test_what_no_weight_expresses_runs_as_it_is(case: str) -> None:
    make, sample, reason = LEFT[case]
    model, x = make(), sample()
    before = [p for p in model.parameters() if p.requires_grad]
    transformed = fxp.transform(model, trace="live")
    assert any(reason in note for note in transformed._fxp_options["notes"])
    assert transformed.sites == ()
    if case == "weights that attention reads":
        # Its adapter does nothing, and all else is frozen.
        assert torch.equal(transformed(x), model(x))
    else:
        assert_same(measured(transformed, before, x), measured(model, before, x))
    if case != "max_norm":
        folded = fxp.fold(transformed, example_inputs=(x,))
        torch.testing.assert_close(folded(x), model.eval()(x), **TOLERANCE)


def test_the_report_says_why_a_layer_is_left_alone() -> None:
    report = str(fxp.transform(adapted(lora_dropout=0.1)).report)
    assert "base_model.model.linear" in report and "its adapter 'default' has dropout 0.1" in report


def test_adapters_in_single_precision_on_a_base_in_half() -> None:
    model = get_peft_model(Mlp().bfloat16(), LoraConfig(r=2, target_modules=["a"]))
    layer = model.base_model.model.a
    for adapter in (layer.lora_A, layer.lora_B):
        adapter.float()
    filled(model)
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    transformed = fxp.transform(model)
    assert transformed.sites == () and torch.equal(transformed(x), model(x))
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    weight = layer.base_layer.weight.float() + layer.scaling["default"] * b @ a
    merged: Any = plain_model(transformed)
    assert torch.equal(merged.base_model.model.a.weight, weight.bfloat16())


# --- beside a spec


def test_rules_on_base_weights_and_adapters_come_before() -> None:
    model, x = with_lora(Mlp(), "a", "b"), line()
    spec = {"*.a.base_layer.weight": fxp.weight_norm(), "*.b.lora_A.default.weight": fxp.weight_norm()}
    transformed = fxp.transform(model, spec, trace="live")
    assert [site.origin for site in transformed.sites] == ["spec", "spec", "peft", "peft"]
    torch.testing.assert_close(transformed(x), model(x), **TOLERANCE)
    transformed(x).sum().backward()
    assert transformed.latents()["base_model.model.b.lora_A.default.parametrizations.weight.original1"].grad is not None
    with torch.no_grad():
        transformed.latents()["base_model.model.a.base_layer.parametrizations.weight.original0"].mul_(2)
        model.base_model.model.a.base_layer.weight.mul_(2)
    torch.testing.assert_close(transformed(x), model(x), **TOLERANCE)
    torch.testing.assert_close(fxp.restore(transformed)(x), model(x), **TOLERANCE)
    torch.testing.assert_close(fxp.fold(transformed, example_inputs=(x,))(x), model(x), **TOLERANCE)


def test_a_base_weight_that_is_parametrized_already() -> None:
    net, x = Mlp(), line()
    nn.utils.parametrizations.weight_norm(net.a)
    model = with_lora(net, "a", "b")
    transformed = fxp.transform(model, trace="live")
    assert [site.origin for site in transformed.sites] == ["parametrize", "peft", "peft"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert_same(measured(transformed, parameters, x), measured(model, parameters, x))
    torch.testing.assert_close(fxp.fold(transformed, example_inputs=(x,))(x), model(x), **TOLERANCE)


def test_without_adoption_the_layers_are_what_they_were() -> None:
    model, x = adapted(), tokens()
    transformed = fxp.transform(model, adopt=False)
    assert transformed.sites == () and torch.equal(transformed(x), model(x))
    assert type(transformed.base_model.model.linear) is type(model.base_model.model.linear)


def test_fxparam_does_not_import_peft() -> None:
    code = "import sys, fxparam, torch; fxparam.transform(torch.nn.Linear(2, 2)); sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
