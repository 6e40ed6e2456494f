"""Random matrices ``E``, ``(total, dim)``, with columns of norm about 1: what a random subspace is spanned by.

A projection is a module that multiplies: ``(dim,)`` to ``(total,)``. Its one entry in the state dict is the seed, under a name
that says of what kind the projection is (``fastfood.seed``, ``sparse2.seed``): a checkpoint brings its projection along, and
does not fit a map with another kind.

- ``Dense`` keeps a Gaussian matrix in memory, outside the state dict, and makes it anew where another seed is loaded. Making it
  in each forward would take as much memory, for a backward needs it.
- ``Sparse`` and ``Fastfood`` store nothing. All their random numbers are computed from the seed in each forward, and what a
  backward needs of them lives as long as the graph: for each weight 4 bytes a nonzero, or 16 bytes (in float32).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxparam.catalogue._hashing import LIMIT, MASK, WIDTH, normals, power_above, random_bits, signs
from fxparam.catalogue._image import computing_dtype, stored, widened
from fxparam.errors import SpecError

_SMALL = 1 << 22
_MOST_ITERATIONS = 1000
_PIECE = 1 << 20
_MOST_PIECES = 8


class Projection(nn.Module, ABC):
    """A random matrix of a seed.

    Args:
        total: the number of rows.
        dim: the number of columns.
        seed: from 0 to 2³² - 1.
        device: where the seed is kept.
        label: the name under which the seed is stored: equal labels and seeds of the same sizes give equal matrices.
    """

    seed: Tensor

    def __init__(self, total: int, dim: int, seed: int, device: torch.device, label: str) -> None:
        super().__init__()
        self.total, self.dim, self.label = total, dim, label
        self.register_buffer("seed", torch.tensor(seed, device=device))

    @property
    @abstractmethod
    def depth(self) -> int:
        """Of how many roundings an element of a product consists, for the tolerance."""

    @abstractmethod
    def forward(self, latent: Tensor) -> Tensor:
        """``(dim,)`` to ``(total,)``, float32 or float64."""

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``E`` itself, ``(total, dim)``."""
        identity = torch.eye(self.dim, dtype=dtype, device=self.seed.device)
        return torch.func.vmap(self.forward)(identity).mT

    def nearest(self, target: Tensor) -> Tensor:
        """The ``d``, ``(dim,)`` in float64, with the smallest ``|E d - target|``; ``target`` is ``(total,)`` in float64.

        Small matrices are decomposed. For large ones there are only products with ``E`` and its transpose, which the method of
        conjugate gradients takes (CGLS, Björck 1996, section 7.4): quick unless ``dim`` comes close to ``total``.
        """
        if self.total * self.dim > _SMALL:
            return self._conjugate_gradients(target.clone())
        # The other devices have only a method for full rank.
        matrix, column = self.matrix().cpu(), target.unsqueeze(-1).cpu()
        return torch.linalg.lstsq(matrix, column, driver="gelsd").solution.squeeze(-1).to(target.device)

    @torch.inference_mode(False)
    def _conjugate_gradients(self, target: Tensor) -> Tensor:
        with torch.enable_grad():
            latent = target.new_zeros(self.dim, requires_grad=True)
            image = self(latent)
            dual = torch.zeros_like(image, requires_grad=True)
            # Linear in dual: its derivative is E again, without making the random numbers once more.
            (pulled,) = torch.autograd.grad(image, latent, dual, create_graph=True)
        found, rest = target.new_zeros(self.dim), target
        (gradient,) = torch.autograd.grad(image, latent, rest, retain_graph=True)
        direction, size = gradient, gradient.dot(gradient)
        # What rounding leaves of the gradient is of the size of the target's, for the columns have norm about 1.
        enough = 1e-28 * target.dot(target)
        for _ in range(_MOST_ITERATIONS):
            if not size > enough:
                break
            (moved,) = torch.autograd.grad(pulled, dual, direction, retain_graph=True)
            step = size / moved.dot(moved)
            found, rest = found + step * direction, rest - step * moved
            (gradient,) = torch.autograd.grad(image, latent, rest, retain_graph=True)
            before, size = size, gradient.dot(gradient)
            direction = gradient + size / before * direction
        return found

    def extra_repr(self) -> str:
        """The sizes."""
        return f"total={self.total}, dim={self.dim}"


