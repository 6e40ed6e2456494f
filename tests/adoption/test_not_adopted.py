"""What cannot be adopted stays as it is, with a note; only a rule for it is an error."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from adoption.common import Scaled, Symmetric, registered, weight_norm
from copying.common import fingerprint
from torch import nn
from torch.nn.utils import parametrize, prune

import fxparam as fxp
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


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "pruned weight_v": (
        pruned_direction,
        "0.weight: keeps its weight_norm hook, because it reads weight_v, which is itself computed (prune); to have both "
        "adopted type torch.nn.utils.prune.remove(module, 'weight_v') and say it in the spec",
    ),
    "parametrized weight_v": (
        parametrized_direction,
        "0.weight: keeps its weight_norm hook, because it reads weight_v, which is itself computed (parametrize); to have both "
        "adopted type torch.nn.utils.parametrize.remove_parametrizations(module, 'weight_v') and say it in the spec",
    ),
    "weight norm of weight_orig": (
        normed_original,
        "0.weight: keeps its prune, because it reads weight_orig, which is itself computed (weight_norm hook); to have both "
        "adopted type torch.nn.utils.remove_weight_norm(module, 'weight_orig') and say it in the spec",
    ),
    "two hooks": (
        twice_hooked,
        "0.weight: keeps its weight_norm hook, because several compute it (weight_norm hook, weight_norm hook)",
    ),
    "no weight_g": (
        without_magnitude,
        "0.weight: keeps its weight_norm hook, because it reads weight_g, which is neither a parameter nor a buffer of the "
        "module",
    ),
    "class changed": (
        broken_by_a_deep_copy,
        "0.weight: keeps its torch parametrization, because the class that PyTorch generated for it was changed afterwards "
        "(remove_parametrizations on a deep copy does that, and fully_shard); transform the model before",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_adopted_stays_with_a_note(case: str) -> None:
    make, text = LEFT[case]
    model = nn.Sequential(make())
    before = fingerprint(model)
    copied = structural_copy(model)
    assert text in copied.notes
    assert not any(one.tensor_name == "weight" for one in copied.adopted)
    assert fingerprint(model) == before


def made(case: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(LEFT[case][0](), nn.Linear(3, 2)).double()


@pytest.mark.parametrize("case", [case for case in LEFT if case != "class changed"])
@pytest.mark.parametrize("trace", ["auto", "live", "record"])
def test_what_stays_runs_as_before(case: str, trace: str) -> None:
    """Hooks that read each other are one forward behind; that is how the model is."""
    original, reference = made(case), made(case)
    model = fxp.transform(original, {"1.weight": fxp.weight_norm()}, trace=trace)
    torch.nn.utils.parametrizations.weight_norm(reference[1])
    assert any(LEFT[case][1].startswith(f"0.weight: {record.why}"[:40]) for record in model.report.refusals)
    steps = [torch.optim.SGD(net.parameters(), 0.1) for net in (model, reference)]
    for seed in range(4):
        x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        got, want = model(x), reference(x)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        if case == "weight norm of weight_orig":
            # Its graph reaches into the forward before: PyTorch refuses a backward after a step.
            continue
        for net, step, y in zip((model, reference), steps, (got, want), strict=True):
            net.zero_grad()
            y.square().sum().backward(retain_graph=True)
            step.step()


def test_a_rule_for_what_stays_says_why_not() -> None:
    with pytest.raises(AdoptionError, match=r"rule '0.weight': 0.weight keeps its weight_norm hook, because it reads weight_v"):
        fxp.transform(nn.Sequential(pruned_direction()), {"0.weight": fxp.orthogonal()})
