"""Weights on a grid, ternary and binary weights, each with the gradient that its paper states."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from catalogue.cases.common import Case, bump
from torch import Tensor

from fxparam import catalogue as cat


class _Through(torch.autograd.Function):
    """The second tensor, with the gradient given to the first."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, weight: Tensor) -> Tensor:
        return weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _through(one: Callable[[Any, list[float]], list[float]]) -> Callable[[Any, Tensor], Tensor]:
    """The oracle that makes the elements of each slice by ``one``."""

    def oracle(module: Any, x: Tensor) -> Tensor:
        parts = [x] if module.dim is None else x.unbind(module.dim)
        made = [torch.tensor(one(module, part.flatten().tolist()), dtype=x.dtype).reshape(part.shape) for part in parts]
        return _Through.apply(x, made[0] if module.dim is None else torch.stack(made, module.dim))

    return oracle


@_through
def _symmetric(module: Any, row: list[float]) -> list[float]:
    step = max(abs(v) for v in row) / (2 ** (module.bits - 1) - 1)
    return [round(v / step) * step for v in row]


@_through
def _affine(module: Any, row: list[float]) -> list[float]:
    low, high = min(0.0, *row), max(0.0, *row)
    step = (high - low) / (2**module.bits - 1)
    zero = -(2 ** (module.bits - 1)) - round(low / step)
    integers = [min(round(v / step) + zero, 2 ** (module.bits - 1) - 1) for v in row]
    return [(q - zero) * step for q in integers]


@_through
def _ternary(module: Any, row: list[float]) -> list[float]:
    mean = sum(abs(v) for v in row) / len(row)
    kept = [abs(v) for v in row if abs(v) > module.threshold * mean]
    alpha = sum(kept) / len(kept) if module.scale == "kept" else mean
    return [math.copysign(alpha, v) if abs(v) > module.threshold * mean else 0.0 for v in row]


@_through
def _binary(module: Any, row: list[float]) -> list[float]:
    alpha = sum(abs(v) for v in row) / len(row)
    return [alpha if v >= 0 else -alpha for v in row]


class _Lsq(torch.autograd.Function):
    """One slice by eqs. 1 and 2 of Esser et al. 2020, with the gradients of eqs. 3 and 5 and the factor of section 2.2."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, step: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(row, step)
        ctx.qn, ctx.qp = 2 ** (bits - 1), 2 ** (bits - 1) - 1
        return torch.stack([torch.round(torch.clip(v / step, -ctx.qn, ctx.qp)) * step for v in row])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        row, step = ctx.saved_tensors
        to_row, to_step = torch.zeros_like(row), torch.zeros_like(step)
        for i, v in enumerate(row):
            unit = v / step
            if unit <= -ctx.qn:
                to_step -= grad[i] * ctx.qn
            elif unit >= ctx.qp:
                to_step += grad[i] * ctx.qp
            else:
                to_row[i] = grad[i]
                to_step += grad[i] * (-unit + torch.round(unit))
        return to_row, to_step / math.sqrt(len(row) * ctx.qp), None


def _lsq(module: Any, x: Tensor, step: Tensor) -> Tensor:
    parts = [x] if module.dim is None else x.unbind(module.dim)
    made = [
        _Lsq.apply(part.flatten(), s, module.bits).reshape(part.shape) for part, s in zip(parts, step.reshape(-1), strict=True)
    ]
    return made[0] if module.dim is None else torch.stack(made, module.dim)


def _learned(entry: cat.LearnedStep, shape: tuple[int, ...], step: tuple[int, ...]) -> Case:
    """Steps of about a tenth, at which few bits are clipped."""
    return Case(
        entry,
        shape,
        _lsq,
        bump,
        latents=(shape, step),
        nodes=15,
        adjust=lambda latents: (latents[0], latents[1].abs() / 10),
        gradient=_WHY,
    )


_WHY = "straight-through"

CASES = [
    Case(cat.FakeQuantize(), (4, 3), _symmetric, bump, gradient=_WHY),
    Case(cat.FakeQuantize(bits=4, dim=1), (2, 3, 4), _symmetric, bump, gradient=_WHY),
    Case(cat.FakeQuantize(bits=2), (5,), _symmetric, bump, gradient=_WHY),
    Case(cat.FakeQuantize(bits=16, dim=-2), (2, 3, 2), _symmetric, bump, gradient=_WHY),
    Case(cat.FakeQuantize(symmetric=False), (4, 3), _affine, bump, gradient=_WHY, nodes=31),
    Case(cat.FakeQuantize(bits=3, dim=0, symmetric=False), (3, 2, 4), _affine, bump, gradient=_WHY, nodes=31),
    _learned(cat.LearnedStep(), (4, 3), ()),
    _learned(cat.LearnedStep(bits=3, dim=0), (4, 3), (4, 1)),
    _learned(cat.LearnedStep(bits=4, dim=1), (2, 3, 4), (1, 3, 1)),
    _learned(cat.LearnedStep(bits=2), (7,), ()),
    Case(cat.Ternary(), (4, 3), _ternary, bump, gradient=_WHY, nodes=16),
    Case(cat.Ternary(threshold=0.3, dim=1), (2, 3, 4), _ternary, bump, gradient=_WHY, nodes=16),
    Case(cat.Ternary(threshold=0.5, scale="absmean"), (5, 2), _ternary, bump, gradient=_WHY),
    Case(cat.Ternary(threshold=0.5, dim=0, scale="absmean"), (3, 4), _ternary, bump, gradient=_WHY),
    Case(cat.Binary(), (4, 3), _binary, bump, gradient=_WHY),
    Case(cat.Binary(dim=-1), (2, 4, 3), _binary, bump, gradient=_WHY),
    Case(cat.Binary(dim=None), (6,), _binary, bump, gradient=_WHY),
]
