"""Relatives of the orthogonal matrices: rotations, unitary matrices, subspaces, and matrices that are nearly orthogonal.

Maps, latents and bases are those of ``fxparam.catalogue.orthogonal``. Rotations, subspaces and nearly orthogonal matrices
give the numbers of GeoTorch's ``SO``, ``Grassmannian`` and ``AlmostOrthogonal`` for the same latents and bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fxparam.catalogue._image import (
    Constrained,
    check_choice,
    check_flag,
    check_floating,
    check_matrix,
    check_number,
    rounding,
    shape_text,
    stored,
    widened,
)
from fxparam.catalogue._orthogonal_maps import completed, orthonormalized, real_dtype, rotation, rotation_rounding
from fxparam.catalogue.orthogonal import RETRACTIONS, OrthogonalMap, check_iterations, check_rebasing, tall
from fxparam.declaration import Entry
from fxparam.errors import SpecError

_ROTATIONS = ("matrix_exp", "cayley")
_SQUASHES = ("sin", "tanh", "scaled_sigmoid")


@dataclass(frozen=True, repr=False)
class SpecialOrthogonal(Entry):
    """``Wᵀ W = I`` with determinant 1: rotations, ``W = base · Q`` with ``Q`` from the strictly lower triangle of the latent.

    A weight of determinant -1 is refused; its projection is the nearest rotation. Latents near the largest number lose what
    ``orthogonal`` says they lose.

    Args:
        map: ``"matrix_exp"`` or ``"cayley"``.
        use_trivialization: whether to multiply with the buffer ``base``, which holds the start.
        rebase_every: after how many optimizer steps the weight becomes the base, as of ``orthogonal``; None: never.

    Raises:
        SpecError: another map, ``rebase_every`` without a trivialization; at build, the weight is not square or not
            floating-point.
    """

    name: ClassVar[str] = "special_orthogonal"
    map: str = "matrix_exp"
    use_trivialization: bool = True
    rebase_every: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.name, "map", self.map, _ROTATIONS)
        check_flag(self.name, "use_trivialization", self.use_trivialization)
        check_rebasing(self.name, self.rebase_every, trivialized=self.use_trivialization)

    def build(self, weight: Tensor) -> SpecialOrthogonalMap:
        """The map for ``(..., n, n)``."""
        check_floating(self.name, weight)
        check_matrix(self.name, weight, square=True)
        return SpecialOrthogonalMap(weight, self.map, use_trivialization=self.use_trivialization).rebased(self.rebase_every)


class SpecialOrthogonalMap(OrthogonalMap):
    """Orthogonal matrices of determinant 1."""

    constraint = "being a rotation (the largest |element| of WᵀW - I; 2 if the determinant is -1)"
    _origin = 0.0

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The nearest rotation in the Frobenius norm (Kabsch 1976); unchanged if in the image.

        ``U diag(1, ..., 1, ±1) Vᵀ`` of the singular value decomposition.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        u, _, vh = torch.linalg.svd(widened(weight))
        # The smallest singular value, the last, costs least to turn around.
        u[..., -1] *= torch.where(torch.linalg.det(u @ vh) < 0, -1.0, 1.0).to(u.dtype).unsqueeze(-1)
        return (u @ vh).to(weight.dtype)

    def _rotations_only(self) -> bool:
        return True


@dataclass(frozen=True, repr=False)
class Unitary(Entry):
    """``Wᴴ W = I`` for complex weights, tall and square, and ``W Wᴴ = I`` for wide ones: ``orthogonal`` for complex numbers.

    Args:
        map: ``"matrix_exp"``, ``"cayley"``, ``"qr"``, ``"polar"`` or ``"newton_schulz"``, as of ``orthogonal``.
        use_trivialization: whether the first two multiply with the buffer ``base``, which holds the start.
        iterations: the steps of ``newton_schulz``, by default 25.
        rebase_every: after how many optimizer steps the weight becomes the base, as of ``orthogonal``; None: never.

    Raises:
        SpecError: another map, ``iterations`` below 1 or for another map, ``rebase_every`` without a trivialization; at
            build, the weight is no matrix or batch of matrices, or is not complex.
    """

    name: ClassVar[str] = "unitary"
    map: str = "matrix_exp"
    use_trivialization: bool = True
    iterations: int | None = None
    rebase_every: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.name, "map", self.map, (*_ROTATIONS, *RETRACTIONS))
        check_flag(self.name, "use_trivialization", self.use_trivialization)
        check_iterations(self.name, self.map, self.iterations)
        check_rebasing(self.name, self.rebase_every, trivialized=self.use_trivialization and self.map not in RETRACTIONS)

    def build(self, weight: Tensor) -> UnitaryMap:
        """The map for ``(..., m, n)``."""
        if not weight.is_complex():
            raise SpecError(
                f"unitary: got a weight of dtype {weight.dtype}; expected a complex dtype; for a real weight "
                "type fxp.orthogonal(...)"
            )
        check_matrix(self.name, weight)
        module = UnitaryMap(weight, self.map, use_trivialization=self.use_trivialization, iterations=self.iterations)
        return module.rebased(self.rebase_every)


class UnitaryMap(OrthogonalMap):
    """Complex matrices with orthonormal columns (rows, if there are more columns than rows)."""

    _origin = 0.0


@dataclass(frozen=True, repr=False)
class Grassmann(Entry):
    """A subspace, as an orthonormal basis of it: ``W = base · exp([[0, -Bᴴ], [B, 0]])[:, :k]`` for a tall weight.

    What trains is the column space of ``W`` (row space of a wide weight): ``B``, the rows of the latent below the first
    ``k``, moves it, and no movement turns the basis within it. The first rows of the latent are not read. Only what does not
    depend on the choice of the basis, such as ``W Wᴴ``, is a function of the subspace (Edelman, Arias and Smith 1998).
    Latents near the largest number lose what ``orthogonal`` says they lose.

    Args:
        map: ``"matrix_exp"``, or ``"cayley"`` for the Cayley transform in its place.
        rebase_every: after how many optimizer steps the weight becomes the base, as of ``orthogonal``; None: never.

    Raises:
        SpecError: another map, ``rebase_every`` below 1; at build, the weight is no matrix or batch of matrices, is square,
            or is neither floating-point nor complex.
    """

    name: ClassVar[str] = "grassmann"
    map: str = "matrix_exp"
    rebase_every: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.name, "map", self.map, _ROTATIONS)
        check_rebasing(self.name, self.rebase_every, trivialized=True)

    def build(self, weight: Tensor) -> GrassmannMap:
        """The map for ``(..., m, n)``, ``m != n``."""
        if not weight.is_complex():
            check_floating(self.name, weight)
        check_matrix(self.name, weight)
        if weight.shape[-2] == weight.shape[-1]:
            raise SpecError(
                f"grassmann: got a square weight of shape {shape_text(weight)}, whose columns span everything; expected more "
                "rows than columns or more columns than rows; for a square weight type fxp.orthogonal()"
            )
        return GrassmannMap(weight, self.map).rebased(self.rebase_every)


class GrassmannMap(OrthogonalMap):
    """Orthonormal bases of subspaces; every orthonormal basis is in the image, and becomes the base."""

    _origin = 0.0

    def _read(self, x: Tensor) -> Tensor:
        k = x.shape[-1]
        return F.pad(x[..., k:, :], (0, 0, k, 0))


@dataclass(frozen=True, repr=False)
class AlmostOrthogonal(Entry):
    """Singular values between ``1 - spread`` and ``1 + spread``: ``W = U diag(1 + spread · squash(s)) Vᴴ``.

    ``U = left · Q`` and ``V = right · Q'``, with ``Q`` from the strictly lower triangle of the (tall) latent, ``Q'`` from its
    strictly upper triangle and ``s`` on its diagonal. At a bound the derivative of every squash is zero, so that a singular
    value that starts there stays. Latents near the largest number lose what ``orthogonal`` says they lose.

    Args:
        spread: the radius of the interval, above 0 and at most 1.
        squash: ``"sin"``, ``"tanh"`` or ``"scaled_sigmoid"`` (``tanh(s / 2)``).
        map: ``"matrix_exp"`` or ``"cayley"``, for both rotations.

    Raises:
        SpecError: ``spread`` is out of range, another squash or map; at build, the weight is no matrix or batch of matrices,
            or is neither floating-point nor complex.
    """

    name: ClassVar[str] = "almost_orthogonal"
    spread: float
    squash: str = "sin"
    map: str = "matrix_exp"

    def __post_init__(self) -> None:
        check_number(self.name, "spread", self.spread)
        if not 0 < self.spread <= 1:
            raise SpecError(f"almost_orthogonal: got spread={self.spread}; expected 0 < spread <= 1")
        check_choice(self.name, "squash", self.squash, _SQUASHES)
        check_choice(self.name, "map", self.map, _ROTATIONS)

    def build(self, weight: Tensor) -> AlmostOrthogonalMap:
        """The map for ``(..., m, n)``."""
        if not weight.is_complex():
            check_floating(self.name, weight)
        check_matrix(self.name, weight)
        return AlmostOrthogonalMap(weight, self)


class AlmostOrthogonalMap(Constrained):
    """Matrices whose singular values are near 1."""

    constraint = "having singular values within the spread around 1"
    left: Tensor
    right: Tensor

    def __init__(self, weight: Tensor, entry: AlmostOrthogonal) -> None:
        super().__init__(weight)
        self.spread, self.squash, self.map = entry.spread, entry.squash, entry.map
        for name, size in (("left", max(weight.shape[-2:])), ("right", min(weight.shape[-2:]))):
            base = torch.eye(size, dtype=weight.dtype, device=weight.device).expand(*weight.shape[:-2], size, size)
            self.register_buffer(name, base.clone())

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., m, n)`` to the same."""
        wide = latent.shape[-2] < latent.shape[-1]
        x = widened(latent.mT if wide else latent)
        k = x.shape[-1]
        u = widened(self.left) @ rotation(x.tril(-1), self.map)
        v = widened(self.right) @ rotation(x[..., :k, :].triu(1).mT, self.map)
        s = x.diagonal(dim1=-2, dim2=-1)
        s = s.real if s.is_complex() else s
        values = 1 + self.spread * _squashed(s, self.squash)
        weight = (u * values.unsqueeze(-2)) @ v.mH
        return stored(weight.mT if wide else weight, latent.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """By how much a singular value exceeds the interval."""
        values = torch.linalg.svdvals(widened(weight))
        return ((values - 1).abs() - self.spread).amax().clamp(min=0)

    def tolerance(self, weight: Tensor) -> float:
        """Rounding of products of ``max(m, n)`` terms; storing adds noise whose norm grows like ``√m + √n``."""
        m, n = weight.shape[-2:]
        dtype = real_dtype(weight.dtype)
        return rounding(dtype, max(m, n)) + torch.finfo(dtype).eps * (m**0.5 + n**0.5) + rotation_rounding(self.map, dtype)

    def invert(self, weight: Tensor) -> Tensor:
        """The diagonal from the singular values; ``left`` and ``right`` become the singular vectors.

        A singular value on a bound that the squash does not reach starts at the last number below it.
        """
        q = tall(weight)
        u, s, vh = torch.linalg.svd(widened(q), full_matrices=False)
        self.left.copy_(completed(u))
        self.right.copy_(vh.mH)
        latent = torch.zeros_like(q)
        latent.diagonal(dim1=-2, dim2=-1).copy_(_unsquashed((s - 1) / self.spread, self.squash))
        return (latent.mT if q is not weight else latent).contiguous()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """Singular values clipped to the interval: the nearest in the Frobenius norm; unchanged if in the image."""
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        u, s, vh = torch.linalg.svd(widened(weight), full_matrices=False)
        clipped = s.clamp(1 - self.spread, 1 + self.spread)
        return ((u * clipped.unsqueeze(-2)) @ vh).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Haar distributed singular vectors; singular values independent and uniform in the interval."""
        *batch, m, n = self.shape
        k = min(m, n)
        u, v = (orthonormalized(self.normal(*batch, size, k, generator=generator)) for size in (m, n))
        angle = self.normal(*batch, k, generator=generator).real
        # The distribution function of the normal numbers makes them uniform.
        values = 1 + self.spread * torch.erf(angle / (1 if self._like.is_complex() else 2**0.5))
        return ((u * values.unsqueeze(-2)) @ v.mH).to(self._like.dtype)

    def extra_repr(self) -> str:
        """The options."""
        return f"spread={self.spread}, squash={self.squash!r}, map={self.map!r}"


def _squashed(s: Tensor, squash: str) -> Tensor:
    """Numbers between -1 and 1."""
    if squash == "sin":
        return s.sin()
    return s.tanh() if squash == "tanh" else (0.5 * s).tanh()


def _unsquashed(values: Tensor, squash: str) -> Tensor:
    """Where ``_squashed`` gives ``values``, which rounding may have brought out of the interval from -1 to 1."""
    if squash == "sin":
        return values.clamp(-1, 1).asin()
    largest = 1 - torch.finfo(values.dtype).eps / 2
    inverse = values.clamp(-largest, largest).atanh()
    return inverse if squash == "tanh" else 2 * inverse
