"""Running recorded graphs in place of the modules they were recorded of, and recording what has none.

The model is recorded at its first call of each kind: train or eval, with or without gradient, each structure and shape of its
arguments, up to a limit. That call runs as it is, only slower. A later call of a module with a graph of the same signature runs
the graph; any other runs the module.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from fxparam.errors import TraceError
from fxparam.runtime.choosing import Chooser, Layer
from fxparam.runtime.plan import Plan
from fxparam.tracer.cutting import RecordedBody
from fxparam.tracer.delivery import WeightReader
from fxparam.tracer.looking import looking
from fxparam.tracer.recording import Recorder
from fxparam.tracer.signature import Signature, flatten, signature_of

MAX_RECORDINGS = 8
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


class Records:
    """What was recorded of a model in one kind of state.

    Attributes:
        bodies: the graphs to run.
        whole: graphs of the model as a whole, whether they are run or not.
        layers: what each module got.
    """

    def __init__(self) -> None:
        self.bodies: tuple[RecordedBody, ...] = ()
        self.whole: tuple[RecordedBody, ...] = ()
        self.layers: dict[str, Layer] = {}
        self._seen: set[Signature] = set()
        self._closed: set[tuple[bool, bool]] = set()
        self._count = 0

    def wants(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call is to be recorded."""
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if self._count >= MAX_RECORDINGS or modes in self._closed:
            return False
        if not all(body.watch.holds() for body in self.bodies):
            self.drop_outdated()
        leaves, structure = flatten((args, kwargs))
        # Arguments that cannot be guarded for are no reason not to look at the parts of the model.
        plain = [leaf if _is_plain(leaf) else type(leaf) for leaf in leaves]
        signature = signature_of(plain, structure, shapes=True)
        if signature in self._seen:
            return False
        self._seen.add(signature)
        self._count += 1
        return True

    def take(self, chooser: Chooser) -> bool:
        """Keep what was chosen; returns whether there are new bodies to run."""
        self.layers = {**self.layers, **chooser.layers}
        if chooser.whole is not None:
            self.whole = (*self.whole, chooser.whole)
        self.bodies = (*self.bodies, *chooser.bodies)
        if not chooser.bodies:
            # Nothing to move out: other shapes will not bring anything either.
            self._closed.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return bool(chooser.bodies)

    def add(self, body: RecordedBody) -> None:
        """Keep a graph of the model that was not recorded but exported."""
        self.bodies, self.whole = (*self.bodies, body), (*self.whole, body)
        self.layers = {**self.layers, "": Layer("", type(body.module).__name__, "export")}

    def drop_outdated(self) -> None:
        """Forget bodies whose Python state is another one now."""
        self.bodies = tuple(body for body in self.bodies if body.watch.holds())
        self.whole = tuple(body for body in self.whole if body.watch.holds())
        self._seen.clear()
        self._closed.clear()


def _is_plain(leaf: Any) -> bool:
    try:
        signature_of([leaf], flatten(0)[1], shapes=True)
    except TraceError:
        return False
    return True


def _under_saved_tensor_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class Running(Protocol):
    """What a region asks of the runtime: the plan of the forward that is running in this thread, if there is one."""

    def running_plan(self) -> Plan | None:
        """The plan, or None outside of a forward and where weights are computed in place."""


class Region:
    """Stands at a module, where PyTorch keeps the compiled call of one, and runs its recorded graph where one fits."""

    def __init__(self, module: nn.Module, path: str, regions: Regions) -> None:
        self.module, self.path, self.regions = module, path, regions

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        if torch.compiler.is_compiling() or _under_saved_tensor_hooks():
            # A checkpoint runs the module again in its backward, outside of any forward: both times must be the same.
            return self.module._call_impl(*args, **kwargs)
        plan = self.regions.running_plan()
        found = None if plan is None else plan.match(self.path, args, kwargs)
        if found is None:
            return self.module._call_impl(*args, **kwargs)
        recorded, leaves = found
        return recorded.run(leaves)


class Regions:
    """The recorded parts of one live module tree.

    Args:
        root: the live module tree.
        running: knows the forward that is running.
        reader: what weights are read of.
    """

    def __init__(self, root: nn.Module, running: Running, reader: WeightReader) -> None:
        self.root, self.running, self.reader = root, running, reader
        self.last_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._local = threading.local()

    def running_plan(self) -> Plan | None:
        """The plan of the forward that is running in this thread; None while it is recorded."""
        return None if getattr(self._local, "recording", False) else self.running.running_plan()

    def can_record(self) -> bool:
        """Whether nothing else looks at what runs now: another mode, a profiler, hooks for all modules, a backward."""
        if getattr(self._local, "recording", False) or torch.compiler.is_compiling() or _under_saved_tensor_hooks():
            return False
        if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack() or sys.getprofile() is not None:
            return False
        if torch._C._current_graph_task_id() != -1 or torch._C._functorch.maybe_current_level() is not None:
            return False
        return not any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)

    def record(self, chooser: Chooser, args: tuple[Any, ...], kwargs: dict[str, Any], random: frozenset[str]) -> Any:
        """Call the model, which is recorded meanwhile; returns what it returns.

        Args:
            chooser: chooses from the recording.
            args: positional arguments of the call.
            kwargs: keyword arguments.
            random: names of the weights that are drawn anew at each read.
        """
        self.last_inputs = pytree.tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs))
        with self._recording():
            output, recording = Recorder(self.root, self.reader, random).run(args, kwargs)
        chooser.choose(recording)
        return output

    def record_ahead(self, chooser: Chooser, args: tuple[Any, ...], kwargs: dict[str, Any], random: frozenset[str]) -> None:
        """The same with given inputs and without a trace of it: buffers, generators and attributes are as they were."""
        self.last_inputs = (args, kwargs)
        with self._recording(), looking(self.root):
            _, recording = Recorder(self.root, _Fixed(chooser.weights), random).run(args, kwargs)
            chooser.choose(recording)

    def install(self, bodies: tuple[RecordedBody, ...]) -> None:
        """From now on calls of these modules look for a graph."""
        for body in bodies:
            if body.path and body.module.__dict__.get("_compiled_call_impl") is None:
                body.module.__dict__["_compiled_call_impl"] = Region(body.module, body.path, self)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        self._local.recording = True
        try:
            yield
        finally:
            self._local.recording = False


class _Fixed:
    """Weights that are there, for a look at the model outside of any step."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def read_weight(self, name: str) -> Tensor:
        """The weight with this name."""
        return self.weights[name]

    def write_weight(self, name: str, value: Tensor) -> None:
        """Nothing: what a look does is undone."""

    def lowered(self, name: str, value: Tensor, reader: Any) -> Tensor:
        """The weight as it is."""
        return value
