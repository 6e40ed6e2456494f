"""What TensorRT's ONNX parser takes, as far as its makers publish it.

Source: the operator support matrix of the parser, ``docs/operators.md`` of onnx/onnx-tensorrt, as of TensorRT 10.15
("operators in the inclusive range of opset 9 to opset 24"). Facts only, rearranged: operators by the types they accept.
The restrictions of single operators, which the same page states in words, are the functions of
``fxparam.exporters.tensorrt_static``. An operator that is neither in ``OPERATORS`` nor in ``UNSUPPORTED`` is one this
table does not know, and is reported as such.

Types have ONNX's names: FP8 is ``FLOAT8E4M3FN`` and FP4 is ``FLOAT4E2M1``.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "operator table of TensorRT 10.15"
"""What a finding made from this table gives as its source."""

OPSETS = range(9, 25)
"""Operator sets of the table: 9 to 24."""

QUANTIZED = frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"})
"""Types that exist between QuantizeLinear and DequantizeLinear only."""

_FLOAT32_16 = frozenset({"FLOAT", "FLOAT16"})
_FLOAT = _FLOAT32_16 | {"BFLOAT16"}
_NUMBER = _FLOAT | {"INT32", "INT64"}
_DATA = _NUMBER | {"BOOL"}

DTYPES = _DATA | QUANTIZED | {"DOUBLE", "UINT8"}
"""Types a tensor may have at all. DOUBLE is converted to FLOAT; UINT8 is for inputs and outputs of the network."""

_BY_TYPES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"BOOL"}), "And Not Or Xor"),
    (frozenset({"FLOAT"}), "STFT"),
    (
        _FLOAT32_16,
        "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign",
    ),
    (
        _FLOAT,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh CumSum "
        "Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization "
        "HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log "
        "LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu ParametricSoftplus QuantizeLinear "
        "RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize "
        "RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh "
        "ThresholdedRelu Upsample",
    ),
    (
        _NUMBER,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul Neg Pad "
        "Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
        "ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK",
    ),
    (
        _DATA,
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence Shape "
        "Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    (_FLOAT | {"INT32"}, "TensorScatter"),
    (_FLOAT | {"INT8", "FLOAT8E4M3FN"}, "Attention"),
    (_NUMBER | {"INT8"}, "Gelu"),
    (_NUMBER | {"FLOAT8E4M3FN"}, "Mean"),
    (_DATA | {"UINT8"}, "Cast CastLike"),
    (_DATA | {"INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}, "Constant ConstantOfShape"),
    (QUANTIZED, "DequantizeLinear"),
)

OPERATORS: Mapping[str, frozenset[str]] = {name: types for types, names in _BY_TYPES for name in names.split()}
"""Operator -> the types it accepts for its data."""

UNSUPPORTED: frozenset[str] = frozenset(
    "AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress "
    "ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool "
    "MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv "
    "QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength "
    "SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit TfIdfVectorizer "
    "Unique".split()
)
"""Operators that the table lists as not supported."""

CONSTANT_INPUTS: Mapping[str, tuple[tuple[int, str], ...]] = {
    "CumSum": ((1, "axis"),),
    "Dropout": ((2, "training_mode"),),
    "OneHot": ((1, "depth"),),
    "STFT": ((1, "frame_step"), (2, "window")),
    "Squeeze": ((1, "axes"),),
    "Unsqueeze": ((1, "axes"),),
} | {f"Reduce{kind}": ((1, "axes"),) for kind in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()}
"""Operator -> inputs (index, name) that must be known when the engine is built."""

DATA_INPUT: Mapping[str, int] = {"Where": 1, "OneHot": 2}
"""Which input the table's types are about, where it is not the first."""

DATA_OUTPUT = frozenset(
    "BlackmanWindow Constant ConstantOfShape EyeLike HammingWindow HannWindow RandomNormal RandomNormalLike RandomUniform "
    "RandomUniformLike".split()
)
"""Operators whose types are about their output."""

BODIES = frozenset({"If", "Loop", "Scan"})
"""Operators with bodies, whose nodes are checked one by one instead."""
