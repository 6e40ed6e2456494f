"""Writing that never costs the file that was there, reading that trusts nothing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from onnx_ir import tensor_adapters

from fxparam.errors import ExportError, MissingExtraError
from fxparam.exporters import files


def model(value: float = 1.0) -> ir.Model:
    """``y = x @ w`` with a 16 x 16 weight, 1 KiB: enough to go outside."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor("w", TensorProto.FLOAT, [16, 16], [0.0] * 256)],
    )
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    built = ir.serde.deserialize_model(proto)
    built.graph.initializers["w"].const_value = tensor_adapters.TorchTensor(torch.full((16, 16), value), "w")
    return built


def save(path: Path, value: float = 1.0, *, external: bool = False, check: Any = lambda file: None) -> Path | None:
    return files.write_model(model(value), path, external=external, check=check)[1]


def weight(path: Path) -> float:
    return float(files.read_model(path).graph.initializers["w"].const_value.numpy()[0, 0])  # type: ignore[union-attr]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raiser(_: Path) -> None:
    raise ZeroDivisionError("the check failed")


def test_staged_replaces_the_target_and_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    target.chmod(0o640)
    with files.staged(target) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert contents(tmp_path) == {"a": b"new"}
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_staged_leaves_the_target_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), files.staged(target) as temporary:
        temporary.write_text("half")
        raiser(target)
    assert contents(tmp_path) == {"a": b"old"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.onnx").write_text("old")
    link = tmp_path / "link.onnx"
    link.symlink_to("real.onnx")
    save(files.writable(link), 2.0)
    assert link.is_symlink()
    assert weight(tmp_path / "real.onnx") == 2.0


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_round_trip(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "m.onnx"
    data = save(path, 3.0, external=external)
    assert weight(path) == 3.0
    assert (data is not None) == external
    assert set(contents(tmp_path)) == {path.name} | ({data.name} if data else set())
    onnx.checker.check_model(str(path), full_check=True)


def test_data_names_follow_the_content(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    first = save(path, 1.0, external=True)
    before = contents(tmp_path)
    assert save(path, 1.0, external=True) == first
    assert contents(tmp_path) == before
    second = save(path, 2.0, external=True)
    assert second != first and second is not None
    assert set(contents(tmp_path)) == {"m.onnx", second.name}, "the data of the old file go with it"


def test_data_that_bear_another_name_stay(tmp_path: Path) -> None:
    other = save(tmp_path / "other.onnx", 1.0, external=True)
    (tmp_path / "m.onnx.unrelated.data").write_text("not referred to")
    save(tmp_path / "m.onnx", 1.0, external=True)
    save(tmp_path / "m.onnx", 2.0)
    assert other is not None
    assert set(contents(tmp_path)) == {"other.onnx", other.name, "m.onnx", "m.onnx.unrelated.data"}


def test_tensors_too_small_to_go_outside_leave_no_data_file(tmp_path: Path) -> None:
    small = model()
    small.graph.initializers["w"].const_value = tensor_adapters.TorchTensor(torch.ones(1, 1), "w")
    assert files.write_model(small, tmp_path / "m.onnx", external=True, check=lambda file: "checked") == (
        "checked",
        None,
    )
    assert set(contents(tmp_path)) == {"m.onnx"}


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "existing"])
@pytest.mark.parametrize("culprit", ["replace", "fsync", "check"])
def test_failures_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, existing: bool, culprit: str
) -> None:
    path = tmp_path / "m.onnx"
    if existing:
        save(path, 1.0, external=external)
    before = contents(tmp_path)
    if culprit == "check":
        with pytest.raises(ZeroDivisionError, match="the check failed"):
            save(path, 2.0, external=external, check=raiser)
    else:
        monkeypatch.setattr(os, culprit, refuse)
        with pytest.raises(ExportError, match=r"cannot write .*m\.onnx: No space left on device") as caught:
            save(path, 2.0, external=external)
        assert ("the file there is unchanged" if existing else "no file was left") in str(caught.value)
    assert contents(tmp_path) == before


