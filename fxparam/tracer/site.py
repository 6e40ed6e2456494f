"""The module that holds the latents of one site and computes its weights from them.

It lives at ``owner.parametrizations.<tensor>`` and names its tensors as ``torch.nn.utils.parametrize`` does: ``original`` (or
``original0``, ``original1``, ... for several latents) and the maps ``0``, ``1``, ... in the order of application, so that
checkpoints go both ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxparam.errors import ImageError, SpecError


class Sites(nn.Module):
    """The sites of one owner, by the name of the tensor: ``layer.parametrizations.weight``.

    Deliberately no ``ModuleDict``: PyTorch takes an owner with one for its own parametrized module and rewrites its class.
    """

    def __getitem__(self, name: str) -> SiteModule:
        return self._modules[name]  # type: ignore[return-value]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __len__(self) -> int:
        return len(self._modules)


class SiteModule(nn.ModuleList):
    """Latents and the chain of maps from them to the weights of one site.

    Args:
        steps: the maps, first applied first, each following the protocol of ``torch.nn.utils.parametrize``.
        latents: a tensor, a tuple of tensors, or None where the weights are computed from other weights.
        n_weights: how many weights the chain yields; above one it yields a tuple.
        is_buffer: whether the latents are buffers instead of parameters.
    """

    def __init__(
        self,
        steps: Iterable[nn.Module],
        latents: Tensor | Sequence[Tensor] | None,
        *,
        n_weights: int = 1,
        is_buffer: bool = False,
    ) -> None:
        super().__init__(steps)
        self.n_weights = n_weights
        named = _named_latents(latents)
        self.latent_names = tuple(named)
        self.computed_latents: tuple[str, ...] = ()
        for name, tensor in named.items():
            if is_buffer:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(
                    name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, tensor.requires_grad)
                )

    def __iter__(self) -> Iterator[nn.Module]:
        """The maps; a child besides them computes a latent."""
        return (module for name, module in self._modules.items() if name.isdigit() and module is not None)

    def __len__(self) -> int:
        return sum(name.isdigit() for name in self._modules)

    @property
    def latents(self) -> tuple[Tensor, ...]:
        """The latents, in the order in which the first map takes them."""
        return tuple(getattr(self, name) for name in self.latent_names)

    def forward(self, *reads: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The weight (several as a tuple), computed now.

        Args:
            *reads: the values of the latents that sites of their own compute (without them they are computed here), then of
                the other weights it reads.
        """
        given = dict(zip(self.computed_latents, reads, strict=False))
        latents = (given[name] if name in given else getattr(self, name) for name in self.latent_names)
        values: Tensor | tuple[Tensor, ...] = (*latents, *reads[len(given) :])
        steps = list(self)
        if not steps:
            return values[0] if self.n_weights == 1 else values
        value = steps[0](*values)
        for step in steps[1:]:
            value = step(value)
        return tuple(value) if isinstance(value, list) else value

    def right_inverse(self, weight: Tensor | tuple[Tensor, ...], *, project: bool = False) -> tuple[Tensor, ...]:
        """Latents that yield ``weight``, through the chain backwards.

        Raises:
            ImageError: a map has no right inverse or ``weight`` is not in its image; nothing was changed.
        """
        if not self.latent_names:
            raise ImageError("the weight is computed from other weights and has no latent of its own; assign to those")
        value = weight
        for step in reversed(list(self)):
            value = invert(step, value, project=project)
        return value if isinstance(value, tuple) else (value,)

    @torch.no_grad()
    def set_latents(self, values: Sequence[Tensor]) -> None:
        """Write new values into the latents, in place.

        Raises:
            SpecError: their number or shapes differ from the present ones.
        """
        latents = self.latents
        if [tuple(t.shape) for t in latents] != [tuple(t.shape) for t in values]:
            raise SpecError(
                f"got latents of shapes {[tuple(t.shape) for t in values]}, expected {[tuple(t.shape) for t in latents]}"
            )
        for name, latent, value in zip(self.latent_names, latents, values, strict=True):
            if name in self.computed_latents:
                setattr(self, name, value)
            else:
                latent.copy_(value)


def invert(step: Any, weight: Tensor | tuple[Tensor, ...], *, project: bool) -> Tensor | tuple[Tensor, ...]:
    """One step of a chain backwards.

    Raises:
        ImageError: there is no right inverse, or ``weight`` is not in the image and was not to be projected.
    """
    if not hasattr(step, "right_inverse"):
        raise ImageError(f"{type(step).__name__} has no right inverse; write to the latents instead")
    if project and hasattr(step, "project"):
        weight = step.project(weight)
    inverse = step.right_inverse(weight)
    return tuple(inverse) if isinstance(inverse, list) else inverse


def _named_latents(latents: Tensor | Sequence[Tensor] | None) -> dict[str, Tensor]:
    if latents is None:
        return {}
    if isinstance(latents, Tensor):
        return {"original": latents}
    return {f"original{number}": tensor for number, tensor in enumerate(latents)}
