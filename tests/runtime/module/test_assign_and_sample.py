"""``assign``, ``sample`` and ``retract``, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.module.common import WN, Net
from runtime.oracles import same
from torch import Tensor, nn

import fxparam as fxp


def test_assign_and_errors() -> None:
    model = fxp.transform(Net(), {"encoder.weight": fxp.weight_norm(), "decoder.weight": fxp.orthogonal()})
    value = torch.randn(4, 5)
    model.assign("encoder.weight", value)
    same(model.weights()["encoder.weight"], value)
    latents = {k: v.clone() for k, v in model.latents().items()}
    refused: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: model.assign("decoder.weight", torch.randn(5, 4)), fxp.ImageError, "is not in the image"),
        (lambda: model.assign("encoder.weihgt", value), fxp.SpecError, r"'encoder.weihgt' is not a computed weight; nearest: "),
        (lambda: model.assign("encoder.weight", value.T), ValueError, r"shape \(5, 4\) for encoder.weight, expected \(4, 5\)"),
        (lambda: model.assign("encoder.bias", value), fxp.SpecError, "'encoder.bias' is not a computed weight"),
        (lambda: model.assign("encoder.weight", value * float("nan")), fxp.ImageError, "NaN or infinite"),
        (lambda: model.freeze("x*"), fxp.SpecError, r"no computed weight fits 'x\*'"),
        (lambda: model.retract("x*"), fxp.SpecError, r"no computed weight fits 'x\*'"),
        (lambda: model.sample("encoder.weihgt"), fxp.SpecError, "is not a computed weight; nearest"),
        (lambda: setattr(model.encoder, "weight", None), fxp.SpecError, "cannot assign NoneType to the computed weight weight"),
        (lambda: fxp.transform(model, WN), fxp.SpecError, r"transformed already; .* fxp\.restore\(model\)"),
    ]
    for function, error, text in refused:
        with pytest.raises(error, match=text):
            function()
    assert all(torch.equal(v, latents[k]) for k, v in model.latents().items())
    model.assign("decoder.weight", torch.randn(5, 4), project=True)
    decoder = model.weights()["decoder.weight"]
    same(decoder.mT @ decoder, torch.eye(4))


def test_sample() -> None:
    model = fxp.transform(Net(), {"decoder.weight": fxp.orthogonal()})
    before = model.weights()["decoder.weight"].detach().clone()
    a, b = (model.sample("decoder.weight", generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and not a.requires_grad
    same(a.mT @ a, torch.eye(4))
    assert torch.equal(model.weights()["decoder.weight"], before)
    plain = fxp.transform(Net(), {"decoder.weight": torch.tanh})
    with pytest.raises(fxp.ImageError, match=r"decoder.weight .* has no distribution to sample from"):
        plain.sample("decoder.weight")


class Circle(nn.Module):
    """Pairs on the unit circle; the latent's length is free and grows under SGD."""

    def forward(self, latent: Tensor) -> Tensor:
        return latent / latent.norm(dim=-1, keepdim=True)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / weight.norm(dim=-1, keepdim=True)


def test_retract_against_drift() -> None:
    model = fxp.transform(nn.Linear(2, 6), {"weight": Circle()})
    latent = model.latents()["parametrizations.weight.original"]
    same(latent.norm(dim=1), torch.ones(6))
    optimizer = torch.optim.SGD([latent], 0.5)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 2)).pow(2).mean().backward()
        optimizer.step()
    assert (latent.norm(dim=1) > 1.001).all()
    weight = model.weights()["weight"].detach().clone()
    model.retract()
    same(latent.norm(dim=1), torch.ones(6))
    same(model.weights()["weight"], weight)
    assert latent is model.latents()["parametrizations.weight.original"]


def test_retract_without_a_right_inverse() -> None:
    model = fxp.transform(nn.Linear(2, 6), {"weight": torch.tanh})
    with pytest.raises(fxp.ImageError, match="has no right inverse"):
        model.retract()


@pytest.mark.parametrize(
    ("declared", "holds"),
    [
        (fxp.orthogonal() >> fxp.scale(3.0), lambda w: torch.allclose(w.T @ w, 9 * torch.eye(4, dtype=w.dtype))),
        (fxp.positive() >> fxp.mask(density=0.5), lambda w: bool((w >= 0).all()) and int((w == 0).sum()) == 8),
    ],
    ids=["scaled", "masked"],
)
def test_a_sample_of_a_chain_is_in_its_image(declared: Any, holds: Any) -> None:
    model = fxp.transform(nn.Linear(4, 4), {"weight": declared})
    weight = model.sample("weight", generator=torch.Generator().manual_seed(3))
    assert holds(weight)


def test_what_is_no_spec_tensor_or_transformed_model_is_refused() -> None:
    with pytest.raises(fxp.SpecError, match=r"as a spec, expected a mapping"):
        fxp.transform(nn.Linear(2, 2), [("weight", fxp.skew())])  # type: ignore[arg-type]
    with pytest.raises(fxp.SpecError, match=r"expected a model that fxp.transform returned"):
        fxp.restore(nn.Linear(2, 2))  # type: ignore[arg-type]
    model = fxp.transform(nn.Linear(2, 2), {"weight": fxp.skew()})
    with pytest.raises(fxp.SpecError, match=r"got list for weight, expected a tensor"):
        model.assign("weight", [[0, 1], [-1, 0]])  # type: ignore[arg-type]
    with pytest.raises(fxp.SpecError, match=r"no weight of this model is computed"):
        fxp.transform(nn.Linear(2, 2)).freeze()


CHAINS: dict[str, Any] = {
    "lora, rounded": fxp.lora(2) >> fxp.fake_quantize(),
    "orthogonal, masked": fxp.orthogonal() >> fxp.mask(density=0.5),
    "positive, symmetric": fxp.positive() >> fxp.symmetric(),
    "spectral norm, scaled": fxp.spectral_norm() >> fxp.scale(0.5),
    "noise on rotations": fxp.special_orthogonal() >> fxp.noise(0.1),
}


@pytest.mark.parametrize("name", CHAINS)
def test_retract_of_a_chain_asks_the_map_that_has_the_latents(name: str) -> None:
    """What the whole chain makes is not in the image of its first map."""
    torch.manual_seed(0)
    model = fxp.transform(nn.Linear(6, 6).double(), {"weight": CHAINS[name]})
    with torch.no_grad():
        for latent in model.latents().values():
            latent.add_(0.1 * torch.randn_like(latent))
    before = model.eval().weight.detach().clone()
    model.train().retract()
    torch.testing.assert_close(model.eval().weight.detach(), before, rtol=1e-10, atol=1e-10)
    if "base" in dict(model.get_submodule("parametrizations.weight.0").named_buffers()) and "orthogonal" in name:
        assert not model.latents()["parametrizations.weight.original"].tril(-1).any()
