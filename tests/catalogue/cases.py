"""One table of cases for the catalogue: an entry, a shape, and the same map written down plainly as its oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxparam import catalogue as cat
from fxparam.declaration import Entry

Oracle = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One entry on one shape.

    Attributes:
        entry: the declaration.
        shape: the weight's shape.
        oracle: ``(module, *latents) -> weight``, written independently of the catalogue.
        outside: turns a weight in the image into one that is not; None where every finite weight is in the image.
        latents: the shapes of the latents, if not one of the weight's shape.
        exact: whether the right inverse gives the weight back bit for bit.
        invertible: whether there is a right inverse at all.
        growth: by how much rounding may grow with latents of size 1000.
        nodes: how many operations a trace may have; 0: none, for the weight is a latent.
    """

    entry: Entry
    shape: tuple[int, ...]
    oracle: Oracle
    outside: Callable[[Tensor], Tensor] | None = None
    latents: tuple[tuple[int, ...], ...] = ()
    exact: bool = False
    invertible: bool = True
    growth: float = 1.0
    nodes: int = 12

    def __str__(self) -> str:
        return f"{self.entry!r}-{'x'.join(map(str, self.shape))}"

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """The module for a random weight, in eval mode (in which nothing writes buffers)."""
        return self.entry.build(self.weight(dtype, seed)).eval()

    def weight(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """A random weight, as a layer would have it before."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    def draw(self, seed: int = 1, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Random latents, leaves that require gradients."""
        generator = torch.Generator().manual_seed(seed)
        shapes = self.latents or (self.shape,)
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes)
        return tuple(tensor.to(dtype).requires_grad_() for tensor in drawn)


def _tall(oracle: Callable[[Tensor], Tensor]) -> Oracle:
    """An oracle for tall matrices as one for all, with the base of a trivialization in front."""

    def whole(module: Any, x: Tensor) -> Tensor:
        wide = x.shape[-2] < x.shape[-1]
        q = oracle(x.transpose(-1, -2) if wide else x)
        if module.base is not None:
            q = torch.einsum("...ij,...jk->...ik", module.base, q)
        return q.transpose(-1, -2) if wide else q

    return whole


def _skew(x: Tensor) -> Tensor:
    n, k = x.shape[-2:]
    row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    square = torch.cat([x, torch.zeros(*x.shape[:-2], n, n - k, dtype=x.dtype)], -1)
    lower = torch.where(row > column, square, 0.0)
    return lower - lower.transpose(-1, -2)


def _exp(x: Tensor) -> Tensor:
    """The series after eight halvings, squared eight times."""
    a = _skew(x) / 256
    term = total = torch.eye(x.shape[-2], dtype=x.dtype).expand_as(a)
    for power in range(1, 20):
        term = term @ a / power
        total = total + term
    for _ in range(8):
        total = total @ total
    return total[..., : x.shape[-1]]


def _cayley(x: Tensor) -> Tensor:
    a, eye = _skew(x), torch.eye(x.shape[-2], dtype=x.dtype)
    return (torch.linalg.inv(eye - a / 2) @ (eye + a / 2))[..., : x.shape[-1]]


def _householder(x: Tensor) -> Tensor:
    n, k = x.shape[-2:]
    eye = torch.eye(n, dtype=x.dtype)
    product = eye.expand(*x.shape[:-2], n, n)
    for j in range(k):
        v = torch.where(torch.arange(n) > j, x[..., j], eye[j])
        product = product @ (eye - 2 * v[..., :, None] * v[..., None, :] / (v * v).sum(-1)[..., None, None])
    signs = torch.stack([torch.where(x[..., j, j] < 0, -1.0, 1.0).to(x.dtype) for j in range(k)], -1)
    return product[..., :k] * signs[..., None, :]


def _weight_norm(module: Any, g: Tensor, v: Tensor) -> Tensor:
    if module.dim == -1:
        return g * v / (v * v).sum().sqrt()
    slices = zip(g.unbind(module.dim), v.unbind(module.dim), strict=True)
    return torch.stack([norm * part / (part * part).sum().sqrt() for norm, part in slices], module.dim)


