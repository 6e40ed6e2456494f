"""The ONNX exporter core: names, nodes, bits and bytes."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import pytest
import torch
from export.common import CASES, Mlp, export, program, simple, stored
from torch import nn

from fxparam.errors import ExportError
from fxparam.exporters import files
from fxparam.exporters.onnx import export_program


@pytest.mark.parametrize("name", CASES)
def test_values_names_and_bits(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report, model = export(name, path)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    initializers = stored(path)
    for key in (k for k in initializers if k in tensors):
        assert torch.equal(initializers[key], tensors[key]), key
    names = set(initializers) | set(report.tied) | set(report.unused)
    assert set(tensors) <= names, "every parameter and buffer is in the file, or the report says where it went"
    assert tuple(initializers) == report.initializers
    assert {p.inputs for p in report.parity} == {"given", "random 1", "random 2"}
    assert all(p.ok and p.tolerance < 1e-2 for p in report.parity)
    graph = onnx.load(path).graph
    used = {name for node in graph.node for name in node.input}
    assert set(initializers) <= used
    assert report.nodes == len(graph.node) and report.bytes == path.stat().st_size


@pytest.mark.parametrize("name", ["mlp", "mlp-dynamic"])
def test_the_same_nodes_and_names_as_exporting_the_plain_model_directly(name: str, tmp_path: Path) -> None:
    build, inputs, _, dynamic = CASES[name]
    model, args = build().eval(), inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        direct = torch.onnx.export(model, args, dynamo=True, optimize=False, verbose=False, dynamic_shapes=dynamic).model_proto  # type: ignore[union-attr]
    exported = torch.export.export(model, args, dynamic_shapes=dynamic)
    export_program(exported, tmp_path / "m.onnx", reference=model, args=args, verify=0)
    ours = onnx.load(tmp_path / "m.onnx").graph

    def described(graph: onnx.GraphProto) -> list[Any]:
        used = {x for node in graph.node for x in node.input} | {o.name for o in graph.output}
        alive = [node for node in graph.node if set(node.output) & used]
        return [(n.name, n.op_type, list(n.input), list(n.output), sorted(map(str, n.attribute))) for n in alive]

    assert described(ours) == described(direct.graph)
    assert [i.name for i in ours.initializer] == [i.name for i in direct.graph.initializer]
    assert [i.raw_data for i in ours.initializer] == [i.raw_data for i in direct.graph.initializer]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    report, _ = export("decoder", tmp_path / "m.onnx", verify=0)
    assert report.tied == {"embed.weight": "decode.weight"}
    assert "decode.weight" in report.initializers and "embed.weight" not in report.initializers


def test_two_parameters_on_one_storage_are_stored_once_and_equal_values_apart_twice(tmp_path: Path) -> None:
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    second.weight = nn.Parameter(first.weight.data)
    third.weight = nn.Parameter(first.weight.data.clone())
    report = simple(nn.Sequential(first, second, third), tmp_path / "m.onnx", torch.randn(2, 4))
    assert report.tied == {"0.weight": "1.weight"}
    assert sorted(n for n in report.initializers if "weight" in n) == ["1.weight", "2.weight"]


def test_unused_parameters_are_left_out_and_named(tmp_path: Path) -> None:
    model = Mlp()
    model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    report = simple(model, tmp_path / "m.onnx", torch.randn(2, 6), verify=0)
    assert report.unused == ("spare",) and "spare" not in stored(tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [18, 24])  # the ends of the range
def test_opsets(opset: int, tmp_path: Path) -> None:
    report, _ = export("conv-dynamic", tmp_path / "m.onnx", opset=opset, verify=1)
    proto = onnx.load(tmp_path / "m.onnx")
    assert report.opset == opset == proto.opset_import[0].version
    assert proto.ir_version >= onnx.helper.find_min_ir_version_for(list(proto.opset_import))


def test_names_of_inputs_and_outputs(tmp_path: Path) -> None:
    names = ["x_out", "w_out", "h", "copy", "again"]
    report, model = export("returns", tmp_path / "m.onnx", input_names=["matmul"], output_names=names)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [i.name for i in graph.input] == ["matmul"] and [o.name for o in graph.output] == names
    assert report.initializers == ("w",) and torch.equal(stored(tmp_path / "m.onnx")["w"], model.get_parameter("w"))


def test_two_exports_have_equal_bytes_and_name_no_source_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    exported, model, args, kwargs = program("decoder")
    again = torch.export.export(model, args, kwargs)
    for file, source in (("a.onnx", exported), ("b.onnx", again)):
        export_program(source, tmp_path / file, reference=model, args=args, kwargs=kwargs, verify=0)
    a = (tmp_path / "a.onnx").read_bytes()
    assert a == (tmp_path / "b.onnx").read_bytes()
    assert b".py" not in a and b"stack_trace" not in a and b"pkg.torch" not in a


def test_metadata_reach_the_file(tmp_path: Path) -> None:
    export("mlp", tmp_path / "m.onnx", verify=0, metadata={"version": "7"})
    assert {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props} == {"version": "7"}


def test_external_data_are_checked_in_place(tmp_path: Path) -> None:
    report, _ = export("mlp", tmp_path / "m.onnx", external_data=True)
    assert report.data is not None and report.data.name in str(report) and report.parity
    assert report.bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    export("mlp", tmp_path / "m.onnx", verify=0)
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]


def test_large_weights_go_outside_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "INLINE_LIMIT", 1000)
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", 2000)
    assert export("mlp", tmp_path / "m.onnx", verify=0)[0].data is not None
    with pytest.raises(ExportError, match="one ONNX file holds 2 GiB; leave external_data out"):
        export("mlp", tmp_path / "m.onnx", verify=0, external_data=False)


def test_nothing_leaks(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level, state = logger.level, torch.get_rng_state()
    exported, model, args, kwargs = program("decoder")
    torch.set_rng_state(state)  # making the program, the first time, draws weights
    export_program(exported, tmp_path / "m.onnx", reference=model, args=args, kwargs=kwargs)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert logger.level == level and torch.equal(torch.get_rng_state(), state)
