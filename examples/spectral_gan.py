"""A GAN on a ring of Gaussians whose discriminator has spectral norm (Miyato et al. 2018), in micro-batches.

The discriminator runs on real and generated points in several micro-batches for each optimizer step. Its weights are computed
once for all of them, and the power iteration advances once, as it would with one large batch.
"""

from __future__ import annotations

import math
import os
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxparam as fxp

QUICK = os.environ.get("FXPARAM_EXAMPLE_QUICK", "") not in ("", "0")
STEPS = 20 if QUICK else 1000
MICRO_BATCHES, SIZE = 4, 64


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.LeakyReLU(0.1))]
    return nn.Sequential(*layers[:-1])


def real(count: int) -> Tensor:
    """Points near eight places on the unit circle."""
    angle = torch.randint(8, (count,)) * (math.pi / 4)
    return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(count, 2)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = mlp(8, 64, 64, 2)
    discriminator = fxp.transform(mlp(2, 64, 64, 1), {fxp.where(nn.Linear): fxp.spectral_norm()})
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.9))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))

    for _ in range(STEPS):
        d_optimizer.zero_grad()
        for _ in range(MICRO_BATCHES):
            fake = generator(torch.randn(SIZE, 8)).detach()
            loss = F.softplus(-discriminator(real(SIZE))) + F.softplus(discriminator(fake))
            (loss.mean() / MICRO_BATCHES).backward()
        d_optimizer.step()

        g_optimizer.zero_grad()
        F.softplus(-discriminator(generator(torch.randn(SIZE, 8)))).mean().backward()
        g_optimizer.step()

    stats = discriminator.stats
    runs = stats.refreshes + stats.hits
    print(f"{STEPS} steps: the discriminator ran {runs:,} times, its weights were computed {stats.refreshes:,} times")
    points = generator(torch.randn(1000, 8)).detach()
    print(f"distance of generated points from the circle: {(points.norm(dim=1) - 1).abs().mean():.3f} on average")
    largest = [torch.linalg.matrix_norm(weight, 2).item() for weight in discriminator.eval().weights().values()]
    print("largest singular values:", ", ".join(f"{value:.3f}" for value in largest))


if __name__ == "__main__":
    main()
