"""Writing model files so that no failure costs the file that was there before, and reading files nobody vouches for.

One file: the bytes go to a temporary file beside the target, are flushed to the disk, checked, and renamed onto the
target (``os.replace``, atomic within a directory). A reader sees the old file or the new one.

An ONNX file with its weights beside it is two files, and no rename covers both. The weights therefore go to a name made
of their content, ``model.onnx.<hash>.data``, which the *new* ``model.onnx`` refers to and the old one does not:

1. write ``model.onnx.<hash>.data``, itself under a temporary name first, for the old file uses this very name where the
weights are the same (the old pair is whole), 2. write and check the new ``model.onnx`` under its temporary name, 3. rename it
onto the target (from here on the new pair is whole), 4. remove the data the old file used, if it bears the model's name.

A process that is killed in between leaves at worst one temporary file, ``.model.onnx[.<hash>.data].<16 hex digits>.tmp``,
which the next write of this target removes once it is ``STALE`` seconds old, and one data file that nothing refers to. The
latter stays: a copy of the model under another name may be what refers to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, TypeVar

from fxparam.errors import ExportError, missing_extra

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

T = TypeVar("T")

INLINE_LIMIT = 3 * 2**29
"""Bytes of weights (1.5 GiB) from which they go beside the file: protobuf ends at 2 GiB, the graph needs room too."""

SMALL = 256
"""Bytes up to which a tensor stays in the file in any case."""

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes a protobuf message may have."""

NODE_LIMIT = 2**20
"""Nodes a file may have with its local functions expanded: some functions that call each other twice are billions."""

STALE = 24 * 3600
"""Seconds after which a temporary file belongs to nobody: no export takes a day between writing a file and renaming it."""


