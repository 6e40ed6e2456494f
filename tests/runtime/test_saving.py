"""Checkpoints by other means than ``torch.save``: safetensors, and ``torch.distributed.checkpoint`` in one process."""
# mypy: disable-error-code="operator,union-attr,arg-type", warn-unused-ignores=False

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime.oracles import DTYPE, SPEC, TRACES, check, gradients, inputs, loss_of, pair, same, train
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.checkpoint.state_dict_loader import load as load_files
from torch.distributed.checkpoint.state_dict_saver import save as save_files
from torch.nn.utils import parametrizations, parametrize

import fxparam as fxp

safetensors = pytest.importorskip("safetensors.torch")

# PyTorch says so also where no_dist=True asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.05, **options)


def trained(module: nn.Module) -> nn.Module:
    """After some steps: away from the start, and with warm weights."""
    torch.manual_seed(7)
    train(module, torch.optim.SGD(module.parameters(), 0.05), inputs(3, 4))
    module(inputs())
    return module


def warm(module: nn.Module) -> nn.Module:
    """Weights cached in both modes, with and without gradient."""
    for mode in (False, True):
        module.train(mode)
        with torch.no_grad():
            module(inputs())
        loss_of(module, inputs()).backward()
    # PyTorch makes no optimizer state where gradients are left.
    module.zero_grad()
    with torch.no_grad():
        module(inputs())
    return module


