"""LoRA and DoRA against peft's layers: the same tensors give the same weight and the same gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam as fxp
from fxparam import catalogue as cat
from fxparam.errors import ImageError, SpecError

OPTIONS = pytest.mark.parametrize(("rank", "alpha", "rslora"), [(2, 3, False), (1, 4, True), (3, None, False), (3, 0.5, True)])


def peft_layer(weight: Tensor, **options: Any) -> Any:
    """A linear layer of ``weight`` with one adapter of peft, all of its dtype."""
    peft = pytest.importorskip("peft")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.clone())
    model = peft.get_peft_model(nn.Sequential(linear), peft.LoraConfig(target_modules=["0"], **options))
    return model.base_model.model[0].to(weight.dtype)


def randomized(layer: Any) -> tuple[Tensor, ...]:
    """Random values for the factors of a layer and, if there is one, around its magnitude; returned as leaves."""
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.no_grad():
        for factor in factors:
            factor.normal_()
    magnitude = layer.lora_magnitude_vector
    if "default" in magnitude:
        with torch.no_grad():
            magnitude["default"].weight.mul_(torch.rand_like(magnitude["default"].weight) + 0.5)
        factors.append(magnitude["default"].weight)
    return tuple(factors)


def merged(layer: Any) -> Tensor:
    """The weight that peft merges."""
    layer.merge()
    weight = layer.base_layer.weight.detach().clone()
    layer.unmerge()
    return weight


@OPTIONS
@pytest.mark.parametrize("dora", [False, True])
def test_weight_and_gradients_are_those_of_peft(rank: int, alpha: float | None, rslora: bool, dora: bool) -> None:
    weight = torch.randn(4, 6, dtype=torch.float64)
    layer = peft_layer(weight, r=rank, lora_alpha=rank if alpha is None else alpha, use_rslora=rslora, use_dora=dora)
    theirs = randomized(layer)
    ours = tuple(tensor.detach().clone().requires_grad_() for tensor in theirs)
    mine = (ours[0], ours[1], ours[2].unsqueeze(1).detach().requires_grad_()) if dora else ours
    module = (cat.Dora if dora else cat.Lora)(rank, alpha=alpha, rslora=rslora).build(weight)
    assert torch.equal(module.base, weight)
    torch.testing.assert_close(module(*mine), merged(layer), rtol=1e-12, atol=1e-12)
    inputs, direction = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    got, expected = inputs @ module(*mine).T, layer(inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    mine_grads = torch.autograd.grad((got * direction).sum(), mine)
    their_grads = torch.autograd.grad((expected * direction).sum(), theirs)
    for one, other in zip(mine_grads, their_grads, strict=True):
        torch.testing.assert_close(one.view_as(other), other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dora", [False, True])
def test_the_start_is_that_of_peft(dora: bool) -> None:
    weight = torch.randn(40, 50)
    layer = peft_layer(weight, r=8, lora_alpha=8, use_dora=dora)
    module: Any = (cat.Dora if dora else cat.Lora)(8).build(weight)
    latents = module.right_inverse(weight)
    assert torch.equal(latents[1], layer.lora_B["default"].weight) and not latents[1].any()
    bound = 1 / math.sqrt(50)
    for a in (latents[0], layer.lora_A["default"].weight):
        assert bound * 0.98 < a.abs().max() <= bound
        assert abs(float(a.detach().std()) - bound / math.sqrt(3)) < 0.1 * bound
    if dora:
        torch.testing.assert_close(latents[2].flatten(), layer.lora_magnitude_vector["default"].weight)
    assert torch.equal(module(*latents), weight)


@pytest.mark.parametrize("entry", [cat.Lora(2), cat.Dora(2)], ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4, 5)], ids=str)
def test_the_start_is_exact_and_trains(entry: Any, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    weight[..., 0, :] = 0
    module = entry.build(weight)
    latents = tuple(latent.requires_grad_() for latent in module.start(weight))
    value = module(*latents)
    assert torch.equal(value, weight)
    grads = torch.autograd.grad((value * torch.randn(shape)).sum(), latents)
    assert not grads[0].any()  # as in peft: B is zero
    trained = grads[1] if isinstance(entry, cat.Lora) else grads[2]
    assert (trained != 0).all()


def test_the_norm_is_a_constant_only_if_detached() -> None:
    weight = torch.randn(4, 5, dtype=torch.float64)
    latents = tuple(t.requires_grad_() for t in cat.Dora(2).build(weight).right_inverse(weight))
    # Along its own direction a row can only change its norm: the exact gradient has no such part.
    exact, detached = (cat.Dora(2, detach_norm=flag).build(weight) for flag in (False, True))
    direction = weight / torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    gradient = torch.autograd.grad((exact(*latents) * direction).sum(), latents[1])[0]
    assert gradient.abs().max() < 1e-14
    gradient = torch.autograd.grad((detached(*latents) * direction).sum(), latents[1])[0]
    torch.testing.assert_close(gradient, direction @ latents[0].detach().T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entry", [cat.Lora(2), cat.Dora(2)], ids=str)
def test_a_half_precision_start_takes_wide_factors(entry: Any, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 5).to(dtype)
    module = entry.build(weight)
    latents = tuple(latent.float() for latent in module.right_inverse(weight))
    latents[1].normal_()
    value = module(*latents)
    assert value.dtype == dtype
    wide = entry.build(weight.float())
    torch.testing.assert_close(value, wide(*latents).to(dtype))


def test_an_update_of_higher_rank_is_refused_and_truncated() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64)
    module: Any = cat.Lora(2, alpha=3).build(weight)
    u, v = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    with pytest.raises(ImageError, match=r"^LoraMap: .*the rank of W - W0 is missed by .*type model.assign"):
        module.right_inverse(weight + u @ v)
    best = module.project(weight + u @ v)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(best - weight - u @ v, 2), torch.linalg.svdvals(u @ v)[2], rtol=1e-10, atol=0
    )
    low = weight + u[:, :1] @ v[:1]
    a, b = module.right_inverse(low)
    torch.testing.assert_close(module(a, b), low)
    # The update has rank 1: the second column of B starts at zero, and its row of A is drawn.
    assert b[:, 0].any() and not b[:, 1].any() and a[1].abs().min() > 0
    assert a[1].abs().max() <= 1 / math.sqrt(5)


def test_dora_moves_its_start() -> None:
    module: Any = cat.Dora(1).build(torch.randn(4, 5))
    weight = torch.randn(4, 5)
    latents = module.right_inverse(weight)
    assert torch.equal(module.base, weight) and torch.equal(module(*latents), weight)
    assert module.contains(weight)


def test_dora_of_rows_of_any_size() -> None:
    weight = torch.tensor([[3.0, 4.0], [3e-30, 4e-30], [3e30, 4e30], [0.0, 0.0]])
    module: Any = cat.Dora(1).build(weight)
    latents = module.right_inverse(weight)
    torch.testing.assert_close(latents[2].flatten(), torch.tensor([5.0, 5e-30, 5e30, 0.0]), rtol=1e-6, atol=0)
    assert torch.equal(module(*latents), weight)


def test_options_that_do_not_fit() -> None:
    loose: Any = cat  # for options of the wrong type
    for make, text in [
        (lambda: loose.Lora(0), r"lora: got rank=0; expected an integer of at least 1"),
        (lambda: loose.Lora(1, alpha=0), r"lora: got alpha=0; expected a number above 0"),
        (lambda: loose.Lora(1, alpha="1"), r"lora: got alpha='1'; expected a finite number"),
        (lambda: loose.Lora(1, rslora=1), r"lora: got rslora=1; expected True or False"),
        (lambda: loose.Dora(1, detach_norm=None), r"dora: got detach_norm=None; expected True or False"),
        (lambda: loose.Dora(1, alpha=-1), r"dora: got alpha=-1; expected a number above 0"),
        (
            lambda: loose.Lora(4).build(torch.ones(4, 3)),
            r"lora: got rank=4 for a weight of shape \(4, 3\); expected 1 <= rank <= 3",
        ),
        (lambda: loose.Dora(1).build(torch.ones(3)), r"dora: got a weight of shape \(3,\); expected a matrix"),
        (lambda: loose.Lora(1).build(torch.ones(3, 3).int()), r"lora: got a weight of dtype torch.int32"),
    ]:
        with pytest.raises(SpecError, match=text):
            make()


def test_repr() -> None:
    assert repr(cat.Lora(2, 3, rslora=True).build(torch.ones(3, 3))) == "LoraMap(rank=2, scaling=2.12132)"
    assert repr(cat.Dora(2).build(torch.ones(3, 3))) == "DoraMap(rank=2, scaling=1, detach_norm=True)"


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_files(tmp_path: Path, ending: str) -> None:
    spec = fxp.Spec({"a": fxp.lora(2, alpha=3.5), "b": fxp.dora(1, rslora=True, detach_norm=False)})
    path = tmp_path / f"spec.{ending}"
    spec.save(path)
    assert fxp.Spec.load(path) == spec


def test_fold_merges_the_adapter() -> None:
    net, inputs = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 6)
    model = fxp.transform(net, fxp.Spec({"0.weight": fxp.lora(2), "2.weight": fxp.dora(1)}))
    assert torch.equal(model(inputs), net(inputs))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    site: Any = model.get_submodule("0.parametrizations.weight")
    assert torch.equal(site[0].base, net.get_parameter("0.weight"))
    plain = fxp.fold(model, example_inputs=(inputs,))
    expected = site[0].base + site.original1 @ site.original0
    torch.testing.assert_close(dict(plain.named_parameters())["0.weight"].detach(), expected.detach())
    torch.testing.assert_close(plain(inputs), model.eval()(inputs))


@pytest.mark.parametrize("entry", [fxp.lora(2), fxp.dora(2), fxp.lora(2) >> fxp.mask(density=0.9)], ids=str)
def test_adapters_train_on_a_frozen_model(entry: Any) -> None:
    net = nn.Linear(5, 4).requires_grad_(False)
    model = fxp.transform(net, {"weight": entry})
    assert {name for name, one in model.named_parameters() if one.requires_grad} == set(model.latents())
    assert not fxp.transform(net, {"weight": fxp.low_rank(2)}).latents()["parametrizations.weight.original0"].requires_grad
    model(torch.randn(3, 5)).sum().backward()
    gradient = model.latents()["parametrizations.weight.original1"].grad
    assert gradient is not None and gradient.any()
