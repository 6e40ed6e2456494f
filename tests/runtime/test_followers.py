"""Latents that are written past every version: by hand in training, by averages, through flat vectors, during an evaluation."""
# mypy: disable-error-code="operator,union-attr,arg-type,index,misc", warn-unused-ignores=False

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters

import fxparam as fxp

DTYPE = torch.float64
X = torch.linspace(-1, 1, 12, dtype=DTYPE).reshape(3, 4)


def pair(**options: Any) -> tuple[nn.Module, fxp.ParametrizedModule]:
    """The same model as PyTorch computes it and transformed."""
    torch.manual_seed(0)
    net = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(4, 4, dtype=DTYPE)) for _ in range(3)))
    return net, fxp.transform(net, copy=True, **options)


def agree(script: Callable[[Any], Any]) -> None:
    """A script yields the same outputs with both models."""
    net, model = pair()
    torch.testing.assert_close(script(model), script(net), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def blended(target: nn.Module, source: nn.Module, how: str) -> None:
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        if how == "copy":
            old.data.copy_(0.3 * new.data + 0.7 * old.data)
        else:
            old.data.mul_(0.7).add_(0.3 * new.data)


@pytest.mark.parametrize("how", ["copy", "in place"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_target_network_that_follows(how: str, fused: bool) -> None:
    def script(model: Any) -> list[Tensor]:
        target = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        found = []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.no_grad():
                goal = target(X)
            (model(X) - goal + 1).square().sum().backward()
            optimizer.step()
            blended(target, model, how)
            found.append(target(X).detach())
        return found

    agree(script)


def test_frozen_weights_of_a_model_in_training_stay() -> None:
    _, model = pair()
    model.freeze()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model(X)
    before = model.stats.refreshes
    for _ in range(3):
        optimizer.zero_grad()
        model(X).sum().backward()
        optimizer.step()
    assert model.stats.refreshes == before


@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_by_hand_through_data(set_to_none: bool) -> None:
    def script(model: Any) -> list[Tensor]:
        found = []
        for _ in range(4):
            model.zero_grad(set_to_none=set_to_none)
            loss = model(X).square().sum()
            found.append(loss.detach())
            loss.backward()
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-0.01)
        return found

    agree(script)


def test_a_vector_that_is_written_in_place() -> None:
    def script(model: Any) -> list[Tensor]:
        vector = parameters_to_vector(model.parameters()).detach().clone()
        found = []
        for step in range(4):
            vector.add_(0.01 * step)
            vector_to_parameters(vector, model.parameters())
            with torch.no_grad():
                found.append(model(X))
        return found

    agree(script)


# --- during an evaluation


class Slow(nn.Module):
    """Waits in the middle, when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on, self.waits = threading.Event(), threading.Event(), False

    def forward(self, latent: Tensor) -> Tensor:
        value = latent * 2.0
        if self.waits:
            self.begun.set()
            assert self.go_on.wait(20)
        return value

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2.0


@pytest.mark.parametrize("event", ["fused step", "step", "data and invalidate"])
def test_what_happens_during_an_evaluation_of_another_thread_counts(event: str) -> None:
    torch.manual_seed(0)
    slow = Slow()
    slow.register_forward_hook(lambda module, args, out: None)  # with a hook it is called as it is
    model = fxp.transform(nn.Linear(4, 4, bias=False, dtype=DTYPE), {"weight": slow})
    latent = model.get_parameter("parametrizations.weight.original")
    optimizer = torch.optim.SGD([latent], lr=1.0, fused=event == "fused step")
    latent.grad = torch.ones_like(latent)
    with torch.no_grad():
        latent.mul_(1.0)
    slow.waits = True
    thread = threading.Thread(target=lambda: model(X))
    thread.start()
    assert slow.begun.wait(20)
    if event == "data and invalidate":
        latent.data.add_(1.0)
        model.invalidate()
    else:
        optimizer.step()
    slow.go_on.set()
    thread.join(20)
    slow.waits = False
    torch.testing.assert_close(model(X), X @ (2.0 * latent).T, rtol=1e-12, atol=1e-12)


# --- hooks of latents that share nodes


def test_a_hook_on_many_latents_hears_of_a_loss_that_reaches_some() -> None:
    def script(model: Any) -> list[list[bool]]:
        heard: list[list[bool]] = []
        latents = [layer.parametrizations.weight.original1 for layer in model]
        register_multi_grad_hook(latents, lambda gradients: heard.append([gradient is None for gradient in gradients]))
        model[0](X).sum().backward()
        model(X).sum().backward()
        return heard

    net, model = pair()
    assert script(model) == script(net) == [[False, True, True], [False, False, False]]


@pytest.mark.parametrize("between", ["grad", "inputs"])
def test_a_hook_after_accumulation_is_not_lost_by_a_pass_without_it(between: str) -> None:
    def script(model: Any) -> int:
        calls: list[Tensor] = []
        latents = [layer.parametrizations.weight.original1 for layer in model]
        latents[2].register_post_accumulate_grad_hook(lambda latent: calls.append(latent))
        for _ in range(60):
            model(X).sum().backward()
            if between == "grad":
                torch.autograd.grad(model[0](X).sum(), latents[0])
            else:
                model[0](X).sum().backward(inputs=[latents[0]])
            model.zero_grad()
            model(X).sum().backward()
            model.zero_grad()
        return len(calls)

    net, model = pair()
    assert script(model) == script(net) == 120


# --- alarms and checks


def test_a_mask_of_infinities_is_no_alarm() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.zeros(4, 4, dtype=DTYPE).masked_fill(torch.eye(4) == 1, -torch.inf))

        def forward(self, latent: Tensor) -> Tensor:
            return torch.softmax(latent + self.mask, 1)

    model = fxp.transform(nn.Linear(4, 4, dtype=DTYPE), {"weight": Masked()})
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            assert model(X).isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_check_of_a_compiled_prologue(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("FXPARAM_CHECK", "1")
    _, model = pair()
    model.compile(backend="aot_eager", prologue=True)
    for _ in range(3):
        model(X).sum().backward()
    model[0].weight.data.add_(1.0)
    with pytest.raises(fxp.StaleWeightsError, match=r"they, or the weight itself, were written"):
        model(X)
