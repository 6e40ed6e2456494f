"""``model.compile()`` keeps the cache and compiles the body alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.compile.common import DYNAMO, MODELS, N, X, grads, noise, skew, train
from runtime.oracles import same
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import fxparam as fxp

pytestmark = DYNAMO


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_compile_keeps_the_cache(make: Callable[[], tuple[Any, fxp.ParametrizedModule]]) -> None:
    oracle, model = make()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter)
    train(oracle, model, model)
    compiled = counter.frame_count
    train(oracle, model, model)
    assert counter.frame_count == compiled > 0, "no step compiles again"
    assert model.stats.refreshes == 6 and model.stats.inlined == 0


def test_compile_compiles_once_for_each_mode() -> None:
    oracle, model = skew()
    counter = CompileCounter()
    model.compile(backend=counter)
    for mode in (True, False, True, False):
        oracle.train(mode)
        model.train(mode)
        train(oracle, model, model, steps=2)
    assert counter.frame_count == 2
    with torch.no_grad():
        same(model(X), oracle(X))
        same(model(X), oracle(X))
    assert counter.frame_count == 3


def test_compile_leaves_the_prologue_out_of_the_graph() -> None:
    _, model = skew()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model.compile(backend=backend, fullgraph=True)
    model(X)
    assert seen and not any("matrix_exp" in target for target in seen)


def test_compile_with_micro_batches_and_several_backwards() -> None:
    oracle, model = skew()
    model.compile(backend="aot_eager")
    for net in (oracle, model):
        (net(X).sum() + net(2 * X).sum()).backward()
        net(3 * X).sum().backward()
    same(grads(model), grads(oracle))
    assert (model.stats.refreshes, model.stats.hits) == (1, 2)


def test_compile_first_without_gradient() -> None:
    oracle, model = skew()
    model.compile(backend="aot_eager")
    with torch.no_grad():
        same(model(X), oracle(X))
    train(oracle, model, model)
    with torch.inference_mode():
        same(model(X), oracle(X))
    train(oracle, model, model)


def test_compile_runs_hooks() -> None:
    _, model = skew()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("root"))
    model.get_submodule("a").register_forward_hook(lambda *_: calls.append("layer"))
    model.compile(backend="eager")
    for _ in range(2):
        model(X)
    assert calls == ["layer", "root"] * 2


def test_compile_after_an_error() -> None:
    oracle, model = skew()
    model.compile(backend="eager")
    with pytest.raises(RuntimeError):
        model(noise(0, 3, N + 1))
    train(oracle, model, model)


def test_compile_with_a_frozen_latent() -> None:
    oracle, model = skew()
    model.compile(backend="aot_eager")
    train(oracle, model, model, steps=1)
    for name in model.freeze("a.*"):
        oracle.get_parameter(name).requires_grad_(False)
        oracle.get_parameter(name).grad = model.get_parameter(name).grad = None
    train(oracle, model, model, steps=2)
    model.unfreeze("a.*")
    for parameter in oracle.parameters():
        parameter.requires_grad_(True)
    train(oracle, model, model, steps=2)
