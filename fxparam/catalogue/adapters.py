"""Low-rank updates of a frozen weight, ``(..., m, n)``: LoRA and DoRA.

The start is kept as the buffer ``base``, ``W0``, in the weight's dtype; with ``W0`` in half precision the factors may be
float32, and the weight is computed in float32 and stored as ``W0`` is. Latents are named in peft's order: ``original0`` is
``A`` of shape ``(..., rank, n)``, ``original1`` is ``B`` of shape ``(..., m, rank)``, and ``original2`` DoRA's magnitude.
Training starts as in peft, at ``B = 0`` and a random ``A``, with the weight as it was. The latents train, whether the weight
was frozen before or not; ``W0`` is no parameter. The kernel of a convolution is taken for a matrix, outputs times all else, as
in peft: ``lora(2)`` is ``lora(2) >> from_matrix()`` there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    Unconstrained,
    check_flag,
    check_floating,
    check_integer,
    check_number,
    stored,
    widened,
)
from fxparam.catalogue._layers import is_kernel, output_dim
from fxparam.catalogue.rank import check_rank, spectral_rounding
from fxparam.catalogue.sharing import FromMatrix
from fxparam.declaration import Chain, Declaration, Entry, Place
from fxparam.errors import SpecError


@dataclass(frozen=True, repr=False)
class Lora(Entry):
    """``W = W0 + (alpha / rank) · B A`` (Hu et al. 2021, eq. 3 and section 4.1).

    Numbers and gradients are those of peft's layers. For huge factors the product overflows.

    Args:
        rank: the inner size, from 1 to ``min(m, n)``.
        alpha: the scale of the update, above 0; None: ``rank``.
        rslora: whether to divide it by ``√rank`` instead of ``rank`` (Kalajdzievski 2023).

    Raises:
        SpecError: an option out of range; at build, ``rank`` exceeds ``min(m, n)``, or the weight is no matrix or batch of
            matrices, or neither floating-point nor complex.
    """

    name: ClassVar[str] = "lora"
    rank: int
    alpha: float | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        _check_options(self)

    def placed(self, place: Place) -> Declaration:
        """For the kernel of a convolution: that of a matrix, outputs times all else."""
        return Chain((self, FromMatrix(output_dim(place)))) if is_kernel(place) else self

    def build(self, weight: Tensor) -> LoraMap:
        """The map for ``(..., m, n)``, which keeps the values of ``weight``."""
        check_rank(self.name, weight, self.rank)
        return LoraMap(weight, self.rank, _scaling(self))


class LoraMap(Constrained):
    """``(A, B)`` to ``W0 + scaling · B A``: ``W0`` plus a matrix of rank at most ``rank``."""

    constraint = "the rank of W - W0"
    remedy = (
        "; load the weight before transform, so that it becomes W0, or type model.assign(name, weight, project=True) for the "
        "nearest"
    )
    adapts = True
    base: Tensor

    def __init__(self, weight: Tensor, rank: int, scaling: float) -> None:
        super().__init__(weight)
        self.rank, self.scaling = rank, scaling
        self.register_buffer("base", weight.detach().clone())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., rank, n)`` and ``(..., m, rank)`` to ``(..., m, n)`` in the dtype of ``W0``."""
        return stored(_adapted(self.base, a, b, self.scaling), self.base.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """The first singular value of ``W - W0`` too many, over the largest element of ``W`` and ``W0``."""
        values = torch.linalg.svdvals(self._update(weight))
        if self.rank == values.shape[-1]:
            return values.new_zeros(())
        return (values[..., self.rank] / self._size(weight)).amax()

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of singular values."""
        return spectral_rounding(weight)

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``√S Vᴴ`` and ``U √S`` of ``(W - W0) / scaling``, truncated.

        Singular values within the tolerance become zero: there the column of ``B`` is zero and the row of ``A`` drawn as at
        the start of training, for were both zero, neither would ever train.
        """
        u, s, vh = self._truncated(weight)
        gone = (s <= self.tolerance(weight) * self._size(weight).unsqueeze(-1)).unsqueeze(-1)
        root = (s / self.scaling).sqrt().unsqueeze(-1)
        a = torch.where(gone, _kaiming(vh), root * vh)
        b = torch.where(gone.mT, 0, u * root.mT)
        return a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """``W0`` plus the nearest matrix to ``W - W0`` of that rank, in every unitarily invariant norm (Mirsky 1960).

        Unchanged if in the image.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        u, s, vh = self._truncated(weight)
        return (widened(self.base) + (u * s.unsqueeze(-2)) @ vh).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """``W0 + B A / √rank`` with factors of standard normal elements, so that updates have variance 1."""
        *batch, m, n = self.shape
        a = self.normal(*batch, self.rank, n, generator=generator)
        b = self.normal(*batch, m, self.rank, generator=generator)
        return _adapted(self.base, a, b, self.rank**-0.5).to(self._like.dtype)

    def _update(self, weight: Tensor) -> Tensor:
        return widened(weight) - widened(self.base)

    def _truncated(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(self._update(weight), full_matrices=False)
        return u[..., : self.rank], s[..., : self.rank], vh[..., : self.rank, :]

    def _size(self, weight: Tensor) -> Tensor:
        """What rounding is relative to, ``(...,)``: the difference of two large tensors has theirs, however small it is."""
        largest = torch.maximum(*(widened(tensor).abs().amax((-2, -1)) for tensor in (weight, self.base)))
        return largest.clamp(min=torch.finfo(weight.dtype).tiny)

    def extra_repr(self) -> str:
        """The options."""
        return f"rank={self.rank}, scaling={self.scaling:.6g}"


@dataclass(frozen=True, repr=False)
class Dora(Entry):
    """``W = g · V / ‖V‖`` with ``V = W0 + (alpha / rank) · B A`` and one norm for each row (Liu et al. 2024, eq. 5).

    As in peft a row holds the weights of one output. The magnitude ``g``, of shape ``(..., m, 1)``, starts at the norms of
    ``W0``. For huge factors the product overflows.

    Args:
        rank: the inner size, from 1 to ``min(m, n)``.
        alpha: the scale of the update, above 0; None: ``rank``.
        rslora: whether to divide it by ``√rank`` instead of ``rank`` (Kalajdzievski 2023).
        detach_norm: whether the norm counts as a constant in the gradient, as in peft (section 4.3, eq. 11); else the
            gradient is that of the formula.

    Raises:
        SpecError: an option out of range; at build, ``rank`` exceeds ``min(m, n)``, or the weight is no matrix or batch of
            matrices, or not floating-point.
    """

    name: ClassVar[str] = "dora"
    rank: int
    alpha: float | None = None
    rslora: bool = False
    detach_norm: bool = True

    def __post_init__(self) -> None:
        _check_options(self)
        check_flag(self.name, "detach_norm", self.detach_norm)

    def placed(self, place: Place) -> Declaration:
        """For the kernel of a convolution: that of a matrix, outputs times all else."""
        return Chain((self, FromMatrix(output_dim(place)))) if is_kernel(place) else self

    def build(self, weight: Tensor) -> DoraMap:
        """The map for ``(..., m, n)``, which keeps the values of ``weight``."""
        check_floating(self.name, weight)
        check_rank(self.name, weight, self.rank)
        return DoraMap(weight, self.rank, _scaling(self), detach_norm=self.detach_norm)


class DoraMap(Unconstrained):
    """``(A, B, g)`` to ``g · V / ‖V‖`` with ``V = W0 + scaling · B A``; a row of ``V`` that is zero stays zero.

    Whether some magnitudes bring a weight within a low rank of ``W0`` has no closed form (an affine rank minimization), so
    the right inverse moves the start instead, as a trivialization does: ``W0`` becomes the weight, and the adapter begins
    anew. Hence every finite weight is in the image. For updates of a ``W0`` that stays, use ``lora``.
    """

    adapts = True
    base: Tensor

    def __init__(self, weight: Tensor, rank: int, scaling: float, *, detach_norm: bool) -> None:
        super().__init__(weight)
        self.rank, self.scaling, self.detach_norm = rank, scaling, detach_norm
        self.register_buffer("base", weight.detach().clone())

    def forward(self, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., rank, n)``, ``(..., m, rank)`` and ``(..., m, 1)`` to ``(..., m, n)`` in the dtype of ``W0``."""
        direction = _adapted(self.base, a, b, self.scaling)
        norms = _norms(direction.detach() if self.detach_norm else direction)
        return stored(direction * (widened(magnitude) / norms.masked_fill(norms == 0, 1)), self.base.dtype)

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a norm."""
        return spectral_rounding(weight)

    def invert(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A new ``A``, ``B = 0``, and the norms of the rows; ``base`` becomes ``weight``.

        A row of zeros gets norm 0 and the direction of all ones, to train.
        """
        norms = _norms(widened(weight))
        self.base.copy_(torch.where(norms == 0, 1, weight))
        *batch, m, n = weight.shape
        a = _kaiming(widened(weight).new_empty(*batch, self.rank, n))
        return a.to(weight.dtype), weight.new_zeros(*batch, m, self.rank), norms.to(weight.dtype)

    def extra_repr(self) -> str:
        """The options."""
        return f"rank={self.rank}, scaling={self.scaling:.6g}, detach_norm={self.detach_norm}"


def _check_options(entry: Lora | Dora) -> None:
    check_integer(entry.name, "rank", entry.rank, least=1)
    if entry.alpha is not None:
        check_number(entry.name, "alpha", entry.alpha)
        if entry.alpha <= 0:
            raise SpecError(f"{entry.name}: got alpha={entry.alpha!r}; expected a number above 0")
    check_flag(entry.name, "rslora", entry.rslora)


def _scaling(entry: Lora | Dora) -> float:
    """``alpha / rank``, rank-stable ``alpha / √rank``."""
    alpha = entry.rank if entry.alpha is None else entry.alpha
    return alpha / (entry.rank**0.5 if entry.rslora else entry.rank)


def _adapted(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``W0 + scaling · B A`` in float32 or better."""
    return widened(base) + scaling * (widened(b) @ widened(a))


def _norms(rows: Tensor) -> Tensor:
    """The norm of each row, ``(..., m, 1)``; squares of numbers that are scaled to 1 neither overflow nor underflow."""
    scale = rows.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return torch.linalg.vector_norm(rows / scale, dim=-1, keepdim=True) * scale


def _kaiming(like: Tensor) -> Tensor:
    """Uniform between ``-1/√n`` and ``1/√n``, of the shape ``(..., rank, n)`` of ``like``: Kaiming's with ``a = √5``."""
    drawn = torch.empty_like(like, memory_format=torch.contiguous_format)
    real = torch.view_as_real(drawn) if drawn.is_complex() else drawn
    real.uniform_(-1, 1).mul_((real.numel() / drawn.numel() * like.shape[-1]) ** -0.5)
    return drawn
