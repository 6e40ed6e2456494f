"""Weights made from checkpoints and by networks. What a trained hypernetwork makes is in test_generation.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from catalogue.cases.common import Case, bump
from torch import Tensor

from fxparam import catalogue as cat

ONE = [[0.5, -1.25, 2.0], [1.5, 0.75, -0.125]]
TWO = [[-1.0, 0.25, 1.0], [0.375, 2.5, 0.5]]
THREE = [[0.25, 0.5, -2.0], [1.0, -0.5, 3.0]]


def _mixed(module: Any, c: Tensor) -> Tensor:
    total = torch.zeros(2, 3, dtype=c.dtype)
    for number, values in enumerate((ONE, TWO, THREE)[: len(c)]):
        total = total + c[number] * torch.tensor(values, dtype=c.dtype)
    return total


def _averaged(module: Any, c: Tensor) -> Tensor:
    powers = [torch.exp(one - c.detach().max()) for one in c]
    whole = powers[0] + powers[1] + powers[2]
    return _mixed(module, torch.stack([power / whole for power in powers]))


def _stepped(module: Any, c: Tensor) -> Tensor:
    start = module.origin.reshape(2, 3)
    steps = [torch.tensor(values, dtype=c.dtype) - start for values in (ONE, TWO)]
    return start + c[0] * steps[0] + c[1] * steps[1]


def network(module: Any, z: Tensor) -> Tensor:
    """Layer by layer, chunk by chunk, unit by unit."""
    elements: list[Tensor] = []
    for embedding in z:
        units = list(embedding)
        for layer, (matrix, bias) in enumerate(zip(module.weights, module.biases, strict=True)):
            inputs = [torch.tanh(unit) for unit in units] if layer else units
            units = [
                sum((matrix[row, column] * inputs[column] for column in range(len(inputs))), bias[row])
                for row in range(len(matrix))
            ]
        elements += units
    made = torch.stack(elements[: math.prod(module.shapes[0])])
    return (module.origin + made).reshape(module.shapes[0])


CASES = [
    Case(cat.Mixture((ONE, TWO, THREE)), (2, 3), _mixed, bump, latents=((3,),), nodes=4),
    Case(cat.Mixture([ONE, TWO, THREE], normalize=True), (2, 3), _averaged, bump, latents=((3,),), nodes=5),
    Case(cat.Mixture([ONE, TWO], origin=True), (2, 3), _stepped, bump, latents=((2,),), nodes=5),
    Case(cat.Hypernetwork(dim=3, hidden=(5,), chunk=4), (2, 5), network, latents=((3, 3),), nodes=9),
    Case(cat.Hypernetwork(dim=2, hidden=(), seed=3), (3, 2, 2), network, latents=((3, 2),), nodes=7),
]
