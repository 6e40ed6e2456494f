"""Masks of slices and of N:M patterns, against torch.nn.utils.prune and plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fxparam as fxp
from fxparam import catalogue as cat
from fxparam.errors import SpecError


def layer(weight: Tensor) -> Any:
    """A module with a weight and nothing else."""
    module = nn.Module()
    module.weight = nn.Parameter(weight.clone())
    return module


def pruned(weight: Tensor, method: Callable[..., Any], **options: Any) -> Tensor:
    """The mask of torch."""
    module = layer(weight)
    method(module, "weight", **options)
    return module.weight_mask


@pytest.mark.parametrize("density", [0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(4, 12), (4, 6, 5), (8, 4, 3, 3)], ids=str)
def test_single_elements_as_torch_prunes_them(shape: tuple[int, ...], density: float) -> None:
    weight = torch.randn(shape)
    # torch rounds the number to prune, the catalogue the number to keep: the same where neither is at a half.
    assert (density * weight.numel()) % 1 != 0.5
    expected = pruned(weight, prune.l1_unstructured, amount=1 - density)
    assert torch.equal(cat.Mask(density=density).build(weight).mask, expected)


@pytest.mark.parametrize("p", [1, 2, 3, 0.5, math.inf])
@pytest.mark.parametrize(("shape", "dim"), [((10, 7), 0), ((7, 10), 1), ((3, 10, 2), -2), ((4, 3, 10), -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_slices_as_torch_prunes_them(shape: tuple[int, ...], dim: int, p: float, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    mask = cat.Mask(density=0.3, dim=dim, p=p).build(weight).mask
    assert mask.dtype == dtype and mask.shape == shape
    # In the precision that the catalogue compares norms in.
    expected = pruned(weight.double(), prune.ln_structured, amount=0.7, n=p, dim=dim)
    assert torch.equal(mask.double(), expected)
    assert int(mask.movedim(dim, 0).flatten(1).any(1).sum()) == 3


def test_random_patterns_keep_each_element_and_each_slice_equally_often() -> None:
    weight, times = torch.ones(5, 4), 400
    kept = torch.stack([cat.Mask(density=0.5, by="random", seed=s).build(weight).mask for s in range(times)])
    rows = torch.stack([cat.Mask(density=0.4, by="random", seed=s, dim=0).build(weight).mask for s in range(times)])
    assert (kept.sum((1, 2)) == 10).all() and (rows.sum((1, 2)) == 8).all()
    assert (rows.amin(2) == rows.amax(2)).all()
    for masks, density in ((kept, 0.5), (rows, 0.4)):
        assert (masks.mean(0) - density).abs().max() < 5 * math.sqrt(density * (1 - density) / times)
    theirs = pruned(weight, prune.random_structured, amount=0.6, dim=0)
    assert theirs.sum() == rows[0].sum()


def test_at_least_one_slice_is_kept_and_ties_keep_the_first() -> None:
    weight = torch.ones(4, 3)
    weight[3] = 2
    assert cat.Mask(density=0.01, dim=0).build(weight).mask.tolist() == [[0] * 3] * 3 + [[1] * 3]
    assert cat.Mask(density=0.5, dim=0).build(weight).mask[:, 0].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_of_slices_neither_overflow_nor_underflow(size: float) -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 4.5], [5.2, 0.0], [1.0, 1.0]]) * size
    assert cat.Mask(density=0.5, dim=0).build(weight).mask[:, 0].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(("shape", "dim"), [((3, 8), 1), ((8, 3), 0), ((2, 12, 3), -2), ((4, 8, 3, 3), 1)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 4), (1, 4)])
def test_semi_structured_keeps_the_largest_of_each_group(n: int, m: int, shape: tuple[int, ...], dim: int) -> None:
    weight = torch.randn(shape)
    mask = cat.SemiStructured(n, m, dim).build(weight).mask
    assert mask.shape == shape and mask.is_contiguous()
    for row, kept in zip(weight.movedim(dim, -1).reshape(-1, m), mask.movedim(dim, -1).reshape(-1, m), strict=True):
        assert sorted(kept.nonzero().flatten().tolist()) == sorted(row.abs().topk(n).indices.tolist())


def test_semi_structured_ties_keep_the_first() -> None:
    assert cat.SemiStructured().build(torch.zeros(1, 8)).mask.tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    weight = torch.tensor([[1.0, -2.0, 2.0, 1.0]])
    assert cat.SemiStructured(3).build(weight).mask.tolist() == [[1, 1, 1, 0]]


def test_options_and_weights_that_do_not_fit() -> None:
    loose: Any = cat  # for options of the wrong type
    for make, text in [
        (lambda: loose.Mask(density=0.5, dim=1.0), r"mask: got dim=1.0; expected an integer"),
        (lambda: loose.Mask(density=0.5, dim=0, p=0), r"mask: got p=0; expected a number above 0, or inf"),
        (lambda: loose.Mask(density=0.5, dim=0, p=math.nan), r"mask: got p=nan; expected a finite number"),
        (lambda: loose.Mask(density=0.5, p=1), r"mask: got p=1 without dim; single elements are compared by their absolute"),
        (lambda: loose.Mask(keep=[1, 0], dim=0), r"mask: got dim=0 beside keep; type a pattern that broadcasts"),
        (lambda: loose.SemiStructured(0), r"semi_structured: got n=0; expected an integer of at least 1"),
        (lambda: loose.SemiStructured(m=2.0), r"semi_structured: got m=2.0; expected an integer of at least 1"),
        (lambda: loose.SemiStructured(5), r"semi_structured: got n=5, m=4; expected n <= m"),
        (lambda: loose.SemiStructured(dim=1.5), r"semi_structured: got dim=1.5; expected an integer"),
        (lambda: loose.Mask(density=0.5, dim=2).build(torch.ones(4, 3)), r"mask: got dim=2 for a weight of shape \(4, 3\)"),
        (lambda: loose.Mask(density=0.5, dim=0).build(torch.ones(4, 3) * math.nan), r'mask: magnitudes.*use by="random"'),
        (
            lambda: loose.Mask(density=0.5).build(torch.ones(3).int()),
            r"mask: got a weight of dtype torch.int32; expected a float",
        ),
        (lambda: loose.SemiStructured().build(torch.ones(4)), r"semi_structured: got dim=1 for a weight of shape \(4,\)"),
        (
            lambda: loose.SemiStructured().build(torch.ones(4, 6)),
            r"semi_structured: got dim=1 of size 6 for a weight of shape \(4, 6\); expected a multiple of m=4",
        ),
        (lambda: loose.SemiStructured().build(torch.ones(4, 4) / 0), r"semi_structured: magnitudes of a weight that holds NaN"),
    ]:
        with pytest.raises(SpecError, match=text):
            make()


def test_entries_are_compared_by_all_their_options() -> None:
    entries = [cat.Mask(0.5), cat.Mask(0.5, dim=0), cat.Mask(0.5, dim=1), cat.Mask(0.5, dim=0, p=1)]
    assert len(set(entries)) == len(entries)
    assert repr(entries[3]) == "mask(density=0.5, dim=0, p=1)"
    assert cat.Mask(0.5, "random", 3) == cat.Mask(density=0.5, by="random", seed=3)


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_files(tmp_path: Path, ending: str) -> None:
    spec = fxp.Spec({"a": fxp.mask(density=0.5, dim=0, p=math.inf), "b": fxp.mask(0.3) >> fxp.semi_structured(1, 4, 0)})
    path = tmp_path / f"spec.{ending}"
    spec.save(path)
    assert fxp.Spec.load(path) == spec


def _chained() -> tuple[nn.Module, fxp.ParametrizedModule, Tensor]:
    net, inputs = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(3, 8)
    spec = fxp.Spec({"0.weight": fxp.mask(density=0.3) >> fxp.semi_structured()})
    return net, fxp.transform(net, spec, example_inputs=(inputs,)), inputs


def test_a_mask_before_semi_structured_keeps_what_both_keep() -> None:
    """The mask is chosen among what the second pattern leaves of the start."""
    net, model, inputs = _chained()
    start = net.get_parameter("0.weight").detach()
    pattern = cat.SemiStructured().build(start).mask
    largest = (start * pattern).abs().flatten().topk(round(0.3 * start.numel())).indices
    expected = torch.zeros_like(start).flatten().index_fill(0, largest, 1).view_as(start) * start
    site: Any = model.get_submodule("0.parametrizations.weight")
    assert torch.equal(site(), expected)
    with torch.no_grad():
        site.original.normal_()
    weight = dict(fxp.fold(model, example_inputs=(inputs,)).named_parameters())["0.weight"]
    assert torch.equal(weight != 0, expected != 0)
