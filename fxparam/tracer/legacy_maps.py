"""What the legacy hooks of PyTorch compute, as maps of the ``torch.nn.utils.parametrize`` protocol."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxparam.errors import ImageError


@final
class WeightNormStep(nn.Module):
    """``(g, v) -> g v / |v|``, the norm over all dimensions but ``dim`` (``-1``: over all), as the legacy hook has it.

    ``g`` has the shape of ``v`` with every dimension but ``dim`` set to 1; the weight has the shape of ``v``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight, of the shape of ``v``."""
        return torch._weight_norm(v, g, self.dim)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``(|weight|, weight)``."""
        return torch.norm_except_dim(weight, 2, self.dim), weight


@final
class SpectralNormStep(nn.Module):
    """``orig -> orig / sigma``, where ``sigma = uᵀ W v`` and ``W`` is ``orig`` as a matrix with ``dim`` first.

    In training each evaluation advances the buffers ``_u`` (rows of ``W``) and ``_v`` (columns) in place by
    ``n_power_iterations`` power iterations, ``v`` first; in eval none. Shares ``u`` and ``v`` with the caller.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, u: Tensor, v: Tensor, *, dim: int, n_power_iterations: int, eps: float) -> None:
        super().__init__()
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)
        self.dim, self.n_power_iterations, self.eps = dim, n_power_iterations, eps

    def forward(self, weight: Tensor) -> Tensor:
        """The weight divided by its estimated largest singular value."""
        matrix = weight
        if self.dim != 0:
            matrix = weight.permute(self.dim, *(d for d in range(weight.dim()) if d != self.dim))
        matrix = matrix.reshape(matrix.size(0), -1)
        u, v = self._u, self._v
        if self.training:
            with torch.no_grad():
                for _ in range(self.n_power_iterations):
                    v = F.normalize(torch.mv(matrix.t(), u), dim=0, eps=self.eps, out=v)
                    u = F.normalize(torch.mv(matrix, v), dim=0, eps=self.eps, out=u)
                # The next evaluation writes into the buffers, and this one's backward still needs these values.
                u, v = u.clone(), v.clone()
        return weight / torch.dot(u, torch.mv(matrix, v))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """``weight``, as PyTorch's own spectral norm has it: exact where its largest singular value is 1."""
        return weight


@final
class MaskStep(nn.Module):
    """``orig -> mask * orig``, the mask cast to the dtype of ``orig``. Shares ``mask`` with the caller."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its pruned entries set to zero."""
        return self.mask.to(dtype=weight.dtype) * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """``weight``, where it is zero wherever it is pruned.

        Raises:
            ImageError: ``weight`` has entries that the mask does not let through.
        """
        wrong = int((self(weight) != weight).sum())
        if wrong:
            raise ImageError(
                f"got a weight of shape {tuple(weight.shape)} with {wrong} entries that its pruning mask changes; "
                "expected a pruned weight; type: weight * mask"
            )
        return weight
