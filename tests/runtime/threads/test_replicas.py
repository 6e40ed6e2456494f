"""Replicas as ``DataParallel`` makes them."""
# mypy: disable-error-code="operator"

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from runtime.oracles import DTYPE, TRACES, check, inputs, pair, same
from runtime.threads.common import at_once
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxparam as fxp


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[nn.Module]]:
    """``torch.nn.parallel.replicate`` for two devices, with copies on the CPU in place of those it sends to GPUs."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def broadcast(tensors: Sequence[Tensor], devices: Sequence[Any], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return lambda network: module.replicate(network, [0, 1])


class Scaled(nn.Module):
    """A model whose root has a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 6, dtype=DTYPE), nn.Tanh(), nn.Linear(6, 3, dtype=DTYPE))
        self.scale = nn.Parameter(torch.full((3,), 1.5, dtype=DTYPE))
        self.register_buffer("shift", torch.ones(3, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale + self.shift


def scaled_pair(trace: Any) -> tuple[fxp.ParametrizedModule, nn.Module]:
    net = Scaled()
    oracle = copy.deepcopy(net)
    for at in (0, 2):
        parametrizations.weight_norm(oracle.inner[at])
    return fxp.transform(net, {"inner.*.weight": fxp.weight_norm()}, trace=trace, copy=True), oracle


def inside_another(trace: Any) -> tuple[nn.Module, nn.Module]:
    model, oracle = (nn.Sequential(module, nn.Linear(3, 3, dtype=DTYPE)) for module in pair(trace))
    oracle.load_state_dict(model.state_dict())
    return model, oracle


REPLICATED: dict[str, Callable[[Any], Any]] = {"layers": pair, "a root with tensors": scaled_pair, "a part": inside_another}


def parallel(replicas: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Scatter, one thread for each replica, gather."""
    return torch.cat(at_once(*(partial(replica, part) for replica, part in zip(replicas, x.chunk(2), strict=True))))


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("kind", REPLICATED)
def test_replicas_train_the_original(kind: str, trace: str, replicate: Callable[[nn.Module], list[nn.Module]]) -> None:
    model, oracle = REPLICATED[kind](trace)
    x, names = inputs(6), list(model.state_dict())
    parameters = dict(model.named_parameters())
    for _ in range(3):
        for module in (model, oracle):
            optimizer = torch.optim.SGD(module.parameters(), 0.05)
            # The oracle is never replicated.
            output = parallel(replicate(module), x) if module is model else module(x)
            output.pow(2).sum().backward()
            optimizer.step()
        for (_, p), (_, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
            same(p.grad, q.grad)
        model.zero_grad()
        oracle.zero_grad()
        check(model, oracle, x)
    assert list(model.state_dict()) == names
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", REPLICATED)
def test_replicas_read_the_tensors_they_were_given(kind: str, replicate: Callable[[nn.Module], list[nn.Module]]) -> None:
    """On other devices these are the only ones a replica can read."""
    model, oracle = REPLICATED[kind]("live")
    x = inputs()
    with torch.no_grad():
        replicas = [replicate(module)[1] for module in (model, oracle)]
        for replica in replicas:
            for module in replica.modules():
                for tensor in module._former_parameters.values():
                    tensor.mul_(0.5)
        same(replicas[0](x), replicas[1](x))
        assert not torch.allclose(replicas[0](x), model(x))


@pytest.mark.parametrize("kind", REPLICATED)
def test_making_replicas_leaves_the_original_alone(kind: str, replicate: Callable[[nn.Module], list[nn.Module]]) -> None:
    model, oracle = REPLICATED[kind]("live")
    modules, parameters = list(model.modules()), list(model.parameters())
    replicate(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    check(model, oracle, inputs())
