"""ONNX files from anyone, full disks and closed folders: work, or an ``ExportError`` and not one changed byte."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper

from fxparam.errors import ExportError
from fxparam.exporters import files
from fxparam.exporters.onnx import TIED, UNUSED
from fxparam.exporters.refit import refit_onnx
from fxparam.exporters.sparsity import SPARSITY
from fxparam.exporters.tensorrt import check_tensorrt

NEW = {"w": torch.full((16, 16), 2.0)}
ACTIONS = {"refit": lambda path: refit_onnx(path, NEW), "check": lambda path: check_tensorrt(path, rung="static")}


def branch(name: str) -> onnx.GraphProto:
    weight = helper.make_tensor(f"{name}.w", T.FLOAT, [100], [1.0] * 100)
    output = helper.make_tensor_value_info(name, T.FLOAT, [100])
    return helper.make_graph([helper.make_node("Add", ["c", f"{name}.w"], [name])], name, [], [output], [weight])


def build() -> onnx.ModelProto:
    """A matrix product, a weight stored as integers, a Constant, an If with weights in its branches, all three metadata."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("DequantizeLinear", ["q", "q.scale", "q.zero_point"], ["q.dequantized"], axis=0),
        helper.make_node("Transpose", ["q.dequantized"], ["qt"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "qt"], ["y"]),
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("cv", T.FLOAT, [1], [2.0])),
        helper.make_node("Constant", [], ["b"], value=helper.make_tensor("bv", T.BOOL, [], [True])),
        helper.make_node("If", ["b"], ["u"], then_branch=branch("u1"), else_branch=branch("u2")),
    ]
    weights = [
        helper.make_tensor("w", T.FLOAT, [16, 16], np.arange(256, dtype=np.float32).tobytes(), raw=True),
        helper.make_tensor("q", T.INT8, [4, 16], np.arange(64, dtype=np.int8).tobytes(), raw=True),
        helper.make_tensor("q.scale", T.FLOAT, [4], [1.0, 2.0, 3.0, 4.0]),
        helper.make_tensor("q.zero_point", T.INT8, [4], [0] * 4),
    ]
    shapes: dict[str, list[Any]] = {"x": ["n", 16], "y": ["n", 4], "u": [100]}
    x, y, u = (helper.make_tensor_value_info(name, T.FLOAT, shape) for name, shape in shapes.items())
    graph = helper.make_graph(nodes, "g", [x], [y, u], weights)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    helper.set_model_props(model, {TIED: '{"v": "w"}', UNUSED: '["n"]', SPARSITY: "{}"})
    return model


GOOD = build().SerializeToString()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@contextmanager
def limits(seconds: int = 10) -> Iterator[None]:
    """An alarm against hanging, 16 GiB of address space against a blow-up."""

    def hang(*_: object) -> None:
        raise AssertionError(f"it took more than {seconds} seconds")

    before, soft = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, soft[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, soft)


def survives(path: Path, action: str) -> str:
    """Act on the file at ``path``: the text of the ``ExportError``, or "" where the result is whole."""
    before = contents(path.parent)
    try:
        with limits():
            ACTIONS[action](path)
    except ExportError as error:
        assert contents(path.parent) == before
        assert len(str(error)) < 3000 and path.name in str(error)
        return str(error)
    if action == "refit":
        weight = files.read_model(path).graph.initializers["w"].const_value
        assert weight is not None and np.array_equal(weight.numpy(), NEW["w"].numpy())
    else:
        assert contents(path.parent) == before
    return ""


def both(path: Path, content: bytes) -> list[str]:
    texts = []
    for action in ACTIONS:
        path.write_bytes(content)
        texts.append(survives(path, action))
    return texts


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_the_undamaged_file_is_taken(tmp_path: Path) -> None:
    assert both(tmp_path / "m.onnx", GOOD) == ["", ""]


