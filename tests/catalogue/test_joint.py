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

from fxparam.catalogue import Flat, Hypernetwork, JointEntry, Subspace
from fxparam.errors import ImageError, SpecError

SHAPES = [(4, 3), (5,), (), (2, 2, 2)]
SUBSPACES = [Subspace(4, seed=2), Subspace(4, "sparse"), Subspace(4, "fastfood")]
BOTH = pytest.mark.parametrize("entry", [*SUBSPACES, Flat(), Hypernetwork(dim=3, hidden=(4,))], ids=str)


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


@pytest.mark.parametrize("entry", SUBSPACES, ids=str)
def test_subspace_is_an_affine_map_with_one_matrix(entry: Subspace) -> None:
    given = weights()
    module = entry.build_joint(given)
    basis = module.projection.matrix()
    assert basis.shape == (26, 4) and module.origin.shape == (26,)
    assert torch.equal(module.origin, flat(given))
    latent = torch.randn(4, dtype=torch.float64, requires_grad=True)
    made = module(latent)
    torch.testing.assert_close(flat(made), flat(given) + (basis * latent).sum(1))
    directions = weights()
    loss = sum((weight * direction).sum() for weight, direction in zip(made, directions, strict=True))
    (gradient,) = torch.autograd.grad(loss, latent)
    torch.testing.assert_close(gradient, (basis * flat(directions)[:, None]).sum(0))
    torch.testing.assert_close(module.right_inverse(made), latent.detach())


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
    module: Any = entry.build_joint(given).requires_grad_(False)
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


@pytest.mark.parametrize("entry", SUBSPACES, ids=str)
def test_the_subspace_refuses_and_projects(entry: Subspace) -> None:
    given, other = weights(), weights()
    module: Any = entry.build_joint(given)
    assert not module.contains(other)
    text = r"^SubspaceMap: weights of 26 elements .* the subspace of 4 dimensions is missed by .*tolerance .*type model.assign"
    with pytest.raises(ImageError, match=text):
        module.right_inverse(other)
    near = module.project(other)
    assert module.contains(near)
    # The nearest: what is left over is orthogonal to the subspace.
    rest = flat(other) - flat(near)
    torch.testing.assert_close(module.projection.matrix().mT @ rest, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)


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
