"""The names of a model's tensors: one row for each tensor, all its aliases, whatever ties there are.

A *tie* is by storage, not by identity: the legacy ``weight_norm`` on one of two tied weights leaves two ``Parameter``
objects on one storage, and these are still one weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

PARAMETRIZATIONS = "parametrizations"
"""The child under which an owner keeps its parametrizations, as in ``torch.nn.utils.parametrize``."""


@dataclass(frozen=True, eq=False)
class NamedTensor:
    """One tensor of a model.

    Attributes:
        name: its first dotted name, in registration order.
        aliases: every dotted name, the first included.
        places: the module and local name behind each alias.
        tensor: the value; for a computed weight, its value now.
        is_buffer: whether the model holds it as a buffer.
        computed: whether a parametrization computes it already.
    """

    name: str
    aliases: tuple[str, ...]
    places: tuple[tuple[nn.Module, str], ...]
    tensor: Tensor
    is_buffer: bool
    computed: bool = False

    @property
    def is_latent(self) -> bool:
        """Whether the tensor stands behind a weight (its name spells out ``parametrizations``)."""
        return PARAMETRIZATIONS in self.name.split(".")


def join(prefix: str, name: str) -> str:
    """The dotted name of ``name`` below ``prefix``."""
    return f"{prefix}.{name}" if prefix else name


def split(name: str) -> tuple[str, str]:
    """A dotted name as (module path, local name)."""
    path, _, local = name.rpartition(".")
    return path, local


def named_tensors(model: nn.Module, computed: Mapping[tuple[int, str], Tensor] | None = None) -> tuple[NamedTensor, ...]:
    """All parameters and buffers of a model, ties merged, in registration order, parameters before buffers.

    Args:
        model: any module tree.
        computed: the weights that parametrizations compute already, by (``id`` of the owner, local name).
    """
    rows: dict[object, list[tuple[str, nn.Module, str, Tensor, bool, bool]]] = {}
    for row in (*_places(model, computed or {}, buffers=False), *_places(model, computed or {}, buffers=True)):
        rows.setdefault(_tie_key(row[3]), []).append(row)
    return tuple(
        NamedTensor(
            name=group[0][0],
            aliases=tuple(name for name, *_ in group),
            places=tuple((owner, local) for _, owner, local, *_ in group),
            tensor=group[0][3],
            is_buffer=all(row[4] for row in group),
            computed=any(row[5] for row in group),
        )
        for group in rows.values()
    )


def first_names(model: nn.Module) -> dict[int, str]:
    """The first dotted name of every registered tensor object, by ``id``; tied objects have the same name."""
    return {
        id(registry[local]): row.name
        for row in named_tensors(model)
        for owner, local in row.places
        for registry in (owner._parameters, owner._buffers)
        # Modules of TorchScript have registries of their own, which are no dictionaries.
        if local in dict(registry.items())
    }


def _places(
    model: nn.Module, computed: Mapping[tuple[int, str], Tensor], *, buffers: bool
) -> Iterator[tuple[str, nn.Module, str, Tensor, bool, bool]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if not buffers:
            for (owner, local), tensor in computed.items():
                if owner == id(module):
                    yield join(path, local), module, local, tensor, False, True
        registry = module._buffers if buffers else module._parameters
        for local, value in registry.items():
            if value is not None:
                yield join(path, local), module, local, value, buffers, False


def _tie_key(tensor: Tensor) -> object:
    # A lazy, an empty or a storage-less tensor has no address to compare: it is tied only to itself.
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.numel() == 0:
        return id(tensor)
    if tensor.device.type == "meta":
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
