"""Spectral norm: the largest singular value by power iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxparam.catalogue._image import (
    Constrained,
    check_dim,
    check_filled,
    check_floating,
    check_integer,
    check_number,
    computing_dtype,
    rounding,
    shape_text,
    stored,
    widened,
)
from fxparam.catalogue._layers import output_dim
from fxparam.catalogue.norms import directed
from fxparam.declaration import Entry, Place
from fxparam.errors import ImageError, SpecError

_INITIAL_ITERATIONS = 15  # as torch.nn.utils.parametrizations.spectral_norm


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """``(n, rest)``: ``dim`` as rows, the others flattened, in their order, as columns."""
    if dim != 0:
        weight = weight.permute(dim, *(d for d in range(weight.ndim) if d != dim))
    return weight.flatten(1)


@dataclass(frozen=True, repr=False)
class SpectralNorm(Entry):
    """``W = X / σ`` with ``σ = uᵀ X v`` by power iteration (Miyato et al. 2018, algorithm 1).

    Latent, buffers, numbers and random draws are those of ``torch.nn.utils.parametrizations.spectral_norm``. As there, a
    latent of zeros gives 0/0, and one of denormal numbers a ``σ`` without digits.

    Args:
        n_power_iterations: iterations for each evaluation in training mode; none in eval mode.
        eps: the least norm that ``u`` and ``v`` are divided by.
        dim: the dimension that becomes the rows of the matrix; the others become its columns. None: the outputs of the
            layer, 1 for a weight of ``nn.ConvTranspose1d``, ``2d`` and ``3d``, else 0 (also without a layer).

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension or is not floating-point.
    """

    name: ClassVar[str] = "spectral_norm"
    n_power_iterations: int = 1
    eps: float = 1e-12
    dim: int | None = None

    def __post_init__(self) -> None:
        check_integer(self.name, "n_power_iterations", self.n_power_iterations, least=1)
        check_number(self.name, "eps", self.eps)
        if self.eps < 0:
            raise SpecError(f"spectral_norm: got eps={self.eps!r}; expected a number of at least 0")
        if self.dim is not None:
            check_integer(self.name, "dim", self.dim)

    def placed(self, place: Place) -> SpectralNorm:
        """With the dimension of the outputs of this layer, where none is given."""
        return self if self.dim is not None else replace(self, dim=output_dim(place))

    def build(self, weight: Tensor) -> SpectralNormMap:
        """The map for ``weight``, by whose values 15 iterations find the first ``u`` and ``v`` from a random start."""
        check_floating(self.name, weight)
        check_filled(self.name, weight)
        dim = check_dim(self.name, weight, self.dim or 0)
        return SpectralNormMap(weight, self.n_power_iterations, float(self.eps), dim)

    def settle(self, module: nn.Module, value: Tensor) -> None:
        """``u`` and ``v`` of what other maps give, as PyTorch finds them when it registers one after the other."""
        assert isinstance(module, SpectralNormMap)
        module.restart(value)


class SpectralNormMap(Constrained):
    """``σ(W) = 1``: as the vectors ``u``, ``v`` of the moment measure it, or exactly.

    ``contains`` takes both: ``uᵀ W v = 1``, which holds for all that ``forward`` returns, and a largest singular value
    of 1. The right inverse of a weight of the second kind sets ``u`` and ``v`` to its singular vectors. Of a vector,
    the norm; there a vector of zeros counts as one of ones.
    """

    constraint = "a largest singular value of 1"
    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, n_power_iterations: int, eps: float, dim: int) -> None:
        super().__init__(weight)
        self.n_power_iterations, self.eps, self.dim = n_power_iterations, eps, dim
        if weight.ndim > 1:
            for name, size in zip(("_u", "_v"), as_matrix(weight, dim).shape, strict=True):
                self.register_buffer(name, weight.detach().new_empty(size))
            self.restart(weight)

    @torch.no_grad()
    def restart(self, latent: Tensor) -> None:
        """Find ``u`` and ``v`` of ``latent`` from a random start, which is torch's, so that equal seeds give equal vectors."""
        if latent.ndim > 1:
            for vector in (self._u, self._v):
                vector.copy_(F.normalize(vector.normal_(), dim=0, eps=self.eps))
            self._iterate(as_matrix(latent.detach(), self.dim), _INITIAL_ITERATIONS)

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """The weight's shape; in training mode ``u`` and ``v`` advance first."""
        if latent.ndim == 1:
            return stored(directed(widened(latent)), latent.dtype)
        matrix = as_matrix(latent, self.dim)
        if self.training:
            self._iterate(matrix, self.n_power_iterations)
        # Backward through this forward must find the vectors of this forward, also when a later one has moved on.
        u, v = self._u.clone(), self._v.clone()
        return latent / torch.vdot(u, torch.mv(matrix, v))

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, n: int) -> None:
        for _ in range(n):
            F.normalize(torch.mv(matrix, self._v), dim=0, eps=self.eps, out=self._u)
            F.normalize(torch.mv(matrix.mT, self._u), dim=0, eps=self.eps, out=self._v)

    def distance(self, weight: Tensor) -> Tensor:
        """How far the measured or the largest singular value is from 1, whichever is nearer."""
        exact = (self._norm(weight) - 1).abs()
        return exact if weight.ndim == 1 else torch.minimum(self._misjudged(weight), exact)

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of the products."""
        return rounding(weight.dtype, math.isqrt(weight.numel()))

    def invert(self, weight: Tensor) -> Tensor:
        """The weight itself; its singular vectors become ``u`` and ``v`` where these do not measure 1 already."""
        if weight.ndim > 1 and not self._misjudged(weight) <= self.tolerance(weight):
            u, _, vh = torch.linalg.svd(widened(as_matrix(weight, self.dim)), full_matrices=False)
            self._u.copy_(u[:, 0])
            self._v.copy_(vh[0])
        return weight.clone()

    @torch.no_grad()
    def start(self, weight: Tensor) -> Tensor:
        """The weight itself, as torch does: ``forward`` divides by ``σ``.

        Raises:
            ImageError: ``weight`` has another shape, is not finite, or is zero.
        """
        self.require_finite(weight)
        self._require_nonzero(weight)
        return weight.clone()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The weight over its largest singular value (found exactly); unchanged if in the image.

        Raises:
            ImageError: the weight is zero.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        self._require_nonzero(weight)
        return (widened(weight) / self._norm(weight)).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """A matrix of standard normal elements over its largest singular value."""
        drawn = self.normal(*self.shape, generator=generator)
        return (drawn / self._norm(drawn)).to(self._like.dtype)

    def _require_nonzero(self, weight: Tensor) -> None:
        if not weight.any():
            raise ImageError(
                f"SpectralNormMap: the weight of shape {shape_text(weight)} is zero and cannot be scaled to norm 1; "
                "give it a value first, or start from sample()"
            )

    def _norm(self, weight: Tensor) -> Tensor:
        wide = widened(weight)
        return torch.linalg.vector_norm(wide) if wide.ndim == 1 else torch.linalg.matrix_norm(as_matrix(wide, self.dim), 2)

    def _misjudged(self, weight: Tensor) -> Tensor:
        """``|uᵀ W v - 1|``, relative to the weight where ``u`` and ``v`` fit so badly that the sum cancels."""
        wide = computing_dtype(weight.dtype)
        matrix = as_matrix(weight.to(wide), self.dim)
        measured = torch.vdot(self._u.to(wide), torch.mv(matrix, self._v.to(wide)))
        return (measured - 1).abs() / torch.linalg.vector_norm(matrix).clamp(min=1)

    def extra_repr(self) -> str:
        """The options."""
        return f"n_power_iterations={self.n_power_iterations}, eps={self.eps}, dim={self.dim}"
