"""The models that scripts run, small and with weights that are reached by some of the outputs only.

Each has a *tap*, a module without effect in the middle of its forward: a hook on it is code that runs between two reads.
"""

# mypy: disable-error-code="operator"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPE = torch.float64
N = 4
HEADS = 70
"""More than the 64 weights that share autograd nodes."""
PER_OUTPUT = 7


def noise(seed: int, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE).to(dtype)


def rotation(seed: int) -> Tensor:
    return torch.linalg.qr(noise(seed, N, N))[0]


class Pair(nn.Module):
    """Two weights from one latent, through a node they share."""

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        shared = latent.exp()
        return (shared * latent).view(3, N), (shared + 1).view(3, N)


class Antisymmetric(nn.Module):
    """A linear map: its graph saves nothing for a backward."""

    def forward(self, latent: Tensor) -> Tensor:
        return latent - latent.mT


class Net(nn.Module):
    """Outputs that each reach some of the weights; one weight is read before and after the tap."""

    def __init__(self) -> None:
        super().__init__()
        self.orth, self.norm = nn.Linear(N, N), nn.Linear(N, 3)
        self.enc, self.dec = nn.Linear(N, 3), nn.Linear(3, N)
        self.left, self.right = nn.Linear(N, 3, bias=False), nn.Linear(N, 3, bias=False)
        self.tap = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        enc = self.enc(x)
        hidden = self.tap(torch.tanh(self.orth(x)))
        hidden = torch.tanh(self.orth(hidden))
        return self.norm(hidden), enc, self.dec(x[:, :3]), self.left(x), self.right(hidden)


class Mix(nn.Module):
    """Weights of a mixture, by mode."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(3))

    def forward(self) -> Tensor:
        return torch.softmax(self.logits if self.training else self.logits / 2, 0)


class Handwritten(nn.Module):
    """Weight arithmetic in the forward, some of it by mode; one weight is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, 3)
        self.gain, self.mix = nn.Parameter(torch.rand(N, 1) + 0.5), Mix()
        self.register_buffer("mask", (torch.rand(N, N) < 0.7).to(torch.get_default_dtype()))
        self.tap = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.tap(x)
        weight = (self.first.weight - self.first.weight.mean(1, keepdim=True)) * self.mask
        weight = self.gain * F.normalize(weight + 0.1, dim=1)
        mix = self.mix()
        hidden = torch.tanh(F.linear(x, weight, self.first.bias))
        return self.second(hidden), (mix[:, None] * self.second.weight).exp().sum(0) * x, F.linear(x, weight.abs())


class Two(nn.Module):
    """For maps with a state, or with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x))))), self.first(x)


class Heads(nn.Module):
    """Many small weights; each output reaches some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(HEADS))
        self.tap = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for start in range(0, HEADS, PER_OUTPUT):
            if start == HEADS // 2:
                x = self.tap(x)
            outputs.append(sum(head(x[:, :2]) for head in self.heads[start : start + PER_OUTPUT]))
        return tuple(outputs)
