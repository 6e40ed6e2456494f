"""How far a file is checked, by whom, and what happens where TensorRT is missing, refuses, hangs or crashes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export.tensorrt_files import MODELS, attention, info, needs_rtx, node, one, save
from torch import Tensor

import fxparam as fxp
from fxparam.errors import ExportError, MissingExtraError
from fxparam.exporters import tensorrt, tensorrt_rules, tensorrt_worker
from fxparam.exporters.tensorrt import check_tensorrt


@needs_rtx
@pytest.mark.parametrize("name", MODELS)
def test_the_real_parser_and_builder_take_them(name: str, tmp_path: Path) -> None:
    build, shape = MODELS[name]
    written = fxp.export_onnx(build(), (torch.randn(shape),), tmp_path / "m.onnx", opset=20, verify=0)
    report = check_tensorrt(tmp_path / "m.onnx", rung="build")
    assert (report.ok, report.rung) == (True, "build"), str(report)
    assert report.engine_bytes and report.peak_bytes and set(report.seconds) == {"parse", "build"}
    assert report.product.startswith("TensorRT-RTX ")
    # Every weight keeps its name in the network, but for batch norms, which become a factor and a summand.
    assert {*report.refittable, *report.combined} == set(written.initializers)
    assert set(report.combined) == {n for n in written.initializers if n.startswith("norm.") and name == "conv"}


@needs_rtx
def test_weights_in_a_second_file_are_found(tmp_path: Path) -> None:
    build, shape = MODELS["conv"]
    written = fxp.export_onnx(build(), (torch.randn(shape),), tmp_path / "m.onnx", external_data=True, verify=0)
    assert written.data is not None and check_tensorrt(tmp_path / "m.onnx", rung="build").rung == "build"


@needs_rtx
def test_what_the_builder_refuses_shows_on_its_rung_only(tmp_path: Path) -> None:
    """At opset 24 attention is one operator, which TensorRT-RTX 1.7.1 parses and cannot build in float32."""
    fxp.export_onnx(attention(), (torch.randn(2, 5, 16),), tmp_path / "m.onnx", opset=24, verify=0)
    assert check_tensorrt(tmp_path / "m.onnx", rung="parse").ok
    report = check_tensorrt(tmp_path / "m.onnx", rung="build")
    assert (report.ok, report.rung) == (False, "parse")
    assert "Attention operation was not supported" in str(report) and "Export at opset 22 or below" in str(report)


@needs_rtx
def test_an_objection_that_the_product_does_not_share_stays_until_numbers_were_seen(tmp_path: Path) -> None:
    """The table wants at least two spatial sizes; TensorRT-RTX 1.7.1 pools over one."""
    path = one(tmp_path / "m.onnx", "MaxPool", shape=(1, 1, 4), kernel_shape=[2])
    report = check_tensorrt(path, rung="build")
    assert (report.rung, report.ok) == ("build", False)
    assert "X has 3 dimensions; expected 4 or 5 (TensorRT-RTX" in str(report) and "builds it all the same)" in str(report)


@needs_rtx
def test_every_fault_of_a_file_is_reported_with_its_node(tmp_path: Path) -> None:
    nodes = [node("Det", "x", "d", "first"), node("Unique", "d", "y", "second")]
    path = save(tmp_path / "m.onnx", nodes, [info("x", shape=[2, 3, 3])], [info("y")])
    told = [f for f in check_tensorrt(path).findings if f.source.startswith("parser")]
    assert [(f.node, f.op) for f in told] == [("first", "Det"), ("second", "Unique")]
    assert told[0].what == "the parser does not support it (UNSUPPORTED_NODE)"


@needs_rtx
def test_the_table_agrees_with_the_real_parser_on_operators() -> None:
    ask = (
        "import json, sys; from tensorrt_worker import *; trt = load(PACKAGES); logger = trt.Logger(trt.Logger.ERROR)\n"
        "builder = trt.Builder(logger); network = builder.create_network(0); parser = trt.OnnxParser(network, logger)\n"
        "print(json.dumps([op for op in json.load(sys.stdin) if parser.supports_operator(op)]))"
    )
    known = [*tensorrt_rules.OPERATORS, *tensorrt_rules.UNSUPPORTED]
    taken = set(json.loads(_python(ask, json.dumps(known))))
    assert taken.isdisjoint(tensorrt_rules.UNSUPPORTED)
    assert set(tensorrt_rules.OPERATORS) - taken == {"DeformConv"}  # TensorRT has a plugin for it, TensorRT-RTX none


@needs_rtx
def test_the_api_that_needs_a_gpu_has_the_names_that_are_used() -> None:
    ask = (
        "import json; from tensorrt_worker import *; trt = load(PACKAGES)\n"
        "names = {'Runtime': ['deserialize_cuda_engine'], 'Refitter': ['get_all_weights', 'refit_cuda_engine'],\n"
        " 'OnnxParserRefitter': ['refit_from_file'], 'TensorIOMode': ['INPUT'], 'TensorLocation': ['HOST'],\n"
        " 'BuilderFlag': ['REFIT', 'TF32'], 'ICudaEngine': ['create_execution_context', 'num_io_tensors', 'get_tensor_name',\n"
        " 'get_tensor_mode', 'get_tensor_dtype', 'get_tensor_location'], 'IExecutionContext': ['set_input_shape',\n"
        " 'set_tensor_address', 'infer_shapes', 'get_tensor_shape', 'execute_async_v3'], 'DataType': ['FLOAT', 'HALF',\n"
        " 'BF16', 'INT8', 'UINT8', 'INT32', 'INT64', 'BOOL', 'FP8']}\n"
        "print(json.dumps([f'{c}.{n}' for c, ns in names.items() for n in ns if not hasattr(getattr(trt, c), n)]))"
    )
    assert json.loads(_python(ask, "")) == []


def _python(code: str, text: str) -> str:
    """What a fresh interpreter prints that finds the worker as a module of its own."""
    here = str(Path(tensorrt_worker.__file__).resolve())
    start = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\nimport importlib.util as u\n"
    start += f"s = u.spec_from_file_location('tensorrt_worker', {here!r}); m = u.module_from_spec(s)\n"
    start += "sys.modules['tensorrt_worker'] = m; s.loader.exec_module(m)\n"
    done = subprocess.run([sys.executable, "-c", start + code], input=text, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- sizes, inputs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamic(tmp_path: Path) -> Path:
    return one(tmp_path / "m.onnx", "Relu", shape=("batch", None, 3))


def test_open_sizes_are_named(dynamic: Path) -> None:
    report = check_tensorrt(dynamic, rung="static")
    assert [(f.level, f.node, f.op) for f in report.findings] == [("warning", "x", "input")]
    assert "sizes batch, x[1] are not fixed; an engine needs an optimization profile" in str(report)
    assert "sizes={'batch': (1, 8, 64)}" in str(report)


@needs_rtx
def test_open_sizes_are_built_for_once_given(dynamic: Path) -> None:
    stopped = check_tensorrt(dynamic)
    assert stopped.rung == "parse" and stopped.stopped.startswith("the sizes batch, x[1] are open; pass sizes={'batch'")
    with pytest.raises(ExportError, match="rung='build' cannot be reached: the sizes x.1. are open"):
        check_tensorrt(dynamic, rung="build", sizes={"batch": 2})
    assert check_tensorrt(dynamic, rung="build", sizes={"batch": (1, 4, 9), "x[1]": 5}).rung == "build"
    assert check_tensorrt(dynamic, rung="build", inputs=[torch.zeros(4, 5, 3)]).rung == "build"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sizes": {"time": 3}}, "there is no open size 'time'; the file leaves open: batch, x[1]"),
        ({"sizes": {"batch": (8, 1, 2)}}, "sizes['batch']: got (8, 1, 2); expected one size, or (smallest, usual, largest)"),
        ({"sizes": {"batch": (1, 2)}}, "sizes['batch']: got (1, 2); expected one size"),
        ({"sizes": {"batch": 2}, "inputs": [torch.zeros(4, 5, 3)]}, "sizes['batch'] is from 2 to 2, and an input has 4"),
        ({"inputs": [torch.zeros(4, 5, 2)]}, "input 'x': got shape (4, 5, 2), expected (batch, None, 3)"),
        ({"inputs": [torch.zeros(3)]}, "input 'x': got shape (3,), expected (batch, None, 3)"),
        ({"inputs": [torch.zeros(4, 5, 3).double()]}, "input 'x': got DOUBLE, expected FLOAT"),
        ({"inputs": [1.0]}, "input 'x': got float, expected a tensor"),
        ({"inputs": []}, "got 0 inputs; the file takes 1 (x)"),
        ({"inputs": {"y": torch.zeros(3)}}, "got inputs y; the file takes x"),
        ({"rung": "top"}, "got rung='top'; expected 'highest' or 'static', 'parse', 'build', 'run'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], text: str, dynamic: Path) -> None:
    with pytest.raises(ExportError) as caught:
        check_tensorrt(dynamic, **options)
    assert text in str(caught.value)


@needs_rtx
def test_unknown_capabilities_are_listed(tmp_path: Path) -> None:
    path = one(tmp_path / "m.onnx", "Relu")
    assert check_tensorrt(path, rung="build", capabilities=("SM86", "SM120")).rung == "build"
    report = check_tensorrt(path, rung="build", capabilities=("SM1",))
    assert report.rung == "parse" and "compute capability 'SM1'; TensorRT-RTX" in report.stopped and "SM120" in report.stopped


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"there is no file .*m\.onnx; export the model first"):
        check_tensorrt(tmp_path / "m.onnx")
    path = one(tmp_path / "m.onnx", "Relu")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ExportError, match="is corrupt, truncated or no ONNX file"):
        check_tensorrt(path)


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = one(tmp_path / "m.onnx", "Relu")
    monkeypatch.setattr(tensorrt_worker, "PACKAGES", ("no_such_tensorrt",))
    report = check_tensorrt(path)
    assert report.rung == "static" and report.stopped == f"TensorRT-RTX is not installed; type: {tensorrt.INSTALL}"
    assert report.product == "" and report.ok
    rungs: tuple[tensorrt.Rung, ...] = ("parse", "build", "run")
    for rung in rungs:
        with pytest.raises(
            MissingExtraError, match=f"needed for rung='{rung}' and is not installed; type: pip install --no-deps"
        ):
            check_tensorrt(path, rung=rung)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(MissingExtraError, match=r"onnx_ir is needed to check ONNX files .* 'fxparam\[onnx\]'"):
        check_tensorrt(path)


def answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> Path:
    """A file, and a worker replaced by this program."""
    worker = tmp_path / "worker.py"
    worker.write_text(f"import json, os, sys, time\nrequest = json.load(sys.stdin)\n{program}\n")
    monkeypatch.setattr(tensorrt_worker, "PACKAGES", ("onnx",))
    monkeypatch.setattr(tensorrt_worker, "__file__", str(worker))
    return one(tmp_path / "m.onnx", "Relu")


SAVE = "json.dump({'product': 'P 1', 'reached': 'parse'}, open(request['answer'], 'w'))\n"


@pytest.mark.parametrize(
    ("program", "rung", "level", "text"),
    [
        (SAVE + "os.abort()", "parse", "error", "its process ended with signal 6"),
        (SAVE + "os.kill(os.getpid(), 9)", "parse", "unknown", "its process ended with signal 9"),
        ("raise RuntimeError('no')", "static", "unknown", "its process ended with exit status 1: RuntimeError: no"),
        (SAVE + "time.sleep(60)", "parse", "unknown", "it took longer than timeout=2 seconds"),
    ],
    ids=["crash", "killed", "error", "slow"],
)
def test_tensorrt_cannot_take_this_process_along(
    program: str, rung: str, level: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = check_tensorrt(answered(monkeypatch, tmp_path, program), rung="build", timeout=2)
    assert (report.rung, report.findings[0].level) == (rung, level) and report.stopped.startswith(text)
    assert report.ok is (level != "error")


def test_libraries_that_do_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = "json.dump({'refused': 'TensorRT cannot be imported: no library'}, open(request['answer'], 'w'))"
    path = answered(monkeypatch, tmp_path, refuse)
    report = check_tensorrt(path)
    assert (report.rung, report.stopped, report.findings) == ("static", "TensorRT cannot be imported: no library", ())
    with pytest.raises(MissingExtraError, match="TensorRT cannot be imported: no library; type: pip install"):
        check_tensorrt(path, rung="parse")


# ---- running ---------------------------------------------------------------------------------------------------------


def run_answer(monkeypatch: pytest.MonkeyPatch, outputs: dict[str, Tensor]) -> None:
    """As if there were a GPU on which each engine gives these outputs."""

    def ask(request: dict[str, Any], _: float) -> dict[str, Any]:
        assert list(torch.load(request["inputs"], weights_only=True)) == ["x"]
        torch.save({name: {"y": value} for name, value in outputs.items()}, request["outputs"])
        return {"product": "P 1", "reached": "run", "ended": "", "crashed": False}

    monkeypatch.setattr(tensorrt_worker, "PACKAGES", ("onnx",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tensorrt, "_ask", ask)


X = torch.tensor([[-1.0, 2.0, 3.0], [4.0, -5.0, 6.0]])


def test_outputs_are_compared_with_onnx_runtime_or_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = one(tmp_path / "m.onnx", "Relu")
    run_answer(monkeypatch, {"engine": X.relu(), "refitted engine": X.relu()})
    report = check_tensorrt(path, rung="run", inputs=[X])
    assert report.ok and report.rung == "run" and report.stopped == ""
    assert [(p.inputs, p.output, p.max_abs) for p in report.parity] == [("engine", "y", 0.0), ("refitted engine", "y", 0.0)]
    assert "output 'y' of the engine: off by 0 (0 of the tolerance)" in str(report)
    assert check_tensorrt(path, inputs={"x": X}, reference=torch.relu).ok
    assert not check_tensorrt(path, inputs={"x": X}, reference=torch.tanh).ok


def test_other_numbers_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = one(tmp_path / "m.onnx", "Relu")
    run_answer(monkeypatch, {"engine": X.relu() + 0.01, "refitted engine": X.relu()[:1]})
    report = check_tensorrt(path, inputs=[X])
    assert not report.ok and [f.what[:35] for f in report.findings] == [
        "the engine is off by 0.01, 109 time",
        "the refitted engine gives shape (1,",
    ]


def test_agreeing_numbers_settle_an_objection_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = one(tmp_path / "m.onnx", "Relu", opset=25)
    for outputs, level in ((X.relu(), "warning"), (X, "error")):
        run_answer(monkeypatch, {"engine": outputs})
        report = check_tensorrt(path, inputs=[X], reference=torch.relu)
        assert level in [
            f.level for f in report.findings if "opset 25; expected 9 to 24 (P 1 builds it all the same)" in f.what
        ]


def test_without_a_gpu_the_last_rung_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_worker, "PACKAGES", ("onnx",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match="rung='run' cannot be reached: there is no CUDA device here"):
        check_tensorrt(one(tmp_path / "m.onnx", "Relu"), rung="run", inputs=[X])


def test_the_report_is_frozen_and_the_file_stays(tmp_path: Path) -> None:
    path = one(tmp_path / "m.onnx", "Relu")
    before = path.read_bytes()
    report = check_tensorrt(path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rung = "run"  # type: ignore[misc]
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.gpu
@pytest.mark.skipif(not any(map(importlib.util.find_spec, tensorrt_worker.PACKAGES)), reason="TensorRT is not installed")
@pytest.mark.parametrize("name", MODELS)
def test_engines_on_a_gpu_agree_before_and_after_refitting(name: str, tmp_path: Path) -> None:
    build, shape = MODELS[name]
    model, x = build().eval(), torch.randn(shape)
    fxp.export_onnx(model, (x,), tmp_path / "m.onnx", opset=20)
    report = check_tensorrt(tmp_path / "m.onnx", rung="run", inputs=[x], reference=model)
    assert (report.rung, report.ok) == ("run", True), str(report)
    assert {p.inputs for p in report.parity} == {"engine", "refittable engine", "refitted engine"}, str(report)
