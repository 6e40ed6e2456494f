"""Elements of at least 0 with given sums."""

from __future__ import annotations

from typing import Any

import torch
from catalogue.cases.common import Case, bump
from torch import Tensor

from fxparam import catalogue as cat


def _softmax(module: Any, x: Tensor) -> Tensor:
    parts = [torch.exp(part) for part in x.unbind(module.dim)]
    return torch.stack([part / sum(parts) for part in parts], module.dim)


def _sinkhorn(module: Any, x: Tensor) -> Tensor:
    """Row and column sums divided away in turn, then algorithm 2 of Altschuler et al., a matrix at a time."""
    if x.ndim > 2:
        return torch.stack([_sinkhorn(module, part) for part in x])
    n = len(x)
    k = torch.exp(x / module.temperature)
    for _ in range(module.iterations):
        k = torch.stack([row / row.sum() for row in k])
        k = torch.stack([column / column.sum() for column in k.unbind(1)], 1)
    k = torch.stack([row * torch.clamp(1 / row.sum(), max=1) for row in k])
    k = torch.stack([column * torch.clamp(1 / column.sum(), max=1) for column in k.unbind(1)], 1)
    rows, columns = 1 - k.sum(1), 1 - k.sum(0)
    missing = float(rows.detach().abs().sum())
    if missing < 1e-13:
        return k
    return torch.stack([torch.stack([k[i, j] + rows[i] * columns[j] / rows.sum() for j in range(n)]) for i in range(n)])


CASES = [
    Case(cat.Simplex(), (4, 3), _softmax, bump),
    Case(cat.Simplex(dim=1), (2, 4, 3), _softmax, torch.neg),
    Case(cat.Simplex(dim=0), (5,), _softmax, lambda w: 2 * w),
    Case(cat.RowStochastic(), (4, 3), _softmax, bump),
    Case(cat.RowStochastic(), (2, 3, 4), _softmax, torch.neg),
    Case(cat.DoublyStochastic(), (4, 4), _sinkhorn, bump, nodes=55),
    Case(cat.DoublyStochastic(iterations=3, temperature=0.5), (2, 3, 3), _sinkhorn, torch.neg, nodes=21),
    Case(cat.DoublyStochastic(iterations=1), (3, 3), _sinkhorn, bump, nodes=17),
    Case(cat.Permutation(), (3, 3), _sinkhorn, bump, nodes=55),
    Case(cat.Permutation(temperature=0.3, iterations=60), (2, 4, 4), _sinkhorn, bump, nodes=135),
]
