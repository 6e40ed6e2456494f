"""Modules of every make: torch's own, lazy, scripted, traced, compiled, parametrized, with attribute access of their own."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from copying.common import fingerprint
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

from fxparam.tracer.copying import structural_copy


class Demanding(nn.Module):
    """A module whose construction, attribute access and copying are all its own."""

    __slots__ = ("kept",)
    kept: Any
    made = 0

    def __new__(cls, width: int) -> Demanding:
        cls.made += 1
        return super().__new__(cls)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        object.__setattr__(self, "kept", self.layer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("magic_"):
            return name
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("training", "layer") and not name.startswith("_"):
            raise RuntimeError("user code must not run")
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("user code must not run")

    def __getstate__(self) -> Any:
        raise RuntimeError("user code must not run")

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(x)


def test_modules_with_slots_and_custom_attribute_access() -> None:
    model = Demanding(3)
    made = Demanding.made
    new: Any = structural_copy(model).root
    assert Demanding.made == made
    assert new.kept is new.layer is not model.layer and new.magic_word == "magic_word"
    x = torch.randn(2, 3)
    torch.testing.assert_close(new(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))]),
        lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "b": torch.zeros(3)}),
        lambda: nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]),
        lambda: nn.ModuleDict({"a": nn.Linear(2, 2)}),
        lambda: nn.Sequential(collections.OrderedDict(a=nn.Linear(2, 2), b=nn.Tanh())),
        lambda: nn.LSTM(2, 3, num_layers=2, bidirectional=True),
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
    ],
    ids=["ParameterList", "ParameterDict", "ModuleList", "ModuleDict", "Sequential", "LSTM", "TransformerEncoderLayer"],
)
def test_torchs_own_modules(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = fingerprint(model)
    new = structural_copy(model).root
    assert repr(new) == repr(model)
    assert [(n, id(t)) for n, t in new.named_parameters()] == [(n, id(t)) for n, t in model.named_parameters()]
    assert [n for n, _ in new.named_modules()] == [n for n, _ in model.named_modules()]
    assert fingerprint(model) == before


def test_recurrent_modules_have_their_own_lists() -> None:
    model = nn.LSTM(2, 3)
    new: Any = structural_copy(model).root
    assert new._flat_weights is not model._flat_weights
    assert new._flat_weight_refs is not model._flat_weight_refs
    x = torch.randn(4, 1, 2)
    expected = model(x)[0]
    new.weight_hh_l0 = nn.Parameter(torch.zeros(12, 3))
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=0)
    assert not torch.equal(new(x)[0], expected)


def test_lazy_modules_are_copied_and_become_what_they_are_apart() -> None:
    model: Any = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    new: Any = structural_copy(model, copy_tensors=True).root
    assert isinstance(new[0], nn.LazyLinear)
    assert new(torch.ones(2, 5)).shape == (2, 3)
    assert type(new[0]) is nn.Linear and type(model[0]) is nn.LazyLinear
    assert model(torch.ones(2, 4)).shape == (2, 3)
    assert not model[0]._forward_pre_hooks and not new[0]._forward_pre_hooks


def scripted(module: nn.Module) -> nn.Module:
    with pytest.warns(DeprecationWarning):
        return torch.jit.script(module)


@pytest.mark.parametrize("copy_tensors", [False, True])
def test_script_modules_are_shared_with_a_note(copy_tensors: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), scripted(nn.Linear(2, 2)))
    copied = structural_copy(model, copy_tensors=copy_tensors)
    root: Any = copied.root
    assert root[1] is model[1] and root[0] is not model[0]
    assert copied.notes == ("1: a ScriptModule cannot be copied and is shared",)
    x = torch.randn(1, 2)
    torch.testing.assert_close(copied.root(x), model(x), rtol=0, atol=0)


def test_graph_modules_get_a_graph_and_a_class_of_their_own() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    new: Any = structural_copy(nn.Sequential(model)).root.get_submodule("0")
    x = torch.randn(3, 2)
    expected = model(x)
    torch.testing.assert_close(new(x), expected, rtol=0, atol=0)
    assert new.graph.owning_module is new and model.graph.owning_module is model
    (relu,) = (node for node in new.graph.nodes if node.target == "1")
    relu.replace_all_uses_with(relu.args[0])
    new.graph.erase_node(relu)
    new.recompile()
    torch.testing.assert_close(new(x), model.get_submodule("0")(x), rtol=0, atol=0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_compiled_calls_are_dropped_and_compiled_wrappers_wrap_the_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.compile(backend="eager")
    copied = structural_copy(model)
    assert copied.notes == ("(root): the compiled call was dropped; type .compile() on the result",)
    assert copied.root._compiled_call_impl is None and model._compiled_call_impl is not None

    wrapped: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    x = torch.randn(3, 2)
    expected = wrapped(x)
    new: Any = structural_copy(wrapped).root
    torch.testing.assert_close(new(x), expected)
    new._orig_mod.weight = nn.Parameter(torch.zeros(2, 2))
    torch.testing.assert_close(new(x), new._orig_mod.bias.expand(3, 2))
    torch.testing.assert_close(wrapped(x), expected, rtol=0, atol=0)


def orthogonal(size: int = 3) -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(size, size, dtype=torch.float64))


def test_without_adoption_parametrized_modules_stay_so_and_apart() -> None:
    model: Any = nn.Sequential(orthogonal(), parametrizations.weight_norm(nn.Linear(3, 3, dtype=torch.float64)))
    before = fingerprint(model)
    copied = structural_copy(model, adopt=False)
    new: Any = copied.root
    assert copied.adopted == () and copied.notes == ()
    assert fingerprint(model) == before
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(new(x), expected, rtol=0, atol=0)
    assert parametrize.is_parametrized(new[0], "weight") and type(new[0]) is not type(model[0])
    assert parametrize.type_before_parametrizations(new[0]) is nn.Linear
    assert [n for n, _ in new.named_parameters()] == [n for n, _ in model.named_parameters()]

    with parametrize.cached():  # the cache is keyed by module: each must find its own
        model(x)
        new[0].parametrizations.weight.original = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        assert not torch.equal(new[0].weight, model[0].weight)
    parametrize.remove_parametrizations(new[0], "weight")
    parametrize.remove_parametrizations(new[1], "weight")
    assert type(new[0]) is type(new[1]) is nn.Linear
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_model_that_deepcopy_refuses_is_copied() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
    model(torch.randn(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    for adopt in (True, False):
        assert structural_copy(model, adopt=adopt).root is not model


def test_deep_models_need_no_deep_stack() -> None:
    model: nn.Module = nn.Identity()
    for _ in range(2000):
        outer = nn.Module()
        outer.__dict__["_modules"]["inner"] = model
        model = outer
    assert len(structural_copy(model).memo) == 2001