class Dense(Projection):
    """Independent normal elements, columns scaled to norm 1; ``total · dim`` numbers in memory.

    The buffer ``basis`` is in no state dict. It is drawn in float32 and rounded to the dtype of the module.
    """

    basis: Tensor
    _CHUNK = 1 << 20

    def __init__(self, total: int, dim: int, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(total, dim, seed, device, "dense")
        self.register_buffer("basis", torch.empty(total, dim, dtype=dtype, device=device), persistent=False)
        self._draw()

    @property
    def depth(self) -> int:
        """The roundings of a sum of ``dim`` terms have random signs."""
        return math.isqrt(self.dim) + 1

    def forward(self, latent: Tensor) -> Tensor:
        """``E d``, in the dtype of ``E`` or float32."""
        return stored(widened(self.basis) @ stored(latent, computing_dtype(self.basis.dtype)), latent.dtype)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """A copy of ``E``, ``(total, dim)``."""
        return self.basis.to(dtype, copy=True)

    @torch.no_grad()
    def _draw(self) -> None:
        if self.basis.is_meta or self.seed.is_meta:
            return
        drawn = torch.empty(self.basis.shape, device=self.basis.device)
        seed = self.seed.to(drawn.device)
        # Chunks of a fixed size, each a stream of its own: the words take several times the memory of the numbers.
        for number, chunk in enumerate(drawn.view(-1).split(self._CHUNK)):
            count = len(chunk)
            chunk.copy_(normals(random_bits(seed, number, (count + 1) // 2), torch.float32)[:count])
        self.basis.copy_(drawn.div_(torch.linalg.vector_norm(drawn, dim=0)))

    def _apply(self, fn: Any, recurse: bool = True) -> Dense:
        before = self.basis
        super()._apply(fn, recurse)
        if self.basis.dtype != before.dtype and not before.is_meta:
            # What half precision has lost, a wider dtype gets back.
            self._draw()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._draw()


class Sparse(Projection):
    """``nonzeros`` elements of nearly equal size and of random sign in each row, at random places.

    The columns fall into as many groups as there are nonzeros, and a row reads one column of each: the block construction of
    Kane and Nelson (2014, *Sparser Johnson-Lindenstrauss Transforms*, figure 1c) for the transpose of ``E``. With one nonzero
    it is feature hashing. The very sparse matrices of Li, Hastie and Church (2006), which Li et al. take, have
    ``dim / √total`` nonzeros a row on average: a few as well.

    Args:
        total: the number of rows.
        dim: the number of columns.
        seed: from 0 to 2³² - 1.
        device: where the seed is kept.
        nonzeros: how many a row has, at most ``dim``.
    """

    _RADIX = 1 << 28

    def __init__(self, total: int, dim: int, seed: int, device: torch.device, nonzeros: int) -> None:
        super().__init__(total, dim, seed, device, f"sparse{nonzeros}")
        self.nonzeros = nonzeros

    @property
    def depth(self) -> int:
        """One rounding for each term."""
        return self.nonzeros + 1

    def forward(self, latent: Tensor) -> Tensor:
        """``E d``: sums of elements of ``d`` and ``-d``."""
        scaled = [part * (part.numel() / self.total) ** 0.5 for part in latent.split(self._sizes())]
        signed = [torch.cat([part, -part]) for part in scaled]
        return torch.cat([self._piece(signed, start, stop) for start, stop in pieces(self.total)])

    def _piece(self, signed: list[Tensor], start: int, stop: int) -> Tensor:
        digits = self.digits(start, stop)
        return reduce(torch.add, (both.index_select(0, at) for both, at in zip(signed, digits, strict=True)))

    def _sizes(self) -> list[int]:
        bounds = [number * self.dim // self.nonzeros for number in range(self.nonzeros + 1)]
        return [high - low for low, high in pairwise(bounds)]

    def digits(self, start: int, stop: int) -> list[Tensor]:
        """For each group, which of its columns and their negatives each of these rows reads: int32, ``(stop - start,)``.

        A word is a binary fraction, and its digits in any base are random: one word serves as many groups as its bits allow.
        """
        digits: list[Tensor] = []
        stream, left, fraction = 0, 0, self.seed
        for size in self._sizes():
            left //= 2 * size
            if left == 0:
                fraction, left = random_bits(self.seed, stream, stop - start, start), self._RADIX // (2 * size)
                stream += 1
            product = fraction * (2 * size)
            digits.append((product >> 32).to(torch.int32))
            fraction = product & MASK
        return digits


class Fastfood(Projection):
    """``H G Π H B`` in blocks, one below the other (Le, Sarlós and Smola 2013, *Fastfood*), in ``O(total · log dim)``.

    A block is square, of the power of two ``n`` at and above ``dim``, at least 2: signs ``B``, a permutation ``Π`` and normal
    numbers ``G`` of its own, and Walsh-Hadamard matrices ``H``. Columns beyond ``dim`` and rows beyond ``total`` are left out.
    So is ``S`` of the paper, which gives the rows of a block random lengths: a subspace has no use for it, columns have norm
    about 1 without it, and Aghajanyan, Gupta and Zettlemoyer (2021), who train language models in such subspaces, do without
    it as well.
    """

    def __init__(self, total: int, dim: int, seed: int, device: torch.device) -> None:
        super().__init__(total, dim, seed, device, "fastfood")

    @property
    def depth(self) -> int:
        """Each butterfly of the two transforms rounds, and normal numbers are rounded in several steps."""
        return 2 * self._size().bit_length() + 4

    def forward(self, latent: Tensor) -> Tensor:
        """``E d``, from the right to the left of the product."""
        size, small = self._size(), hadamard(latent)
        padded = F.pad(latent * (self.total * size) ** -0.5, (0, size - self.dim))
        keys = self._keys()
        made = [
            self._piece(padded, small, keys[start // size : stop // size], start)
            for start, stop in pieces(self._blocks() * size, max(size, 2 * WIDTH))
        ]
        return torch.cat(made)[: self.total]

    def _piece(self, padded: Tensor, small: Tensor, keys: Tensor, start: int) -> Tensor:
        """The blocks of these keys, the first of them at the row ``start``."""
        size = self._size()
        # Two numbers for each word: signs from its lowest bits, normal numbers from the others.
        bits = random_bits(self.seed, 0, len(keys) * size // 2, start // 2).view(-1, size // 2)
        sign, gauss = signs(bits, padded.dtype), normals(bits, padded.dtype)
        spread = walsh_hadamard(sign * padded, small).gather(1, self.permutations(keys))
        return walsh_hadamard(gauss * spread, small).flatten()

    def _size(self) -> int:
        return max(2, power_above(self.dim))

    def _blocks(self) -> int:
        return -(-self.total // self._size())

    def _keys(self) -> Tensor:
        """What the permutations differ by, ``(blocks, 3, 1)``."""
        return random_bits(self.seed, 1, 3 * self._blocks()).view(-1, 3, 1)

    def permutations(self, keys: Tensor | None = None) -> Tensor:
        """``Π`` as positions, int64, ``(blocks, n)``: a bijection of ``log₂ n`` bits for each block, without sorting.

        Adding, multiplying by an odd number and folding the upper half of the bits into the lower one can each be undone.

        Args:
            keys: those of the blocks; None: all blocks.
        """
        first, shift, second = (self._keys() if keys is None else keys).unbind(1)
        size = self._size()
        mask, half = size - 1, size.bit_length() // 2
        position = (torch.arange(size, device=first.device) * ((first | 1) & mask) + shift) & mask
        position = position ^ (position >> half)
        position = (position * ((second | 1) & mask)) & mask
        return position ^ (position >> half)


def pieces(total: int, unit: int = WIDTH) -> list[tuple[int, int]]:
    """``(start, stop)`` of the pieces in which ``total`` rows are computed; each ``start`` is a multiple of ``unit``.

    What lies between latent and weights is larger than the weights, and only that of one piece is there at a time.
    There are few of them, for each has its nodes in a trace; they do not change the matrix.
    """
    length = max(_PIECE, -(-total // _MOST_PIECES))
    length = -(-length // unit) * unit
    return [(start, min(start + length, total)) for start in range(0, total, length)]


def walsh_hadamard(x: Tensor, small: Tensor) -> Tensor:
    """``x H``, with the symmetric ``H`` of ±1 in its natural order (Sylvester), in ``O(n log n)``.

    ``H`` is the Kronecker product of small ones, each a matrix product along a part of the index.

    Args:
        x: ``(rows, n)``, ``n`` a power of two.
        small: the ``H`` of size 32.
    """
    rows, size = x.shape
    done, bits = 1, size.bit_length() - 1
    while bits > 5:
        # As equal as possible: two products with 16 take less than one with 32 and one with 8.
        factor = 1 << -(-bits // -(-bits // 5))
        done *= factor
        bits -= factor.bit_length() - 1
        x = small[:factor, :factor] @ x.reshape(rows * done // factor, factor, size // done)
    last = 1 << bits
    return (x.reshape(-1, last) @ small[:last, :last]).reshape(rows, size)


def hadamard(like: Tensor) -> Tensor:
    """``(32, 32)``; its upper left corners are the smaller ones. An element is -1 where indices share an odd number of bits."""
    index = torch.arange(32, device=like.device)
    shared = index.unsqueeze(-1) & index
    shared = shared ^ (shared >> 4)
    shared = shared ^ (shared >> 2)
    return 1 - 2 * ((shared ^ (shared >> 1)) & 1).to(like.dtype)


def make_projection(
    kind: str, total: int, dim: int, seed: int, *, nonzeros: int, device: torch.device, dtype: torch.dtype
) -> Projection:
    """The projection of a kind.

    Args:
        kind: one of ``KINDS``.
        total: the number of rows.
        dim: the number of columns.
        seed: from 0 to 2³² - 1.
        nonzeros: of a row, for ``"sparse"``; ``dim`` if that is less.
        device: where it is kept.
        dtype: of what it keeps.

    Raises:
        SpecError: it needs more random numbers than the generator has.
    """
    if kind == "dense":
        return Dense(total, dim, seed, device, dtype)
    if total + power_above(dim) > LIMIT:
        raise SpecError(f"subspace: got {total} elements; expected at most {LIMIT - power_above(dim)}")
    if kind == "sparse":
        return Sparse(total, dim, seed, device, min(nonzeros, dim))
    return Fastfood(total, dim, seed, device)


KINDS = ("dense", "sparse", "fastfood")