def _spectral_norm(module: Any, x: Tensor) -> Tensor:
    if x.ndim == 1:
        return x / (x * x).sum().sqrt()
    rows = torch.stack([part.reshape(-1) for part in x.unbind(module.dim)])
    return x / (module._u[:, None] * rows * module._v[None, :]).sum()


def _unit_norm(module: Any, x: Tensor) -> Tensor:
    if module.p == math.inf:
        return x / x.abs().amax(module.dim, keepdim=True)
    return x / (x.abs() ** module.p).sum(module.dim, keepdim=True) ** (1 / module.p)


def _triangles(x: Tensor) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    return row, column


def _symmetric(_: Any, x: Tensor) -> Tensor:
    row, column = _triangles(x)
    return torch.where(row <= column, x, x.transpose(-1, -2))


def _skew_weight(_: Any, x: Tensor) -> Tensor:
    row, column = _triangles(x)
    return torch.where(row < column, x, torch.where(row > column, -x.transpose(-1, -2), 0.0))


def _positive_definite(_: Any, x: Tensor) -> Tensor:
    row, column = _triangles(x)
    factor = torch.where(row > column, x, torch.where(row == column, torch.log1p(torch.exp(x)), 0.0))
    return torch.einsum("...ij,...kj->...ik", factor, factor)


def _bounded(module: Any, x: Tensor) -> Tensor:
    return module.low + (module.high - module.low) / (1 + torch.exp(-2 * x))


def _subspace(module: Any, d: Tensor) -> Tensor:
    return ((module.basis * d).sum(1) + module.origin).reshape(module.shapes[0])


def _bump(weight: Tensor) -> Tensor:
    """One element off."""
    bumped = weight.clone()
    bumped[(0,) * weight.ndim] += 0.5
    return bumped


def _crossed(weight: Tensor) -> Tensor:
    """An element off the diagonal, on one side only."""
    bumped = weight.clone()
    bumped[..., 0, 1] += 0.5
    return bumped


_ORACLES = {"matrix_exp": _exp, "cayley": _cayley, "householder": _householder}
_KEEP = [[1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]]

ORTHOGONAL = [
    Case(
        cat.Orthogonal(map=name, use_trivialization=trivial),
        shape,
        _tall(_ORACLES[name]),
        _bump,
        exact=trivial,
        invertible=trivial or name != "matrix_exp" or shape[-1] == shape[-2],
        growth=2e4,
        nodes=16,
    )
    for name in _ORACLES
    for trivial in (True, False)
    for shape in [(4, 4), (5, 3), (2, 1, 3, 4)] + [(1, 1), (3, 5), (2, 4, 4)] * trivial
]

