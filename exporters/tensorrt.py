"""Will TensorRT take this ONNX file? Four rungs of evidence, each on the one below; the report says which was reached.

1. ``static``: every node against the published operator table (``fxparam.exporters.tensorrt_static``). Needs nothing.
2. ``parse``: the real parser of TensorRT-RTX reads the file. It works without a GPU. Also, which weights keep their names,
   so that new values can be given under them (refitting).
3. ``build``: an engine is built ahead of time, without a GPU, for GPUs named by their compute capability.
4. ``run``: on a GPU, the engine runs on given inputs and its outputs are compared with ONNX Runtime's or the model's; a
   refittable engine runs before and after it was refitted from the file.

TensorRT-RTX is proprietary and no dependency of fxparam; where it is not installed, the report ends at the first rung and
says what to type. It is asked in a process of its own (``fxparam.exporters.tensorrt_worker``).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, final

from torch import Tensor

from fxparam.errors import ExportError, MissingExtraError
from fxparam.exporters import files, tensorrt_worker
from fxparam.exporters import tensorrt_rules as rules
from fxparam.exporters.onnx_verify import Parity
from fxparam.exporters.tensorrt_inputs import Sizes, expected_outputs, known_inputs, optimization_profile, parities
from fxparam.exporters.tensorrt_static import Finding, Level, by_level, check_graph, node_views

if TYPE_CHECKING:
    import onnx_ir as ir

Rung = Literal["static", "parse", "build", "run"]

RUNGS: tuple[Rung, ...] = ("static", "parse", "build", "run")

INSTALL = "pip install --no-deps onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 tensorrt-rtx-cu13-bindings==1.7.1.116"
"""What brings the libraries and the Python API of TensorRT-RTX: works without a GPU, under NVIDIA's licence, 150 MB."""

_MIB = 2**20

_FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
"""Signals by which TensorRT's process ends itself; others come from outside, and say nothing about the file."""