@pytest.mark.parametrize("step", [89, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_truncated_anywhere(tmp_path: Path, step: int) -> None:
    for end in range(0, len(GOOD), step):
        both(tmp_path / "m.onnx", GOOD[:end])
    for text in both(tmp_path / "m.onnx", GOOD[:-1]):
        assert "is corrupt, truncated or no ONNX file" in text


START = GOOD.index(np.arange(256, dtype=np.float32).tobytes())
STRUCTURE = [i for i in range(len(GOOD)) if not START <= i < START + 1024]
flips = st.lists(st.tuples(st.sampled_from(STRUCTURE), st.integers(0, 255)), min_size=1, max_size=4)


def flipped(folder: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for place, byte in changes:
        content[place] = byte
    both(folder / "m.onnx", bytes(content))


@settings(max_examples=80)
@given(flips)
def test_other_bytes_anywhere_but_in_the_weights(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    folder.mkdir(exist_ok=True)
    flipped(folder, changes)


@pytest.mark.exhaustive
@settings(max_examples=10_000)
@given(flips)
def test_many_other_bytes(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.getbasetemp() / "many"
    folder.mkdir(exist_ok=True)
    flipped(folder, changes)


@given(st.binary(max_size=200))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "random"
    folder.mkdir(exist_ok=True)
    both(folder / "m.onnx", content)


# ---- malice ----------------------------------------------------------------------------------------------------------

Edit = Callable[[onnx.ModelProto], Any]


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(i for i in model.graph.initializer if i.name == name)


def assign(part: Edit, field: str, value: Any) -> Edit:
    return lambda model: setattr(part(model), field, value)


def dims(name: str, sizes: list[int]) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        initializer(model, name).dims[:] = sizes

    return edit


def ints(node: int, values: list[int]) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.node[node].attribute[0].ints[:] = values

    return edit


def number(node: int, value: int) -> Edit:
    return assign(lambda model: model.graph.node[node].attribute[0], "i", value)


def wire(node: int, side: str, name: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        getattr(model.graph.node[node], side)[0] = name

    return edit


def nested(depth: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        outer = model.graph.node[-1].attribute[0].g
        for _ in range(depth):
            node = helper.make_node("If", ["b"], ["u1"], then_branch=outer, else_branch=branch("u2"))
            outer = helper.make_graph([node], "n", [], [helper.make_tensor_value_info("u1", T.FLOAT, [100])])
        model.graph.node[-1].attribute[0].g.CopyFrom(outer)

    return edit


def functions(count: int, calls: int) -> Edit:
    """``count`` functions, each of which calls the one before ``calls`` times."""

    def edit(model: onnx.ModelProto) -> None:
        ids = [helper.make_opsetid("", 21), helper.make_opsetid("d", 1)]
        model.opset_import.append(ids[1])
        for i in range(count):
            op, domain = (f"F{i - 1}", "d") if i else ("Relu", "")
            names = [*(f"v{k}" for k in range(calls)), "out"]
            body = [helper.make_node(op, [a], [b], domain=domain) for a, b in itertools.pairwise(names)]
            model.functions.append(helper.make_function("d", f"F{i}", ["v0"], ["out"], body, ids, []))
        model.graph.node.append(helper.make_node(f"F{count - 1}", ["x"], ["f"], domain="d"))

    return edit


def chain(op: str, source: str, length: int, **attributes: Any) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        names = [source, *(f"r{i}" for i in range(length))]
        model.graph.node.extend(helper.make_node(op, [a], [b], **attributes) for a, b in itertools.pairwise(names))
        if source == "w":
            initializer(model, "w").raw_data = bytes(1024)

    return edit


def twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("w", T.FLOAT, [1], [1.0]))


def huge_constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("size", T.INT64, [2], [2**20, 2**20]))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["big"]))


def huge_range(model: onnx.ModelProto) -> None:
    for name, value in {"r0": 0, "r1": 2**40, "r2": 1}.items():
        model.graph.initializer.append(helper.make_tensor(name, T.INT64, [], [value]))
    model.graph.node.append(helper.make_node("Range", ["r0", "r1", "r2"], ["big"]))


def sparse(model: onnx.ModelProto) -> None:
    values, indices = helper.make_tensor("sp", T.FLOAT, [2], [1.0, 2.0]), helper.make_tensor("spi", T.INT64, [2], [0, 5])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**40]))


def function_in_itself(model: onnx.ModelProto) -> None:
    functions(2, 1)(model)
    inner = model.functions[0].node[0]
    inner.op_type, inner.domain = "F1", "d"


def wrong_kind(model: onnx.ModelProto) -> None:
    attribute = model.graph.node[1].attribute[0]
    attribute.type, attribute.s = onnx.AttributeProto.STRING, b"axis"


