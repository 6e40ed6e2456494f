"""Restrictions of single operators, one file each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from export.tensorrt_files import const, info, node, save
from onnx import TensorProto as T
from onnx import helper

from fxparam.exporters.tensorrt import check_tensorrt


def lstm(**attributes: Any) -> tuple[onnx.NodeProto, list[Any], list[onnx.TensorProto]]:
    ways = 2 if attributes.get("direction") == "bidirectional" else 1
    weights = [const("w", T.FLOAT, [ways, 8, 3], [0.5] * ways * 24), const("r", T.FLOAT, [ways, 8, 2], [0.5] * ways * 16)]
    return node("LSTM", "x w r", hidden_size=2, **attributes), [("x", T.FLOAT, [4, 1, 3])], weights


def loop() -> onnx.NodeProto:
    nodes = [node("Identity", "b", "c", "copy"), node("Relu", "v", "w", "relu")]
    inputs = [info("i", T.INT64, []), info("b", T.BOOL, []), info("v", T.FLOAT, [2])]
    return node(
        "Loop", "m  x", "y", body=helper.make_graph(nodes, "body", inputs, [info("c", T.BOOL, []), info("w", T.FLOAT, [2])])
    )


def unequal_branches(second: str) -> onnx.NodeProto:
    then = helper.make_graph([node("Identity", "x", "t", "a")], "then", [], [info("t", T.FLOAT, [2, 3])])
    other = helper.make_graph([node("ReduceSum", "x", second, "b", keepdims=0)], "else", [], [info(second, T.FLOAT, [])])
    return node("If", "c", "y", then_branch=then, else_branch=other)


X23, IMAGE, HEADS = [("x", T.FLOAT, [2, 3])], [("x", T.FLOAT, [1, 2, 4, 4])], [(n, T.FLOAT, [1, 2, 4, 8]) for n in "qkv"]
SCALES = [const("s", T.FLOAT, [4], [1, 1, 2, 2])]
INDEX = [("x", T.INT64, [2])]
FORWARD = ["Sigmoid", "Tanh", "Tanh"]

# name -> (node, inputs, weights, opset, level, text)
RESTRICTED: dict[str, tuple[Any, list[Any], list[onnx.TensorProto], int, str, str]] = {
    "average pool": (
        node("AveragePool", kernel_shape=[2, 2], dilations=[2, 2]),
        IMAGE,
        [],
        21,
        "error",
        "dilations (2, 2); expected all ones",
    ),
    "lp pool": (node("LpPool", kernel_shape=[2, 2], p=3), IMAGE, [], 21, "error", "p=3; expected 1 or 2"),
    "cubic": (node("Resize", "x  s", mode="cubic"), IMAGE, SCALES, 21, "error", "mode='cubic'; expected 'nearest' or 'linear'"),
    "antialias": (node("Resize", "x  s", antialias=1), IMAGE, SCALES, 21, "error", "antialias=1; expected 0"),
    "axes": (
        node("Resize", "x  s", axes=[3, 2, 1, 0]),
        IMAGE,
        SCALES,
        21,
        "error",
        "axes=(3, 2, 1, 0) with scales; expected all",
    ),
    "attention rank": (
        node("Attention", "q k v"),
        [(n, T.FLOAT, [1, 4, 16]) for n in "qkv"],
        [],
        23,
        "error",
        "Q has 3 dimensions; expected 4",
    ),
    "attention past": (
        node("Attention", "q k v  pk pv", "y pk1 pv1"),
        [*HEADS, ("pk", T.FLOAT, [1, 2, 3, 8]), ("pv", T.FLOAT, [1, 2, 3, 8])],
        [],
        23,
        "error",
        "the output present_value is not supported",
    ),
    "lstm layout": (*lstm(layout=1), 21, "error", "layout=1 (batch first); expected 0"),
    "lstm forget": (*lstm(input_forget=1), 21, "error", "input_forget=1; expected 0"),
    "lstm both": (
        *lstm(direction="bidirectional", activations=[*FORWARD, "Sigmoid", "Relu", "Tanh"]),
        21,
        "error",
        "its two directions have different activations",
    ),
    "if ranks": (unequal_branches("e"), [*X23, ("c", T.BOOL, [])], [], 21, "error", "the branches return 2 and 0 dimensions"),
    "loop": (
        loop(),
        [("x", T.FLOAT, [2])],
        [const("m", T.INT64, [], [3])],
        21,
        "unknown",
        "the length of scan outputs must be fixed",
    ),
    "eye": (node("EyeLike"), [("x", T.FLOAT, ["n", 3])], [], 21, "error", "its input must have fixed sizes"),
    "hardmax": (node("Hardmax"), [("x", T.FLOAT, [2, "n"])], [], 21, "error", "the size of axis -1 must be fixed"),
    "norm": (
        node("LayerNormalization", "x g", "y m"),
        X23,
        [const("g", T.FLOAT, [3], [1, 1, 1])],
        21,
        "error",
        "only the output Y is supported",
    ),
    "dropout": (
        node("Dropout", "x r t"),
        X23,
        [const("r", T.FLOAT, [], [0.5]), const("t", T.BOOL, [], [1])],
        21,
        "error",
        "training_mode is true; expected false",
    ),
    "seed": (node("RandomNormalLike", dtype=1), X23, [], 21, "warning", "TensorRT ignores the seed"),
    "depth": (
        node("OneHot", "x d v"),
        [*INDEX, ("d", T.INT64, [])],
        [const("v", T.FLOAT, [2], [0, 1])],
        21,
        "error",
        "depth must be known when the engine is built",
    ),
    "top k": (node("TopK", "x k", "y i", sorted=0), X23, [const("k", T.INT64, [1], [2])], 21, "error", "sorted=0; expected 1"),
    "open k": (node("TopK", "x k", "y i"), [*X23, ("k", T.INT64, [1])], [], 21, "unknown", "K must be less than 3840"),
    "grid": (
        node("GridSample", "x g"),
        [("x", T.FLOAT, [1, 1, 2, 2, 2]), ("g", T.FLOAT, [1, 2, 2, 2, 3])],
        [],
        21,
        "error",
        "X has 5 dimensions; expected 4",
    ),
    "deform": (
        node("DeformConv", "x w o", pads=[0, 0, 1, 1]),
        [*IMAGE, ("o", T.FLOAT, [1, 8, 4, 4])],
        [const("w", T.FLOAT, [1, 2, 2, 2], [1.0] * 8)],
        21,
        "error",
        "pads (0, 0, 1, 1); expected the same at both ends",
    ),
    "stft": (
        node("STFT", "x f  l"),
        [("x", T.FLOAT, [1, 16, 2])],
        [const("f", T.INT64, [], [4]), const("l", T.INT64, [], [4])],
        21,
        "error",
        "its signal is complex; expected real values",
    ),
    "cache": (
        node("TensorScatter", "x u", axis=1),
        [("x", T.FLOAT, [1, 2, 4, 4]), ("u", T.FLOAT, [1, 1, 4, 4])],
        [],
        24,
        "error",
        "axis=1; expected -2",
    ),
    "string": (
        helper.make_node("Constant", [], ["y"], name="n", value_string=b"a"),
        X23,
        [],
        21,
        "error",
        "the attribute value_string is not supported",
    ),
}


@pytest.mark.parametrize("case", RESTRICTED)
def test_restrictions_that_the_table_states_in_words(case: str, tmp_path: Path) -> None:
    only, inputs, weights, opset, level, text = RESTRICTED[case]
    outputs = [info("y", T.STRING if case == "string" else T.FLOAT)]
    path = save(tmp_path / "m.onnx", [only], [info(*x) for x in inputs], outputs, weights, opset=opset)
    report = check_tensorrt(path, rung="static")
    assert [f.level for f in report.findings if text in f.what and f.node == "n"] == [level], str(report)


def test_what_a_functions_caller_decides_is_unknown(tmp_path: Path) -> None:
    pool = node("AveragePool", "a", "c", "pool", kernel_shape=[2, 2])
    pool.attribute.append(onnx.AttributeProto(name="dilations", ref_attr_name="d", type=onnx.AttributeProto.INTS))
    body = [pool, node("ReduceSum", "c k", "b", "sum")]
    function = helper.make_function("my", "F", ["a", "k"], ["b"], body, [helper.make_opsetid("", 21)], attributes=["d"])
    call = [node("F", "x k", "y", "call", domain="my", d=[1, 1])]
    inputs = [info("x", T.FLOAT, [1, 1, 4, 4])]
    path = save(tmp_path / "m.onnx", call, inputs, [info("y")], [const("k", T.INT64, [1], [0])], functions=[function])
    report = check_tensorrt(path, rung="static")
    assert report.ok and {(f.level, f.node) for f in report.findings} == {
        ("unknown", "my.F/pool"),
        ("unknown", "my.F/sum"),
        ("unknown", ""),
    }
    text = str(report)
    assert "some attributes come from the caller of the function" in text and "axes must be known when the engine is" in text
    assert "the type of the data of 2 nodes cannot be inferred (my.F/pool, my.F/sum)" in text
