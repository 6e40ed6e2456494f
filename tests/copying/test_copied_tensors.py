"""Tensors of the structural copy: shared by default, cloned with their ties, views and flags on request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from copying.common import Holder, fingerprint
from torch import Tensor, nn

from fxparam.tracer.copying import structural_copy

HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def test_tensors_are_shared_and_containers_are_not() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.register_parameter("absent", None)
    new: Any = structural_copy(model).root
    assert [(n, id(t)) for n, t in new.named_parameters()] == [(n, id(t)) for n, t in model.named_parameters()]
    assert [(n, id(t)) for n, t in new.named_buffers()] == [(n, id(t)) for n, t in model.named_buffers()]
    for old_module, new_module in zip(model.modules(), new.modules(), strict=True):
        assert type(old_module) is type(new_module)
        assert list(vars(old_module)) == list(vars(new_module))
        for table in ("_parameters", "_buffers", "_modules", *HOOKS):
            assert vars(old_module)[table] is not vars(new_module)[table]
            assert type(vars(old_module)[table]) is type(vars(new_module)[table])
    new[0].register_parameter("extra", nn.Parameter(torch.zeros(1)))
    del new[1]
    new.eval()
    assert len(model) == 2 and model.training and not hasattr(model[0], "extra")


class Tied(nn.Module):
    """Ties by identity, by storage and by view; a frozen parameter, a buffer, tensors in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.c = nn.Parameter(self.a.weight.data)
        self.row = nn.Parameter(self.a.weight.data[1], requires_grad=False)
        self.mean: Tensor
        self.register_buffer("mean", torch.arange(3.0))
        self.tables = [self.mean, torch.ones(2, requires_grad=True)]
        self.a.bias.tag = "kept"  # type: ignore[attr-defined]


def test_copied_tensors_keep_ties_views_and_flags() -> None:
    model: Any = Tied()
    model.a.weight.grad = torch.ones(3, 3)
    before = fingerprint(model)
    new: Any = structural_copy(model, copy_tensors=True).root
    assert fingerprint(model) == before
    state, old_state = new.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(state) == list(old_state)
    for name, tensor in state.items():
        old = old_state[name]
        assert type(tensor) is type(old) and tensor.requires_grad == old.requires_grad
        assert tensor.stride() == old.stride() and tensor.data_ptr() != old.data_ptr() and tensor.grad is None
        torch.testing.assert_close(tensor, old, rtol=0, atol=0)
    assert new.b.weight is new.a.weight
    assert new.c.data_ptr() == new.a.weight.data_ptr() and new.c is not new.a.weight
    assert new.row.data_ptr() == new.a.weight[1].data_ptr()
    assert new.tables[1].requires_grad and not new.tables[0].requires_grad
    assert new.tables[0] is new.mean and new.tables[1].data_ptr() != model.tables[1].data_ptr()
    assert new.a.bias.tag == "kept"
    with torch.no_grad():
        new.a.weight.zero_()
    assert not new.row.any() and model.row.any()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.empty(2, 3, device="meta"),
        torch.randn(4, 3).t(),
        torch.zeros(0),
        torch.tensor(3),
        torch.randn(3, dtype=torch.bfloat16),
    ],
    ids=["sparse", "conjugate", "meta", "transposed", "empty", "scalar", "bfloat16"],
)
def test_tensors_of_every_make_are_copied(tensor: Tensor) -> None:
    model = nn.Module()
    model.register_buffer("held", tensor)
    held: Any = structural_copy(model, copy_tensors=True).root.held
    assert held is not tensor and type(held) is type(tensor)
    assert (held.dtype, held.shape, held.layout, held.device) == (
        *(tensor.dtype, tensor.shape),
        *(tensor.layout, tensor.device),
    )
    if not tensor.is_meta:
        torch.testing.assert_close(held.resolve_conj(), tensor.resolve_conj(), rtol=0, atol=0)


def test_a_computed_attribute_is_shared_with_a_note() -> None:
    model = Holder()
    model.twice = model.layer.weight * 2
    copied = structural_copy(model, copy_tensors=True)
    assert copied.root.twice is model.twice
    assert copied.notes == ("twice: a tensor computed from others, shared with the given model",)


def test_copied_recurrent_modules_run_on_the_clones() -> None:
    model = nn.GRU(2, 3)
    new: Any = structural_copy(model, copy_tensors=True).root
    assert all(a is b for a, b in zip(new._flat_weights, new.parameters(), strict=True))
    assert [ref() for ref in new._flat_weight_refs] == new._flat_weights
    x = torch.randn(4, 1, 2)
    torch.testing.assert_close(new(x)[0], model(x)[0], rtol=0, atol=0)
