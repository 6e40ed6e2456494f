"""The restrictions that TensorRT's operator table states in words, as functions of one node.

Source: as ``fxparam.exporters.tensorrt_rules``. The restrictions on ``training_mode`` of BatchNormalization and ``p`` of
LpNormalization and LpPool come from the parser's checks of single nodes (``builtin_op_static_checkers.cpp`` of the same
repository).
A rule yields what is wrong; it yields level ``unknown`` where the file does not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


@final
@dataclass(frozen=True)
class Problem:
    """A restriction that is broken, or that may be."""

    what: str
    remedy: str
    level: Literal["error", "unknown", "warning"] = "error"


@final
@dataclass(frozen=True)
class NodeView:
    """One node, asked for what the rules need.

    Attributes:
        node: the node.
        in_function: whether it lies in a local function, whose inputs may be constants at one call and not at another.
    """

    node: ir.Node
    in_function: bool = False

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute; ``default`` where it is absent or given by the caller of a function."""
        found = self.node.attributes.get(name)
        return default if found is None or found.is_ref() else found.value

    def input(self, index: int) -> ir.Value | None:
        """An input, ``None`` where it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def output(self, index: int) -> ir.Value | None:
        """An output that something may read, ``None`` where it is left out."""
        outputs = self.node.outputs
        return outputs[index] if index < len(outputs) and outputs[index].name else None

    def rank(self, index: int) -> int | None:
        """The number of dimensions of an input, where it is known."""
        value = self.input(index)
        return len(value.shape) if value is not None and value.shape is not None else None

    def is_constant(self, index: int) -> bool | None:
        """Whether an input is left out or known without running the model; ``None`` where a function's caller decides."""
        value = self.input(index)
        return True if value is None else _is_constant(value, self.in_function, {})

    def constant(self, index: int) -> np.ndarray | None:
        """The values of an input that is a weight or a Constant node."""
        value = self.input(index)
        return _array(value) if value is not None else None


def _is_constant(value: ir.Value, in_function: bool, seen: dict[int, bool | None]) -> bool | None:
    if id(value) in seen:
        return seen[id(value)]
    node = value.producer()
    if value.is_initializer() or (node is not None and node.op_type == "Constant"):
        result: bool | None = True
    elif node is None:
        result = None if in_function else False
    elif node.op_type in ("Shape", "Size") and _is_static(node.inputs[0]):
        result = True
    elif node.op_type.startswith("Random") or any(a.type.name in ("GRAPH", "GRAPHS") for a in node.attributes.values()):
        result = False
    else:
        parts = [_is_constant(x, in_function, seen) for x in node.inputs if x is not None]
        result = False if False in parts else None if None in parts else True
    seen[id(value)] = result
    return result


