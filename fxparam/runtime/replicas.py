"""``torch.nn.DataParallel``: copies of a model for one forward, whose latents are copies on another device.

A replica has no cache: its weights are computed in place from its own latents, once for each forward, so that gradients go
through these to the latents of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from fxparam.errors import FxparamError
from fxparam.program import Site
from fxparam.runtime.modes import autocast_state
from fxparam.runtime.runtime import compute_site
from fxparam.runtime.stats import Stats
from fxparam.tracer.delivery import Inline, binding_of


class ReplicaRuntime:
    """What delivers the weights of one replica.

    Args:
        root: the replica of the live module tree; its children follow.
        sites: the sites of the model.
        stats: the counts of the model.
    """

    def __init__(self, root: nn.Module, sites: Sequence[Site], stats: Stats) -> None:
        self.root, self.sites, self.stats = root, tuple(sites), stats
        self.inline = Inline()
        self._site_of = {alias: site for site in self.sites for aliases in site.aliases for alias in aliases}
        self._local = threading.local()
        self._bound = False

    @contextmanager
    def forward(self) -> Iterator[None]:
        """One forward of the replica."""
        if not self._bound:
            for module in self.root.modules():
                # It would call the module of the model.
                module.__dict__["_compiled_call_impl"] = None
                binding = binding_of(module)
                if binding is not None:
                    binding.bind(self, self.inline)
            self._bound = True
        self.stats.inlined += 1
        outer = getattr(self._local, "values", None)
        self._local.values = {}
        try:
            yield
        finally:
            self._local.values = outer

    def read_weight(self, name: str) -> Tensor:
        """The weight with this dotted name, computed once for a forward, grad mode and autocast state."""
        frame: dict[Any, dict[str, Tensor]] | None = getattr(self._local, "values", None)
        values = {} if frame is None else frame.setdefault((torch.is_grad_enabled(), autocast_state()), {})
        if name not in values:
            values |= compute_site(self.root, self._site_of[name], self._tensor)
        return values[name]

    def lowered(self, name: str, value: Tensor, reader: CodeType) -> Tensor:
        """The weight: a replica casts at each use."""
        return value

    def write_weight(self, name: str, value: Tensor) -> None:
        """Refused.

        Raises:
            FxparamError: always.
        """
        raise FxparamError(f"{name} of a replica cannot be assigned: replicas live for one forward; assign it on the model")

    def compute_all(self) -> Mapping[str, Tensor]:
        """All weights, for compilers."""
        return {name: self.read_weight(name) for name in self._site_of}

    def _tensor(self, name: str) -> Tensor:
        if name in self._site_of:
            return self.read_weight(name)
        path, _, local = name.rpartition(".")
        return getattr(self.root.get_submodule(path), local)
