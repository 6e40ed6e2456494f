"""What cannot be adopted: each error names the module, the tensor and what to type."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from adoption.common import Scaled, Symmetric, registered, weight_norm
from copying.common import fingerprint
from torch import nn
from torch.nn.utils import parametrize, prune

from fxparam.errors import AdoptionError
from fxparam.tracer.copying import structural_copy


def pruned_direction() -> nn.Module:
    return prune.l1_unstructured(weight_norm(nn.Linear(3, 3)), "weight_v", 2)


def parametrized_direction() -> nn.Module:
    return registered(weight_norm(nn.Linear(3, 3)), "weight_v", Scaled())


def normed_original() -> nn.Module:
    return weight_norm(prune.l1_unstructured(nn.Linear(3, 3), "weight", 2), "weight_orig")


def twice_hooked() -> nn.Module:
    layer = weight_norm(nn.Linear(3, 3))
    (hook,) = layer._forward_pre_hooks.values()
    layer.register_forward_pre_hook(hook)
    return layer


def without_magnitude() -> nn.Module:
    layer = weight_norm(nn.Linear(3, 3))
    magnitude = layer._parameters.pop("weight_g")
    layer.__dict__["weight_g"] = magnitude
    return layer


def broken_by_a_deep_copy() -> nn.Module:
    layer = registered(nn.Linear(3, 3), "weight", Symmetric())
    parametrize.remove_parametrizations(copy.deepcopy(layer), "weight")
    return layer


LINEAR = "module '0' (Linear), tensor 'weight': "


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "pruned weight_v": (
        pruned_direction,
        "the weight_norm hook reads 'weight_v', which is itself computed (prune); expected a stored tensor; type "
        "torch.nn.utils.prune.remove(module, 'weight_v') and say it in the spec, or transform(..., adopt=False)",
    ),
    "parametrized weight_v": (
        parametrized_direction,
        "the weight_norm hook reads 'weight_v', which is itself computed (parametrize); expected a stored tensor; type "
        "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight_v') and say it in the spec, "
        "or transform(..., adopt=False)",
    ),
    "weight norm of weight_orig": (
        normed_original,
        "the prune reads 'weight_orig', which is itself computed (weight_norm hook); expected a stored tensor; type "
        "torch.nn.utils.remove_weight_norm(module, 'weight_orig') and say it in the spec, "
        "or transform(..., adopt=False)",
    ),
    "two hooks": (
        twice_hooked,
        "the weight_norm hook is one of 2 that compute it (weight_norm hook, weight_norm hook); expected one; keep one "
        "of them and type torch.nn.utils.remove_weight_norm(module, 'weight') for the other, "
        "or transform(..., adopt=False)",
    ),
    "no weight_g": (
        without_magnitude,
        "the weight_norm hook reads 'weight_g', which is neither a parameter nor a buffer of the module; type "
        "module.register_parameter('weight_g', ...) or transform(..., adopt=False)",
    ),
    "class changed": (
        broken_by_a_deep_copy,
        "expected the class that torch.nn.utils.parametrize generated, and found one that was changed afterwards "
        "(remove_parametrizations on a deep copy does that, and so does fully_shard); transform the model before, "
        "or type transform(..., adopt=False)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adopted_says_module_tensor_and_remedy(case: str) -> None:
    make, text = REFUSED[case]
    model = nn.Sequential(make())
    before = fingerprint(model)
    with pytest.raises(AdoptionError) as caught:
        structural_copy(model)
    assert str(caught.value).replace("(ParametrizedLinear)", "(Linear)") == LINEAR + text
    assert fingerprint(model) == before
    assert structural_copy(model, adopt=False).adopted == ()
