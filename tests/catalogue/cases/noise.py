"""Random weights. In eval mode, as all cases: what they do in training is random, and in test_noise.py."""

from __future__ import annotations

from catalogue.cases.common import Case

from fxparam import catalogue as cat

CASES = [
    Case(cat.Noise(std=0.5), (4, 3), lambda _, x: x, exact=True, nodes=0),
    Case(cat.Noise(std=0.5, relative=True, resample="step"), (2, 3, 2), lambda _, x: x, exact=True, nodes=0),
    Case(cat.Variational(), (4, 3), lambda _, mean, rho: mean, latents=((4, 3), (4, 3)), exact=True, nodes=0),
    Case(cat.Variational(0.2, "call"), (5,), lambda _, mean, rho: mean, latents=((5,), (5,)), exact=True, nodes=0),
]
