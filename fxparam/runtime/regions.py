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
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from fxparam.errors import TraceError
from fxparam.program import Site
from fxparam.program.parts import part_of
from fxparam.runtime.choosing import Chooser, Layer
from fxparam.runtime.entry import Entry
from fxparam.runtime.plan import Plan
from fxparam.runtime.planner import Planner
from fxparam.tracer.cutting import RecordedBody
from fxparam.tracer.looking import looking, present_values
from fxparam.tracer.recording import Recorder
from fxparam.tracer.site import SiteModule

_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def _under_saved_tensor_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with tensors of their own: a forward may write to what it is given."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(Tensor, copy, (args, kwargs))


class Running(Protocol):
    """What regions ask of the runtime."""

    root: nn.Module

    @property
    def plan(self) -> Plan:
        """The plan for the present kind of state."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the model, each after those it reads."""

    def running_entry(self) -> Entry | None:
        """What the forward reads that is running in this thread; None outside of one, and where it computes in place."""

    def registered(self, name: str) -> Tensor:
        """A parameter or buffer, by its dotted name."""

    def follow_plan(self, plan: Plan) -> bool:
        """Read what was computed by a plan that yields the same; False: there is none."""

    def drop_entries(self) -> None:
        """Compute the weights anew at the next read."""

    def read_weight(self, name: str) -> Any:
        """A weight, now."""

    def lowered(self, name: str, value: Any, reader: CodeType) -> Any:
        """What to hand to this reader under autocast."""

    def write_weight(self, name: str, value: Tensor) -> None:
        """Set a weight through the right inverse of its site."""


class Region:
    """Stands at a module, where PyTorch keeps the compiled call of one, and runs its recorded graph where one fits."""

    of_fxparam = True

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
        runtime: the runtime of the tree.
        planner: makes its plans.

    Attributes:
        last_inputs: positional and keyword arguments of the call that was recorded last.
    """

    def __init__(self, runtime: Running, planner: Planner) -> None:
        self.runtime, self.planner = runtime, planner
        self.last_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._local = threading.local()
        for module in runtime.root.modules():
            # There from the beginning: what watches a module counts its attributes.
            module.__dict__.setdefault("_compiled_call_impl", None)

    # --- running

    def running_plan(self) -> Plan | None:
        """The plan of the forward that is running in this thread; None while it is recorded."""
        entry = None if getattr(self._local, "recording", False) else self.runtime.running_entry()
        return None if entry is None else entry.plan

    def call(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model: its recorded graph where one fits, else its Python, which is recorded where that is wanted."""
        found = plan.match("", args, kwargs)
        if found is not None:
            recorded, leaves = found
            return recorded.run(leaves)
        entry = self.runtime.running_entry()
        if entry is None or not self._wanted(args, kwargs):
            return self.runtime.root(*args, **kwargs)
        chooser = self.planner.choosing(plan, plan.by_all_names(entry.published.values))
        self.last_inputs = _copies(args, kwargs)
        with self._recording():
            output, recording = Recorder(self.runtime.root, self.runtime, self._random_names(plan)).run(args, kwargs)
        chooser.choose(recording)
        self._take(chooser)
        return output

    # --- recording

    def record_ahead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call with these inputs without leaving a mark: buffers, generators and attributes are as they were.

        Only what a forward writes into parameters stays.
        """
        plan, root = self.runtime.plan, self.runtime.root
        if plan.arguments(args, kwargs) is not None or self.planner.record == "nothing":
            return
        self.planner.records.wants(args, kwargs)
        chooser = self.planner.choosing(plan, self._present_weights())
        self.last_inputs = (args, kwargs)
        args, kwargs = _copies(args, kwargs)
        with self._recording(), looking(root):
            _, recording = Recorder(root, _Fixed(chooser.weights), self._random_names(plan)).run(args, kwargs)
            chooser.choose(recording)
        self._take(chooser)

    def add(self, body: RecordedBody) -> None:
        """Run this graph of the model for calls that fit it, in the present mode."""
        self.planner.add(body)
        self.runtime.drop_entries()

    def _wanted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self.planner.record != "nothing" and self._undisturbed() and self.planner.records.wants(args, kwargs)

    def _undisturbed(self) -> bool:
        """Whether nothing else looks at what runs now: another mode, a profiler, hooks for all modules, a backward."""
        if getattr(self._local, "recording", False) or torch.compiler.is_compiling() or _under_saved_tensor_hooks():
            return False
        if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack() or sys.getprofile() is not None:
            return False
        if torch._C._current_graph_task_id() != -1 or torch._C._functorch.maybe_current_level() is not None:
            return False
        return not any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)

    def _random_names(self, plan: Plan) -> frozenset[str]:
        return frozenset(name for name, site in self.planner.site_of.items() if site.home in plan.volatile)

    def _present_weights(self) -> dict[str, Tensor]:
        """All computed weights by all their names, as they are now."""
        weights: dict[str, Tensor] = {}
        for site in self.runtime.sites:
            module: SiteModule = self.runtime.root.get_submodule(site.home)  # type: ignore[assignment]
            reads = tuple(weights[read] if read in weights else self.runtime.registered(read) for read in site.reads)
            for aliases, value in zip(site.aliases, present_values(module, reads), strict=True):
                weights |= dict.fromkeys(aliases, value)
        return weights

    def _take(self, chooser: Chooser) -> None:
        """Run what was chosen from now on."""
        if not self.planner.extend(chooser):
            return
        for body in chooser.bodies:
            if body.path and body.module.__dict__.get("_compiled_call_impl") is None:
                body.module.__dict__["_compiled_call_impl"] = Region(body.module, body.path, self)
        plan = self.runtime.plan
        # Computing weights once more would advance what has a state; in training the next step does it anyway.
        again = not self.runtime.root.training or len(plan.repeatable) == len(plan.components)
        if not self.runtime.follow_plan(plan) and again:
            self.runtime.drop_entries()

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        self._local.recording = True
        try:
            yield
        finally:
            self._local.recording = False

    # --- what is known

    @property
    def layers(self) -> Mapping[str, Layer]:
        """What each module got that was recorded, by its name."""
        return self.planner.records.layers

    def whole_graph(self) -> fx.Graph:
        """The graph of the model with its weights computed in it.

        Raises:
            TraceError: there is none; the message says why and what to type.
        """
        plan, records = self.runtime.plan, self.planner.records
        if plan.traced is not None:
            return part_of(plan.program.graph, 0) if plan.recorded else plan.program.graph
        if records.whole:
            return self.planner.choosing(plan, {}).graph(records.whole[-1])
        recorded = records.layers.get("")
        remedy = "" if recorded else ", or call the model once, or give transform(..., example_inputs=(...))"
        reason = f"{plan.why_live}; recorded: {recorded.reason}" if recorded else plan.why_live
        raise TraceError(
            f"there is no graph of this model: {reason}. Its weights are in model.prologue; for a graph of all of it type "
            f"fxp.fold(model, example_inputs=(...)){remedy if self.planner.record != 'nothing' else ''}"
        )


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
