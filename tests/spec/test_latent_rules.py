"""Rules on the latents of what a model already computes, reached by spelling out ``parametrizations``."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import fxparam as fxp


class Halved(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * 2


def models(trace: str) -> tuple[Any, fxp.ParametrizedModule]:
    torch.manual_seed(0)
    net: Any = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    oracle = copy.deepcopy(net)
    parametrize.register_parametrization(oracle[0].parametrizations.weight, "original0", Halved())
    model = fxp.transform(net, {"0.parametrizations.weight.original0": fxp.custom(Halved())}, trace=trace)
    return oracle, model


@pytest.mark.parametrize("trace", ["live", "auto"])
def test_a_latent_is_computed_by_a_site_of_its_own(trace: str) -> None:
    oracle, model = models(trace)
    assert list(model.state_dict()) == list(oracle.state_dict())
    assert list(model.latents()) == [
        "0.parametrizations.weight.parametrizations.original0.original",
        "0.parametrizations.weight.original1",
    ]
    x = torch.randn(5, 3, dtype=torch.float64)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (oracle, model)]
    for _ in range(3):
        for m, optimizer in zip((oracle, model), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), dict(oracle.named_parameters()).values(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-13, msg=name)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(model(x), oracle(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(fxp.restore(model)(x), oracle(x), rtol=1e-13, atol=1e-13)
    assert model.stats.refreshes == 4


def test_assigning_the_weight_goes_through_both_right_inverses() -> None:
    _, model = models("auto")
    weight = torch.randn(4, 3, dtype=torch.float64)
    model.assign("0.weight", weight)
    torch.testing.assert_close(model[0].weight, weight, rtol=1e-14, atol=1e-14)
    norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    latent = model.latents()["0.parametrizations.weight.parametrizations.original0.original"]
    torch.testing.assert_close(latent.detach(), norms * 2)
    torch.testing.assert_close(model[0].parametrizations.weight.original0.detach(), norms)


def test_a_submodule_alone_still_computes_its_weight() -> None:
    oracle, model = models("auto")
    alone = copy.deepcopy(model[0])
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(alone(x), oracle[0](x))


def test_what_does_not_fit_is_refused() -> None:
    net = nn.Sequential(weight_norm(nn.Linear(3, 4)))
    with pytest.raises(fxp.SpecError, match="a latent can only be computed by itself"):
        fxp.transform(net, {fxp.joint("0.parametrizations.weight.*"): fxp.flat()})
    spec = {"0.parametrizations.weight.original0": Halved(), "0.weight": fxp.existing() >> fxp.mask(density=0.5)}
    with pytest.raises(fxp.SpecError, match="0.weight is extended by one rule, and its latent replaced by another"):
        fxp.transform(net, spec)
    with pytest.raises(fxp.SpecError, match="matches nothing"):
        fxp.transform(net, {"*original0": Halved()})
