"""An ONNX file against the published operator table: what it says of which node, and that the real parser agrees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export.tensorrt_files import INSTALLED, MODELS, const, dequantized, info, needs_rtx, node, one, save
from onnx import TensorProto as T
from onnx import helper
from torch import nn

import fxparam as fxp
from fxparam.exporters import tensorrt_rules
from fxparam.exporters.tensorrt import TensorRTReport, check_tensorrt


def levels(report: TensorRTReport) -> list[tuple[str, str, str]]:
    return [(f.level, f.node, f.op) for f in report.findings]


@pytest.mark.parametrize("opset", [18, 24])
@pytest.mark.parametrize("name", MODELS)
def test_exported_models_have_no_objection(name: str, opset: int, tmp_path: Path) -> None:
    build, shape = MODELS[name]
    fxp.export_onnx(build(), (torch.randn(shape),), tmp_path / "m.onnx", opset=opset, verify=0)
    report = check_tensorrt(tmp_path / "m.onnx", rung="static")
    assert (report.ok, report.rung, report.opset, report.findings) == (True, "static", opset, ())
    assert str(report).splitlines()[-1] == "  no objection"


def branches(inner: onnx.NodeProto) -> onnx.NodeProto:
    then = helper.make_graph([inner], "then", [], [info("t", T.FLOAT, [])])
    other = helper.make_graph([node("ReduceSum", "x", "e", "sum", keepdims=0)], "else", [], [info("e", T.FLOAT, [])])
    return node("If", "c", "y", "if", then_branch=then, else_branch=other)


def in_branch(path: Path) -> Path:
    inputs = [info("x", T.FLOAT, [3, 3]), info("c", T.BOOL, [])]
    return save(path, [branches(node("Det", "x", "t", "inner"))], inputs, [info("y", T.FLOAT, [])])


def in_function(path: Path) -> Path:
    body = [node("Det", "a", "b", "inner")]
    function = helper.make_function("my", "F", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    call = [node("F", "x", "y", "call", domain="my")]
    return save(path, call, [info("x", T.FLOAT, [2, 2])], [info("y", T.FLOAT)], functions=[function])


def dynamic_axes(path: Path) -> Path:
    inputs = [info("x", T.FLOAT, [4, 4]), info("a", T.INT64, [1])]
    return save(path, [node("ReduceSum", "x a", "y", "sum")], inputs, [info("y")])


def large_top_k(path: Path) -> Path:
    nodes = [node("TopK", "x k", "y i", "top")]
    return save(
        path, nodes, [info("x", T.FLOAT, [1, 6000])], [info("y"), info("i", T.INT64)], [const("k", T.INT64, [1], [5000])]
    )


def pool_indices(path: Path) -> Path:
    nodes = [node("MaxPool", "x", "y i", "pool", kernel_shape=[2, 2])]
    return save(path, nodes, [info("x", T.FLOAT, [1, 1, 4, 4])], [info("y"), info("i", T.INT64)])


def training_norm(path: Path) -> Path:
    weights = [const(name, T.FLOAT, [2], [1, 2]) for name in ("scale", "bias", "mean", "var")]
    nodes = [node("BatchNormalization", "x scale bias mean var", "y m v", "norm", training_mode=1)]
    return save(path, nodes, [info("x", T.FLOAT, [1, 2, 3])], [info("y")], weights)


def soft_cap(path: Path) -> Path:
    inputs = [info(name, T.FLOAT, [1, 2, 4, 8]) for name in "qkv"]
    return save(path, [node("Attention", "q k v", "y", "att", softcap=2.0)], inputs, [info("y")], opset=23)


# name -> (file, node, operator, text of the finding, text of its remedy)
REFUSED: dict[str, tuple[Any, str, str, str, str]] = {
    "det": (lambda p: one(p, "Det", shape=(3, 3)), "n", "Det", "does not support this operator", "without it"),
    "unique": (lambda p: one(p, "Unique"), "n", "Unique", "does not support this operator", "without it"),
    "unnamed": (lambda p: one(p, "Unique", name=""), "node of 'y'", "Unique", "does not support", "without it"),
    "branch": (in_branch, "if/then_branch/inner", "Det", "does not support this operator", "without it"),
    "function": (in_function, "my.F/inner", "Det", "does not support this operator", "without it"),
    "int32": (lambda p: one(p, "Sigmoid", dtype=T.INT32), "n", "Sigmoid", "'x' is INT32; expected BFLOAT16, FLOAT,", "Cast"),
    "uint8": (lambda p: one(p, "Relu", dtype=T.UINT8), "n", "Relu", "'x' is UINT8; expected", "inputs and outputs of"),
    "int16": (lambda p: one(p, "Neg", dtype=T.INT16), "x", "input", "type INT16, which TensorRT does not have", "Convert"),
    "zero point": (
        lambda p: dequantized(p, T.INT8, 3),
        "dq",
        "DequantizeLinear",
        "1 of 1 zero points are not 0 (one is 3)",
        "sym",
    ),
    "unsigned": (
        lambda p: dequantized(p, T.UINT8, 0),
        "dq",
        "DequantizeLinear",
        "the zero point is UINT8; expected INT8",
        "int8",
    ),
    "int16 weight": (lambda p: dequantized(p, T.INT16), "w", "weight", "type INT16", "Convert"),
    "quantize": (
        lambda p: one(p, "QuantizeLinear", out=T.UINT8, weights=[const("s", T.FLOAT, [], [0.5])]),
        "n",
        "QuantizeLinear",
        "without a zero point its output is UINT8",
        "zero point 0",
    ),
    "axes": (dynamic_axes, "sum", "ReduceSum", "axes must be known when the engine is built", "Make axes a constant"),
    "top k": (large_top_k, "top", "TopK", "K=5000; expected less than 3840", "fewer values"),
    "indices": (pool_indices, "pool", "MaxPool", "the output Indices is not supported", "Do not return the indices"),
    "training": (training_norm, "norm", "BatchNormalization", "training_mode=1; expected 0", "model.eval()"),
    "lp": (lambda p: one(p, "LpNormalization", p=3, opset=18), "n", "LpNormalization", "p=3; expected 1 or 2", "another way"),
    "softcap": (soft_cap, "att", "Attention", "softcap=2.0 is not supported", "below 23"),
    "scatter": (
        lambda p: one(
            p,
            "ScatterND",
            weights=[const("i", T.INT64, [1, 1], [0]), const("u", T.FLOAT, [1, 3], [1, 2, 3])],
            reduction="add",
        ),
        "n",
        "ScatterND",
        "reduction='add'; expected 'none'",
        "ScatterElements",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_static_check_says_node_operator_fault_and_remedy(case: str, tmp_path: Path) -> None:
    write, where, op, what, remedy = REFUSED[case]
    report = check_tensorrt(write(tmp_path / "m.onnx"), rung="static")
    found = [f for f in report.findings if (f.level, f.node, f.op) == ("error", where, op) and what in f.what]
    assert len(found) == 1 and remedy in found[0].remedy, str(report)
    assert not report.ok and str(found[0]) in str(report) and found[0].source == tensorrt_rules.SOURCE


@needs_rtx
@pytest.mark.parametrize("case", [c for c in REFUSED if c not in ("quantize", "top k")])
def test_the_real_parser_refuses_the_same(case: str, tmp_path: Path) -> None:
    """But for TopK, which the builder refuses, and QuantizeLinear without a zero point, taken as INT8 although it is UINT8."""
    report = check_tensorrt(REFUSED[case][0](tmp_path / "m.onnx"), rung="parse")
    told = [f for f in report.findings if f.source.startswith("parser of TensorRT-RTX")]
    assert report.rung == "static" and any(f.level == "error" for f in told), str(report)


@pytest.mark.parametrize(
    ("dtype", "zero"), [(T.INT8, None), (T.INT8, 0), (T.INT4, None), (T.FLOAT8E4M3FN, 0)], ids=["int8", "int8-0", "int4", "fp8"]
)
def test_symmetric_quantized_weights_pass(dtype: int, zero: float | None, tmp_path: Path) -> None:
    path = dequantized(tmp_path / "m.onnx", dtype, zero)
    assert check_tensorrt(path, rung="static").findings == ()
    if INSTALLED:
        report = check_tensorrt(path, rung="build")
        assert (report.ok, report.rung) == (True, "build"), str(report)
        assert {"w", "s"} <= set(report.refittable)


def test_what_the_table_does_not_know_is_called_unknown(tmp_path: Path) -> None:
    custom = one(tmp_path / "a.onnx", "Foo", domain="my")
    assert levels(check_tensorrt(custom, rung="static")) == [("unknown", "n", "Foo")]
    new = one(tmp_path / "b.onnx", "Swish", opset=24)
    report = check_tensorrt(new, rung="static")
    assert [f.what for f in report.findings] == ["the table does not know this operator"]
    assert report.ok and str(report).endswith("no objection, 1 things unknown")


def test_computed_zero_points_and_sizes_of_loops_are_unknown(tmp_path: Path) -> None:
    inputs = [info("x", T.INT8, [2]), info("z", T.INT8, [])]
    nodes = [node("DequantizeLinear", "x s z", "y", "dq")]
    path = save(tmp_path / "m.onnx", nodes, inputs, [info("y")], [const("s", T.FLOAT, [], [1])])
    assert levels(check_tensorrt(path, rung="static")) == [("unknown", "dq", "DequantizeLinear")]


def test_constants_may_be_computed_from_constants(tmp_path: Path) -> None:
    nodes = [node("Shape", "x", "s", "shape"), node("Slice", "s a b", "axis", "slice"), node("ReduceSum", "x axis", "y", "sum")]
    weights = [const("a", T.INT64, [1], [0]), const("b", T.INT64, [1], [1])]
    fixed = save(tmp_path / "a.onnx", nodes, [info("x", T.FLOAT, [1, 3])], [info("y")], weights)
    assert check_tensorrt(fixed, rung="static").findings == ()
    open_size = save(tmp_path / "b.onnx", nodes, [info("x", T.FLOAT, ["n", 3])], [info("y")], weights)
    assert ("error", "sum", "ReduceSum") in levels(check_tensorrt(open_size, rung="static"))


@pytest.mark.parametrize(("opset", "ok"), [(8, False), (9, True), *((opset, True) for opset in range(18, 25)), (25, False)])
def test_operator_sets(opset: int, ok: bool, tmp_path: Path) -> None:
    report = check_tensorrt(one(tmp_path / "m.onnx", "Relu", opset=opset), rung="static")
    assert report.ok is ok
    assert ok or f"opset {opset}; expected 9 to 24. Export it again with opset=24 or less" in str(report)


def test_float64_becomes_float32_which_is_said(tmp_path: Path) -> None:
    fxp.export_onnx(nn.Linear(4, 3).double(), (torch.randn(2, 4).double(),), tmp_path / "m.onnx", verify=0)
    report = check_tensorrt(tmp_path / "m.onnx", rung="static")
    assert report.ok and {level for level, *_ in levels(report)} == {"warning"}
    assert "DOUBLE becomes FLOAT in TensorRT (2 weights). Export the model in float32" in str(report)


def test_float64_weights_that_float32_cannot_hold_are_an_error(tmp_path: Path) -> None:
    weights = [const("w", T.DOUBLE, [2], [1e300, math.inf])]
    path = one(tmp_path / "m.onnx", "Add", dtype=T.DOUBLE, shape=(2,), weights=weights)
    report = check_tensorrt(path, rung="static")
    assert ("error", "w", "weight") in levels(report) and "beyond the range of FLOAT" in str(report)
    if INSTALLED:  # it builds, and stays an error: TensorRT clamps the weight
        built = check_tensorrt(path, rung="build")
        assert (built.rung, built.ok) == ("build", False) and "out of range" in str(built)
