"""What is built is what is in the tree: real files, one top-level name, the same wheel by way of the sdist."""

from __future__ import annotations

import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from glob import glob
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RELEASE = f"{PROJECT['name']}-{PROJECT['version']}"
OPTIONAL = ("matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich", "sklearn", "tensorrt", "yaml")


class Archives(NamedTuple):
    sdist: Path
    wheel_from_sdist: Path
    wheel_from_tree: Path


def run(*command: str, cwd: Path) -> str:
    """Standard output of a command; its standard error is the failure where it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    empty, both, alone = (tmp_path_factory.mktemp(name) for name in ("empty", "both", "alone"))
    build = (sys.executable, "-m", "build", "--no-isolation", str(ROOT), "--outdir")
    run(*build, str(both), cwd=empty)
    run(*build, str(alone), "--wheel", cwd=empty)
    (sdist,), (wheel,), (direct,) = both.glob("*.tar.gz"), both.glob("*.whl"), alone.glob("*.whl")
    return Archives(sdist, wheel, direct)


@pytest.fixture(scope="module")
def package_files() -> dict[str, bytes]:
    """Every file of the package by its name in an archive; ``glob`` walks through the links."""
    paths = [path for path in glob("fxparam/**", root_dir=ROOT, recursive=True) if "__pycache__" not in path]
    return {Path(path).as_posix(): (ROOT / path).read_bytes() for path in paths if (ROOT / path).is_file()}


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        links = [info.filename for info in archive.infolist() if stat.S_ISLNK(info.external_attr >> 16)]
        assert not links
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_package_in_the_tree_is_whole(package_files: dict[str, bytes]) -> None:
    expected = ("__init__.py", "py.typed", "passes/__init__.py", "exporters/__init__.py")
    assert {f"fxparam/{name}" for name in expected} <= package_files.keys()


def test_wheel_holds_the_package_and_nothing_else(archives: Archives, package_files: dict[str, bytes]) -> None:
    files = wheel_files(archives.wheel_from_tree)
    metadata = {name for name in files if name.startswith(f"{RELEASE}.dist-info/")}
    assert {name: files[name] for name in files.keys() - metadata} == package_files
    assert f"{RELEASE}.dist-info/licenses/LICENSE" in metadata


def test_wheel_from_sdist_equals_wheel_from_tree(archives: Archives) -> None:
    assert wheel_files(archives.wheel_from_sdist) == wheel_files(archives.wheel_from_tree)


def test_sdist_holds_real_files_only(archives: Archives, package_files: dict[str, bytes]) -> None:
    with tarfile.open(archives.sdist) as archive:
        members = archive.getmembers()
        assert [member.name for member in members if not (member.isreg() or member.isdir())] == []
        files = {member.name: archive.extractfile(member) for member in members if member.isreg()}
        packed = {name: handle.read() for name, handle in files.items() if handle is not None}
    inside = {name.removeprefix(f"{RELEASE}/"): content for name, content in packed.items()}
    assert {name: content for name, content in inside.items() if name.startswith("fxparam/")} == package_files
    assert {name.partition("/")[0] for name in inside} - {".gitignore"} == {
        *("fxparam", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO")
    }


@pytest.fixture(scope="module")
def installed(archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target))
    run(*pip, str(archives.wheel_from_sdist), cwd=target.parent)
    return target


def test_install_brings_one_top_level_name(installed: Path) -> None:
    assert {path.name for path in installed.iterdir()} == {"fxparam", f"{RELEASE}.dist-info"}


def test_installed_package_imports_under_its_one_name(installed: Path, tmp_path: Path) -> None:
    program = f"""
import importlib.util, sys
sys.path.insert(0, {str(installed)!r})
import fxparam, fxparam.exporters, fxparam.passes
for module in (fxparam, fxparam.exporters, fxparam.passes):
    print(module.__file__)
print(importlib.util.find_spec("passes"), importlib.util.find_spec("exporters"))
"""
    out = run(sys.executable, "-I", "-W", "error", "-c", program, cwd=tmp_path).splitlines()
    inits = ("__init__.py", "exporters/__init__.py", "passes/__init__.py")
    assert out == [*(str(installed / "fxparam" / init) for init in inits), "None None"]


def test_editable_install_brings_one_top_level_name(tmp_path: Path) -> None:
    program = """
import importlib.util, fxparam
print(fxparam.__file__, importlib.util.find_spec("passes"), importlib.util.find_spec("exporters"))
"""
    out = run(sys.executable, "-I", "-c", program, cwd=tmp_path)
    assert out.split() == [str(ROOT / "fxparam" / "__init__.py"), "None", "None"]


def test_import_loads_no_optional_package(tmp_path: Path) -> None:
    program = f"""
import sys, torch
before = set(sys.modules)
import fxparam
print(sorted(set({OPTIONAL!r}) & (set(sys.modules) - before)))
"""
    assert run(sys.executable, "-I", "-W", "error", "-c", program, cwd=tmp_path).strip() == "[]"
