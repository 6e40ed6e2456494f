"""``fold``: the plain model as a graph, with everything that only depends on parameters computed."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxparam.api.inputs import Call, Inputs, as_call
from fxparam.api.observers import without_observers
from fxparam.api.restore import restore
from fxparam.api.transform import transform
from fxparam.errors import TraceError
from fxparam.passes.fold import Fold
from fxparam.program import Program, run
from fxparam.runtime.module import ParametrizedModule
from fxparam.spec.names import named_tensors, split
from fxparam.tracer import peft_layers
from fxparam.tracer.exporting import export_program
from fxparam.tracer.symbolic import trace_body


def fold(
    model: nn.Module,
    *,
    example_inputs: Inputs | None = None,
    dynamic_shapes: Any = None,
    compute_dtype: torch.dtype | None = None,
    arithmetic: bool = True,
) -> fx.GraphModule:
    """The plain model in eval mode: weights are parameters without gradient under their dotted names, no latents are left.

    Args:
        model: what ``transform`` returned, or any module (its parametrizations and its weight arithmetic are folded). It is
            not changed.
        example_inputs: inputs of the model, a tuple of positional or a mapping of keyword ones, needed where symbolic tracing
            is not exact. Default: those given to ``transform``, or those of the last call that was recorded.
        dynamic_shapes: which sizes of which inputs vary, as for ``torch.export.export``; the others are those of the example.
            Without it a graph that needs the example is right for inputs of these shapes only.
        compute_dtype: compute the weights in this dtype and round once.
        arithmetic: whether weight arithmetic in the model's own forward is folded as well.

    Returns:
        A graph module whose parameters share no memory with the model's.

    Raises:
        TraceError: a graph needs example inputs (the message says why), or the model cannot be exported on them.
    """
    plain = plain_model(model, compute_dtype)
    call = as_call(example_inputs) if example_inputs is not None else known_inputs(model)
    return fold_plain(plain, call, dynamic_shapes=dynamic_shapes, compute_dtype=compute_dtype, arithmetic=arithmetic)


def known_inputs(model: nn.Module) -> Call | None:
    """The inputs that a transformed model was given or last recorded with; None for any other."""
    if not isinstance(model, ParametrizedModule):
        return None
    given: Inputs | None = model._fxp_example_inputs
    return as_call(given) if given is not None else model._fxp_runtime.regions.last_inputs


def plain_model(model: nn.Module, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """The model in its own classes, in eval mode, with plain parameters that do not train; a copy.

    LoRA layers are merged, and calibrated fake quantization is written out.
    """
    parametrized = model if isinstance(model, ParametrizedModule) else transform(model, trace="live")
    plain = restore(parametrized, compute_dtype=compute_dtype)
    return without_observers(peft_layers.merged(plain, compute_dtype).eval().requires_grad_(False))


def fold_plain(
    plain: nn.Module,
    call: Call | None,
    *,
    dynamic_shapes: Any = None,
    compute_dtype: torch.dtype | None = None,
    arithmetic: bool = True,
) -> fx.GraphModule:
    """Fold a model without computed weights; see ``fold``."""
    try:
        traced = trace_body(plain, {})
        if call is not None and not _fits(call, traced.arguments):
            return _exported(plain, call, dynamic_shapes, compute_dtype, arithmetic)
    except TraceError as error:
        if call is None:
            raise TraceError(
                f"the model cannot be traced without inputs: {error}; type fxp.fold(model, example_inputs=(x, ...))"
            ) from error
        return _exported(plain, call, dynamic_shapes, compute_dtype, arithmetic)
    tensors = {name: row.tensor for row in named_tensors(plain) for name in row.aliases} | dict(traced.tensors)
    program = Program(traced.graph, tensors, traced.modules)
    if arithmetic:
        program = run(program, (Fold(compute_dtype),))
    return graph_module(plain, program)


def _fits(call: Call, arguments: tuple[str, ...]) -> bool:
    """Whether the graph traced without inputs takes these: the required arguments, all tensors."""
    args, kwargs = call
    return not kwargs and len(args) == len(arguments) and all(isinstance(value, Tensor) for value in args)


def _exported(
    plain: nn.Module, call: Call, dynamic_shapes: Any, compute_dtype: torch.dtype | None, arithmetic: bool
) -> fx.GraphModule:
    program = exported_program(plain, export_program(plain, *call, dynamic_shapes=dynamic_shapes))
    if arithmetic:
        program = run(program, (Fold(compute_dtype),))
    return graph_module(plain, program)


def exported_program(plain: nn.Module, exported: ExportedProgram) -> Program:
    """An exported model as a program."""
    module: Any = exported.module()
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    targets = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    others = {name: attrgetter(name)(module) for name in targets if name not in tensors}
    # Bodies of torch.cond, no_grad and autocast regions are modules that the graph reads as attributes.
    tensors |= {name: value for name, value in others.items() if isinstance(value, Tensor)}
    return Program(module.graph, tensors, dict(module.named_modules()))


def graph_module(root: nn.Module, program: Program) -> fx.GraphModule:
    """A module with just what the graph of ``program`` names, under these names."""
    attributes: dict[str, Any] = {}
    for node in program.graph.nodes:
        if node.op == "call_module" or (node.op == "get_attr" and node.target in program.modules):
            attributes[str(node.target)] = program.modules[str(node.target)]
        elif node.op == "get_attr":
            attributes[str(node.target)] = _parameter(program.tensors, str(node.target))
    # Parents first: a module must exist before a tensor is set below it.
    ordered = dict(sorted(attributes.items(), key=lambda item: (item[0].count("."), not isinstance(item[1], nn.Module))))
    folded = fx.GraphModule(ordered, program.graph, type(root).__name__)
    for module in folded.modules():
        if module is folded or type(module) is nn.Module:
            # What only holds tensors was made here; the others are the model's own and keep their mode.
            module.training = root.training
    return folded


def _parameter(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = tensors[name]
    if isinstance(tensor, nn.Parameter) or split(name)[0] == "constants" or not tensor.is_floating_point():
        return tensor
    return nn.Parameter(tensor, requires_grad=False) if split(name)[0] == "hoisted" else tensor
