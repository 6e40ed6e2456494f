"""``restore`` against the user's model: classes, names, order, hooks, modes, and that it trains."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import copy

import pytest
import torch
from folding.common import TABLE, Attention, Case, Conv, Doubled, Lstm, Mlp, N, by_parametrize, by_spec, inputs, made
from torch import nn

import fxparam as fxp


@pytest.mark.parametrize("case", TABLE)
def test_restore_gives_back_the_users_model(case: Case) -> None:
    plain, model = made(case)
    model.train()
    model.requires_grad_(True)
    restored = fxp.restore(model)
    assert type(restored) is case.net
    assert restored.training
    assert [(n, type(m)) for n, m in restored.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    # The order of a weight that was parametrized before is another test's.
    order = list if case.by is by_spec else sorted
    assert order(restored.state_dict()) == order(plain.state_dict())
    names = order(n for n, _ in plain.named_parameters(remove_duplicate=False))
    assert order(n for n, _ in restored.named_parameters(remove_duplicate=False)) == names
    assert order(n for n, _ in restored.named_parameters()) == order(n for n, _ in plain.named_parameters())
    for name, parameter in restored.named_parameters():
        assert type(parameter) is nn.Parameter and parameter.requires_grad and parameter.is_leaf, name
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-13, atol=1e-13)
    theirs = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *model.weights().values())}
    assert theirs.isdisjoint(t.untyped_storage().data_ptr() for t in (*restored.parameters(), *restored.buffers()))
    for module in restored.modules():
        assert not module._forward_pre_hooks and not module._state_dict_hooks
    # It trains as the plain model would.
    before = [p.detach().clone() for p in restored.parameters()]
    out = restored(inputs())
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    torch.optim.SGD(restored.parameters(), 0.1).step()
    assert not all(map(torch.equal, before, restored.parameters()))
    copy.deepcopy(restored)


@pytest.mark.parametrize("net", [Mlp, Conv, Lstm, Attention], ids=lambda n: n.__name__)
def test_an_adopted_weight_gets_its_old_place(net: type[nn.Module]) -> None:
    """The order of parameters is that of optimizer states and of exported signatures."""
    assert list(fxp.restore(by_parametrize(net())).state_dict()) == list(net().state_dict())


def test_frozen_parameters_stay_frozen_in_restore() -> None:
    net = Mlp()
    net.a.weight.requires_grad_(False)
    net.a.bias.requires_grad_(False)
    restored = fxp.restore(fxp.transform(net, {"a.weight": Doubled()}))
    assert {n for n, p in restored.named_parameters() if p.requires_grad} == {"b.weight"}


def test_restore_keeps_hooks_attributes_and_modes() -> None:
    net = Mlp()
    net.note = {"a": [1]}
    net.a.register_forward_hook(lambda module, args, out: out * 3)
    net.a.eval()
    expected = copy.deepcopy(net)
    restored = fxp.restore(fxp.transform(net, {"a.weight": Doubled()}))
    assert restored.note == {"a": [1]} and restored.note is not net.note
    assert (restored.training, restored.a.training, restored.b.training) == (True, False, True)
    x = torch.randn(2, N)
    torch.testing.assert_close(restored(x), expected(x))


def test_restore_of_restore_can_be_transformed_again() -> None:
    model = fxp.transform(Mlp(), {"*.weight": fxp.weight_norm()})
    again = fxp.transform(fxp.restore(model), {"*.weight": fxp.weight_norm()})
    x = torch.randn(2, N)
    torch.testing.assert_close(again(x), model(x))
    assert list(again.state_dict()) == list(model.state_dict())