def _is_static(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and all(isinstance(size, int) for size in value.shape)


def _array(value: ir.Value) -> np.ndarray | None:
    import onnx_ir as ir

    stored = value.const_value
    if stored is None:
        stored = ir.convenience.get_const_tensor(value)
    return None if stored is None else stored.numpy()


# ---- rules -----------------------------------------------------------------------------------------------------------

Rule = Callable[[NodeView], Iterator[Problem]]

_REWRITE = "Write this part of the model in another way"


def _ranks(view: NodeView, inputs: Sequence[tuple[int, str]], allowed: tuple[int, ...], remedy: str) -> Iterator[Problem]:
    expected = " or ".join(map(str, allowed))
    for index, name in inputs:
        if view.input(index) is None:
            continue
        rank = view.rank(index)
        if rank is None:
            yield Problem(
                f"{name} must have {expected} dimensions, and the file does not tell how many it has", remedy, "unknown"
            )
        elif rank not in allowed:
            yield Problem(f"{name} has {rank} dimensions; expected {expected}", remedy)


def _ones(view: NodeView) -> Iterator[Problem]:
    dilations = view.attribute("dilations", ())
    if any(d != 1 for d in dilations):
        yield Problem(f"dilations {tuple(dilations)}; expected all ones", _REWRITE)


def _pooling(view: NodeView) -> Iterator[Problem]:
    # Two or three spatial sizes, besides batch and channels.
    yield from _ranks(view, ((0, "X"),), (4, 5), "Give it a spatial size of 1 more (unsqueeze, pool, squeeze)")
    yield from _ones(view)
    if view.node.op_type == "MaxPool" and view.output(1) is not None:
        yield Problem("the output Indices is not supported", "Do not return the indices of the pooling")


def _lp_pool(view: NodeView) -> Iterator[Problem]:
    yield from _ones(view)
    yield from _p(view)


def _p(view: NodeView) -> Iterator[Problem]:
    if (p := view.attribute("p", 2)) not in (1, 2):
        yield Problem(f"p={p}; expected 1 or 2", _REWRITE)


def _attention(view: NodeView) -> Iterator[Problem]:
    inputs = ((0, "Q"), (1, "K"), (2, "V"), (3, "attn_mask"))
    yield from _ranks(view, inputs, (4,), "Split the heads before it, to (batch, heads, length, size)")
    for index, name in ((4, "past_key"), (5, "past_value"), (6, "nonpad_kv_seqlen")):
        if view.input(index) is not None:
            yield Problem(f"the input {name} is not supported", "Concatenate the past before the node")
    for index, name in ((1, "present_key"), (2, "present_value"), (3, "qk_matmul_output")):
        if view.output(index) is not None:
            yield Problem(f"the output {name} is not supported", "Compute it with separate operators")
    for name in ("softcap", "qk_matmul_output_mode"):
        if view.attribute(name, 0):
            yield Problem(
                f"{name}={view.attribute(name)} is not supported", "Export at an opset below 23, without this operator"
            )


def _zero_point(view: NodeView) -> Iterator[Problem]:
    remedy = "Quantize symmetrically, with zero point 0 (int8, int4 or fp8)"
    point = view.input(2)
    if point is None:
        if view.node.op_type == "QuantizeLinear" and view.attribute("output_dtype", 0) in (0, 2):
            # TensorRT-RTX 1.7.1 makes it INT8 without a word: negative numbers that ONNX clamps to 0 then pass.
            yield Problem("without a zero point its output is UINT8; TensorRT has signed quantized types only", remedy)
        return
    if point.dtype is not None and point.dtype.name not in ("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"):
        yield Problem(f"the zero point is {point.dtype.name}; expected INT8, INT4, FP8 or FP4", remedy)
    values = view.constant(2)
    if values is None:
        yield Problem("the zero point must be 0, and it is computed", remedy, "unknown")
    elif (nonzero := values.astype("float32").ravel()).any():
        number = int((nonzero != 0).sum())
        yield Problem(f"{number} of {nonzero.size} zero points are not 0 (one is {nonzero[nonzero != 0][0]:g})", remedy)


def _recurrent(view: NodeView) -> Iterator[Problem]:
    names = [x.lower() for x in view.attribute("activations", ())]
    half = len(names) // 2
    if view.attribute("direction", "forward") == "bidirectional" and names[:half] != names[half:]:
        yield Problem("its two directions have different activations; expected the same", "Write it as two layers")
    if view.node.op_type != "LSTM":
        return
    if view.attribute("input_forget", 0):
        yield Problem("input_forget=1; expected 0", _REWRITE)
    if view.attribute("layout", 0):
        yield Problem("layout=1 (batch first); expected 0", "Transpose around the node")


def _if(view: NodeView) -> Iterator[Problem]:
    branches = [view.attribute(name) for name in ("then_branch", "else_branch")]
    if None in branches:
        return
    for then, other in zip(branches[0].outputs, branches[1].outputs, strict=False):
        if then.name == other.name:
            yield Problem(f"both branches call an output {then.name!r}; expected different names", "Rename one of them")
        if then.shape is None or other.shape is None:
            what = (
                f"the outputs {then.name!r} and {other.name!r} of the branches must have one rank, which the file does not tell"
            )
            yield Problem(what, "Give both the same number of dimensions", "unknown")
        elif len(then.shape) != len(other.shape):
            what = f"the branches return {len(then.shape)} and {len(other.shape)} dimensions ({then.name!r}, {other.name!r})"
            yield Problem(what, "Give both the same number of dimensions")


def _loop(view: NodeView) -> Iterator[Problem]:
    what = "the length of scan outputs must be fixed and carried values must keep their shape, which this check cannot tell"
    yield Problem(what, 'Build it (rung="build"), or unroll the loop', "unknown")


def _resize(view: NodeView) -> Iterator[Problem]:
    allowed: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        (
            "coordinate_transformation_mode",
            "half_pixel",
            ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
        ),
        ("mode", "nearest", ("nearest", "linear")),
        ("nearest_mode", "round_prefer_floor", ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
        ("keep_aspect_ratio_policy", "stretch", ("stretch",)),
        ("antialias", 0, (0,)),
    )
    for name, default, values in allowed:
        if (found := view.attribute(name, default)) not in values:
            yield Problem(f"{name}={found!r}; expected {' or '.join(map(repr, values))}", _REWRITE)
    axes, rank = view.attribute("axes"), view.rank(0)
    if view.input(2) is not None and axes is not None and (rank is None or list(axes) != list(range(rank))):
        what = f"axes={tuple(axes)} with scales; expected all axes in order"
        yield Problem(what, "Give scales for every axis", "error" if rank is not None else "unknown")


def _topk(view: NodeView) -> Iterator[Problem]:
    if not view.attribute("sorted", 1):
        yield Problem("sorted=0; expected 1", "Ask for sorted results")
    k = view.constant(1)
    if k is None:
        yield Problem("K must be less than 3840, and it is computed", "Make K a constant", "unknown")
    elif k.size and int(k.ravel()[0]) >= 3840:
        yield Problem(f"K={int(k.ravel()[0])}; expected less than 3840", "Ask for fewer values, or sort in several steps")


def _seed(view: NodeView) -> Iterator[Problem]:
    yield Problem("TensorRT ignores the seed: its random numbers are others", "Draw them outside and pass them in", "warning")


def _deform(view: NodeView) -> Iterator[Problem]:
    yield from _ranks(view, ((0, "X"),), (3, 4), _REWRITE)
    pads = list(view.attribute("pads", ()))
    if pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        yield Problem(f"pads {tuple(pads)}; expected the same at both ends", "Pad before the node")


def _constant(view: NodeView) -> Iterator[Problem]:
    for name in ("sparse_value", "value_string", "value_strings"):
        if name in view.node.attributes:
            yield Problem(f"the attribute {name} is not supported", "Use a dense tensor of numbers")


def _dropout(view: NodeView) -> Iterator[Problem]:
    training = view.constant(2)
    if training is not None and training.any():
        yield Problem("training_mode is true; expected false", "Export the model in eval mode (model.eval())")


def _static_input(view: NodeView) -> Iterator[Problem]:
    if not _is_static(view.input(0)):
        yield Problem("its input must have fixed sizes", "Export the model for fixed sizes")


def _hardmax(view: NodeView) -> Iterator[Problem]:
    value, axis = view.input(0), view.attribute("axis", -1)
    if value is None or value.shape is None:
        yield Problem(f"the size of axis {axis} must be fixed, and the file does not tell it", _REWRITE, "unknown")
    elif not isinstance(value.shape[axis], int):
        yield Problem(f"the size of axis {axis} must be fixed", "Export the model with this size fixed")


def _batch_norm(view: NodeView) -> Iterator[Problem]:
    if view.attribute("training_mode", 0):
        yield Problem("training_mode=1; expected 0", "Export the model in eval mode (model.eval())")


def _layer_norm(view: NodeView) -> Iterator[Problem]:
    if view.output(1) is not None or view.output(2) is not None:
        yield Problem("only the output Y is supported", "Compute mean and deviation with separate operators")


def _scatter_nd(view: NodeView) -> Iterator[Problem]:
    if (reduction := view.attribute("reduction", "none")) != "none":
        yield Problem(f"reduction={reduction!r}; expected 'none'", "Use ScatterElements, or one-hot and a matrix product")


def _positions(view: NodeView) -> Iterator[Problem]:
    value = view.input(3)
    if value is not None and value.dtype is not None and value.dtype.name != "INT64":
        yield Problem(f"position_ids is {value.dtype.name}; expected INT64", "Cast it to INT64")


def _tensor_scatter(view: NodeView) -> Iterator[Problem]:
    yield from _ranks(view, ((0, "past_cache"), (1, "update")), (4,), _REWRITE)
    if (axis := view.attribute("axis", -2)) != -2:
        yield Problem(f"axis={axis}; expected -2", "Transpose around the node")


def _stft(view: NodeView) -> Iterator[Problem]:
    value = view.input(0)
    if value is not None and value.shape is not None and len(value.shape) == 3 and value.shape[2] != 1:
        yield Problem("its signal is complex; expected real values", "Transform the two parts by themselves")


def _grid_sample(view: NodeView) -> Iterator[Problem]:
    yield from _ranks(view, ((0, "X"),), (4,), _REWRITE)


RESTRICTIONS: Mapping[str, Rule] = {
    "Attention": _attention,
    "AveragePool": _pooling,
    "BatchNormalization": _batch_norm,
    "Constant": _constant,
    "DeformConv": _deform,
    "DequantizeLinear": _zero_point,
    "Dropout": _dropout,
    "EyeLike": _static_input,
    "GRU": _recurrent,
    "GridSample": _grid_sample,
    "Hardmax": _hardmax,
    "If": _if,
    "LSTM": _recurrent,
    "LayerNormalization": _layer_norm,
    "Loop": _loop,
    "LpNormalization": _p,
    "LpPool": _lp_pool,
    "MaxPool": _pooling,
    "QuantizeLinear": _zero_point,
    "RNN": _recurrent,
    "RandomNormal": _seed,
    "RandomNormalLike": _seed,
    "RandomUniform": _seed,
    "RandomUniformLike": _seed,
    "Resize": _resize,
    "RotaryEmbedding": _positions,
    "STFT": _stft,
    "ScatterND": _scatter_nd,
    "TensorScatter": _tensor_scatter,
    "TopK": _topk,
}
"""Operator -> its rule; operators without one have no restriction in the table."""