MALICE: dict[str, Edit] = {
    **{f"{n}: {d[:2]}": dims(n, d) for n in ("w", "q", "q.scale", "q.zero_point") for d in (
        [2**62], [2**31, 2**31], [-1, 256], [-16, -16], [0], [], [2**40, 0], [1] * 500, [3], [2, 2], [2**63 - 1, 2],
    )},
    **{f"axis {v}": number(1, v) for v in (5, -1, -9, 2**62, 1)},
    **{f"perm {v}": ints(2, v) for v in ([], [0], [7, 7], [0, 0], [-1, 0], [2**40, 1])},
    **{f"type {v}": assign(lambda model: initializer(model, "w"), "data_type", v) for v in (0, 99, 7, 8, 9, 11, 14, 22)},
    **{f"opset {v}": assign(lambda model: model.opset_import[0], "version", v) for v in (0, -1, 1, 999, 2**62)},
    **{f"version {v}": assign(lambda model: model, "ir_version", v) for v in (0, 1, 2**60)},
    **{f"{depth} subgraphs": nested(depth) for depth in (1, 10, 27)},
    "a node reads what depends on it": wire(0, "input", "y"),
    "a node reads itself": wire(2, "input", "qt"),
    "a node writes an input": wire(3, "output", "x"),
    "no input": wire(3, "input", ""),
    "no inputs": lambda model: model.graph.node[0].ClearField("input"),
    "no outputs": lambda model: model.graph.node[0].ClearField("output"),
    "no name": assign(lambda model: initializer(model, "w"), "name", ""),
    "no opset": lambda model: model.ClearField("opset_import"),
    "no graph": lambda model: model.graph.Clear(),
    "one name twice": twice,
    "an attribute of another kind": wrong_kind,
    "an attribute of a function": assign(lambda model: model.graph.node[1].attribute[0], "ref_attr_name", "x"),
    "a function in itself": function_in_itself,
    "a million million nodes": functions(40, 2),
    "a long way of functions": functions(3000, 1),
    "a long way": chain("Identity", "w", 3000),
    "a long way of transposes": chain("Transpose", "w", 3000, perm=[1, 0]),
    "a huge constant": huge_constant,
    "a huge range": huge_range,
    "a huge sparse tensor": sparse,
}  # fmt: skip


@pytest.mark.parametrize("edit", MALICE.values(), ids=MALICE)
def test_malice(tmp_path: Path, edit: Edit) -> None:
    model = build()
    edit(model)
    both(tmp_path / "m.onnx", model.SerializeToString())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (twice, r"initializer"),
        (functions(40, 2), r"its functions expand to [\d,]+ nodes; expected at most 1,048,576"),
        (functions(3000, 1), r"its functions call each other a thousand deep"),
        (dims("q.zero_point", []), r"cannot reshape array of size 4"),
    ],
    ids=["twice", "functions", "deep", "sizes"],
)
def test_malice_is_named(tmp_path: Path, edit: Edit, message: str) -> None:
    model = build()
    edit(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=rf"m\.onnx is corrupt, truncated or no ONNX file.*{message}"):
        files.read_model(tmp_path / "m.onnx")


ODD = ["", "null", "5", '"a"', "[[]]", '{"a": {}}', '{"w": ["w"]}', '{"v": "v"}', "NaN", "[1, {}]", "\0", "1" + "0" * 5000,
       "[" * 100_000, '{"a":' * 5000, "x" * 1_000_000, json.dumps([9] * 99_999)]  # fmt: skip


@pytest.mark.parametrize("key", [TIED, UNUSED, SPARSITY])
def test_odd_metadata(tmp_path: Path, key: str) -> None:
    for value in ODD:
        model = build()
        next(entry for entry in model.metadata_props if entry.key == key).value = value
        texts = both(tmp_path / "m.onnx", model.SerializeToString())
        if key == SPARSITY:
            assert texts == ["", ""], "it is written, never read"
        elif texts[0]:
            assert "has metadata fxparam.tied" in texts[0]


# ---- data elsewhere --------------------------------------------------------------------------------------------------

