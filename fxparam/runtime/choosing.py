"""Which parts of a recording become graphs, and what each module of the model got.

From the model down: a module that a graph can show, and whose weight arithmetic the passes can move out, is taken whole; else
its submodules are looked at. A graph that moves nothing out of the call is worth nothing; it is taken only where all are
wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxparam.errors import PassError, TraceError
from fxparam.passes.simplify import Simplify
from fxparam.passes.substitute import Substitute
from fxparam.pipeline import training_pipeline
from fxparam.program import Fragment, Program, Site, run
from fxparam.program.line import HOISTED
from fxparam.spec.names import PARAMETRIZATIONS, named_tensors
from fxparam.tracer.cutting import RecordedBody, cut
from fxparam.tracer.recording import CHOOSING, Call, Recording
from fxparam.tracer.signature import Signature
from fxparam.tracer.statistics import mark_written, running_statistics
from fxparam.tracer.symbolic import check_names


@dataclass(frozen=True)
class Layer:
    """How a module runs.

    Attributes:
        path: its dotted name; empty for the model.
        module: the name of its class.
        layer: ``"symbolic"``, ``"record"`` or ``"export"``, where there is a graph of it; ``"live"`` where it is Python.
        reason: why it is Python, with the source line; or why its graph is not run.
    """

    path: str
    module: str
    layer: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({self.module}): {self.layer}{f', {self.reason}' if self.reason else ''}"


NOTHING_TO_MOVE = "runs as Python: there is no weight arithmetic in it to move out"


class Chooser:
    """Chooses among the calls of a recording.

    Args:
        root: the live module tree.
        sites: its sites, each after those it reads.
        fragments: the graph of each, by its home.
        weights: present values of the computed weights, by all their names.
        everything: whether graphs that move nothing are wanted as well.

    Attributes:
        bodies: what is to be run as a graph.
        whole: the graph of the model, whether it is worth running or not.
        layers: what each module got, by its name.
    """

    def __init__(
        self,
        root: nn.Module,
        sites: Sequence[Site],
        fragments: Mapping[str, Fragment],
        weights: Mapping[str, Tensor],
        *,
        everything: bool,
    ) -> None:
        self.root, self.sites, self.fragments, self.weights = root, sites, fragments, weights
        self.everything = everything
        self.bodies: list[RecordedBody] = []
        self.whole: RecordedBody | None = None
        self.layers: dict[str, Layer] = {}
        self._statistics = running_statistics(root)
        self._graphs: dict[str, dict[Signature, str]] = {}
        self._tensors = {name: row.tensor for row in named_tensors(root) for name in row.aliases}

    def choose(self, recording: Recording) -> None:
        """Go through the calls of a recording from the root down."""
        try:
            check_names(self.root)
        except TraceError as error:
            self.layers[""] = Layer("", type(self.root).__name__, "live", str(error))
            return
        self._visit(recording, recording.root)

    def graph(self, body: RecordedBody) -> fx.Graph:
        """The graph of a body with its weights computed in it."""
        return run(self._program(body), (Substitute(self.fragments), Simplify())).graph

    def _visit(self, recording: Recording, call: Call) -> None:
        if call.path is None:
            # Not of the model: a module of the user's that is made or kept elsewhere.
            self._descend(recording, call)
            return
        if call.path and _is_plain_layer(call.module):
            return
        name = type(call.module).__name__
        try:
            body = cut(recording, call)
            moved = self._moves(body)
        except (TraceError, PassError) as error:
            self.layers.setdefault(call.path, Layer(call.path, name, "live", str(error)))
            self._descend(recording, call)
            return
        if call.path == "":
            self.whole = body
        if reason := self._differs(body):
            self.bodies = [known for known in self.bodies if known.path != body.path]
            self.layers[call.path] = Layer(call.path, name, "live", reason)
            return
        worth = self.everything or moved
        self.layers[call.path] = Layer(call.path, name, "record", "" if worth else NOTHING_TO_MOVE)
        if worth and not any(body.path == known.path and body.signature == known.signature for known in self.bodies):
            self.bodies.append(body)

    def _differs(self, body: RecordedBody) -> str:
        """Why a module cannot be a graph that is called several times in one forward; empty if it can."""
        known = self._graphs.setdefault(body.path, {})
        same = known.setdefault(body.signature, str(body.graph)) == str(body.graph)
        return "" if same else "two calls of it that look the same did not do the same"

    def _descend(self, recording: Recording, call: Call) -> None:
        for inner in call.calls:
            self._visit(recording, inner)

    def _moves(self, body: RecordedBody) -> bool:
        """Whether the passes move anything out of a body that is no weight of a site.

        Raises:
            TraceError: they cannot be applied to it.
            PassError: the same.
        """
        program = run(self._program(body), training_pipeline(self.fragments, self.weights, model=True))
        return any(name.startswith(f"{HOISTED}.") for name in program.values)

    def _program(self, body: RecordedBody) -> Program:
        mark_written(body.graph, self._statistics)
        reads = {str(node.target) for node in body.graph.nodes if node.op == "get_attr"}
        sites = self._behind(reads)
        opaque: dict[str, Any] = {site.home: self.root.get_submodule(site.home) for site in sites}
        captured = {name: tensor for site in sites for name, tensor in self.fragments[site.home].captured.items()}
        return Program(body.graph, {**self._tensors, **captured, **body.tensors}, {**body.modules, **opaque}, sites)

    def _behind(self, names: set[str]) -> tuple[Site, ...]:
        """The sites that compute these, and those that they read, in order."""
        wanted, chosen = set(names), []
        for site in reversed(self.sites):
            if not wanted.isdisjoint(alias for aliases in site.aliases for alias in aliases):
                chosen.append(site)
                wanted.update(site.reads)
        return tuple(reversed(chosen))


def _is_plain_layer(module: nn.Module) -> bool:
    """A layer of PyTorch's, without children but the maps of its weights: there is nothing of the user's in it."""
    childless = type(module).__module__.startswith("torch.nn.modules.") and not set(module._modules) - {PARAMETRIZATIONS}
    return childless or isinstance(module, CHOOSING)
