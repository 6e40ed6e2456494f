"""How many dimensions does a task need? All weights of a network move in a random subspace through their start.

Li, Farkhoor, Liu and Yosinski 2018, *Measuring the Intrinsic Dimension of Objective Landscapes*: one vector of a few numbers is
all that trains; the sizes at which the accuracy stops rising tell the intrinsic dimension.
"""

from __future__ import annotations

import os

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fxparam as fxp

QUICK = os.environ.get("FXPARAM_EXAMPLE_QUICK", "") not in ("", "0")
DIMENSIONS = (4, 16) if QUICK else (4, 16, 64, 256)
STEPS = 20 if QUICK else 300


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.readout = nn.Linear(32, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.readout(F.relu(self.hidden(pixels)))


def accuracy_in(dim: int, pixels: Tensor, digits: Tensor) -> float:
    """Train in ``dim`` dimensions on the first 1,300 images; the accuracy on the others."""
    torch.manual_seed(0)
    model = fxp.transform(Classifier(), {fxp.joint("*"): fxp.subspace(dim=dim)})
    assert sum(latent.numel() for latent in model.parameters()) == dim
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(pixels[:1300]), digits[:1300]).backward()
        optimizer.step()
    plain = fxp.fold(model)  # the subspace is gone: an ordinary network
    return (plain(pixels[1300:]).argmax(1) == digits[1300:]).float().mean().item()


def main() -> None:
    torch.set_num_threads(1)
    data = load_digits()
    pixels, digits = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    for dim in DIMENSIONS:
        print(f"{dim:4} dimensions: test accuracy {accuracy_in(dim, pixels, digits):.1%}")


if __name__ == "__main__":
    main()
