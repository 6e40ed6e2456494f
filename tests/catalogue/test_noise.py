"""Random entries in training mode, against the same arithmetic with the same random numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxparam as fxp
from fxparam import catalogue as cat
from fxparam.declaration import Entry
from fxparam.errors import ImageError

SHAPES = pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 1, 3, 4)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def leaves(shape: tuple[int, ...], number: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(number))
    return [tensor.requires_grad_() for tensor in drawn]


def eps_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What a map draws after ``manual_seed(7)``."""
    torch.manual_seed(7)
    return torch.randn(shape, dtype=dtype if dtype == torch.float64 else torch.float32)


def seeded(module: Any, *latents: Tensor) -> Tensor:
    torch.manual_seed(7)
    return module(*latents)


@SHAPES
@DTYPES
@pytest.mark.parametrize("relative", [False, True])
def test_noise(shape: tuple[int, ...], dtype: torch.dtype, relative: bool) -> None:
    (latent,) = leaves(shape, 1, dtype)
    module = cat.Noise(std=0.25, relative=relative).build(latent.detach())
    weight, eps = seeded(module, latent), eps_of(shape, dtype)
    wide = latent.detach().to(eps.dtype).requires_grad_()
    expected = wide * (1 + 0.25 * eps) if relative else wide + 0.25 * eps
    assert weight.dtype == dtype and weight.shape == shape
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(weight, expected.to(dtype), rtol=tolerance, atol=tolerance)
    (got,) = torch.autograd.grad(weight.sum(), latent)
    (wanted,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(got, wanted.to(dtype), rtol=tolerance, atol=tolerance)


@SHAPES
@DTYPES
def test_variational(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mean, rho = leaves(shape, 2, dtype)
    module = cat.Variational().build(mean.detach())
    weight, eps = seeded(module, mean, rho), eps_of(shape, dtype)
    wide = [tensor.detach().to(eps.dtype).requires_grad_() for tensor in (mean, rho)]
    expected = wide[0] + torch.log1p(torch.exp(wide[1])) * eps
    assert weight.dtype == dtype and weight.shape == shape
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(weight, expected.to(dtype), rtol=tolerance, atol=tolerance)
    for got, wanted in zip(
        torch.autograd.grad(weight.sum(), (mean, rho)), torch.autograd.grad(expected.sum(), wide), strict=True
    ):
        torch.testing.assert_close(got, wanted.to(dtype), rtol=tolerance, atol=tolerance)


def test_the_spread_is_what_was_asked_for() -> None:
    zeros = torch.zeros(200, 500, dtype=torch.float64)
    torch.manual_seed(0)
    noise = cat.Noise(std=0.3).build(zeros)(zeros)
    ten = cat.Noise(std=0.3, relative=True).build(zeros)(zeros + 10)
    module: Any = cat.Variational(init_std=0.02).build(zeros)
    drawn = module(*module.right_inverse(zeros + 1))
    # The standard error of a standard deviation of n normal numbers is std / sqrt(2 n).
    for values, mean, std in ((noise, 0.0, 0.3), (ten, 10.0, 3.0), (drawn, 1.0, 0.02)):
        assert abs(float(values.std()) - std) < 5 * std / math.sqrt(2 * values.numel())
        assert abs(float(values.mean()) - mean) < 5 * std / math.sqrt(values.numel())


@pytest.mark.parametrize("std", [1e-12, 0.05, 1.0, 30.0, 1e4])
def test_the_start_has_the_spread_asked_for(std: float) -> None:
    module: Any = cat.Variational(init_std=std).build(torch.zeros(3, dtype=torch.float64))
    mean, rho = module.right_inverse(torch.ones(3, dtype=torch.float64))
    assert torch.equal(mean, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(torch.nn.functional.softplus(rho), torch.full_like(rho, std), rtol=1e-7, atol=0)


@pytest.mark.parametrize("entry", [cat.Noise(std=0.5), cat.Variational()], ids=str)
def test_nothing_is_drawn_in_eval_mode_nor_by_the_right_inverse(entry: Entry) -> None:
    weight = torch.randn(4, 3)
    module: Any = entry.build(weight)
    state = torch.get_rng_state()
    latents = module.right_inverse(weight)
    latents = latents if isinstance(latents, tuple) else (latents,)
    assert module.contains(weight) and torch.equal(module.project(weight), weight)
    module.eval()
    assert torch.equal(module(*latents), weight)
    assert torch.equal(torch.get_rng_state(), state)
    module.train()
    assert not torch.equal(module(*latents), weight)
    with pytest.raises(ImageError, match="NaN or infinite"):
        module.right_inverse(weight * math.nan)


def test_samples_are_standard_normal() -> None:
    module = cat.Variational(init_std=0.01).build(torch.zeros(300, 300))
    sample = module.sample(generator=torch.Generator().manual_seed(0))
    assert abs(float(sample.std()) - 1) < 5 / math.sqrt(2 * sample.numel())
    assert torch.equal(sample, torch.randn(300, 300, generator=torch.Generator().manual_seed(0)))


def test_the_declaration_is_an_attribute_of_the_map() -> None:
    weight = torch.zeros(3)
    built: list[Any] = [e.build(weight) for e in (cat.Noise(), cat.Noise(resample="step"), cat.Variational())]
    assert [module.resample for module in built] == ["call", "step", "step"]
    assert repr(built[1]) == "NoiseMap(std=0.01, relative=False, resample='step')"
    assert repr(built[2]) == "VariationalMap(init_std=0.05, resample='step')"


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_files(tmp_path: Path, ending: str) -> None:
    spec = fxp.Spec(
        {
            "a.weight": fxp.noise(),
            "b.weight": fxp.variational(init_std=0.1, resample="call"),
            "c.weight": fxp.weight_norm() >> fxp.noise(std=0.5, relative=True, resample="step"),
        }
    )
    path = tmp_path / f"spec.{ending}"
    spec.save(path)
    again = fxp.Spec.load(path)
    assert again == spec and again.to_dict() == spec.to_dict()