PLACES: dict[str, dict[str, str]] = {
    "beside": {"location": "d.data"},
    "dot": {"location": "./d.data"},
    "the model": {"location": "m.onnx"},
    "a checksum": {"location": "d.data", "checksum": "x"},
    "length": {"location": "d.data", "offset": "0", "length": str(2**62)},
    "offset": {"location": "d.data", "offset": str(2**70)},
    "negative offset": {"location": "d.data", "offset": "-8"},
    "negative length": {"location": "d.data", "length": "-1"},
    "odd offset": {"location": "d.data", "offset": "3"},
    "other digits": {"location": "d.data", "offset": "٣"},
    "many digits": {"location": "d.data", "length": "1" * 5000},
    "NUL": {"location": "d\0.data"},
    "long": {"location": "d" * 5000},
    "the folder": {"location": "."},
    "nothing": {"location": ""},
    "no location": {"offset": "0"},
    "up": {"location": "../secret"},
    "down and up": {"location": "sub/../../secret"},
    "absolute": {"location": "/etc/passwd"},
    "drive": {"location": "C:x"},
    "backslashes": {"location": "..\\secret"},
    "share": {"location": "\\\\server\\x"},
    "address": {"location": "file:///etc/passwd"},
    "a circle of links": {"location": "circle"},
    "a link out": {"location": "out"},
    "a link to a folder": {"location": "up/secret"},
    "a pipe": {"location": "pipe"},
}
TAKEN = {"beside", "dot", "a checksum", "the model"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(bytes(2048))
    (inner / "d.data").write_bytes(np.ones(256, np.float32).tobytes())
    (inner / "circle").symlink_to("circle")
    (inner / "out").symlink_to(tmp_path / "secret")
    (inner / "up").symlink_to(tmp_path)
    os.mkfifo(inner / "pipe")
    return inner


def elsewhere(tensor: onnx.TensorProto, entries: dict[str, str]) -> None:
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = T.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


@pytest.mark.parametrize("name", PLACES)
def test_external_data_anywhere(folder: Path, name: str) -> None:
    model = build()
    elsewhere(initializer(model, "w"), PLACES[name])
    texts = both(folder / "m.onnx", model.SerializeToString())
    assert name in TAKEN or all(texts)
    initializer(model, "w").dims[:] = [2**31, 2**31]
    assert all(both(folder / "m.onnx", model.SerializeToString()))


@pytest.mark.parametrize("name", PLACES)
def test_external_data_of_a_constant(folder: Path, name: str) -> None:
    model = build()
    elsewhere(model.graph.node[4].attribute[0].t, PLACES[name])
    both(folder / "m.onnx", model.SerializeToString())


def test_external_data_at_two_places(folder: Path) -> None:
    model = build()
    elsewhere(initializer(model, "w"), {"location": "../secret"})
    initializer(model, "w").external_data.add(key="location", value="d.data")
    for text in both(folder / "m.onnx", model.SerializeToString()):
        assert "the place of the data of 'w' is given twice or is no text" in text


def test_names_that_are_no_text(folder: Path) -> None:
    content = build().SerializeToString()
    for name in (b"fxparam.tied", b"q.dequantized", b"MatMul", b'{"v": "w"}'):
        both(folder / "m.onnx", content.replace(name, b"\xff" * len(name)))
    model = build()
    elsewhere(initializer(model, "w"), {"location": "d.data"})
    both(folder / "m.onnx", model.SerializeToString().replace(b"d.data", b"\xff" * 6))


# ---- where nothing can be written ------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(GOOD)
    return path


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("size", [0, 1, 512, 1023, 1500, 2000])
def test_a_full_disk(good: Path, external: bool, size: int) -> None:
    """No file may grow beyond ``size`` bytes, as on a disk that is full by then."""
    model = files.read_model(good)
    if external:
        files.write_model(model, good, external=True, check=lambda file: None)
        model = files.read_model(good)
    before, soft = contents(good.parent), resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = size if size < max(map(len, before.values())) else 0
    action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, soft[1]))
    try:
        with pytest.raises(
            ExportError, match=r"cannot write .*m\.onnx: File too large; the file there is unchanged; check free"
        ):
            files.write_model(model, good, external=external, check=lambda file: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        signal.signal(signal.SIGXFSZ, action)
    assert contents(good.parent) == before
    assert files.read_model(good).graph.initializers["w"].const_value is not None


def test_a_refit_on_a_full_disk(good: Path) -> None:
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, soft[1]))
    try:
        assert "File too large; the file there is unchanged" in survives(good, "refit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)


def test_a_read_only_folder(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as ``os.access`` tells it, once as it comes out (a file system mounted read-only tells nothing before)."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # permissions do not bind the super-user
        assert "does not let you create files" in survives(good, "refit")
    with monkeypatch.context() as patch:

        def closed(*_: Any, **__: Any) -> Any:
            raise OSError(30, "Read-only file system")

        patch.setattr(os, "replace", closed)
        assert "Read-only file system; the file there is unchanged" in survives(good, "refit")


def test_a_read_only_file_is_replaced_and_stays_read_only(good: Path) -> None:
    """As ``mv`` and editors do: replacing a file is a right of its folder."""
    good.chmod(0o444)
    refit_onnx(good, NEW)
    assert good.stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("path", ["", "missing/m.onnx", "m.onnx/m.onnx", "gone.onnx", "n" * 300, "circle", "pipe"])
def test_paths_that_are_no_model(good: Path, path: str) -> None:
    (good.parent / "circle").symlink_to("circle")
    os.mkfifo(good.parent / "pipe")
    before = contents(good.parent)
    for action in ACTIONS.values():
        with pytest.raises(ExportError), limits():
            action(good.parent / path)
    assert contents(good.parent) == before


@pytest.mark.parametrize("path", ["n" * 300, "a\0b", "circle"])
def test_paths_that_no_file_can_have(tmp_path: Path, path: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    model = files.read_model(_written(tmp_path))
    with pytest.raises(ExportError):
        files.write_model(model, files.writable(tmp_path / path), external=False, check=lambda file: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["circle", "m.onnx"]


def _written(folder: Path) -> Path:
    (folder / "m.onnx").write_bytes(GOOD)
    return folder / "m.onnx"


def test_a_link_is_written_through(good: Path) -> None:
    link = good.parent / "link.onnx"
    link.symlink_to(good)
    refit_onnx(link, NEW)
    assert link.is_symlink() and survives(good, "refit") == "" and refit_onnx(good, NEW).replaced == ()
