"""Names and checkpoints: those of ``torch.nn.utils.parametrize``, of plain models and of legacy layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.module.common import WN, Net, gradients
from runtime.oracles import same
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxparam as fxp

DECLARATIONS: dict[str, tuple[Any, Callable[[nn.Module], Any]]] = {
    "weight_norm": (fxp.weight_norm(), parametrizations.weight_norm),
    "weight_norm-dim1": (fxp.weight_norm(dim=1), lambda m: parametrizations.weight_norm(m, dim=1)),
    "spectral_norm": (fxp.spectral_norm(), parametrizations.spectral_norm),
    "orthogonal-exp": (fxp.orthogonal(map="matrix_exp"), lambda m: parametrizations.orthogonal(m, orthogonal_map="matrix_exp")),
    "orthogonal-cayley": (fxp.orthogonal(map="cayley"), lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley")),
    "householder": (fxp.orthogonal(map="householder"), lambda m: parametrizations.orthogonal(m, orthogonal_map="householder")),
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_checkpoints_go_both_ways(name: str) -> None:
    declaration, apply = DECLARATIONS[name]
    x = torch.randn(3, 5)
    oracle = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model = fxp.transform(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), {"*.weight": declaration})
    for at in (0, 2):
        apply(oracle[at])
    assert list(model.state_dict()) == list(oracle.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in oracle.named_parameters()]
    for tensor, other in zip(model.state_dict().values(), oracle.state_dict().values(), strict=True):
        assert tensor.shape == other.shape and tensor.dtype == other.dtype
    model.eval()
    oracle.eval()
    model.load_state_dict(oracle.state_dict())
    same(model(x), oracle(x))
    for a, b in zip(gradients(model, model(x).pow(2).sum()), gradients(oracle, oracle(x).pow(2).sum()), strict=True):
        same(a, b, 1e-9)
    # Below the diagonal only: on it the Householder map keeps signs, which do not train.
    changed = {k: v + 0.01 * (v.ndim < 2 or torch.ones_like(v).tril(-1)) for k, v in model.state_dict().items()}
    model.load_state_dict(changed)
    oracle.load_state_dict(model.state_dict())
    same(model(x), oracle(x))


@pytest.mark.parametrize("assign", [False, True])
def test_plain_checkpoints(assign: bool) -> None:
    plain, model = Net(), fxp.transform(Net(), WN)
    x = torch.randn(3, 5)
    model(x)
    result = model.load_state_dict(plain.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    same(model(x), plain(x))
    before = plain.encoder.weight.detach().clone()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    assert torch.equal(plain.encoder.weight, before)


def test_plain_checkpoint_of_a_joint_site() -> None:
    plain, model = Net(), fxp.transform(Net(), {fxp.joint("*"): fxp.flat()})
    model.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5)
    same(model(x), plain(x))


def test_plain_checkpoint_that_is_not_in_the_image() -> None:
    model = fxp.transform(nn.Linear(5, 5), {"weight": fxp.orthogonal()})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(fxp.ImageError, match=r"the checkpoint holds the plain weight weight, which orthogonal\(\) cannot"):
        model.load_state_dict(nn.Linear(5, 5).state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "weight" in k)


def test_the_given_dict_is_not_changed_by_loading() -> None:
    plain, model = Net().state_dict(), fxp.transform(Net(), WN)
    keys = list(plain)
    model.load_state_dict(plain)
    assert list(plain) == keys


def test_checkpoint_inside_a_larger_model() -> None:
    plain = nn.Sequential(Net(), nn.Linear(5, 2))
    outer = nn.Sequential(fxp.transform(Net(), WN), nn.Linear(5, 2))
    outer.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5)
    same(outer(x), plain(x))


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.register_buffer("kept", torch.ones(2))
        self.epoch = 3

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


def test_extra_state_and_non_persistent_buffers_of_the_root() -> None:
    net = Stateful()
    model = fxp.transform(net, WN)
    names = [name for name in model.state_dict() if "parametrizations" not in name]
    assert names == [name for name in net.state_dict() if name != "layer.weight"]


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_legacy_checkpoints_load_into_a_declared_model(kind: str) -> None:
    legacy = nn.Linear(4, 4)
    declared = {"weight_norm": fxp.weight_norm(), "spectral_norm": fxp.spectral_norm(), "prune": fxp.mask(density=0.5)}[kind]
    if kind == "prune":
        torch.nn.utils.prune.l1_unstructured(legacy, "weight", amount=0.5)
    else:
        getattr(torch.nn.utils, kind)(legacy, "weight")
    legacy.eval()
    model = fxp.transform(nn.Linear(4, 4), {"weight": declared}).eval()
    model.load_state_dict(legacy.state_dict())
    x = torch.randn(3, 4)
    same(model(x), legacy(x))


def test_a_plain_checkpoint_that_contradicts_a_reference_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = fxp.transform(net, {"1.weight": fxp.ref("0.weight") >> fxp.transpose()})
    state = dict(fxp.restore(model).state_dict())
    model.load_state_dict(state)
    with pytest.raises(fxp.ImageError, match=r"the checkpoint holds 1.weight, which is computed from 0.weight here"):
        model.load_state_dict(state | {"1.weight": torch.randn(4, 4)})
