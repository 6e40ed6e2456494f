"""The weight computation of a model as a file, and the weights it makes of a training checkpoint.

A prologue is a straight line of PyTorch operators from the tensors of a checkpoint to the weights of the plain model, in eval
mode. ``torch.export.save`` would write it too, and ``torch.export.load`` unpickles parts of what it reads without
``weights_only`` (it says so itself). Therefore the file is what ``torch.load(weights_only=True)`` reads, one dictionary of:

    "fxparam.prologue"   a text, JSON: "format", "fxparam", "torch" (versions), "default_dtype",
                         "sources": [{"names", "dtype", "shape"}, ...]   tensors of a checkpoint, each with its tied names
                         "fixed": [name, ...]                            tensors of the file itself
                         "steps": [...]                                  see ``prologue_format``
                         "weights": {name of the deployed weight: register}
    "tensors"            the fixed tensors, in order

Reading such a file executes nothing of it. Running it calls the operators it names, which are PyTorch's own (``aten``); the
one that opens files is refused. A file from a stranger may still name operators that take all the memory and time there is, or
internal ones that trust their arguments: run it as you would run any program of theirs, apart from the rest.
"""

from __future__ import annotations

import io
import json
import operator
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from fxparam.errors import ExportError
from fxparam.exporters import files
from fxparam.exporters.checkpoint import Source, first_line, given, read_checkpoint
from fxparam.exporters.onnx_integers import stored_axes
from fxparam.exporters.prologue_format import constant, decode_steps, encode_steps, refusal, results, word
from fxparam.exporters.refit import RefitReport, refit_onnx

FORMAT = 1
"""The version of the format; a reader refuses any other."""

_KEY = "fxparam.prologue"


