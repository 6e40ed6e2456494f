"""``torch.export`` program -> checked ONNX file, initializers under the dotted names of the parameters.

Steps: convert with PyTorch's exporter, clean the graph, store tied weights once, check with ``onnx.checker``, compare
with the model in ONNX Runtime, and only then rename the file onto its target (``fxparam.exporters.files``).

The exporter runs with ``optimize=False``: its optimizer renames transposed weights, merges equal initializers under one
name and folds a batch norm into a weight of the same name, and then no tool finds a parameter again. What the cleaning
does instead is what can be done without touching a parameter: drop dead nodes, unused weights and ``Identity`` nodes,
drop metadata (source paths, hashes and times that make the bytes of two exports differ).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from fxparam.errors import ExportError
from fxparam.exporters import files
from fxparam.exporters.onnx_fake_quantize import translations
from fxparam.exporters.onnx_integers import IntegerWeight, StoredIntegers, store_integers
from fxparam.exporters.onnx_sizes import name_sizes
from fxparam.exporters.onnx_verify import Parity, check_parity, first_line
from fxparam.exporters.sparsity import SPARSITY, Sparsity, as_metadata, sparse_weights

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram
    from torch.fx import Node

OPSETS = range(18, 25)
"""What PyTorch's exporter writes itself; older ones would be converted down, which it does not always manage."""

TIED, UNUSED = "fxparam.tied", "fxparam.unused"
"""Metadata of the file (JSON): further names of tied weights -> the one in the file; names no output depends on."""


