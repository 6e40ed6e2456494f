"""The ONNX exporter core: names and nodes, parity, errors, bytes."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxparam.errors import ExportError, MissingExtraError
from fxparam.exporters import files, onnx_verify
from fxparam.exporters.onnx import OnnxReport, export_program
from fxparam.exporters.onnx_verify import check_parity, compare, random_like


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20, bias=False), nn.ReLU(), nn.Linear(20, 3))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.head = nn.Linear(4 * 4 * 4, 3)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


class Decoder(nn.Module):
    """Integer input, a state, a loop, a tied weight, a keyword input, nested outputs with None and repetition."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.cell = nn.GRUCell(8, 16)
        self.project = nn.Linear(16, 8)
        self.decode = nn.Linear(8, 10, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor, state: Tensor, *, scale: Tensor) -> dict[str, Any]:
        for step in range(tokens.shape[1]):
            state = self.cell(self.embed(tokens[:, step]), state)
        hidden = self.project(state) * scale
        return {"logits": self.decode(hidden), "state": (hidden, state, hidden), "attention": None}


class Shapes(nn.Module):
    """Two inputs whose sizes hang together, and a size as an output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(a).sum(1), torch.cat([b, b * 2])[: a.shape[0]].logical_not()


class Returns(nn.Module):
    """Returns its input, a parameter, a value and a copy of that value."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = x @ self.w
        return x, self.w, h, h.clone(), h


