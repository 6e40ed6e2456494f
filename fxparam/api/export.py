"""From a model in training to a file in production, and new weights into that file."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from fxparam.api.fold import exported_program, graph_module, known_inputs, plain_model
from fxparam.api.inputs import Inputs, as_call
from fxparam.api.integers import integer_weights
from fxparam.api.transform import transform
from fxparam.errors import ExportError, TraceError
from fxparam.graphdiff import GraphDiff
from fxparam.graphdiff import diff as structural_diff
from fxparam.graphdiff.reading import Model
from fxparam.passes.fold import Fold
from fxparam.program import Program, run
from fxparam.runtime.module import ParametrizedModule
from fxparam.spec.names import named_tensors
from fxparam.tracer.exporting import export_program
from fxparam.tracer.symbolic import trace_body

if TYPE_CHECKING:
    from fxparam.exporters.onnx import OnnxReport
    from fxparam.exporters.refit import RefitReport


def export_onnx(
    model: nn.Module,
    args: Inputs,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    arithmetic: bool = True,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    verify: int = 2,
    seed: int = 0,
    external_data: bool | None = None,
    metadata: Mapping[str, str] | None = None,
    integers: bool = False,
) -> OnnxReport:
    """Fold a model, write it as ONNX, and check the file against the model in ONNX Runtime before it replaces the old one.

    Args:
        model: what ``transform`` returned, or any module. It is not changed and exported in eval mode.
        args: inputs to export and check with: a tuple of positional ones, or a mapping of keyword ones.
        path: the file to write.
        kwargs: keyword inputs.
        dynamic_shapes: as for ``torch.export.export``: which sizes of which inputs vary. ``Dim("batch")`` is
            ``batch`` in the file.
        arithmetic: whether weight arithmetic in the model's own forward becomes constants too.
        opset: the ONNX operator set, 18 to 24; default: the exporter's.
        input_names: names of the inputs in the file.
        output_names: names of the outputs in the file.
        verify: how many random inputs to check besides the given ones; 0 checks nothing.
        seed: of the random inputs.
        external_data: keep the weights in a second file; default: from 1.5 GiB on.
        metadata: entries for the file's metadata.
        integers: store weights whose last map is a quantization (``fake_quantize``, ``learned_step``, ``ternary``, ...) as
            integers, which a DequantizeLinear node makes the same weight bit for bit: ``layer.weight``, ``layer.weight.scale``
            and ``layer.weight.zero_point``. Up to 4 bits take int4 from opset 21 on. What stays floating-point is noted. ONNX
            Runtime rounds the inputs of a MatMul with such a weight to 8 bits too, unless the session option
            ``session.disable_quant_qdq`` is "1", with which the check runs; TensorRT takes symmetric grids only.

    Returns:
        What was written, and how far the file's outputs are from the model's.

    Raises:
        ExportError: the model cannot be expressed in ONNX, or the file does not reproduce it. The old file is untouched.
        MissingExtraError: the packages for ONNX are not installed.
    """
    from fxparam.exporters.onnx import export_program as write
    from fxparam.exporters.onnx_sizes import size_names

    given, named = as_call(args)
    args, kwargs = given, {**named, **(kwargs or {})}
    parametrized = _parametrized(model)
    plain = plain_model(parametrized)
    weights, floating = integer_weights(parametrized) if integers else ({}, ())
    program = folded_export(plain, args, kwargs, dynamic_shapes=dynamic_shapes, arithmetic=arithmetic)
    report = write(
        program,
        path,
        reference=plain,
        args=args,
        kwargs=kwargs,
        opset=opset,
        input_names=input_names,
        output_names=output_names,
        verify=verify,
        seed=seed,
        external_data=external_data,
        metadata=metadata,
        integers=weights,
        sizes=size_names(program, args, kwargs, dynamic_shapes, list(inspect.signature(plain.forward).parameters)),
    )
    return replace(report, notes=(*report.notes, *floating))


def _parametrized(model: nn.Module) -> ParametrizedModule:
    return model if isinstance(model, ParametrizedModule) else transform(model, trace="live")


def refit_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    args: tuple[Any, ...] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
) -> RefitReport:
    """Write the model's present weights into the initializers of an exported file, without exporting again.

    Args:
        path: a file that ``export_onnx`` wrote.
        model: the model it was written from, with other weights.
        args: inputs of the model; only needed if the file holds folded weight arithmetic of the model's own.
        kwargs: keyword inputs.

    Raises:
        ExportError: names, shapes or dtypes differ (all differences in one message), or the file is corrupt. It is untouched.
        MissingExtraError: the packages for ONNX are not installed.
    """
    from fxparam.exporters.refit import refit_onnx as write

    parametrized = _parametrized(model)
    plain = plain_model(parametrized)
    values: dict[str, Tensor] = dict(plain.state_dict())
    call = (args or (), dict(kwargs or {})) if args is not None or kwargs else known_inputs(model)
    if call is not None:
        program = run(exported_program(plain, export_program(plain, *call)), (_FOLD,))
        values |= {name: tensor for name, tensor in program.tensors.items() if name.startswith("hoisted.")}
        used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
        if any(name.startswith("hoisted.") for name in used):
            # What only fed the folded arithmetic is not in the file.
            values = {name: tensor for name, tensor in values.items() if name in used}
    return write(path, values, integers=integer_weights(parametrized)[0])


def diff(a: Model, b: Model, *, values: bool = False) -> GraphDiff:
    """The structural difference of two models; empty if their graphs are isomorphic.

    Operators, attributes, argument order, names of parameters, shapes and dtypes count; names of temporaries do not.

    Args:
        a: a ``GraphModule``, a module (traced without inputs), an ``ExportedProgram``, an ONNX model or a path.
        b: the same.
        values: whether tensors have to be equal bit for bit as well.

    Raises:
        TraceError: a module cannot be traced without inputs; export it first and pass the ``ExportedProgram``.
        GraphDiffError: the two kinds cannot be compared.
    """
    return structural_diff(a, b, values=values, trace=_traced)


_FOLD = Fold(views=False, constants=False)


def folded_export(
    plain: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    arithmetic: bool = True,
) -> ExportedProgram:
    """A plain model exported once, and again only if weight arithmetic was left to fold."""
    try:
        exported = export_program(plain, args, kwargs, dynamic_shapes=dynamic_shapes)
        if not arithmetic:
            return exported
        program = exported_program(plain, exported)
        folded = run(program, (_FOLD,))
        if folded is program:
            return exported
        return export_program(graph_module(plain, folded), args, kwargs, dynamic_shapes=dynamic_shapes)
    except TraceError as error:
        raise ExportError(f"{error}. No file was changed") from error


def _traced(module: nn.Module) -> Any:
    plain = plain_model(module) if isinstance(module, ParametrizedModule) else module
    traced = trace_body(plain, {})
    tensors = {name: row.tensor for row in named_tensors(plain) for name in row.aliases} | dict(traced.tensors)
    return graph_module(plain, Program(traced.graph, tensors, traced.modules))
