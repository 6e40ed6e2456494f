"""Entries behind several weights at once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxparam.catalogue import Flat, JointEntry, Subspace
from fxparam.errors import ImageError, SpecError

SHAPES = [(4, 3), (5,), (), (2, 2, 2)]
BOTH = pytest.mark.parametrize("entry", [Subspace(4, seed=2), Flat()], ids=str)


def weights(*dtypes: torch.dtype) -> tuple[Tensor, ...]:
    """Random weights; the dtypes repeat."""
    chosen = [dtypes[j % len(dtypes)] for j in range(len(SHAPES))] if dtypes else [torch.float64] * len(SHAPES)
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape, dtype in zip(SHAPES, chosen, strict=True))


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@BOTH
def test_shapes_and_start(entry: JointEntry) -> None:
    given = weights()
    module: Any = entry.build_joint(given)
    made = module(module.right_inverse(given))
    assert isinstance(made, tuple)
    assert all(torch.equal(got, wanted) for got, wanted in zip(made, given, strict=True))


def test_subspace_is_an_affine_map_with_one_matrix() -> None:
    given = weights()
    module = Subspace(4, seed=2).build_joint(given)
    assert module.basis.shape == (26, 4) and module.origin.shape == (26,)
    torch.testing.assert_close(
        torch.linalg.vector_norm(module.basis, dim=0), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert torch.equal(module.origin, flat(given))
    latent = torch.randn(4, dtype=torch.float64, requires_grad=True)
    made = module(latent)
    torch.testing.assert_close(flat(made), flat(given) + (module.basis * latent).sum(1))
    directions = weights()
    loss = sum((weight * direction).sum() for weight, direction in zip(made, directions, strict=True))
    (gradient,) = torch.autograd.grad(loss, latent)
    torch.testing.assert_close(gradient, (module.basis * flat(directions)[:, None]).sum(0))
    torch.testing.assert_close(module.right_inverse(made), latent.detach())


def test_the_matrix_depends_on_the_seed_only() -> None:
    state = torch.get_rng_state()
    first, same, other = (Subspace(3, seed=s).build(torch.randn(4, 3, generator=torch.Generator())).basis for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(Subspace(3, seed=1).build(torch.zeros(12)).basis, first)
    assert torch.equal(torch.get_rng_state(), state)


def test_flat_is_a_concatenation() -> None:
    given = weights()
    module = Flat().build_joint(given)
    latent = module.right_inverse(given)
    assert torch.equal(latent, flat(given))
    latent.requires_grad_()
    made = module(latent)
    (gradient,) = torch.autograd.grad(made[1].sum(), latent)
    assert torch.equal(gradient, torch.cat([torch.zeros(12), torch.ones(5), torch.zeros(9)]).double())


@BOTH
def test_gradcheck_and_trace(entry: JointEntry) -> None:
    given = weights()
    module: Any = entry.build_joint(given)
    start = module.right_inverse(given)
    latent = (start + torch.randn_like(start)).requires_grad_()
    assert torch.autograd.gradcheck(module, latent)
    graph = make_fx(module, pre_dispatch=True)(latent)
    for got, wanted in zip(graph(latent), module(latent), strict=True):
        assert torch.equal(got, wanted)
        pair = [torch.autograd.grad(weight.sum(), latent, retain_graph=True)[0] for weight in (got, wanted)]
        assert torch.equal(*pair)


@BOTH
def test_mixed_dtypes_are_computed_in_the_widest_and_cast_back(entry: JointEntry) -> None:
    given = weights(torch.float32, torch.bfloat16, torch.float64)
    module: Any = entry.build_joint(given)
    latent = module.right_inverse(given)
    assert latent.dtype == torch.float64
    made = module(latent)
    assert [weight.dtype for weight in made] == [weight.dtype for weight in given]
    assert all(torch.equal(got, wanted) for got, wanted in zip(made, given, strict=True))
    moved = module(latent + torch.randn_like(latent))
    assert module.contains(moved)
    torch.testing.assert_close(module(module.right_inverse(moved))[0], moved[0], rtol=0.05, atol=0.05)
    assert {weight.dtype for weight in copy.deepcopy(module).double()(latent)} == {torch.float64}
    halves: Any = entry.build_joint(weights(torch.float16, torch.bfloat16))
    assert halves.sample()[0].dtype == torch.float16
    assert halves.right_inverse(halves.sample()).dtype == torch.float32


@BOTH
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies(entry: JointEntry, copied: Callable[[Any], Any]) -> None:
    given = weights(torch.float32, torch.float64)
    module: Any = entry.build_joint(given)
    latent = module.right_inverse(given) + 1
    twin = copied(module)
    assert all(torch.equal(got, wanted) for got, wanted in zip(twin(latent), module(latent), strict=True))


@BOTH
def test_samples(entry: JointEntry) -> None:
    module: Any = entry.build_joint(weights())
    first, same = (module.sample(generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(got, wanted) for got, wanted in zip(first, same, strict=True))
    assert [tuple(weight.shape) for weight in first] == SHAPES
    assert module.contains(first)


def test_the_subspace_refuses_and_projects() -> None:
    given, other = weights(), weights()
    module: Any = Subspace(4).build_joint(given)
    assert not module.contains(other)
    text = r"^SubspaceMap: weights of 26 elements .* the subspace of 4 dimensions is missed by .*tolerance .*type model.assign"
    with pytest.raises(ImageError, match=text):
        module.right_inverse(other)
    near = module.project(other)
    assert module.contains(near)
    # The nearest: what is left over is orthogonal to the subspace.
    rest = flat(other) - flat(near)
    torch.testing.assert_close(module.basis.mT @ rest, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)


@BOTH
def test_refusals(entry: JointEntry) -> None:
    given = weights()
    module: Any = entry.build_joint(given)
    with pytest.raises(ImageError, match=r"got weights of shapes \[\(5,\), .*; expected \[\(4, 3\), "):
        module.right_inverse(given[1:])
    bad = (given[0] * float("nan"), *given[1:])
    assert not module.contains(bad)
    with pytest.raises(ImageError, match="12 elements of the weights are NaN or infinite"):
        module.right_inverse(bad)
    with pytest.raises(SpecError, match=r"got no weights; expected at least one"):
        entry.build_joint(())
    with pytest.raises(SpecError, match=r"got weights on 2 devices \(cpu, meta\); expected one device"):
        entry.build_joint((given[0], given[1].to("meta")))
