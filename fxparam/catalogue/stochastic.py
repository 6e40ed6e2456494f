"""Non-negative weights with given sums: simplices, stochastic and doubly stochastic matrices, soft permutations.

Right inverses are logarithms. An element of 0 gets a latent so low that it is exactly 0 again; its gradient is 0 as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    check_dim,
    check_filled,
    check_floating,
    check_integer,
    check_matrix,
    check_number,
    rounding,
    stored,
    widened,
)
from fxparam.declaration import Entry
from fxparam.errors import SpecError

_LOG_ZERO = -1000.0  # its exponential is 0 in every dtype, and it is finite in half precision
_LEAST = 1e-3  # of the largest element; a projection raises smaller ones to that, so that all of them train


def _logits(weight: Tensor) -> Tensor:
    """``log W``, finite also where ``W`` is 0 (or below, by rounding)."""
    return torch.where(weight > 0, weight.log(), _LOG_ZERO)


@dataclass(frozen=True, repr=False)
class Simplex(Entry):
    """``W = softmax(X)`` along one dimension: elements above 0 that sum to 1.

    Args:
        dim: the dimension over which elements sum to 1.

    Raises:
        SpecError: ``dim`` is no integer; at build, the weight has no such dimension or is not floating-point.
    """

    name: ClassVar[str] = "simplex"
    dim: int = -1

    def __post_init__(self) -> None:
        check_integer(self.name, "dim", self.dim)

    def build(self, weight: Tensor) -> SimplexMap:
        """The map for a weight of at least one dimension."""
        check_floating(self.name, weight)
        check_filled(self.name, weight)
        check_dim(self.name, weight, self.dim)
        return SimplexMap(weight, self.dim)


class SimplexMap(Constrained):
    """``W >= 0`` with sums of 1 along ``dim``. The image takes in zeros, for small exponentials underflow."""

    constraint = "elements of at least 0 that sum to 1"

    def __init__(self, weight: Tensor, dim: int) -> None:
        super().__init__(weight)
        self.dim = dim

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """The weight's shape."""
        return latent.softmax(self.dim)

    def distance(self, weight: Tensor) -> Tensor:
        """The larger of what the worst sum misses, and the smallest element is below 0."""
        wide = widened(weight)
        return torch.maximum((wide.sum(self.dim) - 1).abs().amax(), (-wide).amax())

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a sum."""
        return rounding(weight.dtype, weight.shape[self.dim])

    def invert(self, weight: Tensor) -> Tensor:
        """The logarithm."""
        return _logits(widened(weight)).to(weight.dtype)

    @torch.no_grad()
    def start(self, weight: Tensor) -> Tensor:
        """The logarithm of ``weight``; where it is not in the image, ``weight`` itself: every element can train.

        Raises:
            ImageError: ``weight`` has another shape or is not finite.
        """
        self.require_finite(weight)
        return self.invert(weight) if self.contains(weight) else weight.clone()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The nearest in the Euclidean norm (Held, Wolfe and Crowder 1974), often with zeros; unchanged if in the image."""
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        wide = widened(weight).movedim(self.dim, -1)
        # Shifted, the largest is 0, so that the sums below keep their digits.
        wide = wide - wide.amax(-1, keepdim=True)
        ordered = wide.sort(-1, descending=True).values
        count = torch.arange(1, ordered.shape[-1] + 1, device=ordered.device)
        threshold = (ordered.cumsum(-1) - 1) / count
        last = (ordered > threshold).sum(-1, keepdim=True) - 1
        nearest = (wide - threshold.gather(-1, last)).clamp(min=0)
        return (nearest / nearest.sum(-1, keepdim=True)).movedim(-1, self.dim).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """The softmax of standard normal elements (a logistic normal distribution)."""
        return self.forward(self.normal(*self.shape, generator=generator)).to(self._like.dtype)

    def extra_repr(self) -> str:
        """The dimension."""
        return f"dim={self.dim}"


@dataclass(frozen=True, repr=False)
class RowStochastic(Entry):
    """``W = softmax(X)`` of each row: matrices of transition probabilities.

    Raises:
        SpecError: at build, the weight is no matrix or batch of matrices, or not floating-point.
    """

    name: ClassVar[str] = "row_stochastic"

    def build(self, weight: Tensor) -> RowStochasticMap:
        """The map for ``(..., m, n)``."""
        check_floating(self.name, weight)
        check_matrix(self.name, weight)
        return RowStochasticMap(weight, -1)


class RowStochasticMap(SimplexMap):
    """``W >= 0`` with rows that sum to 1."""

    constraint = "elements of at least 0 with rows that sum to 1"


def _check_sinkhorn(name: str, iterations: object, temperature: float) -> None:
    check_integer(name, "iterations", iterations, least=1)
    check_number(name, "temperature", temperature)
    if temperature <= 0:
        raise SpecError(f"{name}: got temperature={temperature!r}; expected a number above 0")


