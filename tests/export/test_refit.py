"""New weights into an existing ONNX file."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from fxparam.errors import ExportError, MissingExtraError
from fxparam.exporters.onnx import TIED, export_program
from fxparam.exporters.onnx_verify import check_parity
from fxparam.exporters.refit import refit_onnx

TOKENS = torch.tensor([[1, 4, 2], [0, 9, 9]])


class Tagger(nn.Module):
    """A tied weight, buffers, a counter that inference does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.BatchNorm1d(8)
        self.mix = nn.Linear(8, 8)
        self.decode = nn.Linear(8, 10, bias=False)
        self.decode.weight = self.embed.weight
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.norm(self.mix(self.embed(tokens).sum(1))))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[bool, Path], Tagger]:
    # Not the seed that each test starts with: what is exported and what a test makes must differ.
    torch.manual_seed(123)
    model = Tagger().eval()
    program = torch.export.export(model, (TOKENS,))
    paths = {}
    for external in (False, True):
        paths[external] = tmp_path_factory.mktemp("exported") / "m.onnx"
        export_program(
            program,
            paths[external],
            reference=model,
            args=(TOKENS,),
            verify=0,
            external_data=external,
            metadata={"a": "b"},
        )
    return paths, model


@pytest.fixture(params=[False, True], ids=["inline", "external"])
def file(request: pytest.FixtureRequest, exported: tuple[dict[bool, Path], Tagger], tmp_path: Path) -> Path:
    for source in exported[0][request.param].parent.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    return tmp_path / "m.onnx"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(path: Path) -> Tensor:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"tokens": TOKENS.numpy()})[0])


def test_new_weights_reach_onnx_runtime(file: Path) -> None:
    other = Tagger().eval()
    before = onnx.load(file, load_external_data=False)
    report = refit_onnx(file, other.state_dict(), check=partial(check_parity, reference=other, args=(TOKENS,)))
    with torch.no_grad():
        torch.testing.assert_close(run(file), other(TOKENS))
    assert set(report.replaced) == {"norm.weight", "mix.weight", "mix.bias", "decode.weight"}
    assert set(report.unchanged) == {"norm.bias", "norm.running_mean", "norm.running_var"}
    assert report.ignored == ("norm.num_batches_tracked",) and report.kept == ()
    assert report.bytes == sum(map(len, contents(file.parent).values()))
    assert str(report).startswith(f"{file}: 4 replaced, 3 unchanged, 0 kept, 1 ignored, ")
    after = onnx.load(file, load_external_data=False)
    assert (after.graph.node, after.metadata_props) == (before.graph.node, before.metadata_props)


def test_there_and_back_gives_the_first_bytes(file: Path, exported: tuple[Any, Tagger]) -> None:
    before = contents(file.parent)
    refit_onnx(file, Tagger().state_dict())
    changed = contents(file.parent)
    assert changed != before and len(changed) == len(before)
    refit_onnx(file, exported[1].state_dict())
    assert contents(file.parent) == before


def test_equal_weights_write_nothing(file: Path, exported: tuple[Any, Tagger], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing was to be written")

    monkeypatch.setattr(os, "replace", refuse)
    checked: list[Path] = []
    report = refit_onnx(file, exported[1].state_dict(), check=checked.append)
    assert report.replaced == () and checked == [file]
    assert report.bytes == sum(map(len, contents(file.parent).values()))


def test_what_is_not_given_stays(file: Path) -> None:
    bias = torch.arange(8.0)
    report = refit_onnx(file, {"mix.bias": bias})
    assert report.replaced == ("mix.bias",) and len(report.kept) == 6
    model = onnx.load(file)
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    assert torch.equal(torch.from_numpy(stored["mix.bias"].copy()), bias)


def test_a_tied_weight_answers_to_all_of_its_names(file: Path) -> None:
    new = torch.randn(10, 8)
    assert refit_onnx(file, {"embed.weight": new}).replaced == ("decode.weight",)
    assert refit_onnx(file, {"embed.weight": new, "decode.weight": new.clone()}).unchanged == ("decode.weight",)


def test_views_and_other_layouts_are_stored_by_value(file: Path) -> None:
    new = torch.randn(8, 8)
    refit_onnx(file, {"mix.weight": new.T})
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(file).graph.initializer}
    assert torch.equal(torch.from_numpy(stored["mix.weight"].copy()), new.T)


