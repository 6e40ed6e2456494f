"""Weights stay in the image, and gradients finite, at the latents where maps break, and after thousands of steps."""

from __future__ import annotations

import pytest
import torch
from catalogue.cases import CASES, Case, parametrized
from catalogue.cases.common import EXTREMES

KINDS = pytest.mark.parametrize("kind", EXTREMES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every = parametrized(CASES)


def problem(case: Case, kind: str, dtype: torch.dtype) -> str:
    """What is wrong at extreme latents: ``"weight"``, ``"gradient"`` or nothing."""
    module, latents = case.build(dtype), case.extreme(kind, dtype)
    weight = module(*latents)
    if not (weight.isfinite().all() and module.contains(weight.detach())):
        return "weight"
    gradients = torch.autograd.grad(weight.sum(), latents, allow_unused=True, materialize_grads=True)
    return "" if all(gradient.isfinite().all() for gradient in gradients) else "gradient"


@every
@KINDS
@DTYPES
def test_extreme_latents(case: Case, kind: str, dtype: torch.dtype) -> None:
    if kind in case.extremes:
        return
    found = problem(case, kind, dtype)
    assert not found or (found == "gradient" and f"{kind} gradient" in case.extremes), found


@parametrized(case for case in CASES if case.extremes)
def test_exemptions_are_needed(case: Case) -> None:
    """One that is not needed any more has to go; what a library's rounding decides says that it "may" be needed."""
    for kind, reason in case.extremes.items():
        name, _, what = kind.partition(" ")
        found = {problem(case, name, dtype) for dtype in (torch.float32, torch.float64)}
        assert (what or "weight") in found or " may " in reason, f"{kind} works: remove the exemption"


def _train(case: Case, steps: int) -> None:
    """Adam with random gradients, a learning rate that shakes latents through and weight decay."""
    torch.manual_seed(1)
    module = case.build(torch.float32)
    latents = case.draw(dtype=torch.float32)
    optimizer = torch.optim.AdamW([*latents, *module.parameters()], lr=0.05, weight_decay=0.01)
    direction = torch.randn(steps, *case.shape)
    for step in range(steps):
        optimizer.zero_grad()
        (module(*latents) * direction[step]).sum().backward()
        optimizer.step()
    weight = module(*latents).detach()
    assert weight.isfinite().all()
    assert module.contains(weight), module.distance(weight)


@parametrized(CASES, 1)
def test_the_constraint_holds_after_training(case: Case) -> None:
    _train(case, 300)


@pytest.mark.exhaustive
@parametrized(CASES, len(CASES))
def test_the_constraint_holds_after_thousands_of_steps(case: Case) -> None:
    _train(case, 5000)