@dataclass(frozen=True, repr=False)
class DoublyStochastic(Entry):
    """Elements of at least 0 whose rows and columns sum to 1, by Sinkhorn's iteration on ``exp(X / temperature)``.

    Rows and columns are divided by their sums in turn (Sinkhorn 1964), as differences of logarithms (Mena et al. 2018).
    After finitely many iterations the columns sum to 1 and the rows nearly do; what they miss is then rounded off onto the
    polytope (Altschuler, Weed and Rigollet 2017, algorithm 2), which moves no more than they miss. So all sums are 1 up to
    rounding for any latents and any number of iterations. More iterations bring the weight nearer to the limit of
    Sinkhorn's iteration, which for latents that differ by much more than the temperature may take thousands.

    Args:
        iterations: how often rows and columns are normalized, at least 1. Each is two operations of the trace.
        temperature: what latents are divided by, above 0.

    Raises:
        SpecError: an option out of range; at build, the weight is not square or not floating-point.
    """

    name: ClassVar[str] = "doubly_stochastic"
    iterations: int = 20
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_sinkhorn(self.name, self.iterations, self.temperature)

    def build(self, weight: Tensor) -> DoublyStochasticMap:
        """The map for ``(..., n, n)``."""
        check_floating(self.name, weight)
        check_matrix(self.name, weight, square=True)
        return DoublyStochasticMap(weight, self.iterations, float(self.temperature))


class DoublyStochasticMap(Constrained):
    """``W >= 0`` with rows and columns that sum to 1. The image takes in zeros, for small exponentials underflow."""

    constraint = "elements of at least 0 with rows and columns that sum to 1"

    def __init__(self, weight: Tensor, iterations: int, temperature: float) -> None:
        super().__init__(weight)
        self.iterations, self.temperature = iterations, temperature

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """``(..., n, n)``."""
        logits = widened(latent)
        if self.temperature != 1:
            logits = logits / self.temperature
        for _ in range(self.iterations - 1):
            logits = logits.log_softmax(-1).log_softmax(-2)
        return stored(_rounded(logits.log_softmax(-1).softmax(-2)), latent.dtype)

    def distance(self, weight: Tensor) -> Tensor:
        """The larger of what the worst sum misses, and the smallest element is below 0."""
        wide = widened(weight)
        sums = torch.cat([wide.sum(-1), wide.sum(-2)])
        return torch.maximum((sums - 1).abs().amax(), (-wide).amax())

    def tolerance(self, weight: Tensor) -> float:
        """The rounding of a sum."""
        return rounding(weight.dtype, weight.shape[-1])

    def invert(self, weight: Tensor) -> Tensor:
        """The logarithm times the temperature."""
        return (_logits(widened(weight)) * self.temperature).to(weight.dtype)

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The weight, elements below a thousandth of the largest raised to that, by Sinkhorn's iteration.

        Up to its convergence that is the nearest to the raised weight in relative entropy. Where no element is above 0,
        all are equal. Unchanged if in the image.
        """
        self.require_finite(weight)
        if self.contains(weight):
            return weight.clone()
        wide = widened(weight)
        largest = wide.amax((-2, -1), keepdim=True)
        raised = torch.where(largest > 0, wide.maximum(largest * _LEAST).log(), 0.0)
        return self.forward(raised * self.temperature).to(weight.dtype)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Sinkhorn's iteration on exponentials of standard normal elements."""
        drawn = self.normal(*self.shape, generator=generator)
        return self.forward(drawn * self.temperature).to(self._like.dtype)

    def extra_repr(self) -> str:
        """The options."""
        return f"iterations={self.iterations}, temperature={self.temperature}"


@dataclass(frozen=True, repr=False)
class Permutation(Entry):
    """A soft permutation: a doubly stochastic matrix of low temperature (Mena et al. 2018, "Gumbel-Sinkhorn").

    The map is that of ``doubly_stochastic``. As the temperature falls, or as the latents grow in training, the weights
    approach permutation matrices, the corners of that polytope; the gradient vanishes there. The nearest permutation
    itself is not offered as a weight: finding it is an assignment problem, which no fixed number of tensor operations
    solves. Fold first, then round the constant with ``scipy.optimize.linear_sum_assignment``.

    Args:
        temperature: what latents are divided by, above 0.
        iterations: how often rows and columns are normalized, at least 1. Each is two operations of the trace.

    Raises:
        SpecError: an option out of range; at build, the weight is not square or not floating-point.
    """

    name: ClassVar[str] = "permutation"
    temperature: float = 0.1
    iterations: int = 20

    def __post_init__(self) -> None:
        _check_sinkhorn(self.name, self.iterations, self.temperature)

    def build(self, weight: Tensor) -> PermutationMap:
        """The map for ``(..., n, n)``."""
        check_floating(self.name, weight)
        check_matrix(self.name, weight, square=True)
        return PermutationMap(weight, self.iterations, float(self.temperature))


class PermutationMap(DoublyStochasticMap):
    """``W >= 0`` with rows and columns that sum to 1; permutation matrices are in the image, as are all means of them."""

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """The Gumbel-Sinkhorn distribution of equal odds: Sinkhorn's iteration on Gumbel noise over the temperature."""
        # Half the squared length of a normal vector of two is exponentially distributed, minus its logarithm is Gumbel.
        pairs = self.normal(2, *self.shape, generator=generator)
        gumbel = -(pairs.square().sum(0) / 2).clamp(min=torch.finfo(pairs.dtype).tiny).log()
        return self.forward(gumbel).to(self._like.dtype)


def _rounded(matrix: Tensor) -> Tensor:
    """The last step onto the polytope, for columns that sum to 1 already.

    Rows that exceed 1 are scaled down to it, after which no sum exceeds 1; a product of what rows and columns miss fills
    them up. Where they miss no more than rounding, dividing by its sum would only make noise of it, hence the floor.
    """
    scaled = matrix / matrix.sum(-1, keepdim=True).clamp(min=1)
    rows = (1 - scaled.sum(-1, keepdim=True)).clamp(min=0)
    columns = (1 - scaled.sum(-2, keepdim=True)).clamp(min=0)
    floor = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    return scaled + rows * (columns / rows.sum(-2, keepdim=True).clamp(min=floor))
