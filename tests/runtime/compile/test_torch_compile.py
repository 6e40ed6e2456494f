"""``torch.compile(model)`` puts the prologue into its graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.compile.common import DYNAMO, MODELS, N, X, grads, methods, noise, norms, recurrent, skew, train
from runtime.oracles import DTYPE, same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxparam as fxp

pytestmark = DYNAMO


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_torch_compile_is_one_graph_with_the_right_values(make: Callable[[], tuple[Any, fxp.ParametrizedModule]]) -> None:
    oracle, model = make()
    counter = CompileCounterWithBackend("aot_eager")
    # LSTM refuses fullgraph in plain PyTorch as well.
    run = torch.compile(model, backend=counter, fullgraph=make is not recurrent)
    train(oracle, model, run)
    compiled = counter.frame_count
    train(oracle, model, run)
    assert counter.frame_count == compiled > 0, "no step compiles again"
    if make is not recurrent:
        assert compiled == 1
        assert model.stats.refreshes == 0


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}], ids=str)
def test_torch_compile_modes_and_sizes(options: dict[str, Any]) -> None:
    oracle, model = skew()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, **options)
    for mode in (True, False, True):
        oracle.train(mode)
        model.train(mode)
        train(oracle, model, run, steps=2)
    for size in (2, 3, 6, 7):
        train(oracle, model, run, steps=1, x=noise(size, size, N))
    assert counter.frame_count <= (1 if options.get("dynamic") else 2)
    with torch.no_grad():
        same(run(X), oracle(X))
    train(oracle, model, model)


def test_torch_compile_sees_every_write() -> None:
    oracle, model = skew()
    run = torch.compile(model, backend="aot_eager")
    name = "a.parametrizations.weight.original"
    writes: list[Callable[[Any], Any]] = [
        lambda net: net.get_parameter(name).detach().mul_(1.5),
        lambda net: net.get_parameter(name).data.add_(0.5),
        lambda net: net.load_state_dict({key: 0.5 * value for key, value in net.state_dict().items()}),
    ]
    for write in writes:
        same(run(X), oracle(X))
        write(oracle)
        write(model)
    same(run(X), oracle(X))


def test_torch_compile_of_methods_and_of_functions_around() -> None:
    oracle, model = methods()

    def loss(net: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: net(x).mean() + net.penalty() + net.encoder.weight.mean()

    run = torch.compile(loss(model), backend="aot_eager", fullgraph=True)
    for net, call in ((oracle, loss(oracle)), (model, run)):
        net.zero_grad()
        call(X).backward()
    same(grads(model), grads(oracle))
    for name in ("encode", "penalty"):
        args = (X,) if name == "encode" else ()
        same(torch.compile(getattr(model, name), backend="aot_eager")(*args), getattr(oracle, name)(*args))


@pytest.mark.parametrize("own", [False, True])
def test_torch_compile_of_a_model_around(own: bool) -> None:
    oracle, model = skew()
    torch.manual_seed(2)
    head = nn.Linear(N, N, dtype=DTYPE)
    whole: Any = nn.Sequential(model, head)
    if own:
        model.compile(backend="aot_eager")
    run = whole if own else torch.compile(whole, backend="aot_eager", fullgraph=True)
    train(nn.Sequential(oracle, copy.deepcopy(head)), whole, run)
    assert model.stats.refreshes == (3 if own else 0)


def test_spectral_norm_advances_at_each_compiled_forward() -> None:
    oracle, model = norms()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        same(run(X), oracle(X))
        same(dict(model.named_buffers()), dict(oracle.named_buffers()))
    for net in (oracle, model):
        net.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    same(run(X), oracle(X))
    same(dict(model.named_buffers()), before)
