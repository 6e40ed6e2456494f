"""New weights into an ONNX file that exists, by name: no tracing, no exporter, the same graph.

The file may come from anyone and may be of any size, so it is read as ``fxparam.exporters.files.read_model`` reads,
everything is checked before anything is written, and the result replaces the file whole or not at all.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from fxparam.errors import ExportError
from fxparam.exporters import files
from fxparam.exporters.onnx import TIED, UNUSED
from fxparam.exporters.onnx_integers import SCALE, ZERO_POINT, IntegerWeight, as_tensor, stored_axes
from fxparam.exporters.sparsity import SPARSITY, as_metadata, sparse_weights

if TYPE_CHECKING:
    import onnx_ir as ir


@final
@dataclass(frozen=True)
class RefitReport:
    """What was replaced. ``print`` gives a short summary.

    Attributes:
        path: the file.
        data: the file beside it with the weights, if they are not inside.
        replaced: initializers that have a new value, in the order of the file.
        unchanged: initializers whose given value is the one they had.
        kept: initializers that were not given.
        ignored: given names that the exported model does not use (the file says so), such as a batch norm's step
            counter.
        bytes: the size of both files.
        notes: what could not be found out about the new file.
    """

    path: Path
    data: Path | None
    replaced: tuple[str, ...]
    unchanged: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = {"replaced": self.replaced, "unchanged": self.unchanged, "kept": self.kept, "ignored": self.ignored}
        line = f"{self.path}: " + ", ".join(f"{len(v)} {k}" for k, v in counts.items()) + f", {self.bytes:,} bytes"
        return "\n".join([line, *(f"  note: {note}" for note in self.notes)])


def refit_onnx(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    *,
    integers: Mapping[str, IntegerWeight] | None = None,
    check: Callable[[Path], Any] | None = None,
) -> RefitReport:
    """Replace initializers of the ONNX file at ``path`` by name.

    Args:
        path: the file; its external data, if any, are rewritten too.
        weights: dotted name -> tensor of the initializer's shape and dtype. Names of tied weights may all be given,
            with one value; names that the exporter recorded as unused are ignored.
        integers: the same weights as integers, for those that the file stores as such.
        check: called with the complete new file under a temporary name before it replaces the old one; what it raises
            stops the refit. ``functools.partial(check_parity, reference=..., args=...)`` compares with a model.

    Raises:
        ExportError: names that the file does not have, other shapes or dtypes, tied names with different values (all of
            them in one message); a corrupt file; data outside of its folder; an error in writing. The file is
            unchanged.
        MissingExtraError: an optional package is not installed.
    """
    files.need("onnx", "onnx_ir", purpose="to refit ONNX files")
    target = files.writable(path)
    model = files.read_model(target)
    initializers = model.graph.initializers
    values, ignored = _resolve(target, model, weights, integers or {})
    external = _is_external(model)
    replaced = [name for name in initializers if name in values and not _equal(initializers[name], values[name])]
    for name in replaced:
        stored = initializers[name].const_value
        assert stored is not None
        initializers[name].const_value = _as_ir(values[name], name, stored.dtype)
    notes = _state_sparsity(model) if replaced else ()
    unchanged = tuple(name for name in initializers if name in values and name not in replaced)
    kept = tuple(name for name in initializers if name not in values)
    if replaced:
        _, data = files.write_model(model, target, external=external, check=lambda file: _check(file, check))
    else:
        _check(target, check)
        data = next(iter(files.own_data(target)), None)
    size = sum(file.stat().st_size for file in (target, data) if file)
    return RefitReport(Path(path), data, tuple(replaced), unchanged, kept, tuple(ignored), size, notes)


def _check(file: Path, check: Callable[[Path], Any] | None) -> None:
    import onnx

    onnx.checker.check_model(os.fspath(file))
    if check is not None:
        check(file)


def _state_sparsity(model: ir.Model) -> tuple[str, ...]:
    """Let the metadata say what is now in the file; a note where that cannot be told."""
    model.metadata_props.pop(SPARSITY, None)
    try:
        found = sparse_weights(model.graph)
    except Exception as error:  # another exporter's graph, in which dimensions do not fit together
        return (f"zeros among the weights were not counted, and {SPARSITY} is left out: {type(error).__name__}: {error}",)
    if found:
        model.metadata_props[SPARSITY] = json.dumps(as_metadata(found))
    return ()


def _resolve(
    path: Path, model: ir.Model, weights: Mapping[str, object], integers: Mapping[str, IntegerWeight]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensor for each initializer that gets one, and the names that are known to be unused.

    Raises:
        ExportError: with every problem there is, so that one run shows them all.
    """
    initializers = model.graph.initializers
    tied, unused = _recorded(path, model)
    weights, tied, problems = _with_integers(model, weights, integers, tied)
    values: dict[str, Tensor] = {}
    given_as: dict[str, str] = {}
    for name, tensor in weights.items():
        own = name if name in initializers else tied.get(name, name)
        if own not in initializers:
            if name not in unused:
                problems.append(_unknown(name, [*initializers, *tied]))
        elif not isinstance(tensor, Tensor):
            problems.append(f"{name}: got {type(tensor).__name__}, expected a tensor")
        elif problem := _misfit(name, initializers[own], tensor):
            problems.append(problem)
        elif own in values and not _same(values[own], tensor):
            problems.append(f"{name} and {given_as[own]} are one tied weight in the file ({own}) and got different values")
        else:
            values[own], given_as[own] = tensor, name
    if problems:
        raise ExportError(
            f"cannot refit {path}; it is unchanged:\n" + "\n".join(f"  {p}" for p in problems) + "\n"
            "Give the weights of the exported model under its own names, or export it again"
        )
    return values, [name for name in weights if name in unused and name not in initializers]