def need(*packages: str, purpose: str) -> None:
    """Check that optional packages can be imported.

    Raises:
        MissingExtraError: one of them cannot; the message names the extra to install.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise missing_extra(package, "onnx", purpose) from error


def writable(path: str | os.PathLike[str]) -> Path:
    """The file that ``path`` names, links followed, after checking that a file can be written there.

    Raises:
        ExportError: its folder does not exist or refuses new files, or ``path`` is a folder or can be no file's name.
    """
    try:
        target = Path(os.path.realpath(path))
        target.lstat()
    except FileNotFoundError:
        pass
    except NotADirectoryError as error:
        raise ExportError(f"cannot write {path}: what stands before its last name is a file; give a folder") from error
    except (OSError, ValueError) as error:  # too long, a NUL byte
        raise ExportError(f"cannot write {path}: no file can be called that ({error})") from error
    if target.is_symlink():
        raise ExportError(f"cannot write {path}: it is a link that leads to itself; remove it first")
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {path}: the folder {target.parent} does not exist; create it first")
    if target.is_dir():
        raise ExportError(f"cannot write {path}: it is a folder; add a file name, such as {Path(path) / 'model.onnx'}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ExportError(f"cannot write {path}: the folder {target.parent} does not let you create files")
    return target


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target``: renamed onto it when the block ends well, removed when it does not.

    The new file gets the permissions of the one it replaces, or the process's default ones.

    Raises:
        OSError: the temporary file could not be flushed or renamed; ``target`` is what it was.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        _flush(temporary)
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(target.parent)
    with contextlib.suppress(OSError):
        _remove_stale(target)


def write_model(model: ir.Model, target: Path, *, external: bool, check: Callable[[Path], T]) -> tuple[T, Path | None]:
    """Write ``model`` to ``target`` by the steps in the module's docstring; ``check`` decides on the temporary file.

    Args:
        model: the model; with ``external`` its initializers refer to the data file afterwards.
        target: the file, in an existing folder.
        external: whether the weights go into a data file beside it.
        check: called with the complete new file under its temporary name; what it raises stops the writing.

    Returns:
        What ``check`` returned, and the data file, if any.

    Raises:
        ExportError: the files could not be written, or what ``check`` raised. Nothing changed.
    """
    with _explained(target):
        stale = own_data(target)
        data = _data_path(model, target) if external and _has_large(model) else None
        known = data is None or data.exists()
    try:
        # `check` runs the user's code, whose own OSErrors are none of writing's: it stays outside `_explained`.
        with contextlib.ExitStack() as stack:
            with _explained(target):
                temporary = stack.enter_context(staged(target))
                if data is not None:
                    _write_data(model, data)
                _write_proto(model, temporary, target)
            result = check(temporary)
            with _explained(target):
                stack.pop_all().close()
    except BaseException:
        if data is not None and not known:
            data.unlink(missing_ok=True)
        raise
    for path in stale - {data}:
        # Nothing refers to it any more; a system that forbids deleting an open file keeps it, and that is all.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return result, data


def read_model(path: Path) -> ir.Model:
    """The ONNX model in ``path``, which may come from anyone: nothing outside its folder is opened.

    Raises:
        ExportError: there is no such file, it is truncated or no valid ONNX, or its external data lie elsewhere.
    """
    import onnx
    import onnx_ir as ir

    if not os.path.isfile(path):  # pathlib's raises for names that are too long
        raise ExportError(f"there is no file {path}; export the model first")
    proto = _parse(path)
    if len(proto.functions):
        _check_functions(proto, path)
    # The locations come before the checker and the reader, which both open what the file names.
    for tensor in _proto_tensors(proto):
        _check_external(tensor, path)
    try:
        onnx.checker.check_model(os.fspath(path))
        model = ir.serde.deserialize_model(proto)
        _check_sizes(model)
    except Exception as error:  # any error of the readers means the same here: these bytes are no model
        raise _corrupt(path, _brief(error)) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    for value in (v for graph in model.graphs() for v in graph.initializers.values()):
        stored = value.const_value
        if isinstance(stored, ir.ExternalTensor):
            end, size = (stored.offset or 0) + stored.nbytes, os.path.getsize(stored.path)
            if end > size or stored.length not in (None, stored.nbytes):
                raise _corrupt(path, f"{stored.location!r} has {size} bytes, and {value.name!r} should end at {end}")
    return model


def same_view(tensor: object) -> object:
    """A key that two torch tensors share when they are the same elements of one storage, in the same layout."""
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
        return id(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)  # what the exporter stores of it
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.device)
    return (*place, tensor.dtype, tuple(tensor.shape), tensor.stride())


def initializer_bytes(model: ir.Model) -> int:
    """Bytes of all weights of a model."""
    return sum(v.const_value.nbytes for g in model.graphs() for v in g.initializers.values() if v.const_value is not None)


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"cannot write {target}: {error.strerror or error}; "
            f"{'the file there is unchanged' if target.exists() else 'no file was left'}; "
            "check free space and permissions, or give another path"
        ) from error


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make a rename durable, where the system can: it is atomic in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_stale(target: Path) -> None:
    """Remove the temporary files that killed processes left beside ``target``, which go unnoticed otherwise."""
    # The last part is of onnx_ir, which writes data into a temporary folder of its own first.
    ours = re.compile(rf"\.?\.{re.escape(target.name)}(\.[0-9a-f]{{16}}\.data)?\.[0-9a-f]{{16}}\.tmp(\.[a-z0-9_]{{8}})?")
    for path in target.parent.iterdir():
        with contextlib.suppress(OSError):
            if ours.fullmatch(path.name) and time.time() - path.lstat().st_mtime > STALE:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _write_proto(model: ir.Model, path: Path, target: Path) -> None:
    import onnx_ir as ir

    try:
        payload = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    except Exception as error:  # names that are no text, more than 2 GiB: the reader takes what the writer does not
        cause = error.__cause__ or error
        raise ExportError(
            f"cannot write {target}: its model fits no ONNX file ({_brief(cause)}); no file was changed"
        ) from error
    with path.open("xb") as file:
        file.write(payload)


def _has_large(model: ir.Model) -> bool:
    values = (v for graph in model.graphs() for v in graph.initializers.values())
    return any(v.const_value is not None and v.const_value.nbytes > SMALL for v in values)


def _data_path(model: ir.Model, target: Path) -> Path:
    """The data file for these weights: its name is a hash of their names, types, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is not None:
                digest.update(f"{name}\0{tensor.dtype.name}\0{tensor.shape}\0".encode())
                digest.update(tensor.tobytes())
    return target.with_name(f"{target.name}.{digest.hexdigest()[:16]}.data")


def _write_data(model: ir.Model, path: Path) -> None:
    import onnx_ir as ir

    with staged(path) as temporary:
        # Small tensors stay in the file: some are shapes and axes, which ONNX's shape inference must see.
        ir.external_data.unload_from_model(model, path.parent, temporary.name, size_threshold_bytes=SMALL)
    for value in (v for graph in model.graphs() for v in graph.initializers.values()):
        old = value.const_value
        if isinstance(old, ir.ExternalTensor) and old.location == temporary.name:
            value.const_value = ir.ExternalTensor(
                path.name, old.offset, old.length, old.dtype, shape=old.shape, name=old.name or "", base_dir=old.base_dir
            )


