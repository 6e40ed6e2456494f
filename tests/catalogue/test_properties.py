"""Any entry, any size of latents: the weight is in the image, and what the right inverse finds gives it back."""

from __future__ import annotations

from typing import Any

import torch
from catalogue.cases import CASES, Case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxparam.catalogue._image import rounding
from fxparam.errors import ImageError

LIMITS = {
    "orthogonal": "eigenvalue near -1",
    "special_orthogonal": "eigenvalue near -1",
    "fixed_rank": "its rank is below",
    "positive": "elements that are 0",
    "positive_definite": "no Cholesky factor",
    "bounded": "on or beyond the bounds",
    "monotone": "",
    "simplex": "",
}
"""Entries whose outputs may round to a limit of the image, which no latent gives, and what the refusal then says."""


def again(case: Case, module: Any, weight: Tensor) -> Tensor | None:
    """The weight by way of the right inverse; None where that refuses a limit."""
    try:
        latents = module.right_inverse(weight)
    except ImageError as error:
        assert LIMITS.get(case.entry.name, "never") in str(error)
        return None
    return module(*latents) if isinstance(latents, tuple) else module(latents)


@given(
    case=st.sampled_from(CASES),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-6, 1.5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_image_and_round_trip(case: Case, seed: int, exponent: float, dtype: torch.dtype) -> None:
    module = case.build(dtype, seed=seed % 1000)
    # Factors whose exponentials differ by more than the precision make singular matrices, as documented.
    scale = 10 ** min(exponent, 0.0 if case.growth > 1e6 else exponent)
    latents = case.draw(seed=seed, scale=scale, dtype=dtype)
    weight = module(*latents).detach()
    assert weight.isfinite().all()
    # Where rounding grows with the latents, as documented, it may grow by as much as they do.
    size = max(float(latent.detach().norm()) for latent in latents)
    tol = module.tolerance(weight) * (1 + size) if case.growth > 1 else None
    assert module.contains(weight, tol)
    gradients = torch.autograd.grad(module(*latents).sum(), latents, allow_unused=True, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if not case.invertible or not module.contains(weight):
        return
    found = again(case, module, weight)
    if found is None:
        return
    # Latents are rounded, and a map may stretch that by as much as it stretches the latents.
    largest = max(float(weight.abs().max()), torch.finfo(dtype).tiny)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e3 * rounding(dtype, 8) * largest)


@given(case=st.sampled_from(CASES), seed=st.integers(0, 2**32 - 1), exponent=st.floats(-3, 3))
def test_projection_and_samples(case: Case, seed: int, exponent: float) -> None:
    module = case.build(seed=seed % 1000)
    given_weight = case.weight(seed=seed) * 10**exponent
    projected = module.project(given_weight)
    assert module.contains(projected)
    assert module.contains(module.project(projected))
    assert module.contains(module.sample(generator=torch.Generator().manual_seed(seed % 2**63)))
    found = again(case, module, projected) if case.invertible else None
    if found is not None:
        scale = float(projected.abs().max()) or 1.0
        torch.testing.assert_close(found, projected, rtol=0, atol=1e-9 * scale)
