"""Zeros among the weights of an ONNX graph: how many there are, and whether every four in a row hold two.

2:4 sparsity (Mishra et al. 2021) is what tensor cores and TensorRT make use of: of every four consecutive elements along the
dimension that the layer sums over, at most two are not zero. Everything here is counted in the file's own tensors, whatever
the model declared: a pattern that is stated was seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

SPARSITY = "fxparam.sparsity"
"""Metadata of the file (JSON): the sparse weights, ``{name: {"density": 0.5, "dim": 1, "2:4": true}}``."""

SPARSE = 0.1
"""The fraction of zeros from which a weight counts as sparse."""

_KEEPS_DIMS = ("Cast", "DequantizeLinear", "Identity")


@final
@dataclass(frozen=True)
class Sparsity:
    """How sparse a weight is.

    Attributes:
        density: the fraction of its elements that are not zero.
        dim: the dimension that its layer sums over; None where the graph does not show one.
        semi_structured: whether at most two of every four consecutive elements along ``dim`` are not zero.
    """

    density: float
    dim: int | None
    semi_structured: bool

    def __str__(self) -> str:
        return f"{1 - self.density:.1%} zeros" + (f", 2:4 along dimension {self.dim}" if self.semi_structured else "")

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return {"density": self.density, "dim": self.dim, "2:4": self.semi_structured}


def sparsity_of(weight: np.ndarray, dim: int | None = 1, zero: Any = 0) -> Sparsity:
    """How sparse a weight is, by its values.

    Args:
        weight: any shape and dtype.
        dim: the dimension along which groups of four are formed; None: none are.
        zero: what counts as zero, broadcast to the weight: the zero point of integers.
    """
    import numpy as np

    nonzero = np.not_equal(weight, zero)
    density = float(nonzero.mean()) if nonzero.size else 1.0
    if dim is None or not nonzero.size or nonzero.shape[dim] % 4:
        return Sparsity(density, dim, False)
    groups = np.moveaxis(nonzero, dim, -1).reshape(-1, 4)
    return Sparsity(density, dim, bool((groups.sum(1) <= 2).all()))


def sparse_weights(graph: ir.Graph) -> dict[str, Sparsity]:
    """The floating-point or dequantized initializers of two and more dimensions with at least ``SPARSE`` of zeros."""
    found = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or len(tensor.shape) < 2:
            continue
        zero = 0 if tensor.dtype.is_floating_point() else _zero_point(value)
        if zero is not None and tensor.size:
            sparsity = sparsity_of(tensor.numpy(), summed_dim(value), zero)
            if sparsity.density <= 1 - SPARSE:
                found[name] = sparsity
    return found


def summed_dim(value: ir.Value) -> int | None:
    """The dimension of a weight that its layer sums over: the inputs of a linear layer, the input channels of a convolution."""
    for node, index in value.uses():
        dim = _summed_by(node, index, 0 if value.shape is None else len(value.shape))
        if dim is not None:
            return dim
    return None


def _summed_by(node: ir.Node, index: int, rank: int) -> int | None:
    if index == 0 and node.op_type in _KEEPS_DIMS:
        return summed_dim(node.outputs[0])
    if node.op_type == "Transpose":
        dim = summed_dim(node.outputs[0])
        perm = node.attributes.get_ints("perm", range(rank)[::-1])
        return None if dim is None else perm[dim]
    if node.op_type == "MatMul":
        return max(rank - 2, 0) if index else rank - 1
    if index != 1:
        return None
    if node.op_type == "Gemm":
        return 1 if node.attributes.get_int("transB", 0) else 0
    return {"Conv": 1, "ConvTranspose": 0}.get(node.op_type)


def _zero_point(value: ir.Value) -> np.ndarray | None:
    """What stands for zero among integers that are dequantized, shaped to broadcast; None for other integers."""
    for node, index in value.uses():
        if node.op_type != "DequantizeLinear" or index != 0 or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        stored = node.inputs[2].const_value
        if stored is not None:
            zero = stored.numpy()
            axis, rank = node.attributes.get_int("axis", 1), len(value.const_value.shape)  # type: ignore[union-attr]
            return zero if zero.ndim == 0 else zero.reshape([-1 if d == axis % rank else 1 for d in range(rank)])
    return None


def as_metadata(found: Mapping[str, Sparsity]) -> dict[str, dict[str, Any]]:
    """What the file's metadata say of its sparse weights."""
    return {name: sparsity.to_dict() for name, sparsity in found.items()}
