"""Does an ONNX file compute what the model computes? ONNX Runtime against the eager model, on given and on random
inputs.

**Random inputs** keep the kind of the given ones, so that they stay valid: floats are normal with the mean and standard
deviation of the given tensor (nonnegative if it is; values of the given one if it looks like a mask), integers lie
between its smallest and its largest value (embedding indices stay in range), booleans are fair coins. Dynamic sizes are
drawn within the range constraints of the program. What the model itself refuses is no evidence and is dropped, with a
note.

**Tolerance.** An output passes where ``|onnx - model| <= rtol |model| + rtol/8 * max|model|``. The relative term is the
usual one; the other covers cancellation, whose error scales with the largest terms. ``rtol`` follows from the coarsest
floating dtype in the program (see ``RTOL``), as a bfloat16 layer before a float32 output rounds to bfloat16. Fake quantization
to ``n`` steps counts as a dtype that rounds to ``1/n``: a value next to a tie moves by a step where a sum is rounded otherwise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxparam.errors import ExportError

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort
    from torch.export import ExportedProgram

RTOL: Mapping[torch.dtype, float] = {
    # ONNX stores attributes (the alpha of LeakyRelu, the epsilon of a norm) in float32, in double models as well: a few
    # of these roundings, 2**3 * 2**-23.
    torch.float64: 2.0**-20,
    # Sums of K terms in another order differ by about sqrt(K) roundings, and layers add up: 2**10 of them, about
    # 1.2e-4.
    torch.float32: 2.0**-13,
    # Sums are kept in float32 and rounded between ops: a few roundings of 2**-10 and 2**-7, whatever the sizes.
    torch.float16: 2.0**-6,
    torch.bfloat16: 2.0**-4,
}
_COARSEST = 2.0**-3  # the 8-bit floats: half a unit in the last place of float8_e5m2

_REDUCED = {torch.bfloat16: torch.uint16}  # dtypes that numpy lacks, and what holds their bits


@final
@dataclass(frozen=True)
class Parity:
    """How far one output is from the model's, on one set of inputs.

    Attributes:
        inputs: ``"given"``, ``"random 1"``, ...
        output: the output's name in the file.
        max_abs: the largest absolute difference.
        max_rel: the same, relative to the largest magnitude of the model's output.
        tolerance: the bound where the difference comes nearest to it (or exceeds it most).
        excess: difference over bound at that place; the output passes up to 1. Infinite where only one side is NaN.
    """

    inputs: str
    output: str
    max_abs: float
    max_rel: float
    tolerance: float
    excess: float

    @property
    def ok(self) -> bool:
        """Whether the output is within tolerance everywhere."""
        return self.excess <= 1


@dataclass(frozen=True)
class _Inputs:
    label: str
    leaves: tuple[Any, ...]
    sizes: str = ""


def check_parity(
    file: Path,
    reference: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    program: ExportedProgram | None = None,
    random_sets: int = 2,
    seed: int = 0,
) -> tuple[tuple[Parity, ...], tuple[str, ...]]:
    """Run ``file`` in ONNX Runtime and compare every output with ``reference(*args, **kwargs)``.

    Args:
        file: the ONNX file.
        reference: the model, called without gradient on copies of the inputs. It must draw no random numbers.
        args: positional inputs, tensors in any nesting.
        kwargs: keyword inputs.
        program: what the file was made from; it knows the inputs' structure, which sizes are dynamic and the dtypes
            inside. Without it the inputs are the tensors among ``args`` and ``kwargs``, in order, in their given sizes.
        random_sets: how many sets of random inputs to try besides the given one.
        seed: the seed of the random inputs; the global generators are not touched.

    Returns:
        One entry per input set and output, and notes on what could not be checked.

    Raises:
        ExportError: an output differs, ONNX Runtime cannot run the file, or the inputs do not fit the program.
    """
    leaves, spec = _flatten(program, args, kwargs or {})
    pair = _Pair(reference, spec, program, _session(file), _rtol(program, leaves))
    results = list(pair.compare(given := _Inputs("given", leaves), pair.expected(given)))
    notes: list[str] = []
    for number in range(1, random_sets + 1):
        try:
            inputs, expected = _random_set(pair, leaves, number, seed)
        except ExportError:
            raise
        except Exception as error:  # whatever the user's model raises on inputs it does not take
            notes.append(f"the model refused random inputs ({first_line(error)}); none were compared")
            break
        results += pair.compare(inputs, expected)
    return tuple(results), tuple(notes)


@dataclass(frozen=True)
class _Pair:
    """The model and the file, ready to run on the same inputs."""

    reference: Callable[..., Any]
    spec: pytree.TreeSpec
    program: ExportedProgram | None
    session: ort.InferenceSession
    rtol: float

    def expected(self, inputs: _Inputs) -> list[Tensor]:
        """The model's outputs, as the file has them."""
        # Copies: a model may write to its inputs, and may return a buffer that its next call changes.
        leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with torch.no_grad():
            outputs = pytree.tree_leaves(self.reference(*args, **kwargs))
        if self.program is None:
            kept = [x for x in outputs if isinstance(x, Tensor)]
        else:
            specs = _user_outputs(self.program)
            if len(specs) != len(outputs):
                raise ExportError(f"the model returns {len(outputs)} values, and the program made from it {len(specs)}")
            kept = [torch.as_tensor(x) for x, s in zip(outputs, specs, strict=True) if not _is_constant(s)]
        return [(torch.view_as_real(x) if x.dtype.is_complex else x).detach().clone() for x in kept]

    def actual(self, inputs: _Inputs) -> list[Tensor]:
        """ONNX Runtime's outputs."""
        leaves = list(inputs.leaves)
        if self.program is None:
            leaves = [x for x in leaves if isinstance(x, Tensor)]
        else:
            leaves = [x for x, s in zip(leaves, _user_inputs(self.program), strict=True) if not _is_constant(s)]
        names = [x.name for x in self.session.get_inputs()]
        if len(names) != len(leaves):
            raise ExportError(f"the ONNX file takes {len(names)} inputs ({', '.join(names)}), and {len(leaves)} were given")
        try:
            outputs = self.session.run_with_ort_values(None, dict(zip(names, map(_to_ort, leaves), strict=True)))
        except Exception as error:  # the runtime's exceptions share no base class
            raise _unrunnable(f" on the {inputs.label} inputs{_sizes(inputs)}", error) from error
        return [_from_ort(value) for value in outputs]

    def compare(self, inputs: _Inputs, expected: list[Tensor]) -> list[Parity]:
        """All outputs on one set of inputs; raises ExportError where one differs."""
        actual = self.actual(inputs)
        names = [x.name for x in self.session.get_outputs()]
        if len(names) != len(expected):
            raise ExportError(f"the ONNX file gives {len(names)} outputs ({', '.join(names)}), the model {len(expected)}")
        pairs = zip(names, expected, actual, strict=True)
        results = [compare(inputs.label, name, e, a, self.rtol) for name, e, a in pairs]
        failures = [result for result in results if not result.ok]
        if failures:
            raise _mismatch(failures, inputs, changes=self._changes(inputs, expected))
        return results

    def _changes(self, inputs: _Inputs, before: list[Tensor]) -> bool:
        pairs = zip(before, self.expected(inputs), strict=True)
        return any(a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def _flatten(
    program: ExportedProgram | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], pytree.TreeSpec]:
    expected = program.call_spec.in_spec if program is not None else None
    if expected is not None and set(names := expected.child(1).context) == set(kwargs):
        kwargs = {name: kwargs[name] for name in names}  # the order of keyword arguments means nothing
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    if expected is not None and spec != expected:
        raise ExportError(
            f"the inputs to compare with have another structure than those the model was exported with: got {spec}, "
            f"expected {expected}; pass the args and kwargs that torch.export.export was given"
        )
    return tuple(leaves), spec


