"""The catalogue: every parametrization that has a name, one file for each family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fxparam.catalogue.adapters import Dora, Lora
from fxparam.catalogue.balls import Ball, Lipschitz, Sphere
from fxparam.catalogue.centering import Centered, Standardized
from fxparam.catalogue.definite import PositiveDefinite, Skew, Symmetric
from fxparam.catalogue.diagonal_low_rank import DiagonalLowRank
from fxparam.catalogue.elementwise import Bounded, Positive, Scale
from fxparam.catalogue.few_bits import Binary, Ternary
from fxparam.catalogue.flat import Flat
from fxparam.catalogue.gates import Gate
from fxparam.catalogue.hypernetwork import Hypernetwork
from fxparam.catalogue.invertible import Invertible, SpecialLinear
from fxparam.catalogue.joint import JointEntry
from fxparam.catalogue.manifolds import AlmostOrthogonal, Grassmann, SpecialOrthogonal, Unitary
from fxparam.catalogue.mixture import Mixture
from fxparam.catalogue.monotone import Monotone
from fxparam.catalogue.noise import Noise, Variational
from fxparam.catalogue.norms import UnitNorm, WeightNorm
from fxparam.catalogue.orthogonal import Orthogonal
from fxparam.catalogue.products import Kronecker, Monarch
from fxparam.catalogue.quantization import FakeQuantize, LearnedStep
from fxparam.catalogue.rank import FixedRank, LowRank
from fxparam.catalogue.semidefinite import PositiveSemidefinite
from fxparam.catalogue.sharing import FromMatrix, Transpose
from fxparam.catalogue.sparsity import Mask, SemiStructured
from fxparam.catalogue.spectral import SpectralNorm
from fxparam.catalogue.stochastic import DoublyStochastic, Permutation, RowStochastic, Simplex
from fxparam.catalogue.structure import Banded, BlockDiagonal, Circulant, Toeplitz, Triangular
from fxparam.catalogue.subspace import Subspace
from fxparam.declaration import Entry

_CLASSES: tuple[type[Entry], ...] = (
    AlmostOrthogonal,
    Ball,
    Banded,
    Binary,
    BlockDiagonal,
    Bounded,
    Centered,
    Circulant,
    DiagonalLowRank,
    Dora,
    DoublyStochastic,
    FakeQuantize,
    FixedRank,
    Flat,
    FromMatrix,
    Gate,
    Grassmann,
    Hypernetwork,
    Invertible,
    Kronecker,
    LearnedStep,
    Lipschitz,
    Lora,
    LowRank,
    Mask,
    Mixture,
    Monarch,
    Monotone,
    Noise,
    Orthogonal,
    Permutation,
    Positive,
    PositiveDefinite,
    PositiveSemidefinite,
    RowStochastic,
    Scale,
    SemiStructured,
    Simplex,
    Skew,
    SpecialLinear,
    SpecialOrthogonal,
    SpectralNorm,
    Sphere,
    Standardized,
    Subspace,
    Symmetric,
    Ternary,
    Toeplitz,
    Transpose,
    Triangular,
    UnitNorm,
    Unitary,
    Variational,
    WeightNorm,
)

ENTRIES: Mapping[str, type[Entry]] = MappingProxyType({entry.name: entry for entry in _CLASSES})
"""Every entry by its name in ``fxp.<name>`` and in spec files."""

__all__ = [
    "ENTRIES",
    "AlmostOrthogonal",
    "Ball",
    "Banded",
    "Binary",
    "BlockDiagonal",
    "Bounded",
    "Centered",
    "Circulant",
    "DiagonalLowRank",
    "Dora",
    "DoublyStochastic",
    "FakeQuantize",
    "FixedRank",
    "Flat",
    "FromMatrix",
    "Gate",
    "Grassmann",
    "Hypernetwork",
    "Invertible",
    "JointEntry",
    "Kronecker",
    "LearnedStep",
    "Lipschitz",
    "Lora",
    "LowRank",
    "Mask",
    "Mixture",
    "Monarch",
    "Monotone",
    "Noise",
    "Orthogonal",
    "Permutation",
    "Positive",
    "PositiveDefinite",
    "PositiveSemidefinite",
    "RowStochastic",
    "Scale",
    "SemiStructured",
    "Simplex",
    "Skew",
    "SpecialLinear",
    "SpecialOrthogonal",
    "SpectralNorm",
    "Sphere",
    "Standardized",
    "Subspace",
    "Symmetric",
    "Ternary",
    "Toeplitz",
    "Transpose",
    "Triangular",
    "UnitNorm",
    "Unitary",
    "Variational",
    "WeightNorm",
]
