"""Short vectors behind weights. The oracles write ``E`` down element by element, with Python's integers and ``math``."""

from __future__ import annotations

import math
from typing import Any

import torch
from catalogue.cases.common import Case, bump
from torch import Tensor

from fxparam import catalogue as cat


def mixed(word: int, key: int = 0) -> int:
    word ^= word >> 16
    word = word * 0x7FEB352D % 2**32 ^ key
    word ^= word >> 15
    word = word * 0x846CA68B % 2**32
    return word ^ word >> 16


def random_bits(seed: int, stream: int, count: int) -> list[int]:
    first = mixed(seed ^ mixed(stream + 1))
    second = first * 0x31848BAB % 2**32
    return [mixed(at ^ first, second) for at in range(count)]


def normals(bits: list[int]) -> list[float]:
    """Two for each word."""
    uniform = [((word // 2**17 + 0.5) / 2**15, (word // 4 % 2**15 + 0.5) / 2**15) for word in bits]
    pairs = [(math.sqrt(-2 * math.log(one)), 2 * math.pi * other) for one, other in uniform]
    return [r * math.cos(angle) for r, angle in pairs] + [r * math.sin(angle) for r, angle in pairs]


def dense(seed: int, total: int, dim: int) -> Tensor:
    drawn = torch.tensor(normals(random_bits(seed, 0, (total * dim + 1) // 2))[: total * dim]).reshape(total, dim)
    return drawn / drawn.square().sum(0).sqrt()


def sparse(seed: int, total: int, dim: int, nonzeros: int) -> Tensor:
    """For groups of columns so small that one word serves all of them."""
    matrix = torch.zeros(total, dim, dtype=torch.float64)
    for row, word in enumerate(random_bits(seed, 0, total)):
        fraction = word
        for group in range(nonzeros):
            low, high = group * dim // nonzeros, (group + 1) * dim // nonzeros
            digit, fraction = divmod(fraction * 2 * (high - low), 2**32)
            sign = 1 if digit < high - low else -1
            matrix[row, low + digit % (high - low)] = sign * math.sqrt((high - low) / total)
    return matrix


def walsh(n: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def permutation(first: int, shift: int, second: int, size: int) -> list[int]:
    bits = size.bit_length() - 1
    places = []
    for at in range(size):
        place = (at * (first | 1) + shift) % size
        place ^= place >> (bits + 1) // 2
        place = place * (second | 1) % size
        places.append(place ^ place >> (bits + 1) // 2)
    return places


def fastfood(seed: int, total: int, dim: int) -> Tensor:
    size = 2
    while size < dim:
        size *= 2
    blocks = math.ceil(total / size)
    bits = random_bits(seed, 0, blocks * size // 2)
    keys = random_bits(seed, 1, 3 * blocks)
    rows = []
    for block in range(blocks):
        place = permutation(keys[3 * block], keys[3 * block + 1], keys[3 * block + 2], size)
        own = bits[block * size // 2 : (block + 1) * size // 2]
        signs = [1.0 - 2 * (word % 2) for word in own] + [1.0 - 2 * (word // 2 % 2) for word in own]
        b = torch.diag(torch.tensor(signs, dtype=torch.float64))
        g = torch.diag(torch.tensor(normals(own), dtype=torch.float64))
        pi = torch.zeros(size, size, dtype=torch.float64)
        pi[torch.arange(size), torch.tensor(place)] = 1
        rows.append(walsh(size) @ g @ pi @ walsh(size) @ b)
    return torch.cat(rows)[:total, :dim] / math.sqrt(total * size)


def matrix(module: Any) -> Tensor:
    """``E`` of a subspace, from what its state dict says."""
    names = [name for name in module.state_dict() if name.endswith(".seed")]
    assert len(names) == 1
    label, seed = names[0].removesuffix(".seed"), int(module.state_dict()[names[0]])
    total, dim = module.total, module.projection.dim
    if label == "dense":
        return dense(seed, total, dim)
    return fastfood(seed, total, dim) if label == "fastfood" else sparse(seed, total, dim, int(label.removeprefix("sparse")))


def _subspace(module: Any, d: Tensor) -> Tensor:
    # Kept as it is: the matrix of a case has been drawn in float32, and torch's logarithms differ from Python's there.
    e = module.projection.matrix()
    expected = matrix(module)
    torch.testing.assert_close(e, expected.double(), rtol=0, atol=1e-5 if "dense" in module.label else 1e-12)
    return ((e.to(d) * d).sum(1) + module.origin).reshape(module.shapes[0])


CASES = [
    Case(cat.Subspace(3), (4, 5), _subspace, bump, latents=((3,),), nodes=5),
    Case(cat.Subspace(2, seed=5), (7,), _subspace, bump, latents=((2,),), nodes=5),
    Case(cat.Subspace(3, "sparse", seed=2), (4, 5), _subspace, bump, latents=((3,),), nodes=56),
    Case(cat.Subspace(5, "sparse", nonzeros=3), (2, 3, 4), _subspace, bump, latents=((5,),), nodes=66),
    Case(cat.Subspace(2, "sparse", nonzeros=1), (9,), _subspace, bump, latents=((2,),), nodes=46),
    Case(cat.Subspace(3, "fastfood"), (4, 5), _subspace, bump, latents=((3,),), nodes=144),
    Case(cat.Subspace(4, "fastfood", seed=2**32 - 1), (3, 2, 3), _subspace, bump, latents=((4,),), nodes=144),
    Case(cat.Subspace(1, "fastfood"), (7,), _subspace, bump, latents=((1,),), nodes=144),
    Case(cat.Flat(), (2, 3, 2), lambda _, v: v.reshape(2, 3, 2), latents=((12,),), exact=True, nodes=3),
]
