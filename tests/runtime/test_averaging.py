"""Averages of latents (SWA, EMA): their weights are those of the averaged latents, at once and in every mode."""
# mypy: disable-error-code="operator,union-attr,arg-type", warn-unused-ignores=False

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from runtime.oracles import TRACES, check, gradients, inputs, loss_of, pair, same, train
from torch import Tensor, nn
from torch.optim.swa_utils import (
    SWALR,
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

import fxparam as fxp

AVERAGES: dict[str, dict[str, Any]] = {
    "default": {},
    "with buffers": {"use_buffers": True},
    "swa": {"avg_fn": get_swa_avg_fn()},
    "swa of all at once": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema": {"avg_fn": get_ema_avg_fn(0.8)},
    "ema of all at once": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "ema with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.8), "use_buffers": True},
}


def check_weights(model: nn.Module, oracle: nn.Module) -> None:
    """The computed weights, read outside of a forward."""
    for name in ("first", "second"):
        same(model.get_submodule(name).weight, oracle.get_submodule(name).weight)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_models(kind: str, trace: str, mode: str) -> None:
    batches, x, seen = inputs(5, 4), inputs(), []
    both = pair(trace, statistics=True)
    averaged = [AveragedModel(module, **AVERAGES[kind]) for module in both]
    optimizers = [torch.optim.Adam(module.parameters(), 0.05, fused=True) for module in both]
    for average in averaged:
        average.train(mode == "train")
    for batch in batches:
        for module, optimizer, average in zip(both, optimizers, averaged, strict=True):
            train(module, optimizer, [batch])
            average.update_parameters(module)
        with torch.no_grad():
            results = [average(x) for average in averaged]
        same(*results)
        check_weights(averaged[0].module, averaged[1].module)
        seen.append(results[0])
    check(averaged[0], averaged[1], x)
    # And the trained model is not the average.
    check(both[0], both[1], x)
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in pairwise(seen))
    assert not torch.allclose(both[0].eval()(x), averaged[0].eval()(x), rtol=1e-3)


def test_one_refresh_for_each_update() -> None:
    model, _ = pair()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8)).eval()
    optimizer = torch.optim.Adam(model.parameters(), 0.05, fused=True)
    own, others = averaged.module.stats.refreshes, model.stats.refreshes
    for step in range(1, 4):
        train(model, optimizer, [inputs()])
        averaged.update_parameters(model)
        for _ in range(3):
            averaged(inputs())
        assert averaged.module.stats.refreshes - own == step
        assert model.stats.refreshes - others == step


@pytest.mark.parametrize("trace", TRACES)
def test_statistics_of_the_average_are_computed_anew(trace: str) -> None:
    batches, x = inputs(4, 6), inputs()
    both = pair(trace, statistics=True)
    averaged = [AveragedModel(module) for module in both]
    for module, average in zip(both, averaged, strict=True):
        optimizer = torch.optim.SGD(module.parameters(), 0.02)
        for batch in batches:
            train(module, optimizer, [batch])
            average.update_parameters(module)
        average.eval()
        before = average(x).detach()
        update_bn(batches, average)
        assert not average.training and not torch.allclose(average(x), before)
    check(averaged[0], averaged[1], x)
    for average in averaged:
        update_bn([(batch, None) for batch in batches[:2]], average.train())
        assert average.training and average.module.norm.momentum == 0.1
    check(averaged[0], averaged[1], x)


@pytest.mark.parametrize("trace", TRACES)
def test_a_whole_swa_run(trace: str) -> None:
    batches, x = inputs(8, 6), inputs()
    both = pair(trace, statistics=True)
    averaged: list[nn.Module] = []
    for module in both:
        optimizer = torch.optim.SGD(module.parameters(), 0.02, momentum=0.9, foreach=True)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        swa, average = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2), AveragedModel(module)
        for epoch in range(6):
            module.train()
            train(module, optimizer, batches[epoch : epoch + 2])
            if epoch < 3:
                cosine.step()
            else:
                average.update_parameters(module)
                swa.step()
            module.eval()
            with torch.no_grad():
                module(x)
        update_bn(batches, average)
        averaged.append(average.eval())
    check(averaged[0], averaged[1], x)
    check(both[0], both[1], x)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("direction", ["to parametrize", "from parametrize"])
def test_checkpoints_of_averages(direction: str, trace: str) -> None:
    batches, x = inputs(3, 4), inputs()
    at = direction == "from parametrize"
    module, other = pair(trace)[at], pair(trace)[not at]
    averages = [AveragedModel(one, multi_avg_fn=get_ema_multi_avg_fn(0.7)) for one in (module, other)]
    averages[1](x)
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    for batch in batches:
        train(module, optimizer, [batch])
        averages[0].update_parameters(module)
    averages[1].load_state_dict(averages[0].state_dict())
    check(averages[1], averages[0], x)
    # Both go on from there.
    other.load_state_dict(module.state_dict())
    for one, average in zip((module, other), averages, strict=True):
        train(one, torch.optim.SGD(one.parameters(), 0.05), batches)
        average.update_parameters(one)
    check(averages[1], averages[0], x)


