"""Steps that no version tells of: raw kernels, writes through ``data`` and NumPy, flat master buffers."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from runtime.oracles import TRACES, raw_fused
from runtime.situations.common import Case, X, Y, grads, latents, loss_of, outcome, pair, same
from runtime.tables import collector
from torch import Tensor, nn

CASES: dict[str, Case] = {}
case = collector(CASES)


@case
def numpy_views_written(m: Any) -> list[Any]:
    views = [(p, p.detach().numpy()) for p in m.parameters()]
    for _ in range(3):
        m.zero_grad(set_to_none=True)
        loss_of(m).backward()
        for p, view in views:
            view -= 0.1 * p.grad.numpy()
    return outcome(m)


@case
def data_added_to(m: Any) -> list[Any]:
    for _ in range(3):
        m.zero_grad(set_to_none=True)
        loss_of(m).backward()
        for p in m.parameters():
            p.data.add_(p.grad, alpha=-0.1)
    return outcome(m)


@case
def raw_fused_kernel(m: Any) -> list[Any]:
    for _ in range(3):
        m.zero_grad(set_to_none=True)
        (loss_of(m) + loss_of(m, Y)).backward()
        raw_fused(list(m.parameters()))
    return outcome(m)


@case
def two_autocast_states_and_a_raw_kernel(m: Any) -> list[Any]:
    """The backward is that of one autocast state; the values in the other are as old."""
    for _ in range(3):
        m.zero_grad(set_to_none=True)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            metric = m(X)
        loss_of(m).backward()
        raw_fused(list(m.parameters()))
    return [metric, *grads(m)]


@case
def step_assigned_on_the_instance(m: Any) -> list[Any]:
    optimizer = torch.optim.SGD(m.parameters(), 0.1, fused=True)

    def step(self: torch.optim.Optimizer) -> None:
        raw_fused(self.param_groups[0]["params"])

    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        loss_of(m).backward()
        optimizer.step()
    return outcome(m)


def flatten(parameters: Sequence[Tensor]) -> Tensor:
    """One flat tensor; the parameters and their gradients become views into it and into its gradient."""
    flat = torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()
    flat.grad = torch.zeros_like(flat)
    sizes = [p.numel() for p in parameters]
    for p, data, gradient in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        p.data, p.grad = data.view_as(p), gradient.view_as(p)
    return flat


def train_flat(m: Any, flat: Tensor, held: Sequence[Tensor], **options: Any) -> list[Any]:
    """Gradients are never None: nothing but the step of the flat tensor tells."""
    optimizer = torch.optim.SGD([flat, *held], 0.1, **options)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(m).backward()
        optimizer.step()
    return [m(Y).detach(), flat.detach()]


@case
def flat_master_buffer(m: Any) -> list[Any]:
    return train_flat(m, flatten(list(m.parameters())), [], foreach=False)


@case
def flat_master_buffer_fused(m: Any) -> list[Any]:
    return train_flat(m, flatten(list(m.parameters())), [], fused=True)


@case
def flat_latents_beside_other_parameters(m: Any) -> list[Any]:
    biases = [p for name, p in m.named_parameters() if name.endswith("bias")]
    for bias in biases:
        bias.grad = torch.zeros_like(bias)
    return train_flat(m, flatten(latents(m)), biases, fused=True)


@case
def flat_latents_beside_another_model(m: Any) -> list[Any]:
    other, _ = pair("live")
    loss_of(other).backward()
    return train_flat(m, flatten(list(m.parameters())), list(other.parameters()), fused=True)


@case
def flat_master_copies(m: Any) -> list[Any]:
    """As mixed precision does it: the step is of a copy, which is then copied back."""
    flat = nn.utils.parameters_to_vector(m.parameters()).detach().requires_grad_()
    optimizer = torch.optim.SGD([flat], 0.1, fused=True)
    for _ in range(3):
        m.zero_grad(set_to_none=False)
        loss_of(m).backward()
        flat.grad = torch.cat([p.grad.flatten() for p in m.parameters()])
        optimizer.step()
        nn.utils.vector_to_parameters(flat.detach(), m.parameters())
    return outcome(m)


class _ThroughData(torch.optim.Optimizer):
    """An optimizer of the user's own that no version tells of."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-0.1)


@case
def optimizers_around_optimizers(m: Any) -> list[Any]:
    """A scaler, a schedule, an optimizer of one's own; gradients stay."""
    own = _ThroughData(m.parameters())
    fused = torch.optim.Adam(m.parameters(), 0.1, fused=True)
    schedule, scaler = torch.optim.lr_scheduler.StepLR(fused, 1), torch.amp.GradScaler("cpu")
    seen = []
    for _ in range(3):
        fused.zero_grad(set_to_none=False)
        scaler.scale(loss_of(m)).backward()
        scaler.step(fused)
        scaler.update()
        schedule.step()
        seen.append(m(X).detach())
        own.step()
        seen.append(m(X).detach())
    return [*seen, *outcome(m)]


@case
def averaged_models(m: Any) -> list[Any]:
    average = torch.optim.swa_utils.AveragedModel(m)
    optimizer = torch.optim.SGD(m.parameters(), 0.1, fused=True)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(m).backward()
        optimizer.step()
        average.update_parameters(m)
        seen.append(average(X).detach())
    return [*seen, *outcome(m)]


@case
def average_swapped_in_through_data(m: Any) -> list[Any]:
    loss_of(m).backward()
    kept = [p.detach().clone() for p in m.parameters()]
    for p in m.parameters():
        p.data.copy_(0.5 * p.data)
    m.eval()
    averaged = m(X).detach()
    for p, value in zip(m.parameters(), kept, strict=True):
        p.data.copy_(value)
    m.train()
    return [averaged, *outcome(m)]


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", list(CASES))
def test_as_uncached(name: str, trace: Any) -> None:
    model, oracle = pair(trace)
    same(CASES[name](model), CASES[name](oracle))
