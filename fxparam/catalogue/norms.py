"""Maps that fix or separate a norm: weight norm, spectral norm, unit norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fxparam.catalogue._image import (
    Constrained,
    Unconstrained,
    check_dim,
    check_filled,
    check_floating,
    check_integer,
    check_number,
    computing_dtype,
    rounding,
    shape_text,
    widened,
)
from fxparam.declaration import Entry
from fxparam.errors import ImageError, SpecError

_INITIAL_ITERATIONS = 15  # as torch.nn.utils.parametrizations.spectral_norm


@dataclass(frozen=True, repr=False)
class WeightNorm(Entry):
    """``W = g · V / ‖V‖`` with one norm for each index of ``dim`` (Salimans and Kingma 2016, eq. 2).

    Latents, numbers and state-dict names are those of ``torch.nn.utils.parametrizations.weight_norm``: ``original0`` is
    ``g`` and ``original1`` is ``V``.

    Args:
        dim: the dimension that keeps a norm for each index; ``None`` or ``-1``: one norm for the whole weight.

    Raises:
        SpecError: ``dim`` is no integer; at build, the weight has no such dimension or is not floating-point.
    """

    name: ClassVar[str] = "weight_norm"
    dim: int | None = 0

    def __post_init__(self) -> None:
        if self.dim is not None:
            check_integer(self.name, "dim", self.dim)

    def build(self, weight: Tensor) -> WeightNormMap:
        """The map for a weight of at least one dimension."""
        check_floating(self.name, weight)
        check_filled(self.name, weight)
        dim = -1 if self.dim is None else self.dim
        # torch's kernel reads -1 as "the whole weight", so no other negative number can mean a dimension.
        if dim < -1:
            raise SpecError(
                f"weight_norm: got dim={dim} for a weight of shape {shape_text(weight)}; expected "
                f"0 <= dim < {weight.ndim}, or None for one norm of the whole weight"
            )
        if dim != -1:
            check_dim(self.name, weight, dim)
        return WeightNormMap(weight, dim)


class WeightNormMap(Unconstrained):
    """``(g, V)`` to ``g · V / ‖V‖``, any finite weight."""

    def __init__(self, weight: Tensor, dim: int) -> None:
        super().__init__(weight)
        self.dim = dim

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:  # type: ignore[override]
        """``g`` of shape ``(1, ..., n, ..., 1)`` (a scalar for the whole weight) and ``V`` of the weight's shape."""
        return torch._weight_norm(weight_v, weight_g, self.dim)

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a norm."""
        return rounding(weight.dtype, weight.numel())

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Norms and the weight itself; a slice of zeros gets norm 0 and the direction of all ones, to be finite."""
        norms = torch.norm_except_dim(weight, 2, self.dim)
        return norms, torch.where(norms == 0, 1.0, weight)

    def extra_repr(self) -> str:
        """The dimension."""
        return f"dim={self.dim}"


@dataclass(frozen=True, repr=False)
class UnitNorm(Entry):
    """``W = X / ‖X‖_p`` along one dimension: rows (or columns, ...) of norm 1.

    Args:
        dim: the dimension over which the norm is taken.
        p: the norm, at least 1; ``inf`` for the largest absolute value.

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension or is not floating-point.
    """

    name: ClassVar[str] = "unit_norm"
    dim: int = -1
    p: float = 2

    def __post_init__(self) -> None:
        check_integer(self.name, "dim", self.dim)
        if self.p != math.inf:
            check_number(self.name, "p", self.p)
            if self.p < 1:
                raise SpecError(f"unit_norm: got p={self.p!r}; expected a number of at least 1, or inf")

    def build(self, weight: Tensor) -> UnitNormMap:
        """The map for a weight of at least one dimension."""
        check_floating(self.name, weight)
        check_filled(self.name, weight)
        check_dim(self.name, weight, self.dim)
        return UnitNormMap(weight, self.dim, float(self.p))


