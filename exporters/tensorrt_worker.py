"""A program of its own: asks TensorRT about one ONNX file and writes the answer as JSON. It imports nothing of fxparam.

It runs in a process of its own because TensorRT is a native library: it prints to the process's standard error, it keeps
one logger for a process, and a fault in it ends the process. ``fxparam.exporters.tensorrt`` starts it, limits its time and
reads its answer, which is written anew after each step, so that a fault in one step does not cost those before.

Request (JSON on standard input): ``model`` (path), ``answer`` (path to write), ``rung`` (``parse``, ``build`` or ``run``),
``weights`` (names to look up), ``profile`` (input -> smallest, usual and largest shape), ``capabilities`` (names such as
``SM89``), ``inputs`` and ``outputs`` (files of tensors by name, for ``run``).

Written against the Python API of TensorRT 10 and TensorRT-RTX 1, which is the same in all that is used here.
"""

from __future__ import annotations

import ctypes
import glob
import importlib
import importlib.util
import json
import os
import sys
import time
from typing import Any

PACKAGES = ("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt")
"""Names under which the Python API is installed, in the order of trial: TensorRT-RTX needs no GPU to parse and build."""

LIBRARIES = {"onnxruntime_ep_nv_tensorrt_rtx": ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")}
"""Package -> shared libraries in it, to be loaded in this order: what the bindings of TensorRT-RTX are linked with."""

LONGEST = 300
"""Characters kept of an error of the builder: some go on with the whole history of a fault."""


class Refused(Exception):
    """The question cannot be put to TensorRT; the message is for the user."""


def load(order: tuple[str, ...]) -> Any:
    """Import TensorRT under the first of these names that works."""
    errors = []
    for name in order:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            versions = _preload() if "rtx" in name else ()
            module = importlib.import_module(name)
        except Exception as error:  # a missing library, a symbol that another version has
            errors.append(f"{name}: {error}")
            continue
        if all(f"{module.__version__}.".startswith(f"{version}.") for version in versions):
            return module
        errors.append(f"{name} is version {module.__version__}, the libraries are {', '.join(versions)}; install matching ones")
    raise Refused("TensorRT cannot be imported: " + ("; ".join(errors) or f"none of {', '.join(order)} is installed"))


def _preload() -> tuple[str, ...]:
    """Load the libraries that the bindings of TensorRT-RTX expect to find loaded; the versions of those loaded."""
    if importlib.util.find_spec("tensorrt_rtx_libs"):  # the bindings load these themselves
        return ()
    versions = set()
    for package, patterns in LIBRARIES.items():
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations if spec is not None else None) or []
        for pattern in patterns if folders else ():
            for path in sorted(glob.glob(os.path.join(folders[0], pattern))):
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
                versions.add(path.rsplit(".so.", 1)[1])
    return tuple(sorted(versions))


