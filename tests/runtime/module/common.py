"""A model with methods and attributes of its own, and the same under ``torch.nn.utils.parametrize``."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxparam as fxp

WN = {"*.weight": fxp.weight_norm()}


class Net(nn.Module):
    """A model with methods and attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 4), nn.Linear(4, 5)
        self.scale = 1.0

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encode(x)) * self.scale

    def generate(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = self(x)
        return x


def oracle_of(net: nn.Module) -> nn.Module:
    oracle = copy.deepcopy(net)
    for module in oracle.modules():
        if isinstance(module, nn.Linear):
            parametrizations.weight_norm(module)
    return oracle


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))