class UnitNormMap(Constrained):
    """``‖W‖_p = 1`` along ``dim``. Latents of norm zero give NaN."""

    constraint = "norm 1 of every slice"

    def __init__(self, weight: Tensor, dim: int, p: float) -> None:
        super().__init__(weight)
        self.dim, self.p = dim, p

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """The weight's shape."""
        return latent / torch.linalg.vector_norm(latent, self.p, self.dim, keepdim=True)

    def distance(self, weight: Tensor) -> Tensor:
        """How far the norm of the worst slice is from 1."""
        return (self._norms(weight) - 1).abs().amax()

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a norm."""
        return rounding(weight.dtype, weight.shape[self.dim])

    def invert(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight.clone()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """Each slice over its norm: the nearest for ``p = 2``; unchanged if in the image.

        Raises:
            ImageError: a slice is zero and has no direction.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        norms = self._norms(weight)
        zeros = int((norms == 0).sum())
        if zeros:
            raise ImageError(
                f"UnitNormMap: {zeros} of {norms.numel()} slices of the weight are zero and have no direction to "
                "scale; give them a value first, or start from sample()"
            )
        return (widened(weight) / norms).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Slices of standard normal elements over their norm: uniform on the sphere for ``p = 2``."""
        drawn = self.normal(*self.shape, generator=generator)
        return (drawn / self._norms(drawn)).to(self._like.dtype)

    def _norms(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(widened(weight), self.p, self.dim, keepdim=True)

    def extra_repr(self) -> str:
        """The options."""
        return f"dim={self.dim}, p={self.p}"


@dataclass(frozen=True, repr=False)
class SpectralNorm(Entry):
    """``W = X / σ`` with ``σ = uᵀ X v`` by power iteration (Miyato et al. 2018, algorithm 1).

    Latent, buffers, numbers and random draws are those of ``torch.nn.utils.parametrizations.spectral_norm``, up to its
    default of ``dim``, which there depends on the layer (1 for transposed convolutions).

    Args:
        n_power_iterations: iterations for each evaluation in training mode; none in eval mode.
        eps: the least norm that ``u`` and ``v`` are divided by.
        dim: the dimension that becomes the rows of the matrix; the others become its columns.

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension or is not floating-point.
    """

    name: ClassVar[str] = "spectral_norm"
    n_power_iterations: int = 1
    eps: float = 1e-12
    dim: int = 0

    def __post_init__(self) -> None:
        check_integer(self.name, "n_power_iterations", self.n_power_iterations, least=1)
        check_number(self.name, "eps", self.eps)
        if self.eps < 0:
            raise SpecError(f"spectral_norm: got eps={self.eps!r}; expected a number of at least 0")
        check_integer(self.name, "dim", self.dim)

    def build(self, weight: Tensor) -> SpectralNormMap:
        """The map for ``weight``, by whose values 15 iterations find the first ``u`` and ``v`` from a random start."""
        check_floating(self.name, weight)
        check_filled(self.name, weight)
        dim = check_dim(self.name, weight, self.dim)
        return SpectralNormMap(weight, self.n_power_iterations, float(self.eps), dim)


class SpectralNormMap(Constrained):
    """``σ(W) = 1``: as the vectors ``u``, ``v`` of the moment measure it, or exactly.

    ``contains`` takes both: ``uᵀ W v = 1``, which holds for all that ``forward`` returns, and a largest singular value
    of 1. The right inverse of a weight of the second kind sets ``u`` and ``v`` to its singular vectors. Of a vector,
    the norm.
    """

    constraint = "a largest singular value of 1"
    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, n_power_iterations: int, eps: float, dim: int) -> None:
        super().__init__(weight)
        self.n_power_iterations, self.eps, self.dim = n_power_iterations, eps, dim
        if weight.ndim > 1:
            matrix = self._matrix(weight.detach())
            # The order of the draws is torch's, so that equal seeds give equal vectors.
            u, v = (matrix.new_empty(size).normal_() for size in matrix.shape)
            self.register_buffer("_u", F.normalize(u, dim=0, eps=eps))
            self.register_buffer("_v", F.normalize(v, dim=0, eps=eps))
            self._iterate(matrix, _INITIAL_ITERATIONS)

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """The weight's shape; in training mode ``u`` and ``v`` advance first."""
        if latent.ndim == 1:
            return F.normalize(latent, dim=0, eps=self.eps)
        matrix = self._matrix(latent)
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

    def _matrix(self, weight: Tensor) -> Tensor:
        if self.dim != 0:
            weight = weight.permute(self.dim, *(d for d in range(weight.ndim) if d != self.dim))
        return weight.flatten(1)

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
            u, _, vh = torch.linalg.svd(widened(self._matrix(weight)), full_matrices=False)
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
        return torch.linalg.vector_norm(wide) if wide.ndim == 1 else torch.linalg.matrix_norm(self._matrix(wide), 2)

    def _misjudged(self, weight: Tensor) -> Tensor:
        """``|uᵀ W v - 1|``, relative to the weight where ``u`` and ``v`` fit so badly that the sum cancels."""
        wide = computing_dtype(weight.dtype)
        matrix = self._matrix(weight.to(wide))
        measured = torch.vdot(self._u.to(wide), torch.mv(matrix, self._v.to(wide)))
        return (measured - 1).abs() / torch.linalg.vector_norm(matrix).clamp(min=1)

    def extra_repr(self) -> str:
        """The options."""
        return f"n_power_iterations={self.n_power_iterations}, eps={self.eps}, dim={self.dim}"
