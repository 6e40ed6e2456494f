"""Stories: what a model goes through, transformed and eager side by side, and how the two are compared.

The oracle is the same model with ``torch.nn.utils.parametrize`` (or nothing) in plain PyTorch. Both go through the same
story: changes (``model.eval()``, an attribute, a hook) and calls. Outputs, gradients and buffers are compared each time.
"""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._pytree import tree_leaves

import fxparam as fxp

N = 4


class Tripled(nn.Module):
    """A map that is not the identity, so that a weight read past it shows."""

    def forward(self, latent: Tensor) -> Tensor:
        return 3 * latent + latent.sin()

    def right_inverse(self, weight: Tensor) -> Tensor:
        latent = weight / 4
        for _ in range(60):
            latent = latent - (3 * latent + latent.sin() - weight) / (3 + latent.cos())
        return latent


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(N, N)


@dataclass
class Output:
    y: Tensor
    z: Tensor


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    story: Sequence[Any] = ()
    body: str | None = None
    """The layer that the design fixes: ``"graph"``, ``"live"``, or None where either may be used."""
    why: str = ""
    """A part of the reason against a graph."""
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Call:
    """One forward: inputs made from a seed, so that both models get equal ones of their own."""

    args: Callable[[], tuple[Any, ...]] = lambda: (torch.randn(5, N),)
    kwargs: Callable[[], dict[str, Any]] = dict
    grad: bool = True
    autocast: bool = False
    write: bool = False
    """Whether the caller writes to the outputs afterwards."""


def step(model: nn.Module) -> None:
    """One step of gradient descent, with the gradients of the last call."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


def to_eval(model: nn.Module) -> None:
    model.eval()


def to_train(model: nn.Module) -> None:
    model.train()


CALL = Call()


LOW = Call(autocast=True)


WRITE = Call(write=True)


STORY = (CALL, CALL, step, CALL, to_eval, CALL, CALL, Call(grad=False), to_train, CALL, step, CALL)


def mutate(expression: str, **names: Any) -> Callable[[nn.Module], None]:
    """A statement on ``model``; ``names`` are what else it may name."""

    def change(model: nn.Module) -> None:
        exec(expression, {"model": model, "torch": torch, "np": np, "nn": nn, **names})

    change.__name__ = expression
    return change


def changes(*expressions: str, **names: Any) -> tuple[Any, ...]:
    """Calls before and after each change."""
    return (CALL, *(part for expression in expressions for part in (mutate(expression, **names), CALL, CALL)))


def given(*args: Callable[[], Any], **kwargs: Callable[[], Any]) -> Call:
    return Call(lambda: tuple(a() for a in args), lambda: {k: v() for k, v in kwargs.items()})


def x() -> Tensor:
    return torch.randn(5, N)


def small() -> Tensor:
    return torch.randn(3, N)


def row() -> Tensor:
    return torch.randn(N)


@dataclass
class Seen:
    """What a call left to compare."""

    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    inputs: list[Tensor | None]


def observe(model: nn.Module, call: Call, seed: int) -> Seen:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    args, kwargs = call.args(), call.kwargs()
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        leaf.requires_grad_(call.grad)
    for parameter in model.parameters():
        parameter.grad = None
    low = torch.autocast("cpu", dtype=torch.bfloat16) if call.autocast else nullcontext()
    with torch.set_grad_enabled(call.grad), low:
        out = model(*args, **kwargs)
    if isinstance(out, Output):
        out = (out.y, out.z)
    outputs = tree_leaves(out)
    scalars = [
        (o * torch.linspace(0.5, 1.5, o.numel()).view_as(o)).sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad
    ]
    if scalars:
        sum(scalars).backward()
    seen = Seen(
        [o.detach().clone() if isinstance(o, Tensor) else o for o in outputs],
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        {name: b.detach().clone() for name, b in model.named_buffers()},
        [leaf.grad for leaf in leaves],
    )
    if call.write:
        with torch.no_grad():
            for out in outputs:
                out.fill_(7.0)
    return seen


def compare(found: Seen, expected: Seen, at: str) -> None:
    def close(a: Any, b: Any, what: str) -> None:
        assert (a is None) == (b is None), f"{at}: {what}: got {a}, expected {b}"
        if isinstance(b, Tensor):
            assert isinstance(a, Tensor), f"{at}: {what}"
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda text: f"{at}: {what}: {text}")
        else:
            assert a == b, f"{at}: {what}: got {a}, expected {b}"

    assert len(found.outputs) == len(expected.outputs), f"{at}: number of outputs"
    for number, (a, b) in enumerate(zip(found.outputs, expected.outputs, strict=True)):
        close(a, b, f"output {number}")
    assert found.gradients.keys() == expected.gradients.keys(), f"{at}: names"
    for name, b in expected.gradients.items():
        close(found.gradients[name], b, f"gradient of {name}")
    assert found.buffers.keys() == expected.buffers.keys(), f"{at}: buffers"
    for name, buffer in expected.buffers.items():
        close(found.buffers[name], buffer, f"buffer {name}")
    for number, (a, b) in enumerate(zip(found.inputs, expected.inputs, strict=True)):
        close(a, b, f"gradient of input {number}")


def pair(case: Case, spec: bool) -> tuple[nn.Module, fxp.ParametrizedModule]:
    torch.manual_seed(0)
    eager = case.make().double()
    torch.manual_seed(0)
    given = case.make().double()
    if spec:
        register_parametrization(eager.lin, "weight", Tripled().double())
    # The trace itself must not leave traces in the global generators.
    return eager, fxp.transform(given, {"lin.weight": Tripled()} if spec else None, **case.options)


def cases(table: Sequence[Case]) -> list[Any]:
    return [
        pytest.param(
            case,
            spec,
            id=f"{case.name}-{'spec' if spec else 'empty'}",
        )
        for case in table
        for spec in (False, True)
    ]


def check(case: Case, spec: bool) -> None:
    """The story of a case, told by the transformed and by the eager model."""
    eager, model = pair(case, spec)
    if case.body is not None:
        assert model.report.body == case.body, f"{case.body} expected: {model.report.why_live}"
        if case.body == "live":
            assert case.why in model.report.why_live
    for number, part in enumerate(case.story or STORY):
        at = f"part {number} ({model.report.body})"
        if isinstance(part, Call):
            expected = observe(eager, part, number)
            compare(observe(model, part, number), expected, at)
        else:
            part(eager)
            part(model)