def _random_set(pair: _Pair, given: tuple[Any, ...], number: int, seed: int) -> tuple[_Inputs, list[Tensor]]:
    """Random inputs and the model's outputs on them.

    Sizes within the range constraints can still be refused (``torch.export`` keeps some conditions as assertions), so
    the given sizes are tried next.
    """
    label, mixed = f"random {number}", seed * 1000 + number
    generator = torch.Generator().manual_seed(mixed)
    shapes, sizes = _draw_shapes(pair.program, given, random.Random(mixed))
    inputs = _Inputs(label, _draw_leaves(given, shapes, generator), sizes)
    try:
        return inputs, pair.expected(inputs)
    except Exception:
        if not sizes:
            raise
    inputs = _Inputs(label, _draw_leaves(given, [_shape(leaf) for leaf in given], generator))
    return inputs, pair.expected(inputs)


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else ()


def _draw_shapes(
    program: ExportedProgram | None, given: Sequence[Any], draw: random.Random
) -> tuple[list[tuple[int, ...]], str]:
    """Shapes with every dynamic size drawn anew, and what was drawn as text (empty: the given shapes)."""
    shapes = [_shape(x) for x in given]
    if program is None:
        return shapes, ""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    fakes = [values.get(getattr(s.arg, "name", None)) for s in _user_inputs(program)]
    # A dynamic size is a sympy expression: a symbol, or something like 2*s.
    exprs = [[_expr(d) for d in f.shape] if isinstance(f, Tensor) else [] for f in fakes]
    symbolic = [(e, n) for es, shape in zip(exprs, shapes, strict=True) for e, n in zip(es, shape, strict=False) if e]
    drawn = {e: _draw_size(program.range_constraints.get(e), size, draw) for e, size in symbolic if e.is_Symbol}
    if not drawn or any(not e.free_symbols <= drawn.keys() for e, _ in symbolic):
        return shapes, ""  # nothing dynamic, or 2*s without s itself among the inputs
    sized = [
        tuple(int(e.xreplace(drawn)) if e else n for e, n in zip(es, shape, strict=True)) if es else shape
        for es, shape in zip(exprs, shapes, strict=True)
    ]
    return sized, ", ".join(f"{symbol}={size}" for symbol, size in sorted(drawn.items(), key=str))


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _draw_size(constraint: Any, given: int, draw: random.Random) -> int:
    # torch.export specializes on sizes 0 and 1, so a model given 2 or more promises nothing about them.
    low, high = min(given, 2), 2 * given + 2
    if constraint is not None:
        low, high = max(low, int(constraint.lower)), int(min(high, constraint.upper))
    return draw.randint(low, max(low, high))


