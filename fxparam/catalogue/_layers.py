"""What the place of a weight tells: which dimension counts outputs or inputs, and a seed of its own."""

from __future__ import annotations

import zlib

from torch import nn

from fxparam.declaration import Place

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def output_dim(place: Place) -> int:
    """The dimension of a weight that counts the outputs of its layer: 1 in transposed convolutions, else 0."""
    return 1 if isinstance(place.owners[0], _TRANSPOSED) else 0


def input_dim(place: Place) -> int:
    """The dimension of a weight that counts the inputs of its layer: 0 in transposed convolutions, else 1."""
    return 1 - output_dim(place)


def is_kernel(place: Place) -> bool:
    """Whether the weight is the kernel of a convolution, of three dimensions or more."""
    return len(place.shape) > 2 and isinstance(place.owners[0], _CONVOLUTIONS + _TRANSPOSED)


def place_seed(seed: int, place: Place) -> int:
    """A seed for this place, ``zlib.crc32(name, seed)`` with the name of the weight, of the first of several."""
    return zlib.crc32(place.names[0].encode(), seed)
