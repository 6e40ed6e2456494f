"""``torch.export`` puts the prologue into its program, and leaves the model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.compile.common import DYNAMO, MODELS, N, X, noise, skew, train
from runtime.oracles import same

import fxparam as fxp

pytestmark = DYNAMO


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_export_computes_the_weights(make: Callable[[], tuple[Any, fxp.ParametrizedModule]], strict: bool) -> None:
    oracle, model = make()
    for net in (oracle, model):
        net.eval()
    # What a strict export says of the place where weights wait for their readers.
    with pytest.warns(UserWarning, match="_fxp_inline") if strict else contextlib.nullcontext():
        program = torch.export.export(model, (X,), strict=strict)
    same(program.module()(X), oracle(X))
    assert set(program.state_dict) == set(model.state_dict())
    # It computes them from the latents that it is given, and shares them with the model.
    with torch.no_grad():
        for net in (model, oracle):
            for _, parameter in sorted(net.named_parameters()):
                parameter.mul_(0.5)
    same(program.module()(X), oracle(X))
    # The model goes on as before.
    for net in (oracle, model):
        net.train()
    train(oracle, model, model)
    assert model.stats.inlined == 0


def test_export_in_training_mode_and_after_steps() -> None:
    oracle, model = skew()
    train(oracle, model, model, steps=2)
    program = torch.export.export(model, (X,), strict=False)
    got: Any = program.module()
    same(got(X), oracle(X))
    train(oracle, model, model, steps=2)


def test_export_with_a_dynamic_size() -> None:
    oracle, model = skew()
    size = torch.export.Dim("size", min=2, max=64)
    # forward(*args): the inputs are one tuple.
    program = torch.export.export(model, (X,), dynamic_shapes=(({0: size},),), strict=False)
    x = noise(7, 9, N)
    same(program.module()(x), oracle(x))


def test_export_with_a_dynamic_size_by_the_users_name() -> None:
    # The wrapper takes any arguments; their names are those of the user's class, which restore gives back.
    oracle, model = skew()
    size = torch.export.Dim("size", min=2, max=64)
    program = torch.export.export(fxp.restore(model), (X,), dynamic_shapes={"x": {0: size}}, strict=False)
    x = noise(7, 9, N)
    same(program.module()(x), oracle(x))


def test_export_of_a_compiled_model() -> None:
    oracle, model = skew()
    model.compile(backend="eager")
    model(X)
    program = torch.export.export(model, (X,), strict=False)
    same(program.module()(X), oracle(X))
