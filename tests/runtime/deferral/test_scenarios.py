"""``defer_backward`` gives the gradients of plain accumulation, through one backward of the prologue."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from runtime.deferral.common import DTYPE, A, B, Block, N, Scenario, X, accumulate, check, grads, pair
from runtime.tables import collector
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

SCENARIOS: dict[str, Scenario] = {}
scenario = collector(SCENARIOS)


# --- losses


@scenario
def different_sizes(model: Any, block: Block) -> Any:
    with block():
        accumulate(model)


@scenario
def nothing_happens(model: Any, block: Block) -> Any:
    with block():
        pass


@scenario
def forwards_only(model: Any, block: Block) -> Any:
    with block():
        return model(X[0]).detach()


@scenario
def losses_reach_some_weights(model: Any, block: Block) -> Any:
    with block():
        for x, path in zip(X, ("abc", "a", "b", "c"), strict=True):
            model(x, path).sum().backward()


@scenario
def losses_reach_no_weight(model: Any, block: Block) -> Any:
    with block():
        for x in X:
            model(x, "c").sum().backward()


@scenario
def one_loss_of_all(model: Any, block: Block) -> Any:
    with block():
        torch.stack([model(x).sum() for x in X]).sum().backward()


@scenario
def losses_of_the_weights_themselves(model: Any, block: Block) -> Any:
    with block():
        for x in X:
            (model(x).sum() + model.a.weight.square().sum()).backward()
        model.b.weight.exp().sum().backward()


@scenario
def losses_of_the_latents_as_well(model: Any, block: Block) -> Any:
    latent = model.get_parameter(A)
    with block():
        for x in X:
            (model(x).sum() + latent.square().sum()).backward()


@scenario
def backward_after_the_block(model: Any, block: Block) -> Any:
    with block():
        losses = [model(x).sum() for x in X]
    for loss in losses:
        loss.backward()


@scenario
def one_backward_after_the_block(model: Any, block: Block) -> Any:
    with block():
        losses = [model(x).sum() for x in X]
    torch.stack(losses).sum().backward()


@scenario
def some_before_and_some_after(model: Any, block: Block) -> Any:
    accumulate(model, X[:1])
    with block():
        accumulate(model, X[1:2])
        late = model(X[2]).sum()
    accumulate(model, X[3:])
    late.backward()


@scenario
def forward_before_the_block(model: Any, block: Block) -> Any:
    early = model(X[0]).sum()
    with block():
        accumulate(model, X[1:])
        early.backward()


@scenario
def retained_graphs(model: Any, block: Block) -> Any:
    with block():
        loss = model(X[0]).square().sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()


@scenario
def gradient_penalty(model: Any, block: Block) -> Any:
    with block():
        for x in X:
            x = x.clone().requires_grad_()
            out = model(x).square().sum()
            (slope,) = torch.autograd.grad(out, x, create_graph=True)
            (out + slope.square().sum()).backward()


@scenario
def gradients_of_inputs(model: Any, block: Block) -> Any:
    with block():
        x = X[0].clone().requires_grad_()
        loss = model(x).square().sum()
        found = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward(inputs=[x])
        return found, x.grad


@scenario
def a_forward_without_gradient(model: Any, block: Block) -> Any:
    with block():
        model(X[0]).sum().backward()
        with torch.no_grad():
            frozen = model(X[1])
        with torch.inference_mode():
            model(X[1])
        model(X[2]).sum().backward()
    return frozen


@scenario
def gradient_off_around_the_block(model: Any, block: Block) -> Any:
    with torch.no_grad(), block(), torch.enable_grad():
        accumulate(model)


@scenario
def inference_mode_around_the_exit(model: Any, block: Block) -> Any:
    with contextlib.ExitStack() as stack:
        stack.enter_context(block())
        accumulate(model)
        stack.enter_context(torch.inference_mode())
        stack.pop_all().__exit__(None, None, None)


@scenario
def autocast_for_some(model: Any, block: Block) -> Any:
    with block():
        for number, x in enumerate(X):
            with torch.autocast("cpu", enabled=number % 2 == 0, dtype=torch.float16):
                model(x).sum().backward()


# --- changes inside the block


@scenario
def eval_in_between(model: Any, block: Block) -> Any:
    with block():
        model(X[0]).sum().backward()
        model.eval()
        with torch.no_grad():
            middle = model(X[1])
        model(X[2]).sum().backward()
        model.train()
        model(X[3]).sum().backward()
    return middle


@scenario
def a_latent_is_written(model: Any, block: Block) -> Any:
    # The map saves no latent, so the sum of the first micro-batch can still pass.
    with block():
        model(X[0]).sum().backward()
        with torch.no_grad():
            model.get_parameter(A).mul_(1.5)
        model(X[1]).sum().backward()


@scenario
def gradients_set_to_zero(model: Any, block: Block) -> Any:
    with block():
        accumulate(model, X[:2])
        model.zero_grad()
        accumulate(model, X[2:])


@scenario
def all_latents_are_frozen(model: Any, block: Block) -> Any:
    for name in (A, B):
        model.get_parameter(name).requires_grad_(False)
    with block():
        accumulate(model)


@scenario
def other_tensors_by_functional_call(model: Any, block: Block) -> Any:
    others = {name: (1.1 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    with block():
        accumulate(model, X[:1])
        functional_call(model, others, (X[1],)).sum().backward()
    return {name: other.grad for name, other in others.items()}


# --- blocks


@scenario
def nested_blocks(model: Any, block: Block) -> Any:
    with block():
        accumulate(model, X[:1])
        with block():
            accumulate(model, X[1:2])
        inner = grads(model)[A]
        accumulate(model, X[2:])
    return inner is None


@scenario
def one_block_after_the_other(model: Any, block: Block) -> Any:
    for x in X:
        with block():
            accumulate(model, [x, x])


@scenario
def as_a_part_of_another_model(model: Any, block: Block) -> Any:
    torch.manual_seed(1)
    whole = nn.Sequential(nn.Linear(N, N, dtype=DTYPE), model, nn.Tanh())
    with block():
        accumulate(whole)
    return grads(whole)


def _checkpointed(model: Any, block: Block, reentrant: bool) -> None:
    with block():
        for x in X:
            x = x.clone().requires_grad_()
            h = checkpoint(lambda z: torch.tanh(model.a(z)), x, use_reentrant=reentrant)
            h = checkpoint(lambda z: torch.tanh(model.b(model.a(z))), h, use_reentrant=reentrant)
            model.c(h).sum().backward()


@scenario
def checkpointing(model: Any, block: Block) -> Any:
    _checkpointed(model, block, False)


@scenario
def reentrant_checkpointing(model: Any, block: Block) -> Any:
    _checkpointed(model, block, True)


@scenario
def a_checkpoint_around_the_model(model: Any, block: Block) -> Any:
    with block():
        for x in X:
            checkpoint(model, x.clone().requires_grad_(), use_reentrant=True).sum().backward()


@scenario
def clipping_and_two_groups(model: Any, block: Block) -> Any:
    latents = [p for name, p in model.named_parameters() if "parametrizations" in name]
    others = [p for name, p in model.named_parameters() if "parametrizations" not in name]
    optimizer = torch.optim.Adam([{"params": latents, "lr": 0.1}, {"params": others, "lr": 0.01}])
    norms = []
    for _ in range(4):
        optimizer.zero_grad()
        with block():
            accumulate(model)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        optimizer.step()
    return norms, dict(model.named_parameters())


@scenario
def a_fused_optimizer(model: Any, block: Block) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, fused=True)
    for _ in range(4):
        optimizer.zero_grad()
        with block():
            accumulate(model)
        optimizer.step()
    return dict(model.named_parameters())


@scenario
def a_gradient_scaler(model: Any, block: Block) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        with block():
            for x in X:
                scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", SCENARIOS)
def test_equals_plain_accumulation(name: str) -> None:
    oracle, model = pair()
    want = SCENARIOS[name](oracle, contextlib.nullcontext)
    got = SCENARIOS[name](model, model.defer_backward)
    # Half precision stays in a forward under autocast, and its gradients are added in another order.
    tol = 1e-3 if "autocast" in name else 1e-12
    if name == "nested_blocks":
        assert got is False, "the inner block sends its own sum at its own end"
    else:
        check(got, want, tol)
    check(grads(model), grads(oracle), tol)


@pytest.mark.parametrize(
    "name",
    "different_sizes losses_reach_some_weights one_loss_of_all gradient_penalty a_forward_without_gradient checkpointing "
    "reentrant_checkpointing a_checkpoint_around_the_model one_backward_after_the_block".split(),
)
def test_one_evaluation_and_one_backward_of_each_component(name: str) -> None:
    _, model = pair()
    SCENARIOS[name](model, model.defer_backward)
    assert (model.stats.refreshes, model.stats.backwards) == (1, 2)
