"""Ways to take a step: scalers, groups, hooks, closures, updates by hand. The weights are those of the latents after it."""
# mypy: disable-error-code="operator,union-attr,arg-type", warn-unused-ignores=False

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from runtime.oracles import TRACES, check, gradients, inputs, loss_of, pair, same, train
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.adam import adam
from torch.optim.optimizer import Optimizer

import fxparam as fxp

Loop = Callable[[nn.Module, Tensor], Any]
LOOPS: dict[str, Loop] = {}


def loop(function: Loop) -> Loop:
    """A training loop. What it returns is compared, and the trained model; it calls ``evaluated`` where it likes."""
    LOOPS[function.__name__] = function
    return function


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """Without gradient, and in the mode the model is in: finds weights that an earlier forward left."""
    with torch.no_grad():
        return model(x)


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


def _in_backward(make: Callable[[nn.Parameter], Optimizer]) -> Loop:
    """A step of each parameter as soon as its gradient is there, which is gone after it."""

    def run(model: nn.Module, batches: Tensor) -> Any:
        optimizers = {p: make(p) for p in model.parameters()}

        def step(p: Tensor) -> None:
            optimizers[p].step()  # type: ignore[index]
            optimizers[p].zero_grad()  # type: ignore[index]

        handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
        found = []
        for x in batches:
            loss_of(model, x).backward()
            found.append(evaluated(model, x))
        for handle in handles:
            handle.remove()
        return found

    return run


LOOPS["Adam in backward"] = _in_backward(lambda p: torch.optim.Adam([p], 0.05))
LOOPS["fused SGD in backward"] = _in_backward(lambda p: torch.optim.SGD([p], 0.05, fused=True))


@loop
def a_hand_written_step_in_backward(model: nn.Module, batches: Tensor) -> Any:
    def step(p: Tensor) -> None:
        p.data.add_(p.grad, alpha=-0.05)
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    found = []
    for x in batches:
        loss_of(model, x).backward()
        found.append(evaluated(model, x))
    for handle in handles:
        handle.remove()
    return found


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


def _by_hand(update: Callable[[list[Tensor], list[Tensor]], None], none: bool) -> Loop:
    def run(model: nn.Module, batches: Tensor) -> Any:
        parameters, found = list(model.parameters()), []
        for x in batches:
            loss_of(model, x).backward()
            with torch.no_grad():
                update(parameters, [p.grad for p in parameters])  # type: ignore[misc]
            model.zero_grad(set_to_none=none)
            found.append(evaluated(model, x))
        return found

    return run


def _foreach(parameters: list[Tensor], grads: list[Tensor]) -> None:
    torch._foreach_mul_(parameters, 0.99)
    torch._foreach_add_(parameters, grads, alpha=-0.05)


def _foreach_on_data(parameters: list[Tensor], grads: list[Tensor]) -> None:
    torch._foreach_add_([p.data for p in parameters], grads, alpha=-0.05)


def _flat(parameters: list[Tensor], grads: list[Tensor]) -> None:
    vector = nn.utils.parameters_to_vector(parameters) - 0.05 * nn.utils.parameters_to_vector(grads)
    nn.utils.vector_to_parameters(vector, parameters)


def _sub(parameters: list[Tensor], grads: list[Tensor]) -> None:
    for p, grad in zip(parameters, grads, strict=True):
        p -= 0.05 * grad


LOOPS["torch._foreach_add_"] = _by_hand(_foreach, none=False)
LOOPS["torch._foreach_add_ on data"] = _by_hand(_foreach_on_data, none=True)
LOOPS["a flat vector"] = _by_hand(_flat, none=False)
LOOPS["p -= g"] = _by_hand(_sub, none=False)


