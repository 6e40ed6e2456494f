"""A model with what a script holds beside it: optimizers, losses that wait for their backward, hooks, a copy."""

# mypy: disable-error-code="operator,union-attr,arg-type,attr-defined,misc", warn-unused-ignores=False

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from runtime.machine.models import DTYPE, N, noise
from torch import Tensor, nn


@dataclass(eq=False)
class Base:
    """Names are those of the transformed model.

    Attributes:
        model: the model.
        own: the model's own name for a tensor.
        read: one weight of the model.
        read_all: its weights by name.
        dtype: of the parameters and of what goes in.
        pending: for each forward that waits for its backward, its partial losses and their sum.
        deferred: losses that were made inside ``defer_backward`` and wait for their backward.
        autocast: whether everything happens under autocast, for now.
    """

    model: nn.Module
    own: Callable[[str], str] = str
    read: Callable[[Any, str], Tensor] = lambda model, name: attrgetter(name)(model)
    read_all: Callable[[Any], dict[str, Tensor]] = lambda model: model.weights()
    dtype: torch.dtype = DTYPE
    pending: list[list[Tensor]] = field(default_factory=list)
    deferred: list[Tensor] = field(default_factory=list)
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    spare: tuple[nn.Module, dict[str, torch.optim.Optimizer]] | None = None
    autocast: bool = False

    def run(self, action: str, *args: Any) -> Any:
        """One of the actions of this world, by its name."""
        with autocast(self.autocast):
            return getattr(self, action)(*args)

    # Looking.

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters in one order for all worlds."""
        return sorted((name.replace("/", "."), parameter) for name, parameter in self.model.named_parameters())

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named()]

    def parameter(self, at: int) -> tuple[str, nn.Parameter]:
        named = self.named()
        return named[at % len(named)]

    def latents(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named() if "parametrizations." in name]

    def state(self) -> dict[str, Any]:
        """All that a script can see without reading a weight."""
        found: dict[str, Any] = {}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            name = name.replace("/", ".")
            found |= {name: tensor, f"{name}.grad": tensor.grad, f"{name}.requires_grad": tensor.requires_grad}
        return {name: found[name] for name in sorted(found)} | {
            "training": self.model.training,
            "fired": dict(sorted(self.fired.items())),
        }

    def clean(self) -> None:
        """After an error in a backward: how far it got is not defined."""
        for model in (self.model, *(() if self.spare is None else self.spare[:1])):
            for parameter in model.parameters():
                parameter.grad = None

    # For the actions.

    def noise(self, seed: int, *shape: int) -> Tensor:
        return noise(seed, *shape, dtype=self.dtype)

    def input(self, seed: int) -> Tensor:
        return self.noise(seed, 3, N)

    def losses(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        parts = [output.square().sum() for output in outputs]
        return [*parts, torch.stack([part.to(self.dtype) for part in parts]).sum()]

    def loss(self, seed: int) -> Tensor:
        """All of one forward."""
        return self.losses(self.model(self.input(seed)))[-1]

    def wait(self, losses: list[Tensor]) -> None:
        """These may have their backward later."""
        self.pending = [*self.pending[-4:], losses]

    def taken(self, at: int, keep: bool) -> list[Tensor]:
        at %= len(self.pending)
        return self.pending[at] if keep else self.pending.pop(at)

    def deferring(self, really: bool = True) -> AbstractContextManager[None]:
        return self.model.defer_backward() if really and hasattr(self.model, "defer_backward") else nullcontext()

    def trained_or_not(self) -> Iterator[nn.Parameter]:
        return iter(self.parameters())


def grad_mode(mode: str) -> AbstractContextManager[Any]:
    return torch.no_grad() if mode == "no_grad" else torch.inference_mode() if mode == "inference" else nullcontext()


def autocast(enabled: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def in_a_thread(call: Callable[[], Any]) -> Any:
    """What a call returns that another thread makes, while this one waits."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()