@pytest.mark.parametrize("trace", TRACES)
def test_averages_of_a_frozen_and_of_a_copied_model(trace: str) -> None:
    both, x = pair(trace), inputs()
    averaged = [AveragedModel(module) for module in both]
    for module, average in zip(both, averaged, strict=True):
        for parameter in average.parameters():
            parameter.requires_grad_(False)
        average(x)
        train(module, torch.optim.SGD(module.parameters(), 0.1), inputs(1, 4).fill_(0.5))
        average.update_parameters(module)
        train(module, torch.optim.SGD(module.parameters(), 0.1), inputs(1, 4).fill_(0.7))
        average.update_parameters(module)
    assert not averaged[0](x).requires_grad
    same(averaged[0](x), averaged[1](x))
    copied = copy.deepcopy(averaged[0])
    copied.update_parameters(both[0])
    assert not torch.allclose(copied(x), averaged[0](x))
    same(averaged[0](x), averaged[1](x))
    averaged[1].update_parameters(both[1])
    same(copied(x), averaged[1](x))


def test_the_average_of_a_plain_model_goes_into_a_transformed_one() -> None:
    # The mean of latents and that of weights differ: this is the second.
    models, x = [pair()[1] for _ in range(2)], inputs()
    plain = [fxp.restore(fxp.transform(module, copy=True)) for module in models]
    averaged = AveragedModel(plain[0])
    for one in plain:
        averaged.update_parameters(one)
    model = fxp.transform(plain[0], {"first.weight": fxp.weight_norm()}, copy=True)
    model(x)
    model.load_state_dict(averaged.module.state_dict())
    same(model(x), averaged(x))
    same(model.weights()["first.weight"], (plain[0].first.weight + plain[1].first.weight) / 2)


# --- swapped in for evaluation, and out again

Write = Callable[[list[nn.Parameter], list[Tensor]], None]


def _copy(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)


def _copy_of_data(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.data.copy_(value)


def _data(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.data = value


def _swapped_data(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for at, p in enumerate(parameters):
        p.data, values[at] = values[at], p.data


def _foreach_copy(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(parameters, values)


def _foreach_lerp(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(parameters, values, 1.0)


def _detached_copy(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.detach().copy_(value)


# Whether PyTorch moves a version or a storage; where it moves neither, train() and eval() between are the only sign.
WRITES: dict[str, tuple[Write, bool]] = {
    "copy_": (_copy, True),
    "detach().copy_": (_detached_copy, True),
    "data =": (_data, True),
    "data, kept = kept, data": (_swapped_data, True),
    "_foreach_copy_": (_foreach_copy, True),
    "_foreach_lerp_": (_foreach_lerp, True),
    "data.copy_": (_copy_of_data, False),
}


@contextmanager
def averaged_in(module: nn.Module, averages: list[Tensor], write: Write, switch: bool) -> Iterator[None]:
    """The model with its averages, as EMA helpers of training libraries do it."""
    parameters = list(module.parameters())
    kept = [p.detach().clone() for p in parameters]
    if switch:
        module.eval()
    write(parameters, [average.clone() for average in averages])
    yield
    write(parameters, kept)
    if switch:
        module.train()


def _run(module: nn.Module, write: Write, switch: bool) -> list[Any]:
    """Training with an evaluation of the averages after each step: all that comes out."""
    torch.manual_seed(3)
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, 0.05, fused=True)
    averages = [p.detach().clone() for p in parameters]
    found: list[Any] = []
    for batch in inputs(4, 4):
        train(module, optimizer, [batch])
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 0.3)
        with averaged_in(module, averages, write, switch):
            with torch.no_grad():
                found.append(module(batch))
            found.append(gradients(module, batch))
        found.append(module(batch).detach())
        found.append(gradients(module, batch))
    return found


CASES = [(name, switch) for name, (_, seen) in WRITES.items() for switch in ((True, False) if seen else (True,))]


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize(("name", "switch"), CASES)
def test_averages_swapped_in_and_out(name: str, switch: bool, trace: str) -> None:
    model, oracle = pair(trace)
    got, want = (_run(module, WRITES[name][0], switch) for module in (model, oracle))
    same(got, want)
    assert not torch.allclose(want[0], want[2], rtol=1e-3)
    check(model, oracle, inputs())


@pytest.mark.parametrize("trace", TRACES)
def test_a_gradient_of_before_the_swap_is_refused(trace: str) -> None:
    """A loss whose backward comes after a swap and back: its saved tensors were written. A new loss is right."""
    x, outcomes = inputs(), []
    for module in pair(trace):
        parameters = list(module.parameters())
        kept = [p.detach().clone() for p in parameters]
        loss = loss_of(module, x)
        _copy(parameters, [p.detach() * 0.5 for p in parameters])
        module(x)
        _copy(parameters, kept)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        module.zero_grad()
        loss_of(module, x).backward()
        outcomes.append([p.grad for p in parameters])
    same(*outcomes)


@pytest.mark.parametrize("trace", TRACES)
def test_averages_kept_beside_the_model_are_read_by_functional_call(trace: str) -> None:
    model, oracle = pair(trace)
    batches, found = inputs(3, 4), []
    for module in (model, oracle):
        averages = {name: p.detach().clone() for name, p in module.named_parameters()}
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for batch in batches:
            train(module, optimizer, [batch])
            for name, p in module.named_parameters():
                averages[name].lerp_(p.detach(), 0.3)
            found.append(torch.func.functional_call(module, averages, (batch,)))
            found.append(module(batch))
    same(found[: len(found) // 2], found[len(found) // 2 :])