class SignDescent(Optimizer):
    """An optimizer of a user's own, that writes through ``data`` and evaluates its closure twice."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        losses = []
        for _ in range(2):
            with torch.enable_grad():
                losses.append(closure())
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad.sign(), alpha=-group["lr"])
        return torch.stack(losses)


@loop
def an_optimizer_with_closures_of_a_users_own(model: nn.Module, batches: Tensor) -> Any:
    optimizer, found = SignDescent(model.parameters(), 0.02), []
    for x in batches:

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss.detach()

        found += [optimizer.step(closure), evaluated(model, x)]
    return found


def _lbfgs(defer: bool, search: str | None) -> Loop:
    """Closures that accumulate over micro-batches."""

    def run(model: nn.Module, batches: Tensor) -> Any:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=4, line_search_fn=search)
        found = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=batches.dtype)
            with model.defer_backward() if defer and isinstance(model, fxp.ParametrizedModule) else nullcontext():
                for x in batches:
                    loss = loss_of(model, x) / len(batches)
                    loss.backward()
                    total += loss.detach()
            return total

        for _ in range(3):
            found += [optimizer.step(closure), evaluated(model, batches[0])]
        return found

    return run


LOOPS["LBFGS over micro-batches"] = _lbfgs(False, "strong_wolfe")
LOOPS["LBFGS over deferred micro-batches"] = _lbfgs(True, "strong_wolfe")
LOOPS["LBFGS without a line search"] = _lbfgs(False, None)


@loop
def sharpness_aware_steps(model: nn.Module, batches: Tensor) -> Any:
    """Two forwards and backwards a step: up along the gradient, then down from there, at the old latents."""
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.05, fused=True)
    for x in batches:
        train_up = gradients(model, x)
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, list(train_up.values()), alpha=0.01)
        optimizer.zero_grad()
        loss_of(model, x).backward()
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)
        optimizer.step()


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
def steps_without_hooks(model: nn.Module, batches: Tensor) -> Any:
    """The functional form, which no hook of an optimizer sees."""
    parameters = list(model.parameters())
    moments: list[list[Tensor]] = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    counts = [torch.zeros((), dtype=torch.float32) for _ in parameters]
    found = []
    for x in batches:
        loss_of(model, x).backward()
        with torch.no_grad():
            adam(
                parameters,  # type: ignore[arg-type]
                [p.grad for p in parameters],  # type: ignore[misc]
                *moments,
                [],
                counts,
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.99,
                lr=0.05,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )
        model.zero_grad()
        found.append(evaluated(model, x))
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
    model, oracle = pair(trace)
    batches, x = inputs(6, 4), inputs()
    start = model(x).detach()
    # A search of lines makes much of a difference in the last digit.
    tolerance = 1e-7 if "LBFGS" in name else 1e-10
    same(LOOPS[name](model, batches), LOOPS[name](oracle, batches), tolerance)
    check(model, oracle, x, tolerance)
    assert not torch.allclose(model(x), start, rtol=1e-3)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize(("kind", "options"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adadelta, {"eps": 1e-3})])
def test_differentiable_optimizers(kind: Any, options: dict[str, Any], trace: str) -> None:
    """Steps that are differentiated: the outer gradient is that of the latents before the inner steps."""
    found, batches = [], inputs(3, 4)

    def loss_with(module: nn.Module, latents: dict[str, Tensor], x: Tensor) -> Tensor:
        # Copies: the optimizer writes into its own, and autograd refuses where that was needed.
        return torch.func.functional_call(module, {name: p.clone() for name, p in latents.items()}, (x,)).pow(2).sum()

    for module in pair(trace):
        module(batches[0])
        fast = {name: p.clone() for name, p in module.named_parameters()}
        optimizer = kind(list(fast.values()), lr=0.1, differentiable=True, **options)
        for x in batches[:2]:
            loss = loss_with(module, fast, x)
            names = list(fast)
            for name, grad in zip(names, torch.autograd.grad(loss, list(fast.values()), create_graph=True), strict=True):
                fast[name].grad = grad
            optimizer.step()
            optimizer.zero_grad()
        loss_with(module, fast, batches[2]).backward()
        found.append([[p.grad for p in module.parameters()], module(batches[0]), list(fast.values())])
    same(found[0], found[1], 1e-10)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_differentiable_steps_of_the_latents_themselves_are_refused_as_in_pytorch(kind: Any) -> None:
    x = inputs()
    for module in pair():
        optimizer = kind(module.parameters(), lr=0.1, differentiable=True)
        loss_of(module, x).backward()
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
            optimizer.step()


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
