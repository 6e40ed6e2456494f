"""Complex weights, for the entries that take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalogue.cases import CASES, COMPLEX_ONLY, Case, parametrized
from torch import Tensor

from fxparam.declaration import Entry
from fxparam.errors import SpecError

COMPLEX = [case for case in CASES if case.complex] + COMPLEX_ONLY
every = parametrized(COMPLEX)
DTYPE = torch.complex128


def as_tuple(latents: Any) -> tuple[Tensor, ...]:
    return latents if isinstance(latents, tuple) else (latents,)


@every
def test_value_and_gradient_equal_the_oracle(case: Case) -> None:
    module, latents = case.build(DTYPE), case.draw(dtype=DTYPE)
    value, expected = module(*latents), case.oracle(module, *latents)
    assert value.dtype == DTYPE and value.shape == case.shape
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    direction = torch.randn_like(value)
    got, wanted = (
        torch.autograd.grad((out * direction).sum().abs(), latents, allow_unused=True, materialize_grads=True)
        for out in (value, expected)
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@parametrized(case for case in COMPLEX if not case.gradient)
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    module = case.build(DTYPE)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert torch.autograd.gradcheck(module, case.draw(seed=2, dtype=DTYPE))


@every
def test_image(case: Case) -> None:
    module = case.build(DTYPE)
    weight = module(*case.draw(seed=3, dtype=DTYPE)).detach()
    assert module.contains(weight)
    projected = module.project(case.weight(DTYPE, seed=7))
    assert projected.dtype == DTYPE and module.contains(projected)
    sample = module.sample(generator=torch.Generator().manual_seed(3))
    assert sample.dtype == DTYPE and module.contains(sample) and sample.imag.any()
    if case.invertible:
        for inside in (weight, projected, sample):
            latents = as_tuple(module.right_inverse(inside))
            torch.testing.assert_close(module(*latents), inside, rtol=1e-11, atol=1e-11)


@parametrized((case for case in CASES if not case.complex), 1)
def test_other_entries_refuse_complex_weights(case: Case) -> None:
    entry: Entry = case.entry
    if entry.name in ("orthogonal", "transpose"):
        return
    with pytest.raises(SpecError, match="complex"):
        entry.build(torch.ones(case.shape, dtype=DTYPE))
