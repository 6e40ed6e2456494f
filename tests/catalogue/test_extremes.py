"""Weights stay in the image, and gradients finite, at the latents where maps break, and after thousands of steps."""

from __future__ import annotations

import pytest
import torch
from catalogue.cases import CASES, Case
from catalogue.cases.common import EXTREMES

KINDS = pytest.mark.parametrize("kind", EXTREMES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every = pytest.mark.parametrize("case", CASES, ids=str)


@every
@KINDS
@DTYPES
def test_extreme_latents(case: Case, kind: str, dtype: torch.dtype) -> None:
    """An exemption is itself tested: one that is not needed any more has to go."""
    module, latents = case.build(dtype), case.extreme(kind, dtype)
    weight = module(*latents)
    fine = bool(weight.isfinite().all()) and module.contains(weight.detach())
    if kind in case.extremes:
        return
    assert fine, (weight, module.distance(weight.detach()))
    gradients = torch.autograd.grad(weight.sum(), latents, allow_unused=True, materialize_grads=True)
    if f"{kind} gradient" not in case.extremes:
        assert all(gradient.isfinite().all() for gradient in gradients), gradients


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exemptions_are_needed(case: Case) -> None:
    for kind in case.extremes:
        name, _, gradient = kind.partition(" ")
        needed = False
        for dtype in (torch.float32, torch.float64):
            module, latents = case.build(dtype), case.extreme(name, dtype)
            weight = module(*latents)
            if gradient:
                grads = torch.autograd.grad(weight.sum(), latents, allow_unused=True, materialize_grads=True)
                needed |= not all(grad.isfinite().all() for grad in grads)
            else:
                needed |= not (weight.isfinite().all() and module.contains(weight.detach()))
        assert needed, f"{kind} works: remove the exemption"


def _one_each() -> list[Case]:
    """The first case of each entry and set of options."""
    first: dict[str, Case] = {}
    for case in CASES:
        first.setdefault(repr(case.entry), case)
    return list(first.values())


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


@pytest.mark.parametrize("case", _one_each(), ids=str)
def test_the_constraint_holds_after_training(case: Case) -> None:
    _train(case, 300)


@pytest.mark.exhaustive
@every
def test_the_constraint_holds_after_thousands_of_steps(case: Case) -> None:
    _train(case, 5000)
