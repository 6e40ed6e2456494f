"""fxparam: a compiler pass for PyTorch models whose weights are computed.

Declare the weights, train at the speed of the plain model, ship the plain model.
"""

from __future__ import annotations

from fxparam.api.export import diff, export_onnx, export_prologue, refit_onnx
from fxparam.api.fold import fold
from fxparam.api.restore import restore
from fxparam.api.transform import transform
from fxparam.catalogue import AlmostOrthogonal as almost_orthogonal
from fxparam.catalogue import Ball as ball
from fxparam.catalogue import Banded as banded
from fxparam.catalogue import Binary as binary
from fxparam.catalogue import BlockDiagonal as block_diagonal
from fxparam.catalogue import Bounded as bounded
from fxparam.catalogue import Centered as centered
from fxparam.catalogue import Circulant as circulant
from fxparam.catalogue import DiagonalLowRank as diagonal_low_rank
from fxparam.catalogue import Dora as dora
from fxparam.catalogue import DoublyStochastic as doubly_stochastic
from fxparam.catalogue import FakeQuantize as fake_quantize
from fxparam.catalogue import FixedRank as fixed_rank
from fxparam.catalogue import Flat as flat
from fxparam.catalogue import FromMatrix as from_matrix
from fxparam.catalogue import Gate as gate
from fxparam.catalogue import Grassmann as grassmann
from fxparam.catalogue import Hypernetwork as hypernetwork
from fxparam.catalogue import Invertible as invertible
from fxparam.catalogue import Kronecker as kronecker
from fxparam.catalogue import LearnedStep as learned_step
from fxparam.catalogue import Lipschitz as lipschitz
from fxparam.catalogue import Lora as lora
from fxparam.catalogue import LowRank as low_rank
from fxparam.catalogue import Mask as mask
from fxparam.catalogue import Mixture as mixture
from fxparam.catalogue import Monarch as monarch
from fxparam.catalogue import Monotone as monotone
from fxparam.catalogue import Noise as noise
from fxparam.catalogue import Orthogonal as orthogonal
from fxparam.catalogue import Permutation as permutation
from fxparam.catalogue import Positive as positive
from fxparam.catalogue import PositiveDefinite as positive_definite
from fxparam.catalogue import PositiveSemidefinite as positive_semidefinite
from fxparam.catalogue import RowStochastic as row_stochastic
from fxparam.catalogue import Scale as scale
from fxparam.catalogue import SemiStructured as semi_structured
from fxparam.catalogue import Simplex as simplex
from fxparam.catalogue import Skew as skew
from fxparam.catalogue import SpecialLinear as special_linear
from fxparam.catalogue import SpecialOrthogonal as special_orthogonal
from fxparam.catalogue import SpectralNorm as spectral_norm
from fxparam.catalogue import Sphere as sphere
from fxparam.catalogue import Standardized as standardized
from fxparam.catalogue import Subspace as subspace
from fxparam.catalogue import Symmetric as symmetric
from fxparam.catalogue import Ternary as ternary
from fxparam.catalogue import Toeplitz as toeplitz
from fxparam.catalogue import Transpose as transpose
from fxparam.catalogue import Triangular as triangular
from fxparam.catalogue import Unitary as unitary
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
from fxparam.exporters.tensorrt import check_tensorrt
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
    "almost_orthogonal",
    "apply",
    "ball",
    "banded",
    "binary",
    "block_diagonal",
    "bounded",
    "centered",
    "check_tensorrt",
    "circulant",
    "custom",
    "diagonal_low_rank",
    "diff",
    "dora",
    "doubly_stochastic",
    "existing",
    "export_onnx",
    "export_prologue",
    "fake_quantize",
    "fixed_rank",
    "flat",
    "fold",
    "from_matrix",
    "gate",
    "grassmann",
    "hypernetwork",
    "invertible",
    "joint",
    "kronecker",
    "learned_step",
    "lipschitz",
    "lora",
    "low_rank",
    "mask",
    "mixture",
    "monarch",
    "monotone",
    "noise",
    "orthogonal",
    "permutation",
    "positive",
    "positive_definite",
    "positive_semidefinite",
    "ref",
    "refit_onnx",
    "restore",
    "row_stochastic",
    "scale",
    "semi_structured",
    "simplex",
    "skew",
    "special_linear",
    "special_orthogonal",
    "spectral_norm",
    "sphere",
    "standardized",
    "subspace",
    "symmetric",
    "ternary",
    "toeplitz",
    "transform",
    "transpose",
    "triangular",
    "unit_norm",
    "unitary",
    "variational",
    "weight_norm",
    "where",
]
