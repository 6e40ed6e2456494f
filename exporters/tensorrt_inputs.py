"""What an engine is built for and run on: sizes, inputs, and the outputs it should give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxparam.errors import ExportError
from fxparam.exporters.onnx_verify import RTOL, Parity, compare
from fxparam.exporters.tensorrt_static import Finding, dynamic_sizes

if TYPE_CHECKING:
    import onnx_ir as ir

Sizes = Mapping[str, "int | Sequence[int]"]
"""Size name -> one size, or the smallest, the usual and the largest."""

Profile = dict[str, list[list[int]]]
"""Input -> its smallest, usual and largest shape."""


def graph_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs to give: those that are not weights with a default."""
    return [value for value in model.graph.inputs if not value.is_initializer()]


def known_inputs(model: ir.Model, given: Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The given inputs by name, in the order of the file.

    Raises:
        ExportError: names, number, types or shapes do not fit the file.
    """
    from onnx_ir import tensor_adapters

    values = graph_inputs(model)
    names = [str(value.name) for value in values]
    if isinstance(given, Mapping):
        if set(given) != set(names):
            raise ExportError(f"got inputs {', '.join(sorted(given))}; the file takes {', '.join(names)}")
        tensors = [given[name] for name in names]
    else:
        tensors = list(given)
        if len(tensors) != len(names):
            raise ExportError(f"got {len(tensors)} inputs; the file takes {len(names)} ({', '.join(names)})")
    for value, tensor in zip(values, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise ExportError(f"input {value.name!r}: got {type(tensor).__name__}, expected a tensor")
        dtype = tensor_adapters.from_torch_dtype(tensor.dtype)
        if value.dtype is not None and dtype != value.dtype:
            raise ExportError(f"input {value.name!r}: got {dtype.name}, expected {value.dtype.name}")
        sizes = list(value.shape) if value.shape is not None else list(tensor.shape)
        fits = len(sizes) == tensor.dim() and all(
            n == size or not isinstance(n, int) for n, size in zip(sizes, tensor.shape, strict=True)
        )
        if not fits:
            raise ExportError(f"input {value.name!r}: got shape {tuple(tensor.shape)}, expected ({', '.join(map(str, sizes))})")
    return dict(zip(names, tensors, strict=True))


def optimization_profile(model: ir.Model, sizes: Sizes, given: Mapping[str, Tensor] | None) -> tuple[Profile, list[str]]:
    """Shapes to build for, for each input with open sizes; and the names of sizes that nobody gave.

    Args:
        model: the model.
        sizes: sizes by name.
        given: inputs, whose sizes count where ``sizes`` has none.

    Raises:
        ExportError: a name that no input has, sizes out of order, or inputs outside of them.
    """
    names = {name for value in graph_inputs(model) for name in dynamic_sizes(value)}
    if wrong := sorted(set(sizes) - names):
        known = f"the file leaves open: {', '.join(sorted(names))}" if names else "all sizes in the file are fixed"
        raise ExportError(f"sizes: there is no open size {', '.join(map(repr, wrong))}; {known}")
    bounds = {name: _bounds(name, size) for name, size in sizes.items()}
    profile: Profile = {}
    missing: list[str] = []
    for value in graph_inputs(model):
        left_open = dynamic_sizes(value)
        if not left_open or value.shape is None:
            continue
        names_left, triples = iter(left_open), []
        for index, size in enumerate(value.shape):
            actual = given[str(value.name)].shape[index] if given is not None else None
            triples.append((size,) * 3 if isinstance(size, int) else _triple(next(names_left), bounds, actual, missing))
        profile[str(value.name)] = [[triple[i] for triple in triples] for i in range(3)]
    return profile, list(dict.fromkeys(missing))


def _bounds(name: str, size: int | Sequence[int]) -> tuple[int, int, int]:
    triple = (size, size, size) if isinstance(size, int) else tuple(size)
    if len(triple) != 3 or not 0 <= triple[0] <= triple[1] <= triple[2]:
        raise ExportError(f"sizes[{name!r}]: got {size!r}; expected one size, or (smallest, usual, largest) in this order")
    return triple


def _triple(
    name: str, bounds: Mapping[str, tuple[int, int, int]], actual: int | None, missing: list[str]
) -> tuple[int, int, int]:
    if name in bounds:
        low, usual, high = bounds[name]
        if actual is not None and not low <= actual <= high:
            raise ExportError(f"sizes[{name!r}] is from {low} to {high}, and an input has {actual}; widen it")
        return low, usual, high
    if actual is None:
        missing.append(name)
        return 0, 0, 0
    return actual, actual, actual


# ---- outputs ---------------------------------------------------------------------------------------------------------


def expected_outputs(
    path: Path, model: ir.Model, inputs: Mapping[str, Tensor], reference: Callable[..., Any] | None
) -> dict[str, Tensor]:
    """Name -> output, from the model or, without one, from ONNX Runtime.

    Raises:
        ExportError: the model gives another number of outputs than the file, or ONNX Runtime cannot run the file.
    """
    names = [str(value.name) for value in model.graph.outputs]
    if reference is None:
        return dict(zip(names, _onnx_runtime(path, inputs), strict=True))
    with torch.no_grad():
        outputs = [x for x in pytree.tree_leaves(reference(*inputs.values())) if isinstance(x, Tensor)]
    if len(outputs) != len(names):
        raise ExportError(f"the model gives {len(outputs)} outputs, the file {len(names)} ({', '.join(names)})")
    return {name: output.detach().cpu() for name, output in zip(names, outputs, strict=True)}


def _onnx_runtime(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    from fxparam.exporters import files

    files.need("onnxruntime", purpose="to compare the engine with")
    import onnxruntime as ort

    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        arrays = session.run(None, {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()})
    except Exception as error:  # the runtime's exceptions share no base class, and numpy lacks some types
        raise ExportError(f"ONNX Runtime cannot run {path} to compare with: {error}; pass reference=model") from error
    return [torch.from_numpy(array.copy()) for array in arrays]


def parities(
    model: ir.Model, expected: Mapping[str, Tensor], results: Mapping[str, Mapping[str, Tensor]], product: str
) -> tuple[list[Finding], tuple[Parity, ...]]:
    """Compare the outputs of each engine: errors for what differs, and all comparisons."""
    rtol = _tolerance(model)
    found, checked = [], []
    for engine, outputs in results.items():
        for name, right in expected.items():
            actual = outputs[name]
            if actual.shape != right.shape:
                what = f"the {engine} gives shape {tuple(actual.shape)}; expected {tuple(right.shape)}"
                found.append(Finding("error", name, "output", what, "Do not use it", product))
                continue
            parity = compare(engine, name, right, actual.to(right.dtype), rtol)
            checked.append(parity)
            if not parity.ok:
                what = f"the {engine} is off by {parity.max_abs:.3g}, {parity.excess:.3g} times the tolerance"
                found.append(Finding("error", name, "output", what, "Do not use it; build another way", product))
    return found, tuple(checked)


def _tolerance(model: ir.Model) -> float:
    """The tolerance for the coarsest floating type in the file; that of float32 at least, as DOUBLE becomes FLOAT."""
    names = {"FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}
    values = [*model.graph.inputs, *(v for graph in model.graphs() for v in graph.initializers.values())]
    found = {names[v.dtype.name] for v in values if v.dtype is not None and v.dtype.name in names}
    return max((RTOL[dtype] for dtype in found), default=RTOL[torch.float32])