class Session:
    """One question: the parsed network, and what was learned so far (``answer``)."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.answer: dict[str, Any] = {"reached": "", "errors": [], "warnings": [], "seconds": {}}
        # What runs on the GPU at hand must fit it: TensorRT itself serves more kinds than TensorRT-RTX.
        order = tuple(sorted(PACKAGES, key="tensorrt".__ne__)) if request["rung"] == "run" else PACKAGES
        self.trt = trt = load(order)
        self.answer["product"] = f"{'TensorRT-RTX' if 'rtx' in trt.__name__ else 'TensorRT'} {trt.__version__}"
        self.messages: list[tuple[str, str]] = []
        self.logger = _logger(trt, self.messages)

    def save(self) -> None:
        """Write what is known so far, whole or not at all."""
        self.answer["peak_bytes"] = _peak_bytes()
        path = self.request["answer"]
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(self.answer, file)
        os.replace(f"{path}.part", path)

    def parse(self) -> bool:
        """Read the model with the real parser; also which weights the network knows by name, for refitting."""
        trt, start = self.trt, time.perf_counter()
        try:
            self.builder = trt.Builder(self.logger)
        except Exception as error:  # TensorRT, unlike TensorRT-RTX, wants a GPU even for this
            raise Refused(f"{self.answer['product']} cannot start here: {self.last_error()} ({error})") from error
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # types as in the file
        self.network = self.builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(self.network, self.logger)
        done = parser.parse_from_file(self.request["model"])
        self.answer["seconds"]["parse"] = time.perf_counter() - start
        self.answer["errors"] = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        self.answer["warnings"] = [text for severity, text in self.messages if severity == "WARNING"]
        if not done and not self.answer["errors"]:
            self.answer["errors"] = [{"node": "", "op": "", "what": self.last_error()}]
        if done:
            self.answer["reached"] = "parse"
            self.answer["refittable"] = self.known_weights()
        self.save()
        return bool(done)

    def known_weights(self) -> list[str]:
        """The weights that the network has under their own names, hence the names a refitter takes."""
        names = []
        for name in self.request["weights"]:
            if self.network.mark_weights_refittable(name):
                names.append(name)
                self.network.unmark_weights_refittable(name)
        return names

    def build(self, *, refit: bool = False) -> Any:
        """A serialized engine, ``None`` where TensorRT refuses (the reason is in the answer)."""
        trt, start = self.trt, time.perf_counter()
        config = self.builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32: TF32 rounds the factors of products to 10 bits
        if refit:
            config.set_flag(trt.BuilderFlag.REFIT)
        capabilities = self.request["capabilities"]
        if capabilities and not hasattr(config, "set_compute_capability"):
            raise Refused(f"{self.answer['product']} builds for the GPU at hand only; leave capabilities out")
        if capabilities:
            config.num_compute_capabilities = len(capabilities)
            for i, name in enumerate(capabilities):
                config.set_compute_capability(self.capability(name), i)
        if self.request["profile"]:
            profile = self.builder.create_optimization_profile()
            for name, shapes in self.request["profile"].items():
                profile.set_shape(name, *map(tuple, shapes))
            config.add_optimization_profile(profile)
        self.messages.clear()
        engine = self.builder.build_serialized_network(self.network, config)
        self.answer["seconds"]["refittable build" if refit else "build"] = time.perf_counter() - start
        if engine is None:
            self.answer["refit_build_error" if refit else "build_error"] = self.last_error()
        elif not refit:
            self.answer["reached"], self.answer["engine_bytes"] = "build", engine.nbytes
        self.save()
        return engine

    def capability(self, name: str) -> Any:
        """The member of ``ComputeCapability``, by its name."""
        members = self.trt.ComputeCapability.__members__
        if name not in members:
            known = ", ".join(sorted(set(members) - {"NONE", "CURRENT"}))
            raise Refused(f"compute capability {name!r}; {self.answer['product']} has {known}")
        return members[name]

    def last_error(self) -> str:
        """The last error that TensorRT logged."""
        errors = [text for severity, text in self.messages if severity in ("ERROR", "INTERNAL_ERROR")]
        last = errors[-1].strip() if errors else "TensorRT gave no reason"
        return last if len(last) <= LONGEST else f"{last[:LONGEST]}..."

    def run(self, serialized: Any) -> None:
        """Run the engine on the given inputs; then a refittable one, before and after refitting from the same file.

        The release notes of TensorRT 11.3 know of refittable engines that drop a bias, hence a look at each.
        """
        import torch

        inputs = torch.load(self.request["inputs"], weights_only=True)
        runtime = self.trt.Runtime(self.logger)
        results = {"engine": self.outputs(self.engine(runtime, serialized), inputs)}
        refittable = self.build(refit=True)
        if refittable is not None:
            engine = self.engine(runtime, refittable)
            results["refittable engine"] = self.outputs(engine, inputs)
            refitter = self.trt.Refitter(engine, self.logger)
            self.answer["refitter_names"] = list(refitter.get_all_weights())
            parser = self.trt.OnnxParserRefitter(refitter, self.logger)
            if parser.refit_from_file(self.request["model"]) and refitter.refit_cuda_engine():
                results["refitted engine"] = self.outputs(engine, inputs)
            else:
                self.answer["refit_build_error"] = f"the engine cannot be refitted from the file: {self.last_error()}"
        torch.save(results, self.request["outputs"])
        self.answer["reached"] = "run"
        self.save()

    def engine(self, runtime: Any, serialized: Any) -> Any:
        """The engine on the GPU at hand."""
        engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise Refused(f"the engine was built and cannot be loaded on this GPU: {self.last_error()}")
        return engine

    def outputs(self, engine: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Name -> output tensor on the CPU, for inputs by name."""
        import torch

        trt, context = self.trt, engine.create_execution_context()
        if context is None:
            raise Refused(f"the engine cannot be prepared on this GPU: {self.last_error()}")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        given = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        stream, held, results = torch.cuda.Stream(), [], {}
        with torch.cuda.stream(stream):
            for name in given:
                tensor = inputs[name].to(_torch_dtype(trt, engine.get_tensor_dtype(name))).contiguous()
                host = engine.get_tensor_location(name) == trt.TensorLocation.HOST  # values that shapes depend on
                held.append(tensor if host else tensor.cuda())
                accepted = context.set_input_shape(name, tuple(tensor.shape))
                if not accepted or not context.set_tensor_address(name, held[-1].data_ptr()):
                    raise Refused(
                        f"the engine does not take the input {name!r} of shape {tuple(tensor.shape)}: {self.last_error()}"
                    )
            if missing := context.infer_shapes():
                raise Refused(f"the engine needs more to know its shapes: {', '.join(missing)}")
            for name in (n for n in names if n not in given):
                shape = tuple(context.get_tensor_shape(name))
                if min(shape, default=0) < 0:
                    raise Refused(f"the shape of the output {name!r} depends on values, {shape}; such outputs are not compared")
                dtype = _torch_dtype(trt, engine.get_tensor_dtype(name))
                results[name] = torch.zeros(shape, dtype=dtype, device="cuda")
                held.append(results[name] if results[name].numel() else torch.zeros(1, dtype=dtype, device="cuda"))
                context.set_tensor_address(name, held[-1].data_ptr())
            stream.synchronize()
            if not context.execute_async_v3(stream.cuda_stream):
                raise Refused(f"the engine failed to run: {self.last_error()}")
            stream.synchronize()
        return {name: tensor.cpu() for name, tensor in results.items()}


