"""Weights that share autograd nodes behave as if each had its own."""
# mypy: disable-error-code="operator,union-attr,arg-type", warn-unused-ignores=False

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxparam as fxp

DTYPE = torch.float64
LAYERS = 5


class Heads(nn.Module):
    """One output for each layer, so that a loss can reach some of the weights."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(layers))

    def forward(self, x: Tensor, only: int | None = None) -> list[Tensor]:
        return [head(x).square().sum() for number, head in enumerate(self.heads) if only in (None, number)]


def models(layers: int = LAYERS) -> tuple[Heads, fxp.ParametrizedModule]:
    """The same model as PyTorch computes it and transformed: nodes are shared by all layers."""
    torch.manual_seed(3)
    plain = Heads(layers).to(DTYPE)
    for head in plain.heads:
        parametrizations.weight_norm(head)
    return plain, fxp.transform(plain, copy=True, trace="live")


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=DTYPE)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def outcome(model: Any, script: Callable[[Any], Any]) -> dict[str, Any]:
    """What a script yields and the gradients it leaves, or the error it ends with."""
    try:
        result = script(model)
    except RuntimeError as error:
        # A backward that is refused may have gone part of its way in PyTorch: what it left says nothing.
        return {"error": str(error)}
    return {"result": result, **gradients(model)}


def agree(script: Callable[[Any], Any], layers: int = LAYERS) -> None:
    """A script does the same to both models."""
    expected, got = (outcome(model, script) for model in models(layers))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, str) or (name == "result" and isinstance(value, list)):
            assert got[name] == value
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_they_do_share_nodes() -> None:
    _, model = models()
    first, second = (model.heads[number].weight for number in (0, 1))
    assert first.grad_fn is not second.grad_fn, "reads outside a forward are apart"
    seen: list[Any] = []
    for head in model.heads:
        head.register_forward_pre_hook(lambda module, args: seen.append(module.weight.grad_fn))
    model(X)
    assert len(seen) == LAYERS and len(set(map(id, seen))) == 1


@pytest.mark.parametrize("layers", [5, 130])
def test_a_loss_that_reaches_some(layers: int) -> None:
    agree(lambda model: model(X)[3].backward(), layers)


def test_a_loss_for_each() -> None:
    agree(lambda model: [loss.backward() for loss in reversed(model(X))])


def test_one_after_all() -> None:
    """The second backward meets what the first one released."""

    def script(model: Any) -> None:
        losses = model(X)
        losses[1].backward()
        sum(losses).backward()

    agree(script)


def test_twice_through_one() -> None:
    def script(model: Any) -> None:
        losses = [loss * 1.0 for loss in model(X)]
        weight = model.heads[2].weight.square().sum()
        losses[0].backward()
        weight.backward()
        weight.backward()

    agree(script)


def test_twice_through_one_that_was_kept() -> None:
    def script(model: Any) -> None:
        losses = model(X)
        losses[1].backward(retain_graph=True)
        losses[2].backward()
        losses[1].backward()

    agree(script)


def test_gradients_of_some() -> None:
    def script(model: Any) -> Any:
        losses, latents = model(X), list(model.parameters())
        return torch.autograd.grad(losses[0], latents[:4], allow_unused=True)

    agree(script)


def test_gradients_of_one_that_was_not_reached() -> None:
    agree(lambda model: torch.autograd.grad(model(X)[0], list(model.parameters())[4:]))


def test_second_order_through_some() -> None:
    def script(model: Any) -> None:
        losses, latents = model(X), list(model.parameters())
        first = torch.autograd.grad(losses[1] + losses[2], latents[2:6], create_graph=True)
        (sum(gradient.square().sum() for gradient in first) + losses[4]).backward()

    agree(script)


@pytest.mark.parametrize("when", ["before", "after a forward"])
def test_hooks_of_latents_hear_only_of_losses_that_reach_them(when: str) -> None:
    def script(model: Any) -> list[str]:
        calls: list[str] = []
        if when != "before":
            sum(model(X)).backward()
        for name, latent in model.named_parameters():
            latent.register_hook(lambda gradient, name=name: calls.append(f"{name} {tuple(gradient.shape)}"))
            latent.register_post_accumulate_grad_hook(lambda latent, name=name: calls.append(f"{name} {latent.grad is None}"))
        model(X)[2].backward()
        return sorted(calls)

    agree(script)


def test_hooks_that_change_a_gradient() -> None:
    def script(model: Any) -> None:
        losses = model(X)
        model.heads[0].parametrizations.weight.original1.register_hook(lambda gradient: gradient * 3)
        losses[0].backward()
        sum(model(X)).backward()

    agree(script)


def test_frozen_ones_among_them() -> None:
    def script(model: Any) -> None:
        for number in (1, 3):
            model.heads[number].requires_grad_(False)
        sum(model(X)).backward()
        model.heads[1].requires_grad_(True)
        sum(model(X)).backward()

    agree(script)


def test_deferred_losses_that_reach_one_each() -> None:
    plain, model = models()
    for loss in plain(X):
        loss.backward()
    with model.defer_backward():
        for loss in model(X):
            loss.backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-12, atol=1e-12)


def test_deferred_losses_twice() -> None:
    _, model = models()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"), model.defer_backward():
        losses = model(X)
        model.heads[1].weight.sum().backward()
        losses[0].backward()
        losses[0].backward()


def test_kept_losses_keep_no_weights() -> None:
    _, model = models()
    entry = next(iter(model._fxp_runtime._entries.values()), None) or (model(X), *model._fxp_runtime._entries.values())[1]
    held = [weakref.ref(value) for value in entry.published.values]
    loss = model(X, only=2)[0]
    loss.backward()
    del entry
    model.invalidate()
    gc.collect()
    assert loss.grad_fn is not None and [value() for value in held] == [None] * LAYERS


def test_a_loss_without_backward_keeps_its_own() -> None:
    """Of a group that is still needed the weights stay: its gradients are right after the model has moved on."""

    def script(model: Any) -> None:
        losses = model(X)
        losses[0].backward()
        model.train(False)
        model(X)
        model.train(True)
        losses[1].backward()

    agree(script)


def test_counts_are_of_components() -> None:
    _, model = models()
    losses = model(X)
    losses[0].backward()
    assert model.stats.backwards == 1
    (losses[1] + losses[2]).backward()
    assert model.stats.backwards == 3
