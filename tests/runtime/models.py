"""Layers and maps that tests of several topics use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def skew_exp(latent: Tensor) -> Tensor:
    lower = latent.tril(-1)
    return torch.matrix_exp(lower - lower.mT)


class SkewExp(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return skew_exp(latent)


def through_one_node(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights from two latents, through a node they share."""
    shared = a.exp()
    return shared * b, shared + 1.0


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class ThreeLayers(nn.Module):
    """Three layers, of which a call uses those in ``path``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(size, size, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor, path: str = "abc") -> Tensor:
        for name in path:
            x = torch.tanh(getattr(self, name)(x))
        return x


def three_parametrized_layers(size: int) -> ThreeLayers:
    """In plain PyTorch: two weights are computed, that of the last layer is not."""
    net = ThreeLayers(size)
    for layer in (net.a, net.b):
        parametrize.register_parametrization(layer, "weight", SkewExp())
    return net