def through_a_file(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    # The base of PyTorch's own orthogonal() lies in memory by columns, which safetensors refuses.
    safetensors.save_file({name: value.contiguous() for name, value in state.items()}, path / "model.safetensors")
    loaded: dict[str, Tensor] = safetensors.load_file(path / "model.safetensors")
    assert loaded.keys() == state.keys()
    return loaded


def check_training(model: nn.Module, oracle: nn.Module) -> None:
    """Neither the first outputs nor later steps are those of old weights."""
    x, batches = inputs(), inputs(3, 4)
    for mode in (True, False):
        model.train(mode)
        oracle.train(mode)
        check(model, oracle, x)
    before = model(x).detach()
    model.train()
    oracle.train()
    for module in (model, oracle):
        # Built anew: loading with assign=True puts other parameters into a model, plain or not.
        train(module, adam(module, fused=True), batches)
    check(model, oracle, x)
    assert not torch.allclose(model(x), before)


# --- safetensors


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("source", ["transformed", "parametrize"])
def test_files_go_both_ways(source: str, trace: str, assign: bool, tmp_path: Path) -> None:
    origin = trained(pair(trace)[source == "parametrize"])
    model, oracle = (warm(module) for module in pair(trace))
    assert list(origin.state_dict()) == list(model.state_dict())
    for at, module in enumerate((model, oracle)):
        folder = tmp_path / str(at)
        folder.mkdir()
        result = module.load_state_dict(through_a_file(origin.state_dict(), folder), assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
    same(dict(model.state_dict()), dict(origin.state_dict()), 0)
    check_training(model, oracle)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("trace", TRACES)
def test_files_of_the_plain_model(trace: str, assign: bool, tmp_path: Path) -> None:
    plain = trained(pair()[1])
    for name in ("first", "second"):
        parametrize.remove_parametrizations(plain.get_submodule(name), "weight")
    model, _ = pair(trace)
    warm(model)
    state = through_a_file(plain.state_dict(), tmp_path)
    result = model.load_state_dict(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    x = inputs()
    same(model(x), plain(x))
    for name, weight in plain.named_parameters():
        same(model.get_parameter(name) if "bias" in name else model.weights()[name], weight)
    # Gradients against the uncached model with the latents that the right inverses gave.
    oracle = pair()[1]
    oracle.load_state_dict(model.state_dict())
    model.zero_grad()
    check_training(model, oracle)
    # What was given is not trained, other than biases that were assigned.
    for name in ("first.weight", "second.weight"):
        same(state[name], plain.state_dict()[name], 0)


State = dict[str, Tensor]


def first_layer(state: State) -> State:
    return {name: value for name, value in state.items() if name.startswith("first")}


def one_of_two_latents(state: State) -> State:
    return {name: value for name, value in state.items() if name.endswith("original1")}


def with_a_stranger(state: State) -> State:
    return {name: value for name, value in state.items() if name.startswith("second")} | {"third.weight": torch.ones(2)}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("part", [first_layer, one_of_two_latents, with_a_stranger])
def test_parts_of_a_state(part: Callable[[State], State], trace: str, assign: bool, tmp_path: Path) -> None:
    state = through_a_file(part(trained(pair()[1]).state_dict()), tmp_path)
    model, oracle = (warm(module) for module in pair(trace))
    for module in (model, oracle):
        with pytest.raises(RuntimeError, match=r"(Missing|Unexpected) key"):
            copy.deepcopy(module).load_state_dict(state)
    # Tensors of their own: assigned ones are trained.
    results = [m.load_state_dict(copy.deepcopy(state), strict=False, assign=assign) for m in (model, oracle)]
    assert results[0] == results[1]
    check_training(model, oracle)


@pytest.mark.parametrize("trace", TRACES)
def test_part_of_a_plain_state(trace: str, tmp_path: Path) -> None:
    weight = torch.randn(6, 5, dtype=DTYPE)
    model, oracle = (warm(module) for module in pair(trace))
    result = model.load_state_dict(through_a_file({"first.weight": weight}, tmp_path), strict=False)
    oracle.first.weight = weight
    assert not result.unexpected_keys
    assert sorted(result.missing_keys) == sorted(name for name in model.state_dict() if not name.startswith("first.param"))
    check_training(model, oracle)


class Tied(nn.Module):
    """Two pairs of layers that share a weight; only the first pair is declared."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4, dtype=DTYPE) for _ in range(4))
        self.b.weight, self.d.weight = self.a.weight, self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))


class TiedOracle(Tied):
    """The same, for ``torch.nn.utils.parametrize``, which unties: the second layer reads the weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.a)
        del self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(torch.tanh(self.a(x)), self.a.weight, self.b.bias)
        return self.d(torch.tanh(self.c(torch.tanh(hidden))))


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("kind", ["transformed", "parametrize", "plain"])
def test_models_with_shared_tensors(kind: str, trace: str, tmp_path: Path) -> None:
    def make() -> fxp.ParametrizedModule:
        return fxp.transform(Tied(), {"a.weight": fxp.weight_norm()}, trace=trace)

    model, x = make(), torch.randn(4, 4, dtype=DTYPE)
    origin = {"transformed": make, "parametrize": TiedOracle, "plain": Tied}[kind]()
    want = origin(x).detach()
    loss_of(model, x).backward()
    safetensors.save_model(origin, str(tmp_path / "model.safetensors"))
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    # Each shared tensor once, and no other way to the tie is left behind.
    assert sum(name.startswith(("a.", "b.")) and "bias" not in name for name in saved) == (1 if kind == "plain" else 2)
    assert not safetensors.load_model(model, str(tmp_path / "model.safetensors"))[0]
    same(model(x), want)
    assert model.c.weight is model.d.weight
    oracle = TiedOracle()
    oracle.load_state_dict(model.state_dict())
    for module in (model, oracle):
        train(module, torch.optim.SGD(module.parameters(), 0.05), torch.randn(3, 4, 4, dtype=DTYPE).fill_(0.3))
    same(gradients(model, x), gradients(oracle, x))
    same(model.a.weight, model.b.weight, 0)
    # And out again.
    safetensors.save_model(model, str(tmp_path / "again.safetensors"))
    again = make()
    safetensors.load_model(again, str(tmp_path / "again.safetensors"))
    same(again(x), oracle(x))


def test_a_model_of_another_file_is_refused_as_in_pytorch(tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    safetensors.save_file({"first.bias": torch.ones(6, dtype=DTYPE), "other": torch.ones(1)}, path)
    model, oracle = pair()
    found = [safetensors.load_model(module, path, strict=False) for module in (model, oracle)]
    assert [set(names) for names in found[0]] == [set(names) for names in found[1]]
    for module in (model, oracle):
        with pytest.raises(RuntimeError, match="Error.* in loading state_dict"):
            safetensors.load_model(module, path)
    check_training(model, oracle)


# --- torch.distributed.checkpoint


def save(state: dict[str, Any], path: Path) -> None:
    save_files(state, checkpoint_id=path, no_dist=True)


def load(state: dict[str, Any], path: Path) -> None:
    load_files(state, checkpoint_id=path, no_dist=True)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("source", ["transformed", "parametrize"])
def test_dcp_writes_into_the_tensors_of_a_state(source: str, trace: str, tmp_path: Path) -> None:
    origin = trained(pair()[source == "parametrize"])
    save(origin.state_dict(), tmp_path)
    model, oracle = (warm(module) for module in pair(trace))
    for module in (model, oracle):
        # In place, and no load_state_dict follows.
        load(module.state_dict(), tmp_path)
    check(model, origin, inputs())
    check_training(model, oracle)


@pytest.mark.parametrize("trace", TRACES)
def test_dcp_takes_the_model_and_the_optimizer_themselves(trace: str, tmp_path: Path) -> None:
    batches, x = inputs(6, 4), inputs()
    straight, oracle = pair(trace)
    resumed = pair(trace)[0]
    for module in (straight, oracle):
        optimizer = adam(module)
        train(module, optimizer, batches[:3])
        save({"model": module, "optimizer": optimizer}, tmp_path / type(module).__name__)
        train(module, optimizer, batches[3:])
    again = adam(warm(resumed))
    # Every state has its place before it is loaded.
    train(resumed, again, batches[:1])
    load({"model": resumed, "optimizer": again}, tmp_path / type(straight).__name__)
    train(resumed, again, batches[3:])
    check(resumed, oracle, x)
    check(resumed, straight, x, 0)


OPTIONS = {
    "default": dsd.StateDictOptions(),
    "full on the CPU": dsd.StateDictOptions(full_state_dict=True, cpu_offload=True),
    "flat optimizer": dsd.StateDictOptions(flatten_optimizer_state_dict=True),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize(
    ("direction", "options"),
    [(way, "default") for way in ("to itself", "from parametrize", "to parametrize")]
    + [("from parametrize", "full on the CPU"), ("to parametrize", "flat optimizer")],
)
def test_training_goes_on_after_dcp(direction: str, options: str, trace: str, tmp_path: Path) -> None:
    chosen, batches = OPTIONS[options], inputs(6, 4)
    first, second = pair(trace), pair(trace)
    source = first[direction == "from parametrize"]
    target = second[direction == "to parametrize"]
    reference = first[direction != "from parametrize"]
    of_source, of_reference = adam(source), adam(reference)
    train(source, of_source, batches[:3])
    train(reference, of_reference, batches[:3])
    model_state, optimizer_state = dsd.get_state_dict(source, of_source, options=chosen)
    same(dict(model_state), dict(source.state_dict()), 0)
    save({"model": model_state, "optimizer": optimizer_state}, tmp_path)

    of_target = adam(warm(target))
    state: dict[str, Any] = {
        "model": dsd.get_model_state_dict(target, options=chosen),
        "optimizer": dsd.get_optimizer_state_dict(target, of_target, options=chosen),
    }
    load(state, tmp_path)
    result = dsd.set_model_state_dict(target, state["model"], options=chosen)
    assert not result.missing_keys and not result.unexpected_keys
    dsd.set_optimizer_state_dict(target, of_target, state["optimizer"], options=chosen)
    check(target, source, batches[0])
    # The reference never saved nor loaded.
    train(target, of_target, batches[3:])
    train(reference, of_reference, batches[3:])
    check(target, reference, batches[0])


@pytest.mark.parametrize("trace", TRACES)
def test_asking_for_the_state_of_a_fresh_optimizer_moves_nothing(trace: str) -> None:
    # PyTorch makes the missing state by a step with gradients and a learning rate of zero.
    batches = inputs(3, 4)
    model, oracle = pair(trace)
    before = model(batches[0]).detach()
    for module in (model, oracle):
        optimizer = adam(module)
        dsd.get_optimizer_state_dict(module, optimizer)
        if module is model:
            same(model(batches[0]), before)
        train(module, optimizer, batches)
    check(model, oracle, batches[0])


@pytest.mark.parametrize("trace", TRACES)
def test_dcp_states_of_the_plain_model(trace: str) -> None:
    plain = trained(pair()[1])
    for name in ("first", "second"):
        parametrize.remove_parametrizations(plain.get_submodule(name), "weight")
    model = warm(pair(trace)[0])
    x = inputs()
    dsd.set_model_state_dict(model, dsd.get_model_state_dict(plain))
    same(model(x), plain(x))
    oracle = pair()[1]
    oracle.load_state_dict(model.state_dict())
    check_training(model, oracle)


@pytest.mark.parametrize("trace", TRACES)
def test_dcp_of_a_part_and_of_frozen_latents(trace: str) -> None:
    model, oracle = (warm(module) for module in pair(trace))
    names = model.freeze("first.*")
    for name, parameter in oracle.named_parameters():
        parameter.requires_grad_(name not in names)
    options = dsd.StateDictOptions(ignore_frozen_params=True, strict=False)
    states = [dsd.get_model_state_dict(module, options=options) for module in (model, oracle)]
    assert list(states[0]) == list(states[1]) and not set(names) & set(states[0])
    moved = {name: value * 1.5 for name, value in states[0].items()}
    results = [dsd.set_model_state_dict(module, dict(moved), options=options) for module in (model, oracle)]
    assert results[0] == results[1]
    x = inputs()
    for module in (model, oracle):
        module.zero_grad()
        loss_of(module, x).backward()
    same(model(x), oracle(x))
    for (name, p), (_, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (name in names)
        if p.grad is not None:
            same(p.grad, q.grad)


@pytest.mark.parametrize("trace", TRACES)
def test_a_part_of_a_larger_model(trace: str, tmp_path: Path) -> None:
    made = [pair(trace), pair(trace)]
    outer, oracle, resumed, _ = (nn.Sequential(module, nn.Linear(3, 3, dtype=DTYPE)) for both in made for module in both)
    oracle.load_state_dict(outer.state_dict())
    batches = inputs(6, 4)
    of_outer, of_oracle = adam(outer, foreach=True), adam(oracle, foreach=True)
    train(outer, of_outer, batches[:3])
    train(oracle, of_oracle, batches)
    save(dict(zip(("model", "optimizer"), dsd.get_state_dict(outer, of_outer), strict=True)), tmp_path)
    again = adam(warm(resumed), foreach=True)
    model_state, optimizer_state = dsd.get_state_dict(resumed, again)
    load({"model": model_state, "optimizer": optimizer_state}, tmp_path)
    dsd.set_state_dict(resumed, again, model_state_dict=model_state, optim_state_dict=optimizer_state)
    train(resumed, again, batches[3:])
    check(resumed, oracle, batches[0])


def test_the_spec_of_these_tests_is_what_they_say() -> None:
    model, _ = pair()
    assert [site.names for site in model.sites] == [(name,) for name in SPEC]
