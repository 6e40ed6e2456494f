"""Names of checkpoints: legacy names lead to those of parametrize, and the hooks behind them go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from adoption.cases import CASES
from torch import nn
from torch.nn.utils import parametrizations

from fxparam.tracer.copying import structural_copy

NEW_FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm, dim 0": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("case", ["weight norm, dim 0", "spectral norm", "pruned", "new weight norm"])
def test_legacy_names_lead_to_the_names_of_parametrize(case: str) -> None:
    model = CASES[case][0]()
    (adopted,) = structural_copy(model).adopted
    scheme = {f"parametrizations.weight.original{i}": o for i, o in enumerate(adopted.originals)}
    if len(adopted.originals) == 1:
        scheme = {"parametrizations.weight.original": adopted.originals[0]}
    for i, step in enumerate(adopted.steps):
        scheme |= {f"parametrizations.weight.{i}.{name}": tensor for name, tensor in step.state_dict(keep_vars=True).items()}
    state = model.state_dict(keep_vars=True)
    assert set(adopted.legacy_names.values()) == set(scheme)
    if case == "new weight norm":
        assert list(adopted.legacy_names) == ["weight_g", "weight_v"]
    else:
        assert {name: id(state[name]) for name in adopted.legacy_names} == {
            name: id(scheme[new]) for name, new in adopted.legacy_names.items()
        }
    if case in NEW_FORMS:
        assert set(NEW_FORMS[case](nn.Linear(3, 4)).state_dict()) == {*scheme, "bias"}


def test_other_parametrizations_have_no_legacy_names() -> None:
    (adopted,) = structural_copy(CASES["chain"][0]()).adopted
    assert dict(adopted.legacy_names) == {}


@pytest.mark.parametrize("case", ["weight norm, dim 0", "spectral norm", "pruned", "new weight norm"])
def test_hooks_for_checkpoints_go_and_those_of_the_user_stay(case: str) -> None:
    model = CASES[case][0]()

    def keep(*_: Any) -> None:
        return None

    model._register_load_state_dict_pre_hook(keep)
    model._register_state_dict_hook(keep)
    copied = structural_copy(model).root
    assert len(copied._load_state_dict_pre_hooks) == len(copied._state_dict_hooks) == 1
    assert next(iter(copied._state_dict_hooks.values())) is keep
