"""Ways to take a step otherwise: in backward, by hand, by closures, by functions, differentiably."""
# mypy: disable-error-code="arg-type"

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from runtime.oracles import TRACES, gradients, inputs, loss_of, pair, same
from runtime.steps.common import Loop, compare, evaluated
from runtime.tables import collector
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.optimizer import Optimizer

import fxparam as fxp

LOOPS: dict[str, Loop] = {}
loop = collector(LOOPS)


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
                parameters,
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


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", LOOPS)
def test_as_plain_pytorch(name: str, trace: str) -> None:
    # A search of lines makes much of a difference in the last digit.
    compare(LOOPS[name], trace, 1e-7 if "LBFGS" in name else 1e-10)


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