@final
@dataclass(frozen=True, eq=False)
class Prologue:
    """How to make the deployed weights of a checkpoint.

    Attributes:
        sources: what it takes.
        fixed: tensors that no checkpoint has, by name: buffers that are not persistent, and constants of the maps.
        graph: one placeholder for each source and each fixed tensor, in this order; returns a dictionary of weights.
        default_dtype: PyTorch's default dtype when it was made, on which operators that create tensors depend.
    """

    sources: tuple[Source, ...]
    fixed: Mapping[str, Tensor]
    graph: fx.Graph
    default_dtype: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weights it makes."""
        return tuple(results(self.graph))

    def weights(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """The deployed weights by name, on the CPU, and the names in ``state`` that the prologue does not know.

        Args:
            state: the ``state_dict`` of the transformed model; of tied names one is enough.

        Raises:
            ExportError: the state does not fit (every problem in one message), or an operator failed.
        """
        tensors, unknown = given(self.sources, state)
        # Copies: an operator may write to what it is given.
        inputs = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
        try:
            with torch.no_grad(), _default_dtype(self.default_dtype):
                values = fx.Interpreter(nn.Module(), graph=self.graph).run(*inputs, *self.fixed.values())
        except Exception as error:  # any error of an operator means the same: there are no weights
            raise ExportError(f"the prologue failed on this checkpoint: {first_line(error)}") from error
        return values, unknown


@final
@dataclass(frozen=True)
class PrologueReport:
    """What was written. ``print`` gives a short summary.

    Attributes:
        path: the file.
        sources: names that a checkpoint must have; of tied ones the first.
        weights: names of the weights that the prologue makes, those that pass through unchanged included.
        fixed: tensors with the value they had at the export: buffers that are not persistent, and constants of the maps.
        operations: how many operators compute the weights.
        bytes: the size of the file.
    """

    path: Path
    sources: tuple[str, ...]
    weights: tuple[str, ...]
    fixed: tuple[str, ...]
    operations: int
    bytes: int

    def __str__(self) -> str:
        counts = f"{len(self.sources)} tensors to {len(self.weights)} weights in {self.operations} operations"
        fixed = f"; fixed: {', '.join(self.fixed)}" if self.fixed else ""
        return f"{self.path}: {counts}, {self.bytes:,} bytes{fixed}"


def make_prologue(
    module: fx.GraphModule,
    inputs: Sequence[str],
    state: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    weights: Mapping[str, int | str],
) -> Prologue:
    """A prologue from a graph of operators.

    Args:
        module: it returns a tuple of tensors.
        inputs: the names of its placeholders.
        state: the ``state_dict`` of the transformed model.
        held: the inputs that are not in ``state``, by name; they are fixed.
        weights: for each deployed weight its position in what ``module`` returns, or the name in ``state`` of what it is.

    Raises:
        ExportError: a weight needs more than operators of PyTorch, or random numbers.
    """
    graph, nodes, refused = fx.Graph(), dict[fx.Node, fx.Node](), dict[fx.Node, str]()
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(files.same_view(tensor), []).append(name)
    sources = tuple(_source(names, state) for names in groups.values())
    registers = {name: node for one in sources for node in [graph.placeholder("source")] for name in one.names}
    fixed: dict[str, Tensor] = {}
    old = list(module.graph.nodes)
    names = {**dict(zip((n for n in old if n.op == "placeholder"), inputs, strict=True)), **_attributes(old)}
    for node, name in names.items():
        value: Any = held[name] if name in held else operator.attrgetter(name)(module) if node.op == "get_attr" else None
        if isinstance(value, Tensor):
            # A clone of its own: a view would take its whole storage into the file.
            fixed[name] = value.detach().cpu().clone()
            registers[name] = graph.placeholder("fixed")
        if name in registers:
            nodes[node] = registers[name]
    for node in old:
        if node.op in ("call_function", "call_method", "call_module"):
            why = refusal(node) if node.op == "call_function" else f"it calls {node.target}, which is Python code"
            why = next((refused[other] for other in node.all_input_nodes if other in refused), why)
            # What no weight needs (weight arithmetic of the model's own) may be anything.
            if why is None:
                nodes[node] = graph.node_copy(node, nodes.__getitem__)
            else:
                refused[node] = why
    values: Any = old[-1].args[0]
    for name, at in weights.items():
        if not isinstance(at, str) and values[at] in refused:
            raise ExportError(
                f"{name} cannot be computed from a file: {refused[values[at]]}; refit with the model: refit_onnx(path, model)"
            )
    graph.output({name: registers[at] if isinstance(at, str) else nodes[values[at]] for name, at in weights.items()})
    graph.eliminate_dead_code()
    for name in [name for name in fixed if not registers[name].users]:
        graph.erase_node(registers[name])
        del fixed[name]
    return Prologue(sources, fixed, graph, word(torch.get_default_dtype()))


def write_prologue(
    prologue: Prologue, path: str | os.PathLike[str], check: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> PrologueReport:
    """Write a prologue, read it back, and check what it makes of a ``state_dict`` before it replaces the old file.

    Args:
        prologue: what to write.
        path: the file.
        check: the weights it should make, by name.
        state: of this ``state_dict``.

    Raises:
        ExportError: it cannot be written, or makes other weights. The old file is untouched.
    """
    target = files.writable(path)
    content = {_KEY: json.dumps(_encoded(prologue)), "tensors": list(prologue.fixed.values())}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        with files.staged(target) as temporary:
            temporary.write_bytes(buffer.getvalue())
            _compare(read_prologue(temporary).weights(state)[0], check)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}; check free space and permissions") from error
    steps = [node for node in prologue.graph.nodes if node.op == "call_function"]
    names = tuple(source.names[0] for source in prologue.sources)
    return PrologueReport(Path(path), names, prologue.names, tuple(prologue.fixed), len(steps), target.stat().st_size)


def read_prologue(path: str | os.PathLike[str]) -> Prologue:
    """Read a prologue. Nothing of the file is executed.

    Raises:
        ExportError: there is no such file, it is no prologue, or one of another version.
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"there is no file {path}; type fxp.export_prologue(model, {str(path)!r}) where the model is")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        data, tensors = json.loads(content[_KEY]), content["tensors"]
        written = data["format"]
    except Exception as error:  # any error of the readers means the same here
        raise _corrupt(path, error) from error
    if written != FORMAT:
        raise ExportError(f"{path} has format {written} of fxparam {data.get('fxparam')}, expected {FORMAT}; export it again")
    try:
        return _decoded(data, tensors)
    except ExportError as error:
        raise ExportError(f"{path} (written with torch {data.get('torch')}) {error}") from error
    except Exception as error:  # as above: whatever is amiss in it
        raise _corrupt(path, error) from error