@final
@dataclass(frozen=True)
class TensorRTReport:
    """What is known about a file and TensorRT. ``print`` gives a summary.

    Attributes:
        path: the file.
        rung: the highest rung that was passed: ``"static"``, ``"parse"``, ``"build"`` or ``"run"``.
        stopped: why it is not a higher one; empty at the highest.
        product: what was asked besides the table, such as ``"TensorRT-RTX 1.7.1.116"``; empty if nothing was.
        opset: the file's operator set.
        nodes: how many nodes were checked, those of bodies and functions included.
        findings: everything found, errors first.
        refittable: weights that an engine knows by name, so that a refitter takes new values for them.
        combined: weights that TensorRT combines into others (batch norms); to be refitted from a file only.
        engine_bytes: the size of the engine.
        seconds: how long each step of TensorRT took.
        peak_bytes: the most memory TensorRT's process had.
        parity: the engines' outputs against the expected ones.
    """

    path: Path
    rung: Rung
    stopped: str
    product: str
    opset: int
    nodes: int
    findings: tuple[Finding, ...]
    refittable: tuple[str, ...] = ()
    combined: tuple[str, ...] = ()
    engine_bytes: int | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peak_bytes: int | None = None
    parity: tuple[Parity, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the file. It is as good as the rung: only ``"run"`` has seen numbers."""
        return not any(finding.level == "error" for finding in self.findings)

    def __str__(self) -> str:
        asked = f", {self.product}" if self.product else ""
        lines = [f"{self.path}: opset {self.opset}, {self.nodes} nodes; TensorRT check reached rung {self.rung!r}{asked}"]
        if self.stopped:
            lines.append(f"  not higher: {self.stopped}")
        if self.seconds:
            times = ", ".join(f"{step} {seconds:.2f} s" for step, seconds in self.seconds.items())
            memory = f", peak memory {self.peak_bytes / _MIB:,.0f} MiB" if self.peak_bytes else ""
            lines.append(f"  {times}{memory}" + (f", engine of {self.engine_bytes:,} bytes" if self.engine_bytes else ""))
        if self.refittable or self.combined:
            lines.append(f"  {len(self.refittable)} weights can be refitted by name, {len(self.combined)} from a file only")
        for p in self.parity:
            lines.append(f"  output {p.output!r} of the {p.inputs}: off by {p.max_abs:.2g} ({p.excess:.2g} of the tolerance)")
        lines += [f"  {finding}" for finding in self.findings]
        unknown = sum(finding.level == "unknown" for finding in self.findings)
        if self.ok:
            lines.append("  no objection" + (f", {unknown} things unknown" if unknown else ""))
        return "\n".join(lines)


def check_tensorrt(
    path: str | os.PathLike[str],
    *,
    rung: Rung | Literal["highest"] = "highest",
    inputs: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    reference: Callable[..., Any] | None = None,
    sizes: Sizes | None = None,
    capabilities: Sequence[str] = (),
    timeout: float = 600.0,
) -> TensorRTReport:
    """Find out whether TensorRT takes an ONNX file. The file is not changed, and nothing is written.

    Args:
        path: the file.
        rung: how far to go: ``"static"``, ``"parse"``, ``"build"``, ``"run"``, or as far as this machine allows.
        inputs: tensors to run on, in the order of the file's inputs or by name; they also give the sizes to build for.
        reference: the model, called with the inputs in order, to compare with; by default ONNX Runtime runs the file.
        sizes: size name -> one size, or the smallest, the usual and the largest, for sizes that the file leaves open.
        capabilities: GPUs to build for, such as ``("SM86", "SM120")``; by default all that the product builds for.
        timeout: seconds that TensorRT may take.

    Raises:
        ExportError: the file is missing or corrupt, the inputs or sizes do not fit it, or ``rung="run"`` without a GPU.
        MissingExtraError: a package is not installed that ``rung`` needs by name (``"highest"`` does without TensorRT).
    """
    if rung != "highest" and rung not in RUNGS:
        raise ExportError(f"got rung={rung!r}; expected 'highest' or {', '.join(map(repr, RUNGS))}")
    files.need("onnx", "onnx_ir", purpose="to check ONNX files")
    path = Path(path)
    model = files.read_model(path)
    findings = check_graph(model)
    report = TensorRTReport(
        path=path,
        rung="static",
        stopped="only the static check was asked for",
        product="",
        opset=model.opset_imports.get("", 0),
        nodes=sum(1 for _ in node_views(model)),
        findings=findings,
    )
    given = known_inputs(model, inputs) if inputs is not None else None
    profile, open_sizes = optimization_profile(model, sizes or {}, given)
    wanted, why = _reachable(rung, has_inputs=given is not None, open_sizes=open_sizes)
    if wanted == "static":
        return dataclasses.replace(report, stopped=why or report.stopped)
    with tempfile.TemporaryDirectory(prefix="fxparam-tensorrt-") as folder:
        request = {
            "model": os.fspath(path.resolve()),
            "answer": os.path.join(folder, "answer.json"),
            "rung": wanted,
            "weights": _weights(model),
            "profile": profile,
            "capabilities": list(capabilities),
            "inputs": os.path.join(folder, "inputs.pt"),
            "outputs": os.path.join(folder, "outputs.pt"),
        }
        if wanted == "run" and given is not None:
            _save(given, request["inputs"])
        answer = _ask(request, timeout)
        if not answer.get("product") and "refused" in answer:
            if rung != "highest":
                raise MissingExtraError(f"{answer['refused']}; type: {INSTALL}")
            return dataclasses.replace(report, stopped=answer["refused"])
        report = _told(report, model, answer, wanted, why)
        if report.rung == "run" and given is not None:
            report = _compared(report, model, given, reference, request["outputs"])
    return report


def _reachable(rung: str, *, has_inputs: bool, open_sizes: Sequence[str]) -> tuple[Rung, str]:
    """How far this machine and these arguments allow to go, and why not further; an error where it was asked for."""
    import torch

    if not any(importlib.util.find_spec(package) for package in tensorrt_worker.PACKAGES):
        if rung not in ("highest", "static"):
            raise MissingExtraError(f"TensorRT-RTX is needed for rung={rung!r} and is not installed; type: {INSTALL}")
        return "static", "" if rung == "static" else f"TensorRT-RTX is not installed; type: {INSTALL}"
    limits: list[tuple[Rung, str]] = []
    if open_sizes:
        names = ", ".join(open_sizes)
        limits.append(("parse", f"the sizes {names} are open; pass sizes={{{open_sizes[0]!r}: (1, 8, 64)}} or inputs="))
    if not torch.cuda.is_available():
        no_gpu = "there is no CUDA device here, so an engine can be built and not run; a refittable one takes CUDA as well"
        limits.append(("build", no_gpu))
    elif not has_inputs:
        limits.append(("build", "no inputs to run on; pass inputs="))
    top, why = min(limits, key=lambda limit: RUNGS.index(limit[0]), default=("run", ""))
    if rung == "highest":
        return top, why
    asked = cast(Rung, rung)
    if RUNGS.index(asked) > RUNGS.index(top):
        raise ExportError(f"rung={rung!r} cannot be reached: {why}")
    return asked, "" if asked == "run" else f"only rung={rung!r} was asked for"


# ---- asking TensorRT -------------------------------------------------------------------------------------------------


def _weights(model: ir.Model) -> list[str]:
    """Names of initializers that hold numbers to train: floating or quantized ones, not shapes and axes."""
    kinds = ("FLOAT", "DOUBLE", "BFLOAT", "INT4", "INT8")
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    return [str(v.name) for v in values if v.dtype is not None and v.dtype.name.startswith(kinds)]


def _save(tensors: Mapping[str, Tensor], path: Any) -> None:
    import torch

    torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, path)


def _ask(request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The worker's answer; ``ended`` in it says how it came to an early end."""
    # -P: the folder of the worker holds an onnx.py, which is not the onnx that somebody may import.
    command = [sys.executable, "-P", str(Path(tensorrt_worker.__file__).resolve())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    ended, crashed = "", False
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            text=True,
            errors="replace",
            capture_output=True,
            timeout=timeout,
            env=environment,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
            ended = f"its process ended with {how}: {last}"
            crashed = -done.returncode in _FAULTS
    except subprocess.TimeoutExpired:
        ended = f"it took longer than timeout={timeout:g} seconds"
    answer = Path(request["answer"])
    return {**(json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}), "ended": ended, "crashed": crashed}


def _told(report: TensorRTReport, model: ir.Model, answer: Mapping[str, Any], wanted: Rung, why: str) -> TensorRTReport:
    """The report with what TensorRT said."""
    product = answer.get("product", "TensorRT")
    reached = cast(Rung, answer.get("reached") or "static")
    found = list(report.findings)
    if reached in ("build", "run"):
        # Still errors: that an engine can be built does not say that its numbers are right.
        but = f" ({product} builds it all the same)"
        found = [dataclasses.replace(f, what=f.what + but) if _disputed(f) else f for f in found]
    for where, op, what in dict.fromkeys((e["node"], e["op"], e["what"]) for e in answer.get("errors", ())):
        remedy = "Write this part of the model with what TensorRT supports, or compute it outside of the engine"
        found.append(Finding("error", where, op, what, remedy, f"parser of {product}"))
    for text in dict.fromkeys(answer.get("warnings", ())):
        found.append(Finding("warning", "", "", text, "See whether this matters to you", f"parser of {product}"))
    if "build_error" in answer:
        remedy = "The parser takes the file; the builder has no implementation for this part, so write it in another way"
        if "Attention" in answer["build_error"]:
            remedy = "Export at opset 22 or below, where attention is written with matrix products and Softmax, or in float16"
        found.append(Finding("error", "", "", answer["build_error"], remedy, f"builder of {product}"))
    if "refit_build_error" in answer:
        remedy = "Build it without REFIT, and again for new weights"
        found.append(
            Finding("warning", "", "", f"no refittable engine: {answer['refit_build_error']}", remedy, f"builder of {product}")
        )
    stopped = why
    if reached != wanted:
        part = "parser" if reached == "static" else "builder"
        stopped = answer.get("refused") or answer["ended"] or f"the {part} of {product} refuses the file"
        if answer.get("refused") or answer["ended"]:
            level: Level = "error" if answer["crashed"] else "unknown"
            found.append(Finding(level, "", "", stopped, "What it did not come to is not known", product))
    combined = _combined(model)
    known = set(answer.get("refitter_names", answer.get("refittable", ())))  # the engine's own names, where one was loaded
    refittable = tuple(name for name in _weights(model) if name in known)
    if reached != "static":
        found += _refit_findings(model, refittable, combined, product)
    return dataclasses.replace(
        report,
        rung=reached,
        stopped=stopped,
        product=product if answer.get("product") else "",
        findings=by_level(found),
        refittable=refittable,
        combined=tuple(name for name in combined if name not in refittable) if reached != "static" else (),
        engine_bytes=answer.get("engine_bytes"),
        seconds=answer.get("seconds", {}),
        peak_bytes=answer.get("peak_bytes"),
    )


def _disputed(finding: Finding) -> bool:
    """Whether it is an objection of the table that a product may prove wrong (but not that weights lose their values)."""
    return finding.level == "error" and finding.source == rules.SOURCE and finding.op != "weight"


def _combined(model: ir.Model) -> list[str]:
    """Weights that only batch norms read: the parser computes one factor and one summand from the four of them."""
    return [
        str(value.name)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.uses() and all(u.node.op_type == "BatchNormalization" and u.idx > 0 for u in value.uses())
    ]


def _refit_findings(model: ir.Model, known: Sequence[str], combined: Sequence[str], product: str) -> list[Finding]:
    missing = [name for name in _weights(model) if name not in known]
    merged = [name for name in missing if name in combined]
    lost = [name for name in missing if name not in combined]
    found = []
    if merged:
        what = f"{len(merged)} weights of batch norms are combined into a factor and a summand, without their names"
        remedy = "Give new values through a file (refit_onnx, then OnnxParserRefitter), not by name"
        found.append(Finding("warning", _some(merged), "weight", what, remedy, product))
    if lost:
        what = f"{len(lost)} weights cannot be refitted: the network has none of this name"
        found.append(Finding("warning", _some(lost), "weight", what, "Build the engine again for new values", product))
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _compared(
    report: TensorRTReport,
    model: ir.Model,
    inputs: Mapping[str, Tensor],
    reference: Callable[..., Any] | None,
    outputs: Any,
) -> TensorRTReport:
    """The report with the engines' outputs compared with the expected ones."""
    import torch

    expected = expected_outputs(report.path, model, inputs, reference)
    results = torch.load(outputs, weights_only=True)
    found, checked = parities(model, expected, results, report.product)
    old = report.findings
    if not any(finding.level == "error" for finding in found):
        old = tuple(dataclasses.replace(f, level="warning") if _disputed(f) else f for f in old)
    return dataclasses.replace(report, findings=by_level((*found, *old)), parity=checked)