class Clash(nn.Module):
    """Parameters called as the exporter would call an input and an intermediate value."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(3))
        self.mul = nn.Parameter(torch.randn(3))
        self.add = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.x * self.mul + self.add


BATCH = Dim("batch", min=2, max=64)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], dict[str, Any], Any]] = {
    "mlp": (Mlp, lambda: (torch.randn(4, 6),), {}, None),
    "mlp-dynamic": (Mlp, lambda: (torch.randn(4, 6),), {}, ({0: BATCH},)),
    "conv": (ConvNet, lambda: (torch.randn(2, 2, 6, 6),), {}, None),
    "conv-dynamic": (ConvNet, lambda: (torch.randn(2, 2, 6, 6),), {}, ({0: BATCH},)),
    "decoder": (
        Decoder,
        lambda: (torch.randint(0, 10, (2, 3)), torch.zeros(2, 16)),
        {"scale": torch.rand(8)},
        None,
    ),
    "shapes": (
        Shapes,
        lambda: (torch.randn(6, 7, 5), torch.rand(6) > 0.5),
        {},
        ({0: BATCH, 1: Dim("time")}, {0: BATCH}),
    ),
    "returns": (Returns, lambda: (torch.randn(2, 3),), {}, None),
    "clash": (Clash, lambda: (torch.randn(2, 3),), {}, None),
}


@functools.cache  # the tests share the exported programs, which exporting leaves as they are
def program(name: str) -> tuple[torch.export.ExportedProgram, nn.Module, tuple[Any, ...], dict[str, Any]]:
    build, inputs, kwargs, dynamic = CASES[name]
    model, args = build().eval(), inputs()
    return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic), model, args, kwargs


def export(name: str, path: Path, **options: Any) -> tuple[OnnxReport, nn.Module]:
    exported, model, args, kwargs = program(name)
    return export_program(exported, path, reference=model, args=args, kwargs=kwargs, **options), model


def simple(module: nn.Module, path: Path, *args: Tensor, **options: Any) -> OnnxReport:
    exported = torch.export.export(module.eval(), args)
    return export_program(exported, path, **{"reference": module, "args": args, **options})


def stored(path: Path) -> dict[str, Tensor]:
    return {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in onnx.load(path).graph.initializer}


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


def test_onnx_runtime_outputs_equal_an_independent_evaluation(tmp_path: Path) -> None:
    report, model = export("decoder", tmp_path / "m.onnx", verify=0)
    assert report.parity == () and "not compared with the model" in str(report)
    tokens, state, scale = torch.randint(0, 10, (2, 3)), torch.randn(2, 16), torch.rand(8)
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    feeds = {"tokens": tokens.numpy(), "state": state.numpy(), "scale": scale.numpy()}
    got = session.run(None, feeds)
    with torch.no_grad():
        want = model(tokens, state, scale=scale)
    for a, b in zip(got, [want["logits"], *want["state"]], strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "got opset=17; expected 18 to 24"),
        ({"verify": -1}, "got verify=-1; expected how many sets"),
        ({"input_names": ["a", "b"]}, r"got 2 input_names \(a, b\); the model has 1 inputs"),
        ({"output_names": ["0.weight"]}, "'0.weight' is empty, given twice, or the name of a parameter"),
        ({"output_names": [""]}, "'' is empty"),
    ],
)
def test_bad_options_are_explained(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export("mlp", tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("external", [False, True])
def test_a_wrong_reference_leaves_the_old_file(tmp_path: Path, external: bool) -> None:
    exported, model, args, _ = program("mlp")
    export_program(exported, tmp_path / "m.onnx", reference=model, args=args, external_data=external)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    torch.manual_seed(123)  # other weights than the cached program's
    changed = torch.export.export(Mlp().eval(), args)
    with pytest.raises(ExportError) as caught:
        export_program(changed, tmp_path / "m.onnx", reference=model, args=args, external_data=external)
    text = str(caught.value)
    for part in ("output 'linear_2' on the given inputs", "times the tolerance of", "No file was changed", "verify=0"):
        assert part in text
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_random_inputs_find_what_the_given_ones_hide(tmp_path: Path) -> None:
    model = Mlp().eval()
    exported = torch.export.export(model, (torch.zeros(2, 6),))
    with pytest.raises(ExportError, match="on the random 1 inputs"):
        export_program(exported, tmp_path / "m.onnx", reference=lambda x: model(x) + x[:, :3], args=(torch.zeros(2, 6),))


def test_a_model_that_draws_random_numbers_is_told_so(tmp_path: Path) -> None:
    exported, model, args, _ = program("mlp")
    with pytest.raises(ExportError, match=r"draws random numbers or keeps state.*call model.eval\(\) first"):
        export_program(exported, tmp_path / "m.onnx", reference=lambda x: model(x) + torch.rand(1), args=args)


def test_inputs_of_another_structure_are_refused(tmp_path: Path) -> None:
    exported, model, args, _ = program("mlp")
    with pytest.raises(ExportError, match="another structure than those the model was exported with"):
        export_program(exported, tmp_path / "m.onnx", reference=model, args=(*args, *args))


class Input(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.w = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


class Weight(Input):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.operation(self.w)


ON_INPUT = "It depends on the input x: what depends on an input stays in the file"
ON_WEIGHT = r"It depends on parameters only: fold it into a constant first \(fxp.fold\(model\)"


@pytest.mark.parametrize(
    ("kind", "operation", "op", "advice"),
    [
        (Weight, torch.matrix_exp, "linalg_matrix_exp", ON_WEIGHT),
        (Weight, torch.linalg.inv, "linalg_inv_ex", ON_WEIGHT),
        (Input, lambda a: torch.linalg.qr(a)[0], "linalg_qr", ON_INPUT),
    ],
)
def test_operations_without_an_onnx_form(kind: type[Input], operation: Any, op: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"aten\.{op}\.\w+ has no ONNX form, at .*test_export_onnx\.py:\d+ `.*{advice}"):
        simple(kind(operation), tmp_path / "m.onnx", torch.eye(3))
    assert list(tmp_path.iterdir()) == []


def test_python_numbers_among_the_outputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the model returns 3 \(int\); an ONNX file returns tensors only"):
        simple(Input(lambda x: (x, 3)), tmp_path / "m.onnx", torch.eye(3))  # type: ignore[arg-type,return-value]


class Counter(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


def test_written_buffers_are_noted(tmp_path: Path) -> None:
    report = simple(Counter(), tmp_path / "m.onnx", torch.randn(3))
    assert report.notes == ("the model writes to its buffers calls; in the file they keep the values they have now",)
    assert "note: the model writes" in str(report)


def test_what_the_model_refuses_is_noted_not_compared(tmp_path: Path) -> None:
    def picky(x: Tensor) -> Tensor:
        if not torch.equal(x, x.round()):
            raise ValueError("whole numbers only")
        return x * 2

    report = simple(
        Input(lambda x: x * 2), tmp_path / "m.onnx", torch.eye(3) * 4 + torch.arange(9.0).view(3, 3), reference=picky
    )
    assert {p.inputs for p in report.parity} == {"given"}
    assert report.notes == ("the model refused random inputs (whole numbers only); none were compared",)


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


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported, model, args, _ = program("mlp")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is needed to export ONNX files .* 'fxparam\[onnx\]'"):
        export_program(exported, tmp_path / "m.onnx", reference=model, args=args)


# ---- random inputs, comparison ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "holds"),
    [
        (torch.tensor([3, 9, 5]), lambda t: 3 <= t.min() < t.max() <= 9),
        (torch.tensor([2**63 - 1]), lambda t: (t >= 2**63 - 2).all()),
        (torch.tensor([7], dtype=torch.uint8), lambda t: (t == 7).all()),
        (torch.tensor([True]), lambda t: 0.3 < t.float().mean() < 0.7),
        (torch.randn(400) * 3 + 50, lambda t: abs(t.mean() - 50) < 1 and abs(t.std() - 3) < 1),
        (torch.rand(400), lambda t: t.min() >= 0),
        (torch.zeros(4), lambda t: abs(t.std() - 1) < 0.2),
        (torch.tensor([0.0, -math.inf, 0.0]), lambda t: set(t.tolist()) == {0.0, -math.inf}),
        (torch.tensor([1.0, 0.0, 0.0]), lambda t: set(t.tolist()) == {0.0, 1.0}),
        (torch.randn(400, dtype=torch.complex64), lambda t: t.imag.std() > 0.3),
        (torch.randn(9, dtype=torch.bfloat16), lambda t: t.isfinite().all()),
        (torch.empty(0), lambda t: (t == 0).all()),
    ],
)
def test_random_inputs_keep_the_kind_of_the_given_ones(given: Tensor, holds: Callable[[Tensor], Any]) -> None:
    drawn = random_like(given, (400,), torch.Generator().manual_seed(0))
    assert drawn.dtype == given.dtype and drawn.shape == (400,) and holds(drawn)


def test_dynamic_sizes_are_drawn_within_their_range() -> None:
    exported, _, args, _ = program("shapes")
    draws = [onnx_verify._draw_shapes(exported, args, __import__("random").Random(seed)) for seed in range(50)]
    shapes = [shapes for shapes, _ in draws]
    assert {b for _, b in shapes} == {(a[0],) for a, _ in shapes}, "one symbol, one size"
    assert len({a for a, _ in shapes}) > 20
    assert all(2 <= a[0] <= 14 and a[1] >= 2 and a[2] == 5 for a, _ in shapes)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("expected", "actual", "ok"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.00005, 2.0], True),
        ([1.0, 2.0], [1.001, 2.0], False),
        ([1000.0, 0.0], [1000.0, 0.01], True),
        ([1.0, 0.0], [1.0, 0.01], False),
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, 2.0], [1.0, NAN], False),
        ([1.0, NAN], [1.0, 2.0], False),
        ([1.0, INF], [1.0, INF], True),
        ([1.0, INF], [1.0, -INF], False),
        ([1.0, INF], [1.0, 3e38], False),
        ([0.0], [1e-9], True),
        ([0.0], [1e-6], False),
        ([1e-5], [1.2e-5], False),
    ],
)
def test_comparison(expected: list[float], actual: list[float], ok: bool) -> None:
    result = compare("given", "y", torch.tensor(expected), torch.tensor(actual), onnx_verify.RTOL[torch.float32])
    assert result.ok == ok


def test_integers_and_booleans_compare_exactly() -> None:
    assert compare("given", "y", torch.tensor([1, 2]), torch.tensor([1, 2]), 0.5).ok
    assert not compare("given", "y", torch.tensor([10**6, 2]), torch.tensor([10**6 + 1, 2]), 0.5).ok
    assert not compare("given", "y", torch.tensor([True]), torch.tensor([False]), 0.5).ok


def test_shapes_and_dtypes_must_agree() -> None:
    with pytest.raises(ExportError, match=r"'y' \(given inputs\) is torch.float32 of shape \(2,\) in ONNX Runtime and torch"):
        compare("given", "y", torch.zeros(3), torch.zeros(2), 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    report = simple(Mlp().to(dtype), tmp_path / "m.onnx", torch.randn(3, 6, dtype=dtype))
    assert all(p.ok for p in report.parity)
    # A float32 output of a half-precision model is as coarse as the model, and no coarser than that for double.
    assert (max(p.tolerance for p in report.parity) < 1e-5) == (dtype == torch.float64)


def test_parity_without_a_program(tmp_path: Path) -> None:
    _, model = export("mlp", tmp_path / "m.onnx", verify=0)
    parity, notes = check_parity(tmp_path / "m.onnx", model, (torch.randn(4, 6),), random_sets=1)
    assert [p.inputs for p in parity] == ["given", "random 1"] and notes == ()
    with pytest.raises(ExportError, match=r"takes 1 inputs \(input\), and 2 were given"):
        check_parity(tmp_path / "m.onnx", lambda a, b: model(a), (torch.randn(4, 6), torch.randn(1)))
    with pytest.raises(ExportError, match="ONNX Runtime cannot run the model on the given inputs"):
        check_parity(tmp_path / "m.onnx", lambda a: a, (torch.randn(4, 7),))
