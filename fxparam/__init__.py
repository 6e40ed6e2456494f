"""fxparam: a compiler pass for PyTorch models whose weights are computed.

Declare the weights, train at the speed of the plain model, ship the plain model.
"""

from __future__ import annotations

from fxparam.api.export import diff, export_onnx, refit_onnx
from fxparam.api.fold import fold
from fxparam.api.restore import restore
from fxparam.api.transform import transform
from fxparam.catalogue import Bounded as bounded
from fxparam.catalogue import Flat as flat
from fxparam.catalogue import LowRank as low_rank
from fxparam.catalogue import Mask as mask
from fxparam.catalogue import Noise as noise
from fxparam.catalogue import Orthogonal as orthogonal
from fxparam.catalogue import Positive as positive
from fxparam.catalogue import PositiveDefinite as positive_definite
from fxparam.catalogue import Scale as scale
from fxparam.catalogue import Skew as skew
from fxparam.catalogue import SpectralNorm as spectral_norm
from fxparam.catalogue import Subspace as subspace
from fxparam.catalogue import Symmetric as symmetric
from fxparam.catalogue import Transpose as transpose
from fxparam.catalogue import UnitNorm as unit_norm
from fxparam.catalogue import Variational as variational
from fxparam.catalogue import WeightNorm as weight_norm
from fxparam.declaration import Custom as custom
from fxparam.declaration import Declaration, Entry, Parametrization
from fxparam.errors import (
    AdoptionError,
    DeferralError,
    ExportError,
    FxparamError,
    ImageError,
    MissingExtraError,
    NonFiniteError,
    PassError,
    SpecError,
    StaleWeightsError,
    TraceError,
)
from fxparam.graphdiff import GraphDiff, apply
from fxparam.program import Program, Site
from fxparam.runtime.module import ParametrizedModule
from fxparam.spec.selectors import joint, where
from fxparam.spec.spec import Spec, existing, ref

__version__ = "0.1.0"

__all__ = [
    "AdoptionError",
    "Declaration",
    "DeferralError",
    "Entry",
    "ExportError",
    "FxparamError",
    "GraphDiff",
    "ImageError",
    "MissingExtraError",
    "NonFiniteError",
    "Parametrization",
    "ParametrizedModule",
    "PassError",
    "Program",
    "Site",
    "Spec",
    "SpecError",
    "StaleWeightsError",
    "TraceError",
    "apply",
    "bounded",
    "custom",
    "diff",
    "existing",
    "export_onnx",
    "flat",
    "fold",
    "joint",
    "low_rank",
    "mask",
    "noise",
    "orthogonal",
    "positive",
    "positive_definite",
    "ref",
    "refit_onnx",
    "restore",
    "scale",
    "skew",
    "spectral_norm",
    "subspace",
    "symmetric",
    "transform",
    "transpose",
    "unit_norm",
    "variational",
    "weight_norm",
    "where",
]
