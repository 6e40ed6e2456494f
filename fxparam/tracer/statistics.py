"""Running statistics: buffers that PyTorch's normalizations write in training without moving their version."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fxparam.spec.names import first_names


def running_statistics(root: nn.Module) -> frozenset[str]:
    """The names of the statistics that some call of the model may write in the modes its modules are in."""
    norms = [module for module in root.modules() if isinstance(module, _NormBase) and module.training]
    registries = [norm._buffers for norm in norms]
    tensors = [one for held in registries for name in ("running_mean", "running_var") if (one := held.get(name)) is not None]
    if not tensors:
        return frozenset()
    names = first_names(root)
    return frozenset(names[id(tensor)] for tensor in tensors if id(tensor) in names)


def mark_written(graph: fx.Graph, names: Collection[str]) -> None:
    """Keep what is computed from these tensors in the call: nothing tells when they are written."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in names:
            node.meta["written"] = "normalization writes it in training"
