"""The fingerprint of a model that must not change, and a module that holds one more attribute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> list[Any]:
    """All that must not change: classes, attributes, hooks, tensors by identity, version and value, the generator."""
    print_: list[Any] = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules(remove_duplicate=False):
        print_.append((name, id(module), type(module), sorted(vars(type(module)), key=str)))
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for key, value in vars(module).items():
            print_.append((key, id(value)))
            if isinstance(value, dict):
                print_.append([(k, id(v)) for k, v in value.items()])
            if isinstance(value, list | tuple):
                print_.append([id(v) for v in value])
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                grad = None if tensor.grad is None else tensor.grad.tolist()
                print_.append((key, type(tensor), tensor._version, tensor.requires_grad, tensor.tolist(), grad))
    return print_


class Holder(nn.Module):
    """A module with a layer, and one more attribute that a test puts in."""

    def __init__(self, reference: Callable[[Holder], Any] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        if reference is not None:
            self.__dict__["reference"] = reference(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def named(self, _: str = "") -> nn.Module:
        return self.layer
