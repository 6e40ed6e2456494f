"""The module that holds the latents of one site and computes its weights from them.

It lives at ``owner.parametrizations.<tensor>`` and names its tensors as ``torch.nn.utils.parametrize`` does: ``original`` (or
``original0``, ``original1``, ... for several latents) and the maps ``0``, ``1``, ... in the order of application, so that
checkpoints go both ways.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxparam.declaration import RESAMPLING
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


class Cache(Protocol):
    """What keeps weights that a site computed: the runtime."""

    def drop_entries(self) -> None:
        """Let go of what was computed."""


class Link:
    """The way from a site to the cache of its weights; a copy of the site has none until a runtime takes it over."""

    def __init__(self) -> None:
        self._cache: weakref.ref[Cache] | None = None

    def bind(self, cache: Cache) -> None:
        """From now on ``cache`` keeps the weights."""
        self._cache = weakref.ref(cache)

    def drop(self) -> None:
        """Drop what the cache holds: it has edges to the latents, and PyTorch refuses to swap tensors that have any."""
        cache = None if self._cache is None else self._cache()
        if cache is not None:
            cache.drop_entries()

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return Link()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Link, ())


class SiteModule(nn.ModuleList):
    """Latents and the chain of maps from them to the weights of one site.

    Args:
        steps: the maps, first applied first, each following the protocol of ``torch.nn.utils.parametrize``.
        latents: a tensor, a tuple of tensors, or None where the weights are computed from other weights.
        n_weights: how many weights the chain yields; above one it yields a tuple.
        is_buffer: whether the latents are buffers instead of parameters.
        resample: for each map, what its rule says about how often it draws random numbers; None: what the map says.

    Raises:
        SpecError: one map is to draw per call, and another per step.
    """

    def __init__(
        self,
        steps: Iterable[nn.Module],
        latents: Tensor | Sequence[Tensor] | None,
        *,
        n_weights: int = 1,
        is_buffer: bool = False,
        resample: Sequence[str | None] = (),
    ) -> None:
        super().__init__(steps)
        self.n_weights = n_weights
        self.resample = tuple(resample) or (None,) * len(self)
        self._check_resampling()
        named = _named_latents(latents)
        self.latent_names = tuple(named)
        self.computed_latents: tuple[str, ...] = ()
        self.link = Link()
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
    def resamples_per_step(self) -> bool:
        """Whether the random numbers of all its maps are drawn once per step, for one of them says so."""
        return "step" in map(_resampling, self, self.resample)

    def _check_resampling(self) -> None:
        named = {_resampling(step, given): type(step).__name__ for step, given in zip(self, self.resample, strict=True)}
        if "call" in named and "step" in named:
            raise SpecError(
                f"{named['call']} draws random numbers per call and {named['step']} per step, for one weight; give both the "
                'same resample="call" or "step"'
            )

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

    def _apply(self, fn: Any, recurse: bool = True) -> SiteModule:
        self.link.drop()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.link.drop()
        super()._load_from_state_dict(*args)

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


def _resampling(step: nn.Module, given: str | None) -> str | None:
    """How often a map is to draw random numbers: as its rule says, else as its own attribute says. None: nobody says."""
    said = given or getattr(step, "resample", None)
    # Maps of other libraries may have an attribute of that name for something else.
    return said if isinstance(said, str) and said in RESAMPLING else None


def _named_latents(latents: Tensor | Sequence[Tensor] | None) -> dict[str, Tensor]:
    if latents is None:
        return {}
    if isinstance(latents, Tensor):
        return {"original": latents}
    return {f"original{number}": tensor for number, tensor in enumerate(latents)}
