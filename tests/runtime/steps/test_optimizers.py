"""Ways to take a step by optimizers: scalers, groups, clipping, schedules, several optimizers in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.oracles import TRACES, inputs, loss_of, pair, train
from runtime.steps.common import Loop, compare, evaluated
from runtime.tables import collector
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import Optimizer

LOOPS: dict[str, Loop] = {}
loop = collector(LOOPS)


@loop
def a_scaler_that_skips_steps(model: nn.Module, batches: Tensor) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    found = []
    for at, x in enumerate(batches):
        optimizer.zero_grad()
        # One of the losses is infinite: nothing may move.
        scaler.scale(loss_of(model, x) * (float("inf") if at == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        found += [evaluated(model, x), scaler.get_scale()]
    return found


@loop
def a_scaler_and_a_fused_optimizer(model: nn.Module, batches: Tensor) -> Any:
    # Unscales inside of the fused kernel, and skips there.
    optimizer = torch.optim.Adam(model.parameters(), 0.05, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    found = []
    for at, x in enumerate(batches):
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(loss_of(model, x) * (float("nan") if at == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(evaluated(model, x))
    return found


@loop
def a_scaler_with_clipping_and_micro_batches(model: nn.Module, batches: Tensor) -> Any:
    halves = [list(model.parameters())[::2], list(model.parameters())[1::2]]
    optimizers = [torch.optim.Adam(half, 0.05, foreach=True) for half in halves]
    scaler, norms = torch.amp.GradScaler("cpu", init_scale=64.0), []
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for x in (first, second):
            scaler.scale(loss_of(model, x) / 2).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        for optimizer in optimizers:
            scaler.step(optimizer)
            norms.append(evaluated(model, first))
        scaler.update()
    return norms


@loop
def groups_with_latents_of_one_weight_apart(model: nn.Module, batches: Tensor) -> Any:
    scales = [p for name, p in model.named_parameters() if name.endswith("original0")]
    others = [p for name, p in model.named_parameters() if not name.endswith("original0")]
    optimizer = torch.optim.AdamW(
        [{"params": scales, "weight_decay": 0.0, "lr": 0.2}, {"params": others, "weight_decay": 0.3}], 0.02, fused=True
    )
    train(model, optimizer, batches)
    return len(scales)


@loop
def a_group_added_and_one_whose_rate_is_zero(model: nn.Module, batches: Tensor) -> Any:
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters[:2], 0.1, fused=True)
    train(model, optimizer, batches[:2])
    optimizer.add_param_group({"params": parameters[2:], "lr": 0.03})
    train(model, optimizer, batches[2:4])
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, batches[4:])


@loop
def clipping_by_value_and_by_norm(model: nn.Module, batches: Tensor) -> Any:
    optimizer, norms = torch.optim.SGD(model.parameters(), 0.1), []
    for at, x in enumerate(batches):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        if at % 2:
            nn.utils.clip_grad_value_(model.parameters(), 0.2)
        else:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True))
        optimizer.step()
    return norms


def _schedule(make: Callable[[Optimizer], Any], *metric: float) -> Loop:
    def run(model: nn.Module, batches: Tensor) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
        scheduler, rates = make(optimizer), []
        for x in batches:
            train(model, optimizer, [x])
            scheduler.step(*metric)
            rates += [optimizer.param_groups[0]["lr"], evaluated(model, x)]
        return rates

    return run


LOOPS["a one-cycle schedule"] = _schedule(lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=10))
LOOPS["a schedule on a plateau"] = _schedule(lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1), 1.0)
LOOPS["schedules in a row"] = _schedule(
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], milestones=[3]
    )
)


@loop
def an_optimizer_for_each_parameter(model: nn.Module, batches: Tensor) -> Any:
    kinds = [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam]
    optimizers = [kinds[at % 4]([p], lr=0.02) for at, p in enumerate(model.parameters())]
    found = []
    for x in batches:
        loss_of(model, x).backward()
        for optimizer in optimizers:
            optimizer.step()
            # Between two of them the weights are those of some latents moved and others not.
            found.append(evaluated(model, x))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=False)
    return found


@loop
def turns_of_two_optimizers(model: nn.Module, batches: Tensor) -> Any:
    parameters = list(model.parameters())
    optimizers = [torch.optim.Adam(some, 0.05, fused=True) for some in (parameters[:3], parameters[3:])]
    for at, x in enumerate(batches):
        loss_of(model, x).backward()
        optimizers[at % 2].step()
        # The gradients of the others are left, and grow.
        optimizers[at % 2].zero_grad()


@loop
def accumulation_with_an_evaluation_inside(model: nn.Module, batches: Tensor) -> Any:
    optimizer, found = torch.optim.Adam(model.parameters(), 0.05, fused=True), []
    for at, x in enumerate(batches):
        (loss_of(model, x) / 2).backward()
        model.eval()
        found.append(evaluated(model, x))
        model.train()
        if at % 2:
            optimizer.step()
            optimizer.zero_grad()
    return found


@loop
def a_state_of_an_optimizer_that_is_loaded(model: nn.Module, batches: Tensor) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), 0.05, fused=True)
    train(model, optimizer, batches[:3])
    other = torch.optim.Adam(model.parameters(), 0.5, fused=True)
    other.load_state_dict(optimizer.state_dict())
    train(model, other, batches[3:])


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", LOOPS)
def test_as_plain_pytorch(name: str, trace: str) -> None:
    compare(LOOPS[name], trace)


def test_one_refresh_for_each_step_whoever_takes_it() -> None:
    model, _ = pair()
    halves = [list(model.parameters())[::2], list(model.parameters())[1::2]]
    optimizers = [torch.optim.SGD(half, 0.01, fused=True) for half in halves]
    scaler, refreshes = torch.amp.GradScaler("cpu", init_scale=4.0), model.stats.refreshes
    for step in range(1, 5):
        for x in inputs(3, 4):
            scaler.scale(loss_of(model, x)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        assert model.stats.refreshes - refreshes == step
