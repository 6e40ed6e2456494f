"""What was recorded of a model: the graphs, what each module got, and which calls are still to be recorded."""

from __future__ import annotations

from typing import Any

import torch

from fxparam.errors import TraceError
from fxparam.runtime.choosing import Chooser, Layer
from fxparam.tracer.cutting import RecordedBody
from fxparam.tracer.signature import Signature, flatten, signature_of

MAX_RECORDINGS = 8
"""How many calls are recorded in one kind of state."""


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
