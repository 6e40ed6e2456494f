"""What a rule says about a weight: the base classes of everything that can stand on the right of a spec.

A *declaration* is an immutable description; ``Entry.build`` turns a catalogue entry into an ``nn.Module`` for one
concrete weight. That module follows the protocol of ``torch.nn.utils.parametrize``: ``forward(*latents) -> weight`` and, if
there is one, ``right_inverse(weight) -> latents``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from fxparam.errors import ImageError, SpecError

Latents = Tensor | tuple[Tensor, ...]

RESAMPLING = ("call", "step")
"""How often a map that draws random numbers may be declared to draw them: at each read of its weight, or once per step."""


class Parametrization(nn.Module, ABC):
    """A differentiable map from latents to one weight, as the catalogue writes them.

    Any ``nn.Module`` with ``forward`` and, optionally, ``right_inverse`` works in a spec; this class adds what the catalogue
    promises on top: ``contains``, ``project`` and ``sample``.

    Any such module that draws random numbers may say how often, by an attribute ``resample`` of ``"call"`` or ``"step"``.
    """

    adapts: ClassVar[bool] = False
    """Whether the latents train even where the weight was frozen: that is what an adapter is put on a frozen weight for."""

    @abstractmethod
    def forward(self, *latents: Tensor) -> Tensor:
        """The weight that these latents produce."""

    @abstractmethod
    def contains(self, weight: Tensor, tol: float | None = None) -> bool:
        """Whether ``weight`` is in the image of ``forward``, up to ``tol`` (default: derived from the dtype and size)."""

    def right_inverse(self, weight: Tensor) -> Latents:
        """Latents with ``forward(latents) == weight``.

        Raises:
            ImageError: ``weight`` is not in the image (the message says by how far), or the map has no right inverse.
        """
        raise ImageError(f"{type(self).__name__} has no right inverse; give the start with fxp.custom(..., init=...)")

    def project(self, weight: Tensor) -> Tensor:
        """A weight in the image, near ``weight``: the documented start for a weight that is not in the image."""
        raise ImageError(f"{type(self).__name__} has no projection onto its image")

    def start(self, weight: Tensor) -> Latents:
        """Latents to start from where ``weight`` is not in the image: by default those of its projection."""
        return self.right_inverse(self.project(weight))

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """A random weight in the image, from the distribution the class documents."""
        raise ImageError(f"{type(self).__name__} has no distribution to sample from")


class Declaration(ABC):
    """Anything that can stand on the right of a rule. ``a >> b`` applies ``a`` first."""

    def __rshift__(self, other: object) -> Chain:
        return Chain((*steps_of(self), *steps_of(declaration(other))))

    def __rrshift__(self, other: object) -> Chain:
        return Chain((*steps_of(declaration(other)), *steps_of(self)))


@final
@dataclass(frozen=True, eq=False)
class Place:
    """Where the weights of one site stand in the model.

    Attributes:
        names: their dotted names, in the order of the weights.
        owners: for each, the module that holds it (the first of several).
        shape: of what the step of the chain has to yield there, which is not always that of the weight; ``()`` for several.
    """

    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    shape: tuple[int, ...] = ()


class Entry(Declaration):
    """A catalogue entry: a frozen dataclass whose fields are its options, built anew for each weight."""

    name: ClassVar[str]
    """The name in ``fxp.<name>`` and in spec files."""

    def placed(self, place: Place) -> Declaration:
        """The entry, or a chain, for one place in a model, where what is left open depends on it (its layer, its name)."""
        return self

    @abstractmethod
    def build(self, weight: Tensor) -> nn.Module:
        """A parametrization for a weight like ``weight`` (its shape, dtype and device; values only where documented).

        Raises:
            SpecError: the options do not fit this shape or dtype.
        """

    follows: ClassVar[bool] = False
    """Whether the map, behind others in a chain, is chosen by what they give it, and they start as if it were not there."""

    def settle(self, module: nn.Module, value: Tensor) -> None:
        """Fit ``module``, which ``build`` made, to the ``value`` that it is given at the start, behind other maps or a ``ref``.

        ``build`` knew only the weight that is to be replaced. By default nothing depends on its values.
        """
        return

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options().items())})"


@final
@dataclass(frozen=True)
class Chain(Declaration):
    """Declarations applied one after the other, the first of them to the latents."""

    steps: tuple[Declaration, ...]

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.steps))


@final
@dataclass(frozen=True)
class Ref(Declaration):
    """The final values of other weights (``"encoder.weight"``) or their latents (``"encoder.weight.original"``).

    They are handed to the next step of the chain, in this order.
    """

    targets: tuple[str, ...]

    def __repr__(self) -> str:
        return f"ref({', '.join(map(repr, self.targets))})"


@final
@dataclass(frozen=True)
class Existing(Declaration):
    """The parametrization a weight already has: ``existing() >> mask(...)`` extends it."""

    def __repr__(self) -> str:
        return "existing()"


@final
@dataclass(frozen=True, eq=False)
class Custom(Declaration):
    """A user's own map: a module (used as it is), a factory ``tensor -> nn.Module``, or a plain function of the latents.

    Args:
        map: the module, factory or function.
        init: the start of the latents: a tensor, a tuple of tensors (one for each latent), or a function of the weight that
            returns either. Needed where the map changes shape or dtype and has no right inverse.
        right_inverse: for a plain function, the function from weight to latents.
        resample: how often random numbers of the map are drawn: ``"call"``, at each read of the weight, or ``"step"``, once
            per optimizer step for all reads, and with them those of all maps of the chain. None: as the attribute
            ``resample`` of the map says, else per call.

    Raises:
        SpecError: ``resample`` is something else.
    """

    map: Callable[..., Any]
    init: Tensor | tuple[Tensor, ...] | Callable[[Tensor], Latents] | None = None
    right_inverse: Callable[[Tensor], Latents] | None = None
    resample: str | None = None

    def __post_init__(self) -> None:
        if self.resample is not None:
            check_resample("custom", self.resample)

    def __repr__(self) -> str:
        inner = getattr(self.map, "__name__", None) or type(self.map).__name__
        resample = f", resample={self.resample!r}" if self.resample is not None else ""
        return f"custom({inner}{', init=...' if self.init is not None else ''}{resample})"


def check_resample(name: str, value: object) -> None:
    """Refuse what does not say how often random numbers are drawn.

    Raises:
        SpecError: ``value`` is neither ``"call"`` nor ``"step"``.
    """
    if value not in RESAMPLING:
        raise SpecError(f"{name}: got resample={value!r}; expected one of {', '.join(map(repr, RESAMPLING))}")


def declaration(value: object) -> Declaration:
    """``value`` as a declaration: declarations are returned as they are, modules and callables become ``Custom``.

    Raises:
        SpecError: ``value`` is none of the forms a spec accepts.
    """
    if isinstance(value, Declaration):
        return value
    if isinstance(value, type) and issubclass(value, Entry):
        raise SpecError(f"got the catalogue entry {value.name} without its call; type fxp.{value.name}(...)")
    if callable(value):
        return Custom(value)
    raise SpecError(
        f"got {value!r} ({type(value).__name__}) as a declaration; expected a catalogue entry such as fxp.orthogonal(), "
        "an nn.Module with forward(latent), a factory weight -> nn.Module, a function of the latent, fxp.ref(name), "
        "or a chain of these with >>"
    )


def steps_of(value: Declaration) -> tuple[Declaration, ...]:
    """The steps of a declaration: those of a chain, or the declaration itself."""
    return value.steps if isinstance(value, Chain) else (value,)
