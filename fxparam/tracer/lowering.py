"""Which readers of a weight use it only where autocast computes in low precision.

Autocast keeps the casts of leaves and of nothing else: a computed weight that is read fifty times in a forward is cast fifty
times. To such readers the cast can be handed instead, once for a forward.
"""

from __future__ import annotations

import operator
from types import CodeType

import torch
from torch import fx, nn
from torch.nn import functional as F

_LAYERS = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.RNNCell, nn.LSTMCell, nn.GRUCell),
)

LOWERING_CODE: frozenset[CodeType] = frozenset(layer.forward.__code__ for layer in _LAYERS)
"""The code of forwards that pass the tensors of their layer to matrix products and convolutions and to nothing else."""

_OPERATIONS = frozenset(
    (
        *(F.linear, torch.matmul, operator.matmul, torch.mm, torch.bmm, torch.addmm),
        *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    )
)


def lowered_in(graph: fx.Graph) -> frozenset[str]:
    """The names of the tensors that a graph reads (``get_attr``) and uses in matrix products and convolutions only."""
    names: dict[str, bool] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            only = all(user.op == "call_function" and user.target in _OPERATIONS for user in node.users)
            names[str(node.target)] = names.get(str(node.target), True) and only
    return frozenset(name for name, only in names.items() if only)
