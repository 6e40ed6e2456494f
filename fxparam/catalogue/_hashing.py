"""Random numbers as a function of a seed and a position, in plain tensor operations.

A counter-based generator (Salmon, Moraes, Dror and Shaw 2011, *Parallel Random Numbers: As Easy as 1, 2, 3*): the number at
a position is a hash of the position: nothing is stored, and a trace has no random operation in it. Words are of 32 bits, kept
in int64. Multipliers are below 2³¹ in absolute value: no product overflows, and the bits are the same on every device.

The mixer is ``lowbias32`` of C. Wellons (*hash-prospector*), with a key between its two rounds: the words of two seeds are then
no rearrangement of each other.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
LIMIT = 1 << 32
"""How many positions a stream has, and how many seeds there are."""

_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B - LIMIT  # the same factor modulo 2³²
_OTHER = 0x31848BAB
WIDTH = 4096
"""Where a draw may start: at multiples of this."""

Word = TypeVar("Word", Tensor, int)
"""A number from 0 to 2³² - 1, or an int64 tensor of such."""


def mixed(word: Word, key: Word | None = None) -> Word:
    """A bijection of words that scatters neighbours.

    Args:
        word: any shape.
        key: a word to add between the rounds; broadcasts.
    """
    word = word ^ (word >> 16)
    word = word * _FIRST & MASK
    if key is not None:
        word = word ^ key
    word = word ^ (word >> 15)
    word = word * _SECOND & MASK
    return word ^ (word >> 16)


def random_bits(seed: Tensor, stream: int, count: int, start: int = 0) -> Tensor:
    """``(count,)`` words.

    Args:
        seed: int64, ``()``, a word.
        stream: which of the sequences of this seed, from 0.
        count: how many.
        start: the position of the first, a multiple of ``WIDTH``; none may be beyond ``LIMIT``.
    """
    first = mixed(seed ^ mixed(stream + 1))
    second = first * _OTHER & MASK
    width = min(WIDTH, power_above(count))
    # A counter of all positions would depend on nothing, and be kept as a constant; with the key in it, it is computed anew.
    row = torch.arange(start, start + count, width, device=seed.device) ^ first
    counter = row.unsqueeze(-1) ^ torch.arange(width, device=seed.device)
    return mixed(counter, second).flatten()[:count]


def signs(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """``(..., 2 count)`` numbers -1 and 1 from the lowest two bits of ``(..., count)`` words."""
    return 1 - 2 * torch.cat([(bits & 1).to(dtype), (bits >> 1 & 1).to(dtype)], dim=-1)


def normals(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """``(..., 2 count)`` standard normal numbers from the upper 30 bits of ``(..., count)`` words (Box and Muller 1958).

    A radius and an angle of 15 bits each make two; none exceeds 4.71 in absolute value.

    Args:
        bits: words.
        dtype: float32 or float64; the numbers differ by rounding.
    """
    # Exact in float32, and never 0 or 1.
    radius, angle = ((part.to(dtype) + 0.5) * 2**-15 for part in (bits >> 17, bits >> 2 & 0x7FFF))
    radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)


def power_above(count: int) -> int:
    """The smallest power of two that is at least ``count``, which is at least 1."""
    return 1 << (count - 1).bit_length()