def own_data(target: Path) -> set[Path]:
    """The data files that the file at ``target`` refers to and that bear its name: they go when it is replaced."""
    siblings = {p.name: p for p in target.parent.glob("*.data") if p.name.startswith(f"{target.name}.")}
    if not siblings or not target.is_file():
        return set()
    try:
        tensors = list(_proto_tensors(_parse(target)))
    except ExportError:
        return set()  # an unreadable file refers to nothing
    return {siblings[loc] for loc in (_external(t).get("location", "") for t in tensors) if loc in siblings}


def _brief(error: BaseException, limit: int = 500) -> str:
    """What an error says, without the whole model that some of them print."""
    text = str(error) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


def _corrupt(path: Path, why: str) -> ExportError:
    return ExportError(f"{path} is corrupt, truncated or no ONNX file ({why}); it is unchanged; export it again")


def _parse(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise _corrupt(path, str(error)) from error
    if not proto.HasField("graph"):  # protobuf reads an empty file without complaint
        raise _corrupt(path, "it holds no graph")
    return proto


def _proto_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers and attributes, in subgraphs and functions as well."""
    stack: list[onnx.GraphProto | onnx.FunctionProto] = [proto.graph, *proto.functions]
    while stack:
        graph = stack.pop()
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for attribute in (a for node in graph.node for a in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            stack += [attribute.g, *attribute.graphs]


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph, those of subgraphs included."""
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            yield node
            stack += [g for attribute in node.attribute for g in (attribute.g, *attribute.graphs)]


def _check_functions(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse local functions that would fill the memory of whoever expands them, as shape inference does."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(graph: onnx.GraphProto | onnx.FunctionProto) -> int:
        total = 0
        for node in _nodes(graph):
            key = (node.domain, node.op_type, node.overload)
            if key in functions and key not in sizes:
                sizes[key] = 0  # for a function that calls itself, which the checker refuses
                sizes[key] = size(functions[key])
            total += 1 + sizes.get(key, 0)
        return total

    try:
        nodes = size(proto.graph)
    except RecursionError as error:
        raise _corrupt(path, "its functions call each other a thousand deep") from error
    if nodes > NODE_LIMIT:
        raise _corrupt(path, f"its functions expand to {nodes:,} nodes; expected at most {NODE_LIMIT:,}")


def _check_sizes(model: ir.Model) -> None:
    """Read the tensors that lie in the file itself: the checker takes some whose bytes do not fill their shape."""
    import onnx_ir as ir

    for value in (v for graph in model.graphs() for v in graph.initializers.values()):
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.numpy()


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    """Where a tensor's data lie, ``{}`` if in the file itself."""
    import onnx

    outside = tensor.data_location == onnx.TensorProto.EXTERNAL
    return {entry.key: entry.value for entry in tensor.external_data} if outside else {}


def _resolved(folder: Path, location: str) -> Path | None:
    """The file that ``location`` names, links followed; None where it can name none."""
    try:
        path = (folder / location).resolve()
        path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, links in a circle
        return None
    return path


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuse external data that are missing or leave the folder of ``path``."""
    entry = _external(tensor)
    if not entry:
        return
    # protobuf gives bytes for what is no UTF-8; readers disagree on which of two entries counts.
    if len(entry) != len(tensor.external_data) or not all(isinstance(text, str) for text in entry.values()):
        raise _corrupt(path, f"the place of the data of {tensor.name!r} is given twice or is no text")
    location = entry.get("location", "")
    folder = path.parent.resolve()
    data = _resolved(folder, location)
    if data is None:
        raise _corrupt(path, f"data of {tensor.name!r} in {location[:200]!r}, which no file can be called")
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    leaves = posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts)
    if not location or leaves or not data.is_relative_to(folder):
        raise ExportError(
            f"{path} keeps the data of {tensor.name!r} in {location!r}, outside its own folder; such a file is "
            "refused: move the data beside it, or export it again"
        )
    if not data.is_file():
        raise ExportError(
            f"{path} keeps the data of {tensor.name!r} in {location!r}, and there is no such file; export it again"
        )
    offset, length = entry.get("offset", "0"), entry.get("length", "0")
    if not (offset.isdecimal() and length.isdecimal()):
        raise _corrupt(path, f"data of {tensor.name!r} at offset {offset!r}, length {length!r}")
