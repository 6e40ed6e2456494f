"""From a model in training to a file in production, and new weights into that file."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
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
from fxparam.spec.names import named_tensors, split
from fxparam.tracer.exporting import export_program
from fxparam.tracer.peft_layers import ORIGIN as LORA
from fxparam.tracer.symbolic import trace_body

if TYPE_CHECKING:
    from fxparam.exporters.onnx import OnnxReport
    from fxparam.exporters.prologue import PrologueReport
    from fxparam.exporters.refit import RefitReport
    from fxparam.runtime.report import SiteRow


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
    model: nn.Module | None = None,
    args: tuple[Any, ...] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    prologue: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> RefitReport:
    """Write new weights into the initializers of an exported file, without exporting again.

    Args:
        path: a file that ``export_onnx`` wrote.
        model: the model it was written from, with other weights. Or, where there is no model:
        args: inputs of the model; only needed if the file holds folded weight arithmetic of the model's own.
        kwargs: keyword inputs.
        prologue: a file that ``export_prologue`` wrote, and
        checkpoint: a ``state_dict`` of the transformed model, in a ``.safetensors`` file or one of ``torch.save``. Neither
            needs the code of the model, and none is executed. Names that the prologue does not know are among ``ignored``.

    Raises:
        ExportError: names, shapes or dtypes differ (all differences in one message), or a file is corrupt. It is untouched.
        MissingExtraError: the packages for ONNX, or safetensors, are not installed.
    """
    if model is None and prologue is not None and checkpoint is not None and args is None and not kwargs:
        from fxparam.exporters.prologue import refit_from_checkpoint

        return refit_from_checkpoint(path, prologue, checkpoint)
    if model is None or prologue is not None or checkpoint is not None:
        given = {"model": model, "args": args, "kwargs": kwargs, "prologue": prologue, "checkpoint": checkpoint}
        names = ", ".join(name for name, value in given.items() if value is not None) or "neither a model nor a prologue"
        raise ExportError(
            f"got {names}; type refit_onnx(path, model), or refit_onnx(path, prologue=..., checkpoint=...) with files of "
            "export_prologue and of model.state_dict()"
        )
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


def export_prologue(model: nn.Module, path: str | os.PathLike[str]) -> PrologueReport:
    """Write how the weights are computed, so that ``refit_onnx`` can make them of a checkpoint where the model's code is not.

    Shapes, dtypes, options of the maps (a threshold, a bound) and tensors that no ``state_dict`` has are those of now (the
    report lists these as ``fixed``), and the maps are in eval mode.

    Args:
        model: what ``transform`` returned. It is not changed, and keeps its mode.
        path: the file to write. What it makes of the present ``state_dict`` is compared with the model's weights before.

    Raises:
        ExportError: a map is no graph of PyTorch's operators (the message names it and says why), or part of the state is no
            tensor. The old file is untouched.
    """
    from fxparam.exporters.prologue import make_prologue, write_prologue

    if not isinstance(model, ParametrizedModule):
        raise ExportError(
            f"got {type(model).__name__}, expected a model that fxp.transform returned; the weights of any other are in its "
            "state_dict as they are"
        )
    # A copy: eval mode, and the look at the weights in it, would drop what the model has cached for its next backward.
    frozen = copy.deepcopy(model).eval()
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        expected = plain_model(frozen).state_dict()
        plan, rows = frozen._fxp_runtime.plan, frozen.report.sites
    state: dict[str, Any] = frozen.state_dict()
    slots = dict(zip(plan.sources, plan.slots, strict=True))
    held = {name: registry[local] for name, (registry, local) in slots.items() if name not in state}
    problems = list(_uncomputable(frozen, rows, state, held))
    if not problems:
        known = {**plan.component_of, **state}
        problems = [f"{name}: neither computed nor in the state_dict" for name in expected if name not in known]
    if problems:
        raise ExportError(
            f"cannot write {path}; these weights cannot be computed from a checkpoint without the model:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\nRefit with the model: refit_onnx(path, model)"
        )
    weights = {name: plan.component_of[name][1] if name in plan.component_of else name for name in expected}
    prologue = make_prologue(plan.prologue, plan.sources, state, held, weights)
    return write_prologue(prologue, path, expected, state)


def _uncomputable(
    model: ParametrizedModule, rows: Sequence[SiteRow], state: Mapping[str, Any], held: Mapping[str, Tensor]
) -> Iterator[str]:
    """What of a model's weights no checkpoint and no graph gives; ``held`` is what the prologue reads and ``state`` has not."""
    for row in rows:
        if row.origin == LORA:
            yield f"{', '.join(row.weights)}: a LoRA layer of PEFT, which is merged under another name"
        elif row.layer != "graph":
            yield f"{', '.join(row.weights)} ({row.declaration}): {row.reason or row.layer}"
    for name, value in state.items():
        if not isinstance(value, Tensor):
            yield f"{name}: a {type(value).__name__}, no tensor"
    for name, tensor in held.items():
        path, local = split(name)
        passing = local in getattr(_module(model, path), "_non_persistent_buffers_set", ())
        registered = local in getattr(_module(model, path), "_buffers", ())
        if isinstance(tensor, nn.Parameter) or tensor.requires_grad or (registered and not passing):
            # Fixed at its present value it would be silently wrong after training.
            yield f"{name}: not in the state_dict"


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


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