def _draw_leaves(given: Sequence[Any], shapes: Sequence[tuple[int, ...]], generator: torch.Generator) -> tuple[Any, ...]:
    return tuple(
        random_like(leaf, shape, generator) if isinstance(leaf, Tensor) else leaf
        for leaf, shape in zip(given, shapes, strict=True)
    )


def random_like(given: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random tensor of ``shape`` with the dtype, the device and the kind of values of ``given`` (see the module)."""
    values = given.detach().cpu().flatten()
    if values.dtype.is_complex:
        parts = [random_like(part.contiguous(), shape, generator) for part in (given.real, given.imag)]
        return torch.complex(*parts)
    if values.dtype == torch.bool:
        new = torch.randint(0, 2, shape, generator=generator) > 0
    elif values.numel() == 0:
        new = torch.zeros(shape)
    elif not values.dtype.is_floating_point:
        low, high = (min(int(bound), 2**63 - 2) for bound in values.long().aminmax())  # randint excludes its upper end
        new = torch.randint(low, high + 1, shape, generator=generator)
    else:
        new = _random_floats(values.double(), shape, generator)
    return new.to(device=given.device, dtype=given.dtype)


def _random_floats(values: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    distinct = values.unique()
    if not values.isfinite().all() or (len(distinct) == 2 and len(values) > 2):  # a mask
        return values[torch.randint(0, len(values), shape, generator=generator)]
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(distinct) == 1:  # zeros or ones as a placeholder say nothing about the spread
        return normal
    new = values.mean() + values.std() * normal
    return new.abs() if values.min() >= 0 else new


def _user_inputs(program: ExportedProgram) -> list[Any]:
    return [s for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]


def _user_outputs(program: ExportedProgram) -> list[Any]:
    return [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]


def _is_constant(spec: Any) -> bool:
    """Whether an input or output is a Python constant, which the exporter leaves out of the file."""
    return isinstance(spec.arg, ConstantArgument)


# ---- running ---------------------------------------------------------------------------------------------------------


def _session(file: Path) -> ort.InferenceSession:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    # By default it computes dequantized weights and activations in kernels that round where the file does not say so.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class
        raise _unrunnable("", error) from error


def _unrunnable(where: str, error: Exception) -> ExportError:
    return ExportError(
        f"ONNX Runtime cannot run the model{where}: {first_line(error)}. No file was changed; give another opset or "
        "dtype (it has few float64 and bfloat16 kernels), or pass verify=0 to write the file without running it"
    )


def _to_ort(leaf: Any) -> ort.OrtValue:
    import onnxruntime as ort

    tensor = torch.as_tensor(leaf).detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)  # what the exporter turns complex numbers into
    if tensor.dtype in _REDUCED:
        from onnx import TensorProto

        bits = tensor.contiguous().view(_REDUCED[tensor.dtype]).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())


def _from_ort(value: ort.OrtValue) -> Tensor:
    if "bfloat16" in value.data_type():
        return torch.utils.dlpack.from_dlpack(value._get_c_value()).clone()  # the one way out for a dtype numpy lacks
    array: np.ndarray = value.numpy()
    return torch.from_numpy(array.copy())


# ---- comparing -------------------------------------------------------------------------------------------------------


def _rtol(program: ExportedProgram | None, leaves: Sequence[Any]) -> float:
    tensors: list[Any] = list(leaves)
    if program is not None:
        tensors = [v for node in program.graph.nodes for v in pytree.tree_leaves(node.meta.get("val"))]
    dtypes = {x.dtype.to_real() for x in tensors if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())}
    coarse = [] if program is None else [8 / max(high - low, 1) for low, high in _grids(program)]
    return max(
        [*(RTOL.get(dtype, _COARSEST) for dtype in dtypes), *(min(c, _COARSEST) for c in coarse)], default=RTOL[torch.float32]
    )


def _grids(program: ExportedProgram) -> list[tuple[int, int]]:
    """The smallest and the largest integer of each fake quantization."""
    nodes = [node for node in program.graph.nodes if "fake_quantize_per_" in str(node.target)]
    return [node.args[-2:] for node in nodes]


def compare(inputs: str, output: str, expected: Tensor, actual: Tensor, rtol: float) -> Parity:
    """One output against the model's: floats within the tolerance of the module's docstring, all else equal.

    NaN equals NaN, and an infinity the same infinity.

    Raises:
        ExportError: another shape or dtype.
    """
    expected, actual = expected.cpu(), actual.cpu()
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        raise ExportError(
            f"output {output!r} ({inputs} inputs) is {actual.dtype} of shape {tuple(actual.shape)} in ONNX Runtime and "
            f"{expected.dtype} of shape {tuple(expected.shape)} in the model; no file was changed"
        )
    if expected.numel() == 0:
        return Parity(inputs, output, 0.0, 0.0, 0.0, 0.0)
    e, a = expected.double(), actual.double()
    same = (expected == actual) | (e.isnan() & a.isnan())
    finite = e[e.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    difference = torch.where(same, 0.0, (a - e).abs()).nan_to_num(nan=math.inf)
    if not expected.dtype.is_floating_point:
        bound = torch.zeros_like(e)
    else:
        # Below 2**-10 the scale no longer counts: what is left of terms of size 1 that cancel.
        bound = (rtol * e.abs() + rtol / 8 * max(scale, 2.0**-10)).nan_to_num(nan=0.0, posinf=0.0)
    excess = torch.where(same, 0.0, difference / bound).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(excess.argmax())
    largest = float(difference.max())
    return Parity(
        inputs,
        output,
        largest,
        largest / scale if scale else (math.inf if largest else 0.0),
        float(bound.flatten()[worst]),
        float(excess.flatten()[worst]),
    )


def _mismatch(failures: list[Parity], inputs: _Inputs, *, changes: bool) -> ExportError:
    lines = [
        f"  output {p.output!r} on the {p.inputs} inputs{_sizes(inputs)}: off by up to {p.max_abs:.3g} "
        f"({p.max_rel:.3g} of the largest value), {p.excess:.3g} times the tolerance of {p.tolerance:.3g}"
        for p in failures[:5]
    ]
    if len(failures) > 5:
        lines.append(f"  and {len(failures) - 5} more outputs")
    why = (
        "The model gives other values when it is called again with the same inputs: it draws random numbers or keeps "
        "state, which no file reproduces; call model.eval() first"
        if changes
        else "The exporter or the runtime computes something else than the model"
    )
    return ExportError(
        "the exported model does not reproduce the model in ONNX Runtime:\n" + "\n".join(lines) + f"\n{why}. "
        "No file was changed; pass verify=0 to write it all the same"
    )


def _sizes(inputs: _Inputs) -> str:
    return f" (sizes {inputs.sizes})" if inputs.sizes else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
