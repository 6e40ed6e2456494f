"""Matrices with orthonormal columns or rows, ``(..., m, n)``.

A latent ``X``, made tall, gives orthonormal columns ``Q`` by one of the maps of ``_orthogonal_maps``. Those that move a start
by a rotation (``matrix_exp``, ``cayley``, ``householder``) may be multiplied with a fixed orthogonal ``base``: the
*trivialization* ``W = base · Q``, so that training starts at ``Q = I`` (Lezcano-Casado 2019). Those that bring a matrix to
the set (``qr``, ``polar``, ``newton_schulz``) have no use for one: what is orthonormal is its own latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from fxparam.catalogue._image import (
    Constrained,
    check_choice,
    check_flag,
    check_integer,
    check_matrix,
    rounding,
    stored,
    widened,
)
from fxparam.catalogue._orthogonal_maps import (
    completed,
    inverse_reflections,
    newton_schulz,
    orthonormalized,
    polar_factor,
    qr_factor,
    real_dtype,
    reflections,
    rotation,
    rotation_rounding,
)
from fxparam.catalogue._rotations import inverse_cayley, inverse_exp
from fxparam.declaration import Entry
from fxparam.errors import SpecError

MOVES = ("matrix_exp", "cayley", "householder")
"""Maps that move a start."""
RETRACTIONS = ("qr", "polar", "newton_schulz")
"""Maps that bring a matrix to the set, each orthonormal one to itself."""
ITERATIONS = 25


@dataclass(frozen=True, repr=False)
class Orthogonal(Entry):
    """``Wᵀ W = I`` for tall and square weights, ``W Wᵀ = I`` for wide ones; unitary for complex ones.

    With the first three maps, latent, buffer and numbers are those of ``torch.nn.utils.parametrizations.orthogonal``.

    ``matrix_exp`` and ``cayley`` are as accurate as the kernels of PyTorch: rounding grows with the norm of the latent, and
    of a latent near the largest number nothing orthogonal is left. ``model.retract()`` brings latents back to zero where
    there is a trivialization; the other maps need no such care.

    Args:
        map: ``"matrix_exp"``, ``"cayley"``, ``"householder"``, ``"qr"``, ``"polar"`` or ``"newton_schulz"``; by default the
            first for square or complex weights and ``"householder"`` for others. ``newton_schulz`` needs matrix products
            only, but leaves a latent without full rank where it is: outside the set.
        use_trivialization: whether to multiply with the buffer ``base``, which holds the start. Without, square weights
            of ``matrix_exp`` and ``cayley`` have determinant 1. ``qr``, ``polar`` and ``newton_schulz`` never do.
        iterations: the steps of ``newton_schulz``, by default 25: orthonormal up to rounding in double precision where the
            largest singular value of the latent is at most 1000 times the smallest; each factor of 10 takes 6 steps more.
        rebase_every: dynamic trivialization (Lezcano-Casado 2019, algorithm 1): after this many steps of an optimizer that
            holds the latent, the weight becomes the base and the latent starts anew at zero. Momentum of the optimizer stays
            as it is. Averages over steps are those of weights, not of latents, whose base moves. None: never.

    Raises:
        SpecError: another map, ``iterations`` below 1 or for another map, ``rebase_every`` without a trivialization; at
            build, the weight is no matrix or batch of matrices, is neither floating-point nor complex, or is complex with
            ``householder``.
    """

    name: ClassVar[str] = "orthogonal"
    map: str | None = None
    use_trivialization: bool = True
    iterations: int | None = None
    rebase_every: int | None = None

    def __post_init__(self) -> None:
        if self.map is not None:
            check_choice(self.name, "map", self.map, (*MOVES, *RETRACTIONS))
        check_flag(self.name, "use_trivialization", self.use_trivialization)
        check_iterations(self.name, self.map, self.iterations)
        check_rebasing(self.name, self.rebase_every, trivialized=self.use_trivialization and self.map not in RETRACTIONS)

    def build(self, weight: Tensor) -> OrthogonalMap:
        """The map for ``(..., m, n)``."""
        if not (weight.is_floating_point() or weight.is_complex()):
            raise SpecError(f"orthogonal: got a weight of dtype {weight.dtype}; expected a floating-point or complex dtype")
        check_matrix(self.name, weight)
        square = weight.shape[-2] == weight.shape[-1]
        chosen = self.map or ("matrix_exp" if square or weight.is_complex() else "householder")
        if weight.is_complex() and chosen == "householder":
            raise SpecError('orthogonal: got map="householder" for a complex weight; expected "matrix_exp" or "cayley"')
        module = OrthogonalMap(weight, chosen, use_trivialization=self.use_trivialization, iterations=self.iterations)
        return module.rebased(self.rebase_every)


def check_rebasing(name: str, every: Any, *, trivialized: bool) -> None:
    """Refuse an interval that is none, or is given where there is no base.

    Raises:
        SpecError: as above.
    """
    if every is None:
        return
    check_integer(name, "rebase_every", every, least=1)
    if not trivialized:
        raise SpecError(
            f"{name}: got rebase_every={every} without a base to change; leave it out, or type use_trivialization=True with "
            f"one of the maps {', '.join(map(repr, MOVES))}"
        )


def check_iterations(name: str, map: str | None, iterations: Any) -> None:
    """Refuse a number of iterations that is none, or is given to a map that does not iterate.

    Raises:
        SpecError: as above.
    """
    if iterations is None:
        return
    check_integer(name, "iterations", iterations, least=1)
    if map != "newton_schulz":
        raise SpecError(f'{name}: got iterations={iterations} with map={map!r}; only map="newton_schulz" iterates')


class OrthogonalMap(Constrained):
    """Orthonormal columns (rows, if there are more columns than rows).

    With ``householder`` the diagonal of the latent carries signs and does not train; any negative number counts as -1,
    any other as 1, so that weight decay on the latent cannot leave the image.
    """

    constraint = "orthonormality (the largest |element| of WᴴW - I)"
    base: Tensor | None
    rebase_every: int | None = None
    """After how many optimizer steps the weight becomes the base; the runtime counts them in the buffer ``steps``."""
    _origin: ClassVar[float] = -1.0
    """The diagonal of a latent that stands for the base: torch's signs of the householder map; the others do not read it."""

    def __init__(self, weight: Tensor, map: str, *, use_trivialization: bool = True, iterations: int | None = None) -> None:
        super().__init__(weight)
        self.map = map
        self.iterations = iterations or ITERATIONS
        n = max(weight.shape[-2:])
        base = torch.eye(n, dtype=weight.dtype, device=weight.device).expand(*weight.shape[:-2], n, n).clone()
        self.register_buffer("base", base if use_trivialization and map in MOVES else None)

    def rebased(self, every: int | None) -> Self:
        """This map, with the weight becoming the base after ``every`` steps; None: never."""
        self.rebase_every = every
        if every is not None:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.rebase_every is not None:
            # The checkpoint of a map that keeps its base, PyTorch's among them, says nothing of steps.
            state_dict.setdefault(f"{prefix}steps", torch.zeros((), dtype=torch.int64))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., m, n)`` to the same."""
        wide = latent.shape[-2] < latent.shape[-1]
        q = self._columns(widened(latent.mT if wide else latent))
        if self.base is not None:
            q = widened(self.base) @ q
        return stored(q.mT if wide else q, latent.dtype)

    def _read(self, x: Tensor) -> Tensor:
        """The part of the tall ``x`` that counts."""
        return x

    def _columns(self, x: Tensor) -> Tensor:
        """Orthonormal columns from the tall ``x``."""
        x = self._read(x)
        if self.map in ("matrix_exp", "cayley"):
            return rotation(x, self.map)
        if self.map == "newton_schulz":
            return newton_schulz(x, self.iterations)
        return {"householder": reflections, "qr": qr_factor, "polar": polar_factor}[self.map](x)

    def distance(self, weight: Tensor) -> Tensor:
        """The largest element of ``|WᴴW - I|`` (2 for a reflection where only rotations are reached)."""
        q = widened(tall(weight))
        identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        gap = (q.mH @ q - identity).abs().amax()
        if self._rotations_only() and bool((torch.linalg.det(q) < 0).any()):
            return gap.clamp(min=2)
        return gap

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of products of ``max(m, n)`` terms, or of PyTorch's matrix exponential, which may be larger."""
        return max(rounding(real_dtype(weight.dtype), max(weight.shape[-2:])), rotation_rounding(self.map, weight.dtype))

    def invert(self, weight: Tensor) -> Tensor:
        """The inverse of the map; of a trivialization, zero (-1 on the diagonal, as torch), and ``base`` becomes ``weight``."""
        if self.map in RETRACTIONS:
            return weight.clone(memory_format=torch.contiguous_format)
        q = tall(weight)
        if self.base is not None:
            self.base.copy_(completed(q))
            latent = self._at_base(q)
        elif self.map == "householder":
            latent = inverse_reflections(widened(q))
        else:
            latent = self._inverse_rotation(q, weight)
        latent = latent.to(weight.dtype)
        return (latent.mT if q is not weight else latent).contiguous()

    def _at_base(self, x: Tensor) -> Tensor:
        """The tall latent, of the shape of ``x``, that stands for the base."""
        latent = torch.zeros_like(x)
        latent.diagonal(dim1=-2, dim2=-1).fill_(self._origin)
        return latent

    @torch.no_grad()
    def rebase(self, latent: Tensor) -> Tensor:
        """Makes the weight the base, and returns the latent that then stands for it, of the same shape.

        The whole rotation moves into the base, also the columns that the weight has not: nothing is drawn, so that equal
        replicas of a model stay equal. The product is orthonormalized, so that rounding does not add up.
        """
        assert self.base is not None
        x = tall(latent)
        n, k = x.shape[-2:]
        whole = F.pad(self._read(widened(x)), (0, n - k))
        q = reflections(whole) if self.map == "householder" else rotation(whole, self.map)
        self.base.copy_(orthonormalized(widened(self.base) @ q))
        start = self._at_base(x)
        return (start.mT if x is not latent else start).contiguous()

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
        missed = float((rotation(latent.to(widened(q).dtype), self.map) - q).abs().amax())
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
        """As torch, the ``Q`` of a QR decomposition whose ``R`` has a positive diagonal; unchanged if in the image.

        For ``polar`` and ``newton_schulz`` the nearest in the Frobenius norm. Where only rotations are reached, the last
        column changes its sign if need be.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        x = widened(tall(weight))
        q = polar_factor(x) if self.map in ("polar", "newton_schulz") else self._turned(orthonormalized(x))
        return (q.mT if weight.shape[-2] < weight.shape[-1] else q).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Uniform (Haar measure), also among rotations: ``Q`` of a Gaussian matrix, signs corrected (Mezzadri 2007)."""
        q = self._turned(orthonormalized(tall(self.normal(*self.shape, generator=generator))))
        return (q.mT if self.shape[-2] < self.shape[-1] else q).to(self._like.dtype)

    def _turned(self, q: Tensor) -> Tensor:
        """``q`` with the sign of the last column such that it is reached."""
        if self._rotations_only():
            q[..., -1] *= torch.where(torch.linalg.det(q) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-1)
        return q

    def _rotations_only(self) -> bool:
        square = self.shape[-2] == self.shape[-1]
        return self.base is None and square and self.map in ("matrix_exp", "cayley") and not self._like.is_complex()

    def extra_repr(self) -> str:
        """The options."""
        steps = f", iterations={self.iterations}" if self.map == "newton_schulz" else ""
        every = f", rebase_every={self.rebase_every}" if self.rebase_every else ""
        return f"map={self.map!r}, use_trivialization={self.base is not None}{steps}{every}"


def tall(weight: Tensor) -> Tensor:
    """``weight``, transposed if it has more columns than rows."""
    return weight.mT if weight.shape[-2] < weight.shape[-1] else weight
