"""The catalogue: every parametrization that has a name, one file for each family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fxparam.catalogue.definite import PositiveDefinite, Skew, Symmetric
from fxparam.catalogue.elementwise import Bounded, Positive, Scale
from fxparam.catalogue.joint import JointEntry
from fxparam.catalogue.noise import Noise, Variational
from fxparam.catalogue.norms import SpectralNorm, UnitNorm, WeightNorm
from fxparam.catalogue.orthogonal import Orthogonal
from fxparam.catalogue.rank import LowRank
from fxparam.catalogue.sharing import Transpose
from fxparam.catalogue.sparsity import Mask
from fxparam.catalogue.subspace import Flat, Subspace
from fxparam.declaration import Entry

_CLASSES: tuple[type[Entry], ...] = (
    Bounded,
    Flat,
    LowRank,
    Mask,
    Noise,
    Orthogonal,
    Positive,
    PositiveDefinite,
    Scale,
    Skew,
    SpectralNorm,
    Subspace,
    Symmetric,
    Transpose,
    UnitNorm,
    Variational,
    WeightNorm,
)

ENTRIES: Mapping[str, type[Entry]] = MappingProxyType({entry.name: entry for entry in _CLASSES})
"""Every entry by its name in ``fxp.<name>`` and in spec files."""

__all__ = [
    "ENTRIES",
    "Bounded",
    "Flat",
    "JointEntry",
    "LowRank",
    "Mask",
    "Noise",
    "Orthogonal",
    "Positive",
    "PositiveDefinite",
    "Scale",
    "Skew",
    "SpectralNorm",
    "Subspace",
    "Symmetric",
    "Transpose",
    "UnitNorm",
    "Variational",
    "WeightNorm",
]
