"""Components of a prologue, and which of them share autograd nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxparam.tracer.hazards import nodes_behind

_MAX_GROUP = 64
_MAX_GROUP_ELEMENTS = 2**20
"""How much shares a node: gradients of a group arrive together, and those of large weights should not wait."""


@dataclass(frozen=True, eq=False)
class Component:
    """A connected part of the prologue: no other part shares a source or a value with it.

    Attributes:
        sources: positions of the tensors it reads.
        values: positions of the values it yields.
    """

    sources: tuple[int, ...]
    values: tuple[int, ...]


class Group:
    """Components whose values cross the bridge in the same nodes.

    Args:
        components: the components, by their numbers.
        frees: whether their graphs save tensors; PyTorch lets a graph that saved nothing run again. The same for all of them.

    Attributes:
        sources: positions of the tensors they read.
        values: positions of the values they yield.
        part: for each of these, the number of the component that yields it.
    """

    def __init__(self, components: Mapping[int, Component], *, frees: bool) -> None:
        self.components, self.frees = components, frees
        self.sources = tuple(at for component in components.values() for at in component.sources)
        self.values = tuple(at for component in components.values() for at in component.values)
        self.part = tuple(number for number, component in components.items() for _ in component.values)

    def reached(self, gradients: Sequence[Tensor | None]) -> set[int]:
        """The numbers of the components that these gradients of the values belong to."""
        return {part for part, gradient in zip(self.part, gradients, strict=True) if gradient is not None}


def grouped(components: Sequence[Component], values: Sequence[Tensor]) -> dict[int, Group]:
    """Groups of the components that train, neighbours together, by the number of the component.

    Args:
        components: the parts of the prologue.
        values: what it yielded, with its graph.
    """
    result: dict[int, Group] = {}
    run: dict[int, Component] = {}
    kind, size = (False, torch.device("cpu")), 0
    for number, component in enumerate(components):
        own = [values[at] for at in component.values]
        if not any(value.requires_grad for value in own):
            continue
        own_kind, own_size = (_saves(own), own[0].device), sum(value.numel() for value in own)
        if own_kind != kind or len(run) == _MAX_GROUP or size + own_size > _MAX_GROUP_ELEMENTS:
            result |= dict.fromkeys(run, Group(run, frees=kind[0]))
            run, kind, size = {}, own_kind, 0
        run[number] = component
        size += own_size
    return result | dict.fromkeys(run, Group(run, frees=kind[0]))


def _saves(values: Sequence[Tensor]) -> bool:
    """Whether any node behind these values saved a tensor for its backward; nodes of Python functions are taken to."""
    return any(
        isinstance(node, torch.autograd.function.BackwardCFunction) or any(name.startswith("_raw_saved_") for name in dir(node))
        for node in nodes_behind(values)
    )