def refit_from_checkpoint(
    path: str | os.PathLike[str], prologue: str | os.PathLike[str], checkpoint: str | os.PathLike[str]
) -> RefitReport:
    """Write the weights that a prologue makes of a checkpoint into an exported ONNX file.

    Args:
        path: the file.
        prologue: the file of the prologue.
        checkpoint: the file of the ``state_dict``.

    Raises:
        ExportError: one of the files is missing or corrupt, they do not fit, or the file at ``path`` holds what a prologue does
            not make: integers, or folded weight arithmetic of the model's own. It is unchanged.
        MissingExtraError: an optional package is not installed.
    """
    files.need("onnx", "onnx_ir", purpose="to refit ONNX files")
    deployed = files.read_model(files.writable(path)).graph
    if hoisted := [name for name in deployed.initializers if name.startswith("hoisted.")]:
        raise ExportError(
            f"cannot refit {path}: it holds folded weight arithmetic of the model's own ({', '.join(hoisted)}), "
            "which a prologue does not make; refit it with the model (refit_onnx(path, model, args)), or export it with "
            "arithmetic=False"
        )
    if integers := list(stored_axes(deployed)):
        raise ExportError(
            f"cannot refit {path}: it stores {', '.join(integers)} as integers, and a prologue makes floating-point weights; "
            "refit it with the model (refit_onnx(path, model)), or export it with integers=False"
        )
    made = read_prologue(prologue)
    state = read_checkpoint(checkpoint)
    try:
        weights, unknown = made.weights(state)
    except ExportError as error:
        raise ExportError(f"cannot refit {path} from {checkpoint}; it is unchanged: {error}") from error
    report = refit_onnx(path, weights)
    return replace(report, ignored=(*report.ignored, *unknown))


def _source(names: list[str], state: Mapping[str, Tensor]) -> Source:
    tensor = state[names[0]]
    return Source(tuple(names), word(tensor.dtype), tuple(tensor.shape))


def _attributes(nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
    return {node: str(node.target) for node in nodes if node.op == "get_attr"}


def _encoded(prologue: Prologue) -> dict[str, Any]:
    steps, weights = encode_steps(prologue.graph)
    return {
        "format": FORMAT,
        # Not imported: the package's front imports the API, and that imports this module.
        "fxparam": sys.modules["fxparam"].__version__,
        "torch": str(torch.__version__),
        "default_dtype": prologue.default_dtype,
        "sources": [{"names": one.names, "dtype": one.dtype, "shape": one.shape} for one in prologue.sources],
        "fixed": list(prologue.fixed),
        "steps": steps,
        "weights": weights,
    }


def _decoded(data: Mapping[str, Any], tensors: Sequence[Any]) -> Prologue:
    sources = tuple(Source(tuple(map(str, one["names"])), str(one["dtype"]), tuple(one["shape"])) for one in data["sources"])
    if not all(source.names for source in sources) or not all(type(tensor) is Tensor for tensor in tensors):
        raise ValueError("a source has no name, or a fixed tensor is none")
    constant("dtype", data["default_dtype"])
    fixed = dict(zip(data["fixed"], tensors, strict=True))
    graph = decode_steps(len(sources) + len(fixed), data["steps"], data["weights"])
    return Prologue(sources, fixed, graph, data["default_dtype"])


def _corrupt(path: str | os.PathLike[str], error: Exception) -> ExportError:
    return ExportError(
        f"{path} is corrupt, truncated or no prologue ({type(error).__name__}: {first_line(error)}); "
        f"type fxp.export_prologue(model, {str(path)!r}) where the model is"
    )


def _compare(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise if the file makes other weights than the model; rounding may differ, since the maps are computed in groups."""
    wrong = [name for name, tensor in expected.items() if not _close(got[name], tensor.detach().cpu())]
    if wrong:
        raise ExportError(
            f"the prologue does not make the model's weights {', '.join(wrong)}; the old file is unchanged; "
            "refit with the model: refit_onnx(path, model)"
        )


def _close(value: Tensor, expected: Tensor) -> bool:
    """Within the square root of the dtype's resolution, relative to the largest element."""
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(value, expected)
    largest = float(expected.abs().nan_to_num(0, 0, 0).max()) if expected.numel() else 0.0
    return torch.allclose(value, expected, rtol=0, atol=torch.finfo(expected.dtype).eps ** 0.5 * largest, equal_nan=True)


@contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)
