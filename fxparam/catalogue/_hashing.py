"""Random numbers as a function of a seed and a position, in plain tensor operations.

A counter-based generator (Salmon, Moraes, Dror and Shaw 2011, *Parallel Random Numbers: As Easy as 1, 2, 3*): the number at
a position is a hash of the position, so nothing is stored, and a trace has no random operation in it. Words are of 32 bits, kept
in int64; multipliers are below 2³¹ in absolute value, so that no product overflows, and the bits are the same on every device.

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
_WIDTH = 4096

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


def random_bits(seed: Tensor, stream: int, count: int) -> Tensor:
    """``(count,)`` words.

    Args:
        seed: int64, ``()``, a word.
        stream: which of the sequences of this seed, from 0.
        count: how many, at most ``LIMIT``.
    """
    first = mixed(seed ^ mixed(stream + 1))
    second = first * _OTHER & MASK
    width = min(_WIDTH, power_above(count))
    # A counter of all positions would depend on nothing, and be kept as a constant; with the key in it, it is computed anew.
    start = (torch.arange(-(-count // width), device=seed.device) * width) ^ first
    counter = start.unsqueeze(-1) ^ torch.arange(width, device=seed.device)
    return mixed(counter, second).flatten()[:count]


def signs(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The lowest bit of each word as -1 or 1."""
    return 1 - 2 * (bits & 1).to(dtype)


def normals(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers from the upper 23 bits of each word (Box and Muller 1958), at most 5.8 in absolute value.

    Args:
        bits: words, ``(count,)`` with an even ``count``.
        dtype: float32 or float64; the numbers differ by rounding.
    """
    # Exact in float32, and never 0 or 1.
    one, other = (((bits >> 9).to(dtype) + 0.5) * 2**-23).chunk(2)
    radius, angle = (-2 * one.log()).sqrt(), 2 * math.pi * other
    return torch.cat([radius * angle.cos(), radius * angle.sin()])


def power_above(count: int) -> int:
    """The smallest power of two that is at least ``count``, which is at least 1."""
    return 1 << (count - 1).bit_length()
