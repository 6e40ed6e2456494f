"""Matrices with orthonormal columns or rows, ``(..., m, n)``.

A latent ``X``, made tall, gives the skew-Hermitian ``A = tril X - (tril X)ᴴ`` (padded with zeros to a square) and by it
an orthogonal ``Q``, of which the first columns are taken:

- ``matrix_exp``: ``Q = exp(A)`` (Lezcano-Casado and Martínez-Rubio 2019);
- ``cayley``: ``Q = (I - A/2)⁻¹ (I + A/2)`` (Helfrich, Willmott and Ye 2018);
- ``householder``: instead the product of the reflections along the columns of ``tril(X, -1) + I``, each column times
  the sign on the diagonal of ``X`` (Mhammedi et al. 2017).

A *trivialization* is ``W = base · Q`` with a fixed orthogonal ``base``, so that training starts at ``Q = I``
(Lezcano-Casado 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import Constrained, check_choice, check_flag, check_matrix, rounding, stored, widened
from fxparam.catalogue._rotations import inverse_cayley, inverse_exp
from fxparam.declaration import Entry
from fxparam.errors import SpecError

_MAPS = ("matrix_exp", "cayley", "householder")


@dataclass(frozen=True, repr=False)
class Orthogonal(Entry):
    """``Wᵀ W = I`` for tall and square weights, ``W Wᵀ = I`` for wide ones; unitary for complex ones.

    Latent, buffer and numbers are those of ``torch.nn.utils.parametrizations.orthogonal``.

    Args:
        map: ``"matrix_exp"``, ``"cayley"`` or ``"householder"``; by default the first for square or complex weights and
            the last for others.
        use_trivialization: whether to multiply with the buffer ``base``, which holds the start. Without, square weights
            of ``matrix_exp`` and ``cayley`` have determinant 1.

    Raises:
        SpecError: another map; at build, the weight is no matrix or batch of matrices, is neither floating-point nor
            complex, or is complex with ``householder``.
    """

    name: ClassVar[str] = "orthogonal"
    map: str | None = None
    use_trivialization: bool = True

    def __post_init__(self) -> None:
        if self.map is not None:
            check_choice(self.name, "map", self.map, _MAPS)
        check_flag(self.name, "use_trivialization", self.use_trivialization)

    def build(self, weight: Tensor) -> OrthogonalMap:
        """The map for ``(..., m, n)``."""
        if not (weight.is_floating_point() or weight.is_complex()):
            raise SpecError(f"orthogonal: got a weight of dtype {weight.dtype}; expected a floating-point or complex dtype")
        check_matrix(self.name, weight)
        square = weight.shape[-2] == weight.shape[-1]
        chosen = self.map or ("matrix_exp" if square or weight.is_complex() else "householder")
        if weight.is_complex() and chosen == "householder":
            raise SpecError('orthogonal: got map="householder" for a complex weight; expected "matrix_exp" or "cayley"')
        return OrthogonalMap(weight, chosen, use_trivialization=self.use_trivialization)


class OrthogonalMap(Constrained):
    """Orthonormal columns (rows, if there are more columns than rows).

    With ``householder`` the diagonal of the latent carries signs and does not train; any negative number counts as -1,
    any other as 1, so that weight decay on the latent cannot leave the image.
    """

    constraint = "orthonormality (the largest |element| of WᴴW - I)"
    base: Tensor | None

    def __init__(self, weight: Tensor, map: str, *, use_trivialization: bool) -> None:
        super().__init__(weight)
        self.map = map
        n = max(weight.shape[-2:])
        base = torch.eye(n, dtype=weight.dtype, device=weight.device).expand(*weight.shape[:-2], n, n).clone()
        self.register_buffer("base", base if use_trivialization else None)

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., m, n)`` to the same."""
        wide = latent.shape[-2] < latent.shape[-1]
        x = widened(latent.mT if wide else latent)
        q = _reflections(x) if self.map == "householder" else _rotation(x, self.map)
        if self.base is not None:
            q = widened(self.base) @ q
        return stored(q.mT if wide else q, latent.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """The largest element of ``|WᴴW - I|`` (2 for a reflection where only rotations are reached)."""
        q = widened(_tall(weight))
        identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        gap = (q.mH @ q - identity).abs().amax()
        if self._rotations_only() and bool((torch.linalg.det(q) < 0).any()):
            return gap.clamp(min=2)
        return gap

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of products of ``max(m, n)`` terms."""
        return rounding(_real(weight.dtype), max(weight.shape[-2:]))

    def invert(self, weight: Tensor) -> Tensor:
        """The inverse of the map; of a trivialization, -1 on the diagonal, and ``base`` becomes ``weight``."""
        q = _tall(weight)
        if self.base is not None:
            self.base.copy_(_completed(q))
            latent = torch.zeros_like(q)
            # The signs of the householder map; the others do not read the diagonal.
            latent.diagonal(dim1=-2, dim2=-1).fill_(-1)
        elif self.map == "householder":
            latent = _inverse_reflections(widened(q))
        else:
            latent = self._inverse_rotation(q, weight)
        latent = latent.to(weight.dtype)
        return (latent.mT if q is not weight else latent).contiguous()

    def _inverse_rotation(self, q: Tensor, weight: Tensor) -> Tensor:
        wide = q.to(torch.complex128 if q.is_complex() else torch.float64)
        if self.map == "matrix_exp" and q.shape[-2] != q.shape[-1]:
            raise self.refusal(
                weight,
                f"the matrix exponential has no known closed-form inverse for {q.shape[-2]} x {q.shape[-1]} (distance "
                f"0, tolerance {self.tolerance(weight):.3g})",
                '; type orthogonal(map="cayley"), orthogonal(map="householder") or use_trivialization=True',
            )
        skew = inverse_exp(wide) if self.map == "matrix_exp" else inverse_cayley(wide)
        diagonal = skew.diagonal(dim1=-2, dim2=-1)
        latent = skew.tril(-1)
        latent.diagonal(dim1=-2, dim2=-1).copy_(diagonal / 2)
        missed = float((_rotation(latent.to(widened(q).dtype), self.map) - q).abs().amax())
        allowed = 10 * self.tolerance(weight)
        if not missed <= allowed:
            raise self.refusal(
                weight,
                f"its latents miss it by {missed:.3g}, tolerance {allowed:.3g}, for it has an eigenvalue near -1, "
                f"which the {self.map} map does not reach",
                "; type orthogonal(use_trivialization=True), which starts anywhere",
            )
        return latent

    def start(self, weight: Tensor) -> Tensor:
        """As elsewhere, but ``weight`` itself where ``matrix_exp`` has no inverse: not square, no trivialization."""
        m, n = self.shape[-2:]
        if self.map == "matrix_exp" and self.base is None and m != n:
            self.require_finite(weight)
            return weight.detach().clone()
        return super().start(weight)  # type: ignore[return-value]

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The ``Q`` of a QR decomposition whose ``R`` has a positive diagonal, as torch; unchanged if in the image.

        Where only rotations are reached, the last column changes its sign if need be.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        q = _orthonormalized(widened(_tall(weight)))
        if self._rotations_only():
            q[..., -1] *= torch.where(torch.linalg.det(q) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-1)
        return (q.mT if weight.shape[-2] < weight.shape[-1] else q).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Uniform (Haar measure), also among rotations: ``Q`` of a Gaussian matrix, signs corrected (Mezzadri 2007)."""
        q = _orthonormalized(_tall(self.normal(*self.shape, generator=generator)))
        if self._rotations_only():
            q[..., -1] *= torch.where(torch.linalg.det(q) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-1)
        return (q.mT if self.shape[-2] < self.shape[-1] else q).to(self._like.dtype)

    def _rotations_only(self) -> bool:
        square = self.shape[-2] == self.shape[-1]
        return self.base is None and square and self.map != "householder" and not self._like.is_complex()

    def extra_repr(self) -> str:
        """The options."""
        return f"map={self.map!r}, use_trivialization={self.base is not None}"


def _rotation(x: Tensor, map: str) -> Tensor:
    """``exp`` or Cayley transform of the skew-Hermitian matrix with the lower triangle of the tall ``x``."""
    n, k = x.shape[-2:]
    lower = x.tril()
    if n != k:
        lower = torch.cat([lower, lower.new_zeros(n, n - k).expand(*x.shape[:-2], -1, -1)], dim=-1)
    skew = lower - lower.mH
    if map == "matrix_exp":
        q = torch.matrix_exp(skew)
    else:
        identity = torch.eye(n, dtype=skew.dtype, device=skew.device)
        q = torch.linalg.solve(torch.add(identity, skew, alpha=-0.5), torch.add(identity, skew, alpha=0.5))
    return q if n == k else q[..., :k]


def _reflections(x: Tensor) -> Tensor:
    """The product of the reflections along the columns of ``x``: ``(..., n, k)``, tall."""
    vectors = x.tril(diagonal=-1)
    tau = 2.0 / (1.0 + (vectors * vectors).sum(dim=-2))
    diagonal = x.diagonal(dim1=-2, dim2=-1).detach()
    return torch.linalg.householder_product(vectors, tau) * torch.ones_like(diagonal).copysign(diagonal).unsqueeze(-2)


def _inverse_reflections(q: Tensor) -> Tensor:
    """The reflections LAPACK finds for a QR decomposition, with the signs of R on the diagonal."""
    latent, tau = torch.geqrf(q)
    diagonal = latent.diagonal(dim1=-2, dim2=-1)
    # LAPACK skips a reflection by tau = 0 exactly; ours along a zero column is -1 on the diagonal instead.
    diagonal.copy_(torch.where(tau == 0, -diagonal.sign(), diagonal.sign()))
    return latent


def _orthonormalized(a: Tensor) -> Tensor:
    """The Q of ``a = Q R`` with a real positive diagonal of R; ``a`` is tall."""
    packed, tau = torch.geqrf(a)
    signs = packed.diagonal(dim1=-2, dim2=-1).sgn()
    return torch.linalg.householder_product(packed, tau) * torch.where(signs == 0, 1, signs).unsqueeze(-2)


def _completed(q: Tensor) -> Tensor:
    """``q``, bit for bit, with random columns added (torch's draws) until it is square and orthogonal."""
    n, k = q.shape[-2:]
    if n == k:
        return q
    wide = widened(q)
    drawn = torch.randn(*q.shape[:-2], n, n - k, dtype=wide.dtype, device=q.device)
    return torch.cat([q, _orthonormalized(torch.cat([wide, drawn], dim=-1))[..., k:].to(q.dtype)], dim=-1)


def _tall(weight: Tensor) -> Tensor:
    return weight.mT if weight.shape[-2] < weight.shape[-1] else weight


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
