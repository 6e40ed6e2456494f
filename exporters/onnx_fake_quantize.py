"""``torch.fake_quantize_*`` in a forward, as QuantizeLinear and DequantizeLinear with PyTorch's own rounding.

PyTorch multiplies by the reciprocal, ``q = clamp(round(x · (1/s)) + z)``, and QuantizeLinear divides, ``round(x / s)``: the two
differ near ties, which are no rarity where ``x`` lies on another grid (an image, the sum of two quantized values). So the
product is a node of its own and the quantization has the scale 1:

    fake_quantize(x, s, z)    becomes    x -> Mul(1/s) -> [Clip] -> QuantizeLinear(1, z) -> DequantizeLinear(s, z)

The clipping, to ``[quant_min - z, quant_max - z]``, is there for ranges smaller than that of the integers (uint8 for ranges
from 0 on, else int8). Before the rounding it has the same effect as after it, and leaves the pair together, as TensorRT
wants it. Ranges of more than 8 bits, and channels of float64, are computed in floating point.

Equal bit for bit for finite ``x`` of less than 2^63 steps, beyond which PyTorch's own kernels disagree with each other.
Half precision is computed in float32 and float64 in float64, except that the product with ``s`` is one of float32 where there
is one scale: as in those kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_INTEGERS: Mapping[str, tuple[int, int]] = {"UINT8": (0, 255), "INT8": (-128, 127)}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What writes these operations, for ``torch.onnx.export(custom_translation_table=...)``."""
    aten = torch.ops.aten
    return {
        aten.fake_quantize_per_tensor_affine.default: _per_tensor,
        aten.fake_quantize_per_tensor_affine.tensor_qparams: _per_tensor,
        aten.fake_quantize_per_channel_affine.default: _per_channel,
    }


def _per_tensor(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Any:
    return _write(x, scale, zero_point, None, (quant_min, quant_max))


def _per_channel(x: Any, scale: Any, zero_point: Any, axis: int, quant_min: int, quant_max: int) -> Any:
    return _write(x, scale, zero_point, axis % len(x.shape), (quant_min, quant_max))


def _write(x: Any, scale: Any, zero_point: Any, axis: int | None, limits: tuple[int, int]) -> Any:
    """The nodes for one operation.

    Args:
        x: what is quantized, of any floating-point dtype.
        scale: a number, or a tensor of one element or of the size of ``axis``.
        zero_point: the same, integers.
        axis: the dimension with a scale for each index; None: one scale.
        limits: the smallest and the largest integer.

    Raises:
        NotImplementedError: the zero point is floating-point, which PyTorch adds before the rounding.
    """
    import numpy as np
    from onnx_ir import DataType
    from onnxscript import opset18 as op

    def aligned(value: Any) -> Any:
        """One number for each index of ``axis``, in a shape that broadcasts."""
        trailing = 0 if axis is None else len(x.shape) - 1 - axis
        return op.Unsqueeze(value, _as(np.arange(trailing) + 1, DataType.INT64)) if trailing else value

    if not isinstance(zero_point, int) and zero_point.dtype.is_floating_point():
        raise NotImplementedError(
            "its zero point is no integer; observe with an integer zero point (qscheme per_channel_affine)"
        )
    step, zero = (_as(value, DataType.FLOAT) for value in (scale, zero_point))
    steps = _in_steps(x, aligned(_reciprocal(scale)))
    low, high = (_as(float(end), DataType.FLOAT) for end in limits)
    is_wide = x.dtype == DataType.DOUBLE and axis is not None
    fitting = None if is_wide else _integer_type(limits)
    if fitting is None:
        levels = op.Sub(op.Clip(op.Add(op.Round(steps), aligned(zero)), low, high), aligned(zero))
        factors = levels, aligned(step)
        result = op.Mul(*(op.Cast(factor, to=DataType.DOUBLE) for factor in factors) if is_wide else factors)
        return result if is_wide or x.dtype == DataType.FLOAT else op.Cast(result, to=x.dtype)
    if limits != _INTEGERS[fitting]:
        steps = op.Min(op.Max(steps, aligned(op.Sub(low, zero))), aligned(op.Sub(high, zero)))
    one = _as(1.0 if isinstance(scale, int | float) else np.ones([*scale.shape]), DataType.FLOAT)
    integer = _as(zero_point, DataType[fitting])
    # The default axis, 1, is refused by TensorRT for vectors, even where there is one scale.
    quantized = op.QuantizeLinear(steps, one, integer, axis=axis or 0)
    result = op.DequantizeLinear(quantized, step, integer, axis=axis or 0)
    return result if x.dtype == DataType.FLOAT else op.Cast(result, to=x.dtype)


def _reciprocal(scale: Any) -> Any:
    """``1 / s`` as float32."""
    import numpy as np
    from onnx_ir import DataType
    from onnxscript import opset18 as op

    if isinstance(scale, int | float):
        return _as(np.float32(1) / np.float32(scale), DataType.FLOAT)
    # Written as (2 / s) / 2, which has the same bits: ONNX Runtime turns a product with 1 / s into the division.
    return op.Mul(op.Div(_as(2.0, DataType.FLOAT), _as(scale, DataType.FLOAT)), _as(0.5, DataType.FLOAT))


def _in_steps(x: Any, reciprocal: Any) -> Any:
    """``x · (1/s)`` as float32, with the product in the dtype in which PyTorch has it."""
    from onnx_ir import DataType
    from onnxscript import opset18 as op

    if x.dtype == DataType.DOUBLE:
        # Rounded before it becomes float32, which would else decide ties.
        return op.Cast(op.Round(op.Mul(x, op.Cast(reciprocal, to=DataType.DOUBLE))), to=DataType.FLOAT)
    return op.Mul(_as(x, DataType.FLOAT), reciprocal)


def _as(value: Any, dtype: Any) -> Any:
    """A number, an array or a value of the graph, as ``dtype``."""
    import numpy as np
    import onnx_ir as ir
    from onnxscript import opset18 as op

    if isinstance(value, int | float | np.ndarray | np.floating):
        return op.Constant(value=ir.tensor(np.asarray(value, dtype=dtype.numpy())))  # type: ignore[arg-type]
    return value if value.dtype == dtype else op.Cast(value, to=dtype)


def _integer_type(limits: tuple[int, int]) -> str | None:
    """The integers of 8 bits that hold all from the smallest to the largest."""
    return next((name for name, (low, high) in _INTEGERS.items() if low <= limits[0] and limits[1] <= high), None)
