"""Copies, pickles and kept submodules; the given model is not changed."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from runtime.module.common import WN, Net
from runtime.oracles import TRACES, same

import fxparam as fxp


@pytest.mark.parametrize("trace", TRACES)
def test_deepcopy(trace: str) -> None:
    model = fxp.transform(Net(), WN, trace=trace)
    x = torch.randn(3, 5)
    model(x).sum().backward()
    other = copy.deepcopy(model)
    same(other(x), model(x))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2.0)
    before = model(x).detach()
    other(x).pow(2).sum().backward()
    assert torch.equal(model(x), before)
    assert not torch.allclose(other(x), before)
    assert other.stats is not model.stats and other.report.body == model.report.body


@pytest.mark.parametrize("trace", TRACES)
def test_pickle_and_torch_save(trace: str) -> None:
    model = fxp.transform(Net(), WN, trace=trace)
    x = torch.randn(3, 5)
    model(x).sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert list(other.state_dict()) == list(model.state_dict())
        same(other(x), model(x))
        other.zero_grad()
        other(x).sum().backward()
        assert all(p.grad is not None for p in other.parameters())
        optimizer = torch.optim.SGD(other.parameters(), 0.1)
        optimizer.step()
        assert not torch.allclose(other(x), model(x))


def test_shallow_copy_leaves_the_original_alone() -> None:
    model = fxp.transform(Net(), {fxp.joint("*.weight"): fxp.flat()})
    x = torch.randn(3, 5)
    want = model(x)
    other = copy.copy(model)
    del other
    gc.collect()
    model.invalidate()
    same(model(x), want)


def test_submodules_copied_or_kept() -> None:
    model = fxp.transform(Net(), WN)
    x = torch.randn(3, 5)
    encoded = model.encoder(x).detach()
    clone = copy.deepcopy(model.encoder)
    clone(x).sum().backward()
    assert all(p.grad is not None for p in clone.parameters())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model.encoder.parametrizations.weight.original0.mul_(2.0)
    same(clone(x), encoded)
    kept = model.encoder
    doubled = model.encoder(x).detach()
    del model
    gc.collect()
    same(kept(x), doubled)
    assert not torch.allclose(doubled, encoded)


def test_kept_submodule_of_a_joint_site_says_what_to_do() -> None:
    model = fxp.transform(Net(), {fxp.joint("*.weight"): fxp.flat()})
    clone = copy.deepcopy(model.decoder)
    with pytest.raises(fxp.FxparamError, match="copy the whole transformed model, or use fxp.restore"):
        clone(torch.randn(3, 4))


def test_the_given_model_is_not_changed() -> None:
    net = Net()
    state, classes = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    model = fxp.transform(net, WN)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(3, 5)).sum().backward()
    assert net.encoder.weight.grad is None
    assert [type(m) for m in net.modules()] == classes
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    optimizer.step()
    assert torch.equal(net.encoder.weight, state["encoder.weight"])
    assert net.encoder.bias is model.encoder.bias