def _logger(trt: Any, messages: list[tuple[str, str]]) -> Any:
    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                messages.append((severity.name, text))

    return Collector()


def _parser_error(error: Any) -> dict[str, str]:
    what = error.desc().strip()
    code = str(error.code()).rsplit(".", 1)[-1]
    if what in ("", "false"):  # an operator with no importer: the failed condition is all that it says
        what = "the parser does not support it"
    return {"node": error.node_name(), "op": error.node_operator(), "what": f"{what} ({code})"}


def _torch_dtype(trt: Any, dtype: Any) -> Any:
    import torch

    names = {
        "FLOAT": "float32",
        "HALF": "float16",
        "BF16": "bfloat16",
        "INT8": "int8",
        "UINT8": "uint8",
        "INT32": "int32",
        "INT64": "int64",
        "BOOL": "bool",
        "FP8": "float8_e4m3fn",
    }
    if dtype.name not in names:
        raise Refused(f"an input or output of type {dtype.name}, which PyTorch does not have")
    return getattr(torch, names[dtype.name])


def _peak_bytes() -> int | None:
    """The most memory this process ever had, where the system says."""
    # Not resource.getrusage: on Linux its maximum includes what the process that started this one had.
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    session = None
    try:
        session = Session(request)
        if not session.parse() or request["rung"] == "parse":
            return
        serialized = session.build()
        if serialized is not None and request["rung"] == "run":
            session.run(serialized)
    except Refused as refusal:
        if session is None:
            with open(request["answer"], "w", encoding="utf-8") as file:
                json.dump({"refused": str(refusal)}, file)
        else:
            session.answer["refused"] = str(refusal)
            session.save()


if __name__ == "__main__":
    main()