def _with_integers(
    model: ir.Model, weights: Mapping[str, object], integers: Mapping[str, IntegerWeight], tied: Mapping[str, str]
) -> tuple[dict[str, object], dict[str, str], list[str]]:
    """The weights and tied names with integers, scale and zero point for what the file stores as such, and what is amiss."""
    axes = stored_axes(model.graph)
    given, names, problems = dict(weights), dict(tied), []
    for name, tensor in weights.items():
        own = name if name in axes else tied.get(name, name)
        if own not in axes:
            continue
        weight = integers.get(name)
        if weight is None or not isinstance(tensor, Tensor) or not weight.gives(tensor):
            problems.append(f"{name}: the file stores integers, and the given weight is not quantized as its last step")
            del given[name]
        elif weight.axis != axes[own]:
            problems.append(f"{name}: got {_scales(weight.axis)}, expected {_scales(axes[own])}")
            del given[name]
        else:
            given |= weight.named(name)
            names |= {name + part: own + part for part in (SCALE, ZERO_POINT) if name != own}
    return given, names, problems


def _scales(axis: int | None) -> str:
    return "one scale" if axis is None else f"a scale for each index of dimension {axis}"


def _recorded(path: Path, model: ir.Model) -> tuple[dict[str, str], list[str]]:
    """What the exporter wrote about names that are no initializers; nothing for files of other exporters."""
    texts = (model.metadata_props.get(TIED, "{}"), model.metadata_props.get(UNUSED, "[]"))
    try:
        tied, unused = map(json.loads, texts)
    except (ValueError, RecursionError) as error:  # no JSON, no text, numbers without end, a thousand brackets
        raise ExportError(f"{path} has metadata {TIED} or {UNUSED} that are no JSON ({error}); export it again") from error
    if not isinstance(tied, dict) or not isinstance(unused, list):
        raise ExportError(
            f"{path} has metadata {TIED} = {texts[0]:.99}, {UNUSED} = {texts[1]:.99}; expected an object and a list"
        )
    return {str(k): str(v) for k, v in tied.items()}, [str(name) for name in unused]


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"{name}: no such initializer" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _misfit(name: str, value: ir.Value, tensor: Tensor) -> str | None:
    from onnx_ir import tensor_adapters

    stored = value.const_value
    assert stored is not None
    tensor = _real(tensor)
    got, expected = tuple(tensor.shape), tuple(stored.shape.numpy())
    if got != expected:
        return f"{name}: got shape {got}, expected {expected}"
    try:
        dtype = tensor_adapters.from_torch_dtype(tensor.dtype)
    except TypeError:
        return f"{name}: {tensor.dtype} has no ONNX form, expected {stored.dtype.name}"
    if dtype != stored.dtype and not _fits_int4(tensor, stored.dtype):
        return f"{name}: got dtype {dtype.name}, expected {stored.dtype.name}"
    return None


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as the exporter stores them, pairs of reals."""
    tensor = tensor.detach().resolve_conj()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _fits_int4(tensor: Tensor, stored: ir.DataType) -> bool:
    """Whether these are integers of 8 bits, as PyTorch has no smaller ones, for an initializer of 4."""
    if stored.name != "INT4" or tensor.dtype != torch.int8:
        return False
    return tensor.numel() == 0 or bool(tensor.min() >= -8 and tensor.max() <= 7)


def _as_ir(tensor: Tensor, name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    return as_tensor(_real(tensor), name, dtype)


def _equal(value: ir.Value, tensor: Tensor) -> bool:
    """Whether the stored bytes are those of ``tensor`` (so that NaN and -0.0 count as what they are)."""
    assert value.const_value is not None
    return value.const_value.tobytes() == _as_ir(tensor, "", value.const_value.dtype).tobytes()


def _same(a: Tensor, b: Tensor) -> bool:
    if files.same_view(a) == files.same_view(b):
        return True
    one, other = (_real(tensor).cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(one, other)


def _is_external(model: ir.Model) -> bool:
    import onnx_ir as ir

    return any(isinstance(v.const_value, ir.ExternalTensor) for g in model.graphs() for v in g.initializers.values())