@final
@dataclass(frozen=True)
class OnnxReport:
    """What was written. ``print`` gives a short summary.

    Attributes:
        path: the file.
        data: the file beside it with the weights, if they are not inside.
        opset: its operator set.
        nodes: how many nodes the main graph has.
        initializers: the names of its weights, in the order of the file.
        tied: further names of tied weights -> the initializer that stands for them.
        unused: weights and buffers that no output depends on; they are not in the file.
        bytes: the size of both files.
        parity: how far each output is from the model's, for each set of inputs; empty with ``verify=0``.
        notes: what an ONNX file cannot say about this model, or what could not be checked.
        integers: the weights that are stored as integers, by the name of the initializer.
        sparsity: the weights with at least a tenth of zeros, as they were found in the file.
    """

    path: Path
    data: Path | None
    opset: int
    nodes: int
    initializers: tuple[str, ...]
    tied: Mapping[str, str]
    unused: tuple[str, ...]
    bytes: int
    parity: tuple[Parity, ...]
    notes: tuple[str, ...] = ()
    integers: Mapping[str, StoredIntegers] = field(default_factory=dict)
    sparsity: Mapping[str, Sparsity] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: opset {self.opset}, {self.nodes} nodes, {len(self.initializers)} initializers, "
            f"{self.bytes:,} bytes" + (f" (weights in {self.data.name})" if self.data else "")
        ]
        if not self.parity:
            lines.append("  not compared with the model (verify=0)")
        for output in dict.fromkeys(p.output for p in self.parity):
            checks = [p for p in self.parity if p.output == output]
            worst = max(checks, key=lambda p: p.excess)
            sets = ", ".join(p.inputs for p in checks)
            off = max(p.max_abs for p in checks)
            lines.append(
                f"  output {output!r} agrees with the model on {sets}: off by at most {off:.2g} "
                f"({worst.excess:.2g} of the tolerance)"
            )
        lines += [f"  {name}: {how}" for stated in (self.integers, self.sparsity) for name, how in stated.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def export_program(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    reference: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    verify: int = 2,
    seed: int = 0,
    external_data: bool | None = None,
    metadata: Mapping[str, str] | None = None,
    integers: Mapping[str, IntegerWeight] | None = None,
    sizes: Mapping[str, str] | None = None,
) -> OnnxReport:
    """Write ``program`` to ``path``, after checking that the file computes what ``reference`` computes.

    Args:
        program: the exported model, whose state holds the weights. It is not changed.
        path: the file to write; one that exists is replaced at the very end, whole, or not at all.
        reference: the model, called with ``args`` and ``kwargs``; in eval mode, on the devices of its inputs.
        args: positional inputs to compare on, of the structure that the program was exported with.
        kwargs: keyword inputs.
        opset: the operator set, 18 to 24; by default the exporter's.
        input_names: new names of the inputs, one each.
        output_names: new names of the outputs, one each.
        verify: how many sets of random inputs are tried besides the given one; 0 writes the file without running it.
        seed: the seed of the random inputs.
        external_data: weights in a second file beside it (``model.onnx.<hash>.data``); by default from 1.5 GiB on.
        metadata: entries for the file's metadata.
        integers: weights to store as integers, by the names of their initializers; see ``fxparam.exporters.onnx_integers``.
        sizes: names of dynamic sizes, by the symbols that the program has for them.

    Raises:
        ExportError: an operation has no ONNX form, the file does not reproduce the model, or it cannot be written.
            Whatever was at ``path`` is unchanged.
        MissingExtraError: an optional package is not installed.
    """
    _check_options(opset, verify)
    runtime = ("onnxruntime",) if verify else ()
    files.need("onnx", "onnx_ir", "onnxscript", *runtime, purpose="to export ONNX files")
    target = files.writable(path)
    _check_outputs(program)
    model, decomposed = _convert(program, opset)
    _clean(model)
    _merge_tied(model)
    tied, unused = _missing_names(program, model)
    stored, floating = store_integers(model, integers or {})
    sparsity = sparse_weights(model.graph)
    _name(model, input_names, output_names)
    name_sizes(model, sizes or {})
    entries = ((TIED, tied), (UNUSED, unused), (SPARSITY, as_metadata(sparsity)))
    recorded = {key: json.dumps(entry) for key, entry in entries if entry}
    model.metadata_props.update(recorded | dict(metadata or {}))

    def check(file: Path) -> tuple[tuple[Parity, ...], tuple[str, ...]]:
        _check_file(file)
        if not verify:
            return (), ()
        return check_parity(file, reference, args, kwargs, program=program, random_sets=verify, seed=seed)

    nodes, names = len(model.graph), tuple(model.graph.initializers)
    external = _is_external(model, external_data)
    (parity, notes), data = files.write_model(model, target, external=external, check=check)
    return OnnxReport(
        path=Path(path),
        data=data,
        opset=model.opset_imports[""],
        nodes=nodes,
        initializers=names,
        tied=tied,
        unused=tuple(unused),
        bytes=sum(file.stat().st_size for file in (target, data) if file),
        parity=parity,
        notes=(*_lost(decomposed), *floating, *notes),
        integers=stored,
        sparsity=sparsity,
    )


def _check_options(opset: int | None, verify: int) -> None:
    if opset is not None and opset not in OPSETS:
        raise ExportError(f"got opset={opset!r}; expected {OPSETS[0]} to {OPSETS[-1]}, or None for the exporter's default")
    if verify < 0:
        raise ExportError(f"got verify={verify}; expected how many sets of random inputs to try, 0 to skip the comparison")


def _check_outputs(program: ExportedProgram) -> None:
    for spec in program.graph_signature.output_specs:
        if isinstance(spec.arg, ConstantArgument) and spec.arg.value is not None:
            raise ExportError(
                f"the model returns {spec.arg.value!r} ({type(spec.arg.value).__name__}); an ONNX file returns tensors "
                "only: return torch.tensor(...) of it, or leave it out"
            )


def _is_external(model: ir.Model, wanted: bool | None) -> bool:
    size = files.initializer_bytes(model)
    if wanted is False and size > files.PROTOBUF_LIMIT:
        raise ExportError(
            f"the weights take {size:,} bytes and one ONNX file holds 2 GiB; leave external_data out, or pass "
            "external_data=True"
        )
    return size > files.INLINE_LIMIT if wanted is None else wanted


def _check_file(file: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(os.fspath(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the exported graph is no valid ONNX: {first_line(error)}; no file was changed. Try another opset "
            f"({OPSETS[0]} to {OPSETS[-1]})"
        ) from error


# ---- conversion ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own chatter from the user; what matters of it is an error or a note here."""
    # It logs a line for each absent torchvision operator, and for each Python constant among the inputs and outputs.
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # PyTorch's own use of a class it has deprecated, whenever it copies the structure of a program's arguments.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _convert(program: ExportedProgram, opset: int | None) -> tuple[ir.Model, ExportedProgram]:
    """The converted model, and the decomposed program it was made from (the first to show every write to a buffer)."""
    import onnx

    try:
        with _quiet():
            converted = torch.onnx.export(
                program,
                (),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                custom_translation_table=translations(),
            )
    except torch.onnx.OnnxExporterError as error:
        raise _untranslatable(program, error) from error
    assert converted is not None and converted.exported_program is not None
    model = converted.model
    written = model.opset_imports[""]
    if opset is not None and written != opset:
        raise ExportError(f"this graph cannot be written in opset {opset}, only in {written}; pass opset={written}")
    # The exporter writes one IR version whatever the opset; newer opsets need a newer one.
    required = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", written)])
    model.ir_version = max(model.ir_version, required)
    return model, converted.exported_program


def _untranslatable(program: ExportedProgram, error: BaseException) -> ExportError:
    """The node at which the conversion stopped, in the user's terms."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(map(str, reversed(chain)))
    found = re.search(r"translating node %(?P<name>\w+) .*?target=(?:torch\.ops\.)?(?P<op>[\w.]+)", text, re.DOTALL)
    if found is None:
        return ExportError(f"PyTorch's ONNX exporter failed: {first_line(chain[-1])}; no file was changed")
    name, op = found["name"], found["op"]
    node = _find(program, name, op)
    missing = "No ONNX function found" in text
    why = f"{op} has no ONNX form" if missing else f"{op} could not be translated: {first_line(chain[-1])}"
    remedy = _remedy(node, set(program.graph_signature.user_inputs))
    return ExportError(f"cannot export node %{name}: {why}{_source(node)}; no file was changed. {remedy}")


def _find(program: ExportedProgram, name: str, op: str) -> Node | None:
    """The node of this op; the exporter decomposes first, so the program may hold it only inside a larger op."""
    with _quiet():
        graphs = [program.graph, program.run_decompositions().graph]
    for graph in graphs:
        nodes = [node for node in graph.nodes if node.op == "call_function" and str(node.target) == op]
        if nodes:
            return next((node for node in nodes if node.name == name), nodes[0])
    return None


def _source(node: Node | None) -> str:
    """Where the user's code called it: the innermost frame outside of PyTorch."""
    trace = (node.meta.get("stack_trace") or "") if node is not None else ""
    frames = re.findall(r'File "(.+?)", line (\d+), in .+\n\s*(.+)', trace)
    torch_folder = os.path.dirname(torch.__file__)
    own = [frame for frame in frames if not frame[0].startswith(torch_folder)] or frames
    return f", at {own[-1][0]}:{own[-1][1]} `{own[-1][2].strip()}`" if own else ""


def _remedy(node: Node | None, user_inputs: set[Any]) -> str:
    fold = "fold it into a constant first (fxp.fold(model), which fxp.export_onnx(model, ...) does)"
    cannot = "what depends on an input stays in the file and must be written with operations that ONNX has"
    if node is None:
        return f"If it depends on parameters only, {fold}; {cannot}"
    seen: set[Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    inputs = sorted({n.name for n in seen} & user_inputs)
    if inputs:
        return f"It depends on the input {', '.join(inputs)}: {cannot}"
    return f"It depends on parameters only: {fold}"


def _lost(program: ExportedProgram) -> list[str]:
    """What the model does besides returning its outputs; ONNX has no place for it."""
    specs = program.graph_signature.output_specs
    buffers = sorted(s.target for s in specs if s.kind == OutputKind.BUFFER_MUTATION and s.target)
    inputs = sorted(s.target for s in specs if s.kind == OutputKind.USER_INPUT_MUTATION and s.target)
    notes = []
    if buffers:
        notes.append(f"the model writes to its buffers {', '.join(buffers)}; in the file they keep the values they have now")
    if inputs:
        notes.append(f"the model writes to its inputs {', '.join(inputs)}; the file leaves them as they are")
    return notes


# ---- cleaning --------------------------------------------------------------------------------------------------------


def _clean(model: ir.Model) -> None:
    """Remove what computes nothing. Names of inputs, outputs and initializers stay."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    outputs = [value.name or f"output_{i}" for i, value in enumerate(model.graph.outputs)]
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        for value in _values(root):
            value.metadata_props.clear()
    ir.passes.Sequential(
        common.ClearMetadataAndDocStringPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    _separate(model.graph, outputs)


def _values(graph: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    import onnx_ir as ir

    for owner in (graph, *graph.subgraphs()):
        yield from owner.inputs
        yield from owner.initializers.values() if isinstance(owner, ir.Graph) else ()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs


def _separate(graph: ir.Graph, names: list[str]) -> None:
    """Give each output a value of its own, called as before, and everything a name of its own; parameters keep theirs.

    A model may return an input, a parameter, or one value twice. ONNX wants outputs apart from inputs and from each
    other, and renaming an output must not rename a parameter: ``x -> [x, x]`` becomes ``x -> Identity -> [out0], x ->
    Identity -> [out1]``.
    """
    import onnx_ir as ir

    taken: set[str | None] = {value.name for value in graph.initializers.values()}
    for value in graph.inputs:
        value.name = unique(value.name or "input", taken, "_input")
        taken.add(value.name)
    seen: set[ir.Value] = set()
    for i, (value, name) in enumerate(zip(graph.outputs, names, strict=True)):
        if value in seen or value.is_graph_input() or value.is_initializer():
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[i] = value = node.outputs[0]
        seen.add(value)
        value.name = unique(name, taken, "_output")
        taken.add(value.name)
        producer = value.producer()
        if producer is not None and not producer.name:
            producer.name = f"node_{value.name}"
    _free(graph)


def unique(name: str, taken: set[str | None], suffix: str) -> str:
    """``name``, with ``suffix`` and a number where needed to keep it apart from ``taken``."""
    candidates = (name if i == 0 else f"{name}{suffix}{i if i > 1 else ''}" for i in range(len(taken) + 1))
    return next(candidate for candidate in candidates if candidate not in taken)


def _free(graph: ir.Graph) -> None:
    """Rename intermediate values that bear the name of an input, an output or a parameter; those keep theirs."""
    import onnx_ir as ir

    fixed = {id(v) for v in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    taken = {v.name for v in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            if id(value) not in fixed and value.name:
                value.name = unique(value.name, taken, "_value")
                taken.add(value.name)


def _merge_tied(model: ir.Model) -> None:
    """Store each tensor once: initializers that are the same elements of one storage become one.

    ``torch.export`` does this for one Parameter under several names, and calls it by the last; so it is done here.
    Equal values in separate storages stay apart: they are trained, and refitted, apart.
    """
    import onnx_ir as ir

    initializers = model.graph.initializers
    last = {_view(value): value for value in initializers.values()}
    for name, value in list(initializers.items()):
        kept = last[_view(value)]
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            del initializers[name]


def _view(value: ir.Value) -> object:
    return files.same_view(getattr(value.const_value, "raw", value))


def _name(model: ir.Model, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> None:
    """Rename inputs and outputs as asked."""
    graph = model.graph
    wanted: list[tuple[ir.Value, str]] = []
    for kind, values, names in (("input", graph.inputs, inputs), ("output", graph.outputs, outputs)):
        old = [str(value.name) for value in values]
        if names is not None and len(names) != len(old):
            raise ExportError(
                f"got {len(names)} {kind}_names ({', '.join(names)}); the model has {len(old)} {kind}s ({', '.join(old)})"
            )
        wanted += zip(values, old if names is None else names, strict=True)
    taken = set(graph.initializers)
    for _, name in wanted:
        if not name or name in taken:
            raise ExportError(
                f"got input_names={inputs}, output_names={outputs}: {name!r} is empty, given twice, or the name of a "
                "parameter, an input or an output; names must differ"
            )
        taken.add(name)
    for value, name in wanted:
        value.name = name
    _free(graph)


def _missing_names(program: ExportedProgram, model: ir.Model) -> tuple[dict[str, str], list[str]]:
    """The names of weights and buffers that are no initializer: those of tied weights, and those nothing depends on."""
    initializers = model.graph.initializers
    kept = {_view(value): name for name, value in initializers.items()}
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    targets = [s.target for s in program.graph_signature.input_specs if s.kind in kinds and s.target]
    tensors = {name: program.state_dict.get(name, program.constants.get(name)) for name in targets}
    absent = {name: kept.get(files.same_view(tensor)) for name, tensor in tensors.items() if name not in initializers}
    return {n: k for n, k in absent.items() if k is not None}, [n for n, k in absent.items() if k is None]
