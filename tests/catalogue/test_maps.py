"""What every parametrization of the catalogue promises, over one table of cases."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from catalogue.cases import CASES, Case, parametrized
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxparam.catalogue._image import rounding
from fxparam.errors import ImageError

every = parametrized(CASES)
EPS = torch.finfo(torch.float64).eps
HALF = (torch.float16, torch.bfloat16)


def as_tuple(latents: Any) -> tuple[Tensor, ...]:
    return latents if isinstance(latents, tuple) else (latents,)


def gradients(value: Tensor, latents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random functional of a weight."""
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(value.dtype)
    return torch.autograd.grad((value * direction).sum(), latents, allow_unused=True, materialize_grads=True)


def close(got: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Equal up to a few hundred roundings of the largest element."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(got, expected, rtol=0, atol=200 * factor * EPS * scale)


@every
def test_value_and_gradient_equal_the_oracle(case: Case) -> None:
    module, latents = case.build(), case.draw()
    value, expected = module(*latents), case.oracle(module, *latents)
    assert value.shape == case.shape
    close(value, expected)
    for got, wanted in zip(gradients(value, latents), gradients(expected, latents), strict=True):
        close(got, wanted)


@parametrized(case for case in CASES if not case.gradient)
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    module = case.build()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert torch.autograd.gradcheck(module, case.draw(seed=2))


@parametrized(case for case in CASES if not case.gradient and not case.second)
def test_second_derivatives_are_those_of_finite_differences(case: Case) -> None:
    module = case.build()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    latents = case.draw(seed=2)
    if any(grad.requires_grad for grad in torch.autograd.grad(module(*latents).square().sum(), latents, create_graph=True)):
        assert torch.autograd.gradgradcheck(module, latents)


@every
def test_right_inverse_gives_back_what_forward_makes(case: Case) -> None:
    module = case.build()
    weight = module(*case.draw(seed=3)).detach()
    if not case.invertible:
        with pytest.raises(ImageError, match="no known closed-form inverse"):
            module.right_inverse(weight)
        return
    latents = as_tuple(module.right_inverse(weight))
    again = module(*latents)
    if case.exact:
        assert torch.equal(again, weight)
    else:
        close(again, weight)
    expected = case.latents or (case.shape,)
    assert tuple(tuple(latent.shape) for latent in latents) == expected
    assert not any(latent.requires_grad for latent in latents)


@every
def test_latents_share_no_memory_with_the_weight(case: Case) -> None:
    module = case.build()
    weight = module(*case.draw(seed=3)).detach().clone()
    if not case.invertible:
        return
    latents = as_tuple(module.right_inverse(weight))
    before = module(*latents).clone()
    weight.fill_(17)
    assert torch.equal(module(*latents), before)


@every
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_constraint_holds_for_any_latents(case: Case, scale: float) -> None:
    module = case.build()
    weight = module(*case.draw(seed=4, scale=scale)).detach()
    assert weight.isfinite().all()
    assert module.contains(weight, case.growth * 100 * EPS if scale > 1 and case.growth > 1 else None)


@every
def test_projection_lands_in_the_image_and_leaves_the_image_alone(case: Case) -> None:
    module, weight = case.build(), case.weight(seed=7)
    projected = module.project(weight)
    assert module.contains(projected)
    assert projected.shape == weight.shape and projected.dtype == weight.dtype
    inside = module(*case.draw(seed=5)).detach()
    if case.kept:
        assert torch.equal(module.project(inside), inside)
    else:
        close(module.project(inside), inside)
    if case.invertible:
        close(module(*as_tuple(module.right_inverse(projected))), projected)


@every
def test_samples_are_in_the_image_and_seeded(case: Case) -> None:
    module = case.build()
    first, same = (module.sample(generator=torch.Generator().manual_seed(11)) for _ in range(2))
    other = module.sample(generator=torch.Generator().manual_seed(12))
    assert torch.equal(first, same)
    assert first.shape == case.shape and first.dtype == torch.float64
    assert module.contains(first) and module.contains(module.sample())
    # One by one, -1 and 1 are all there is.
    assert not torch.equal(first, other) or case.shape == (1, 1)


@every
def test_weights_outside_the_image_are_refused(case: Case) -> None:
    module = case.build()
    inside = module(*case.draw(seed=6)).detach()
    if case.outside is None:
        return
    weight = case.outside(inside)
    assert not module.contains(weight)
    with pytest.raises(ImageError) as caught:
        module.right_inverse(weight)
    text = str(caught.value)
    assert text.startswith(f"{type(module).__name__}: ")
    assert "is not in the image" in text or "are not in the image" in text
    assert "tolerance" in text
    assert "type model.assign(name, weight, project=True)" in text
    assert not module.contains(weight, tol=1e-12)
    assert module.contains(weight, tol=1e6)


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(case: Case, value: float) -> None:
    module = case.build()
    weight = module(*case.draw(seed=6)).detach().clone()
    weight[(0,) * weight.ndim] = value
    assert not module.contains(weight)
    for refuse in (module.right_inverse, module.project):
        with pytest.raises(ImageError, match=rf"^{type(module).__name__}: 1 .*elements of the weights? are NaN or infinite"):
            refuse(weight)


@every
def test_weights_of_another_shape_are_refused(case: Case) -> None:
    module, weight = case.build(), torch.zeros(*case.shape, 2, dtype=torch.float64)
    assert not module.contains(weight)
    with pytest.raises(ImageError, match=r"got .*2.*; expected "):
        module.right_inverse(weight)


@every
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_separate(case: Case, copied: Any) -> None:
    module, latents = case.build(), case.draw()
    expected = module(*latents)
    twin = copied(module)
    assert torch.equal(twin(*latents), expected)
    for tensor in (*twin.buffers(), *twin.parameters()):
        tensor.data.fill_(0)
    assert torch.equal(module(*latents), expected)


@every
def test_trace_equals_eager_in_value_and_gradient(case: Case) -> None:
    module, latents = case.build(), case.draw()
    graph = make_fx(module, pre_dispatch=True)(*latents)
    operations = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert min(1, case.nodes) <= len(operations) <= case.nodes, graph.code
    other = case.draw(seed=8)
    value, expected = graph(*other), module(*other)
    assert torch.equal(value, expected)
    for got, wanted in zip(gradients(value, other), gradients(expected, other), strict=True):
        assert torch.equal(got, wanted)


@every
def test_modules_follow_a_change_of_dtype(case: Case) -> None:
    module = case.build(torch.float32).double()
    value = module(*case.draw())
    assert value.dtype == torch.float64
    assert module.sample().dtype == torch.float64
    inside = module.project(case.weight(seed=3))
    if case.invertible:
        close(module(*as_tuple(module.right_inverse(inside))), inside)


@every
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_lower_precision(case: Case, dtype: torch.dtype) -> None:
    module = case.build(dtype)
    inside = module.project(case.weight(dtype, seed=3))
    assert inside.dtype == dtype
    assert module.contains(inside)
    sample = module.sample()
    assert sample.dtype == dtype and module.contains(sample)
    if not case.invertible:
        return
    latents = as_tuple(module.right_inverse(inside))
    assert {latent.dtype for latent in latents} == {dtype}
    again = module(*latents)
    assert again.dtype == dtype
    # A latent is rounded too, and the map may stretch that by a few; 8 is far below what a wrong map would miss by.
    atol = 8 * rounding(dtype, 8) * max(1.0, float(inside.abs().max()))
    torch.testing.assert_close(again, inside, rtol=0, atol=atol)
    fresh = tuple(latent.clone().requires_grad_() for latent in latents)
    assert all(grad.isfinite().all() for grad in gradients(module(*fresh), fresh))