def test_all_problems_are_listed_at_once(file: Path) -> None:
    before = contents(file.parent)
    weights: dict[str, Any] = {
        "mix.weigth": torch.randn(8, 8),
        "zzz": torch.randn(1),
        "mix.weight": torch.randn(8),
        "mix.bias": torch.randn(8).double(),
        "norm.bias": [0.0] * 8,
        "embed.weight": torch.randn(10, 8),
        "decode.weight": torch.randn(10, 8),
        "norm.weight": torch.randn(8),
    }
    with pytest.raises(ExportError) as caught:
        refit_onnx(file, weights)
    lines = str(caught.value).splitlines()
    assert lines == [
        f"cannot refit {file}; it is unchanged:",
        lines[1],
        "  zzz: no such initializer",
        "  mix.weight: got shape (8,), expected (8, 8)",
        "  mix.bias: got dtype DOUBLE, expected FLOAT",
        "  norm.bias: got list, expected a tensor",
        "  decode.weight and embed.weight are one tied weight in the file (decode.weight) and got different values",
        "Give the weights of the exported model under its own names, or export it again",
    ]
    assert lines[1].startswith("  mix.weigth: no such initializer; did you mean mix.weight")
    assert contents(file.parent) == before


def test_a_failing_check_changes_nothing(file: Path) -> None:
    before = contents(file.parent)
    wrong = partial(check_parity, reference=Tagger().eval(), args=(TOKENS,))
    with pytest.raises(ExportError, match="does not reproduce the model"):
        refit_onnx(file, Tagger().state_dict(), check=wrong)
    assert contents(file.parent) == before


def test_an_error_in_writing_changes_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = contents(file.parent)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ExportError, match="No space left on device; the file there is unchanged"):
        refit_onnx(file, Tagger().state_dict())
    assert contents(file.parent) == before


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_truncated_files_are_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    before = contents(file.parent)
    with pytest.raises(ExportError, match="is corrupt, truncated or no ONNX file"):
        refit_onnx(file, {"mix.bias": torch.zeros(8)})
    assert contents(file.parent) == before


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_metadata_nobody_wrote_are_refused(file: Path, text: str) -> None:
    proto = onnx.load(file, load_external_data=False)
    for entry in proto.metadata_props:
        entry.value = text if entry.key == TIED else entry.value
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match=r"metadata fxparam\.tied"):
        refit_onnx(file, {"mix.bias": torch.zeros(8)})


def test_missing_paths_and_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"there is no file .*m\.onnx; export the model first"):
        refit_onnx(tmp_path / "m.onnx", {})
    monkeypatch.setitem(__import__("sys").modules, "onnx_ir", None)
    with pytest.raises(MissingExtraError, match=r"onnx_ir is needed to refit ONNX files .* 'fxparam\[onnx\]'"):
        refit_onnx(tmp_path / "m.onnx", {})


def test_zeros_that_cannot_be_counted_are_noted(tmp_path: Path) -> None:
    """A graph of another exporter, whose dimensions do not fit together."""
    old, new = torch.zeros(4, 4), torch.eye(4)
    nodes = [
        onnx.helper.make_node("Transpose", ["w"], ["t"], perm=[9, 0]),
        onnx.helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 4]) for name in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [onnx.numpy_helper.from_array(old.numpy(), "w")])
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    report = refit_onnx(path, {"w": new})
    assert report.replaced == ("w",)
    assert "note: zeros among the weights were not counted, and fxparam.sparsity is left out: IndexError" in str(report)
    written = onnx.load(path)
    assert not written.metadata_props
    assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(written.graph.initializer[0]).copy()), new)
