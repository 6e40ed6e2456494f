"""Random weights. In eval mode, as all cases: what they do in training is random, and in test_noise.py."""

from __future__ import annotations

from catalogue.cases.common import Case

from fxparam import catalogue as cat

CASES = [
    Case(cat.Noise(std=0.5), (4, 3), lambda _, x: x, exact=True, nodes=0),
    Case(cat.Noise(std=0.5, relative=True, resample="step"), (2, 3, 2), lambda _, x: x, exact=True, nodes=0),
    *(
        Case(entry, shape, lambda _, mean, rho: mean, latents=(shape, shape), exact=True, nodes=0, second="none of the spread")
        for entry, shape in ((cat.Variational(), (4, 3)), (cat.Variational(0.2, "call"), (5,)))
    ),
]