def test_a_failing_check_keeps_data_that_the_old_file_shares(tmp_path: Path) -> None:
    save(tmp_path / "m.onnx", 1.0, external=True)
    before = contents(tmp_path)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path / "m.onnx", 1.0, external=True, check=raiser)
    assert contents(tmp_path) == before


def test_an_error_of_the_check_is_not_taken_for_one_of_writing(tmp_path: Path) -> None:
    def check(_: Path) -> None:
        raise FileNotFoundError("the user's own file")

    with pytest.raises(FileNotFoundError, match="the user's own file"):
        save(tmp_path / "m.onnx", check=check)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/m.onnx", r"the folder .*missing does not exist; create it first"),
        ("", r"it is a folder; add a file name, such as .*model\.onnx"),
    ],
)
def test_unwritable_paths_are_refused_early(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        files.writable(tmp_path / path)


def test_a_read_only_folder_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the super-user may write everywhere
    with pytest.raises(ExportError, match="does not let you create files"):
        files.writable(tmp_path / "m.onnx")


@pytest.mark.parametrize("damage", ["empty", "noise", "truncated", "half"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.onnx"
    save(path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "noise": b"\xff" * 99, "truncated": whole[:-1], "half": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ExportError, match=r"m\.onnx is corrupt, truncated or no ONNX file \(.*export it again"):
        files.read_model(path)


def test_a_damaged_file_can_be_written_over(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(path, external=True)
    path.write_bytes(b"\xff" * 99)
    save(path, 5.0)
    assert weight(path) == 5.0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"there is no file .*m\.onnx; export the model first"):
        files.read_model(tmp_path / "m.onnx")


def relocate(path: Path, **entries: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("location", ["../secret.data", "/etc/passwd", "a/../../secret.data", "C:\\secret", "..\\secret"])
def test_external_data_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret.data").write_bytes(bytes(1024))
    save(folder / "m.onnx", external=True)
    relocate(folder / "m.onnx", location=location)
    with pytest.raises(ExportError, match="outside its own folder; such a file is refused"):
        files.read_model(folder / "m.onnx")


def test_external_data_behind_a_link_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret.data").write_bytes(bytes(1024))
    data = save(folder / "m.onnx", external=True)
    assert data is not None
    data.unlink()
    data.symlink_to(tmp_path / "secret.data")
    with pytest.raises(ExportError, match="outside its own folder"):
        files.read_model(folder / "m.onnx")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "gone.data"}, "there is no such file"),
        ({"offset": "8"}, "corrupt"),
        ({"length": "4"}, "corrupt"),
        ({"offset": "-4"}, "corrupt"),
        ({"length": "many"}, "corrupt"),
    ],
)
def test_external_data_that_do_not_fit_are_refused(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    save(tmp_path / "m.onnx", external=True)
    relocate(tmp_path / "m.onnx", **entries)
    with pytest.raises(ExportError, match=message):
        files.read_model(tmp_path / "m.onnx")


def test_truncated_external_data_are_refused(tmp_path: Path) -> None:
    data = save(tmp_path / "m.onnx", external=True)
    assert data is not None
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(ExportError, match="has 1020 bytes, and 'w' should end at 1024"):
        files.read_model(tmp_path / "m.onnx")


def test_same_view_tells_storage_and_layout_apart() -> None:
    a = torch.arange(4.0).reshape(2, 2)
    assert files.same_view(a) == files.same_view(torch.nn.Parameter(a))
    for other in (a.T, a[:1], a.clone(), a.view(torch.int32)):
        assert files.same_view(a) != files.same_view(other)
    assert files.same_view(torch.empty(0)) != files.same_view(torch.empty(0))


def test_missing_packages_name_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"no_such_package is needed to export .* pip install 'fxparam\[onnx\]'"):
        files.need("onnx", "no_such_package", purpose="to export ONNX files")
