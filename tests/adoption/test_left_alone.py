"""What stays as it is: nested parametrizations, lists that do more than their steps, hooks of the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from adoption.cases import CASES
from adoption.common import Scaled, Symmetric, assert_same, attach, call, held, line, names_of, registered, run, weight_norm
from copying.common import fingerprint
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.weight_norm import WeightNorm

from fxparam.tracer.copying import structural_copy


def test_a_parametrization_inside_a_parametrization_stays() -> None:
    model = CASES["nested"][0]()
    copied = structural_copy(model)
    (adopted,) = copied.adopted
    mixer, normed = adopted.steps[0].mixer, adopted.steps[0].normed
    old: Any = model.parametrizations.weight[0]  # type: ignore[union-attr, index]
    assert isinstance(mixer, nn.Module) and isinstance(normed, nn.Module)
    assert parametrize.is_parametrized(mixer, "weight") and type(mixer) is not type(old.mixer)
    assert len(normed._forward_pre_hooks) == 1
    assert copied.notes == tuple(
        f"parametrizations.weight.0.{name}: keeps its own parametrization, because it is part of another one"
        for name in ("mixer", "normed")
    )
    parametrize.remove_parametrizations(mixer, "weight")
    assert parametrize.is_parametrized(old.mixer, "weight") and type(mixer) is nn.Linear
    model(line())


def test_a_layer_that_another_parametrization_reads_stays() -> None:
    class From(nn.Module):
        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.other: Any = other

        def forward(self, x: Tensor) -> Tensor:
            return x * self.other.weight

    first_layer = registered(nn.Linear(3, 3), "weight", Symmetric())
    model = nn.Sequential(first_layer, registered(nn.Linear(3, 3), "weight", From(first_layer)))
    copied = structural_copy(model)
    assert names_of(copied) == ["1.weight: parametrize"]
    assert copied.notes == ("0: keeps its own parametrization, because it is part of another one",)
    x = line()
    parameters, buffers = held(copied)
    x.requires_grad_()
    expected = run(model, call, x, parameters, buffers)
    assert_same(run(attach(copied), call, x, parameters, buffers), expected)


def hooked_list() -> nn.Module:
    model: Any = registered(nn.Linear(3, 3), "weight", Symmetric())
    model.parametrizations.weight.register_forward_hook(lambda m, a, out: out * 2)
    return registered(model, "bias", Scaled())


def pruned_original() -> nn.Module:
    model: Any = registered(nn.Linear(3, 3), "weight", Symmetric())
    prune.l1_unstructured(model.parametrizations.weight, "original", 4)
    return registered(model, "bias", Scaled())


def parametrized_original() -> nn.Module:
    model: Any = registered(nn.Linear(3, 3), "weight", Symmetric())
    inner = registered(model.parametrizations.weight, "original", Scaled())
    inner.parametrizations.original.register_forward_hook(lambda m, a, out: out * 2)  # type: ignore[union-attr]
    return registered(model, "bias", Scaled())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hooked_list, "because the list of its steps has hooks"),
        (pruned_original, "because the list of its steps has hooks"),
        (parametrized_original, "because the list of its steps has hooks"),
    ],
)
def test_a_list_that_does_more_than_its_steps_stays(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    before = fingerprint(model)
    copied = structural_copy(model)
    assert fingerprint(model) == before
    assert names_of(copied) == ["bias: parametrize"]
    assert f"weight: keeps its torch parametrization, {reason}" in copied.notes
    x = line().requires_grad_()
    parameters, buffers = held(copied)
    expected = run(model, call, x, parameters, buffers)
    assert_same(run(attach(copied), call, x, parameters, buffers), expected)


class OwnWeightNorm(WeightNorm):
    """A hook of the user that only looks like weight norm."""

    def compute_weight(self, module: nn.Module) -> Any:
        return super().compute_weight(module) * 2


class OwnMasking(prune.L1Unstructured):
    """A pruning method that does more than multiply with its mask."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        return super().apply_mask(module) * 2


def own_weight_norm() -> nn.Module:
    layer = nn.Linear(3, 3)
    weight_norm(layer)
    (key,) = layer._forward_pre_hooks
    layer._forward_pre_hooks[key] = OwnWeightNorm("weight", 0)
    return layer


def own_masking() -> nn.Module:
    layer = nn.Linear(3, 3)
    OwnMasking.apply(layer, "weight", 4)
    return layer


@pytest.mark.parametrize("make", [own_weight_norm, own_masking])
def test_an_unknown_hook_is_the_users_and_keeps_running(make: Callable[[], nn.Module]) -> None:
    model = make()
    copied = structural_copy(model)
    assert copied.adopted == () and len(copied.root._forward_pre_hooks) == 1
    x = line().requires_grad_()
    parameters, buffers = held(copied)
    expected = run(model, call, x, parameters, buffers)
    assert_same(run(copied.root, call, x, parameters, buffers), expected)


def test_a_module_dict_that_happens_to_be_called_parametrizations_is_left_alone() -> None:
    model = nn.Module()
    model.parametrizations = nn.ModuleDict({"weight": nn.Linear(2, 2)})
    copied = structural_copy(model)
    assert copied.adopted == () and type(copied.root) is nn.Module
    assert isinstance(copied.root.get_submodule("parametrizations.weight"), nn.Linear)


@pytest.mark.parametrize("case", [case for case in CASES if "hook" in CASES[case][3][0] or "prune" in CASES[case][3][0]])
def test_without_adoption_legacy_hooks_keep_running(case: str) -> None:
    make, draw, use, _ = CASES[case]
    model = make()
    x = draw().requires_grad_()
    use(model, x).sum().backward()
    copied = structural_copy(model, adopt=False)
    parameters, buffers = held(copied)
    assert copied.adopted == ()
    expected = run(model, use, x, parameters, buffers)
    assert_same(run(copied.root, use, x, parameters, buffers), expected)