CASES = [
    *ORTHOGONAL,
    Case(cat.Orthogonal(), (4, 4), _tall(_exp), _bump, exact=True, growth=2e4),
    Case(cat.Orthogonal(), (5, 3), _tall(_householder), _bump, exact=True, growth=2e4, nodes=14),
    Case(cat.WeightNorm(), (4, 3), _weight_norm, latents=((4, 1), (4, 3))),
    Case(cat.WeightNorm(dim=1), (4, 3, 2), _weight_norm, latents=((1, 3, 1), (4, 3, 2))),
    Case(cat.WeightNorm(dim=None), (4, 3), _weight_norm, latents=((), (4, 3))),
    Case(cat.WeightNorm(), (5,), _weight_norm, latents=((5,), (5,))),
    Case(cat.SpectralNorm(), (4, 3), _spectral_norm, lambda w: 2 * w),
    Case(cat.SpectralNorm(dim=1, n_power_iterations=2), (3, 4, 2), _spectral_norm, lambda w: 2 * w),
    Case(cat.SpectralNorm(), (5,), _spectral_norm, lambda w: 2 * w),
    Case(cat.UnitNorm(), (4, 3), _unit_norm, _bump),
    Case(cat.UnitNorm(dim=0, p=1), (2, 4, 3), _unit_norm, _bump),
    Case(cat.UnitNorm(p=3.5), (5,), _unit_norm, _bump),
    Case(cat.UnitNorm(p=math.inf), (4, 3), _unit_norm, lambda w: 1.5 * w),
    Case(cat.Symmetric(), (4, 4), _symmetric, _crossed, exact=True),
    Case(cat.Symmetric(), (2, 3, 3), _symmetric, _crossed, exact=True),
    Case(cat.Skew(), (4, 4), _skew_weight, _crossed, exact=True),
    Case(cat.Skew(), (2, 3, 3), _skew_weight, _bump, exact=True),
    Case(cat.PositiveDefinite(), (4, 4), _positive_definite, _crossed),
    Case(cat.PositiveDefinite(), (2, 3, 3), _positive_definite, torch.neg),
    Case(cat.Positive(), (4, 3), lambda _, x: torch.log1p(torch.exp(x)), torch.neg),
    Case(cat.Positive(map="exp"), (), lambda _, x: math.e**x, torch.neg),
    Case(cat.Positive(map="square"), (2, 3, 2), lambda _, x: x * x, torch.neg),
    Case(cat.Bounded(), (4, 3), _bounded, lambda w: w + 2),
    Case(cat.Bounded(low=0.1, high=0.7), (5,), _bounded, lambda w: w - 1),
    Case(cat.Scale(factor=-2.5, shift=0.3), (4, 3), lambda _, x: 0.3 - 2.5 * x),
    Case(cat.Scale(factor=0.5, shift=-1.0, trainable=True), (3,), lambda m, x: m.factor * x + m.shift),
    Case(cat.Mask(density=0.5), (4, 3), lambda m, x: torch.where(m.mask > 0, x, 0.0), lambda w: w + 1, exact=True),
    Case(cat.Mask(density=0.3, by="random", seed=3), (2, 5), lambda m, x: m.mask * x, lambda w: w + 1, exact=True),
    Case(cat.Mask(keep=_KEEP), (3, 4), lambda _, x: torch.tensor(_KEEP) * x, lambda w: w + 1, exact=True),
    Case(
        cat.LowRank(2),
        (4, 5),
        lambda _, a, b: torch.einsum("ik,kj->ij", a, b),
        lambda w: w + torch.eye(4, 5, dtype=w.dtype),
        latents=((4, 2), (2, 5)),
    ),
    Case(
        cat.LowRank(1),
        (2, 3, 3),
        lambda _, a, b: (a[..., None] * b[:, None]).sum(2),
        lambda w: w + torch.eye(3, dtype=w.dtype),
        latents=((2, 3, 1), (2, 1, 3)),
    ),
    Case(cat.Transpose(), (4, 3), lambda _, x: torch.einsum("ij->ji", x), latents=((3, 4),), exact=True),
    Case(cat.Transpose(0, -1), (2, 3, 4), lambda _, x: torch.einsum("ijk->kji", x), latents=((4, 3, 2),), exact=True),
    Case(cat.Subspace(3), (4, 5), _subspace, _bump, latents=((3,),), nodes=8),
    Case(cat.Subspace(2, seed=5), (7,), _subspace, _bump, latents=((2,),), nodes=8),
    # In eval mode, as all cases: what they do in training is random, and in test_noise.py.
    Case(cat.Noise(std=0.5), (4, 3), lambda _, x: x, exact=True, nodes=0),
    Case(cat.Noise(std=0.5, relative=True, resample="step"), (2, 3, 2), lambda _, x: x, exact=True, nodes=0),
    Case(cat.Variational(), (4, 3), lambda _, mean, rho: mean, latents=((4, 3), (4, 3)), exact=True, nodes=0),
    Case(cat.Variational(0.2, "call"), (5,), lambda _, mean, rho: mean, latents=((5,), (5,)), exact=True, nodes=0),
    Case(cat.Flat(), (2, 3, 2), lambda _, v: v.reshape(2, 3, 2), latents=((12,),), exact=True, nodes=3),
]
