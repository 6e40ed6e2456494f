"""Fixed sparsity patterns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxparam.catalogue._image import (
    Constrained,
    check_choice,
    check_dim,
    check_filled,
    check_inexact,
    check_integer,
    check_number,
    shape_text,
    widened,
)
from fxparam.catalogue._layers import input_dim, place_seed
from fxparam.declaration import Entry, Place
from fxparam.errors import SpecError

Pattern = Tensor | Sequence[Any]


@dataclass(frozen=True, repr=False, eq=False)
class Mask(Entry):
    """``W = mask · X`` with a pattern of zeros and ones that is fixed when the map is built.

    Args:
        density: the fraction of elements (with ``dim``: of slices) to keep, in ``(0, 1]``; at least one is kept.
        by: ``"magnitude"`` keeps the largest absolute values of the weight (of slices, norms; ties: the first),
            ``"random"`` any.
        seed: for ``"random"``, from 0 to 2³² - 1; the pattern does not depend on the device. In a model, each weight gets its
            own: the seed becomes ``zlib.crc32(name, seed)`` with the name of the weight.
        keep: instead of a density, the pattern: a tensor or nested lists, nonzero where an element is kept, of the
            weight's shape or one that broadcasts to it. It is copied.
        dim: keep or drop whole slices, one for each index of this dimension (structured pruning, as
            ``torch.nn.utils.prune.ln_structured`` and ``random_structured``); None: single elements.
        p: the norm by which slices are compared, above 0; ``inf`` for the largest absolute value.

    Raises:
        SpecError: not exactly one of density and keep is given, ``dim`` beside ``keep``, ``p`` without ``dim``, or an option
            is out of range; at build, the pattern or ``dim`` does not fit the weight, or the weight is neither
            floating-point nor complex or (for magnitudes) not finite.
    """

    name: ClassVar[str] = "mask"
    density: float | None = None
    by: str = "magnitude"
    seed: int = 0
    keep: Pattern | None = None
    dim: int | None = None
    p: float = 2
    follows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice(self.name, "by", self.by, ("magnitude", "random"))
        check_integer(self.name, "seed", self.seed, least=0)
        if self.seed >= 2**32:
            raise SpecError(f"mask: got seed={self.seed}; expected an integer below 2**32")
        self._check_slices()
        if (self.density is None) == (self.keep is None):
            given = "neither" if self.density is None else "both"
            raise SpecError(f"mask: got {given} of density and keep; type fxp.mask(density=0.5) or fxp.mask(keep=pattern)")
        if self.density is not None:
            check_number(self.name, "density", self.density)
            if not 0 < self.density <= 1:
                raise SpecError(f"mask: got density={self.density!r}; expected 0 < density <= 1")
        elif isinstance(self.keep, Tensor):
            object.__setattr__(self, "keep", self.keep.detach() != 0)
        else:
            object.__setattr__(self, "keep", _lists(self.keep))

    def _check_slices(self) -> None:
        if self.p != math.inf:
            check_number(self.name, "p", self.p)
            if self.p <= 0:
                raise SpecError(f"mask: got p={self.p!r}; expected a number above 0, or inf")
        if self.dim is None:
            if self.p != 2:
                raise SpecError(f"mask: got p={self.p!r} without dim; single elements are compared by their absolute values")
            return
        check_integer(self.name, "dim", self.dim)
        if self.keep is not None:
            raise SpecError(f"mask: got dim={self.dim} beside keep; type a pattern that broadcasts to the weight's shape")

    def placed(self, place: Place) -> Mask:
        """With the seed of this place."""
        return replace(self, seed=place_seed(self.seed, place)) if self.by == "random" else self

    def build(self, weight: Tensor) -> MaskMap:
        """The map for ``weight``, whose values decide the pattern under ``by="magnitude"``."""
        check_inexact(self.name, weight)
        check_filled(self.name, weight)
        return MaskMap(weight, self._pattern(weight.detach()).to(weight.device, weight.dtype))

    def settle(self, module: nn.Module, value: Tensor) -> None:
        """Behind other maps it is their values that decide."""
        module.mask.copy_(self._pattern(value.detach()))  # type: ignore[operator]

    def _pattern(self, weight: Tensor) -> Tensor:
        if self.keep is not None:
            keep = self.keep if isinstance(self.keep, Tensor) else torch.tensor(self.keep)
            try:
                return keep.expand(weight.shape).clone()
            except RuntimeError as error:
                raise SpecError(
                    f"mask: got keep of shape {shape_text(keep)} for a weight of shape {shape_text(weight)}; "
                    "expected the same shape, or one that broadcasts to it"
                ) from error
        assert self.density is not None
        dim = None if self.dim is None else check_dim(self.name, weight, self.dim)
        number = weight.numel() if dim is None else weight.shape[dim]
        if self.by == "random":
            order = torch.randperm(number, generator=torch.Generator().manual_seed(self.seed)).to(weight.device)
        else:
            check_values(self.name, weight, '; use by="random" or keep=...')
            sizes = weight.abs().flatten() if dim is None else slice_norms(weight, dim, float(self.p))
            order = sizes.argsort(descending=True, stable=True)
        pattern = torch.zeros(number, dtype=torch.bool, device=weight.device)
        pattern[order[: max(1, round(self.density * number))]] = True
        if dim is None:
            return pattern.reshape(weight.shape)
        return pattern.reshape(-1, *[1] * (weight.ndim - dim - 1)).expand(weight.shape)

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain values.

        Raises:
            SpecError: ``keep`` is a tensor, which a spec file cannot hold.
        """
        if isinstance(self.keep, Tensor):
            raise SpecError(
                f"mask: keep is a tensor of shape {shape_text(self.keep)}, and a tensor cannot be written to a spec "
                "file; give the pattern as nested lists (keep=tensor.int().tolist()), or a density with a seed"
            )
        return self._given()

    def _given(self) -> dict[str, Any]:
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not f.default and v != f.default}

    def __repr__(self) -> str:
        if not isinstance(self.keep, Tensor):
            return super().__repr__()
        return f"mask(keep=tensor of shape {shape_text(self.keep)} with {int(self.keep.sum())} kept)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        mine, theirs = (
            (m.density, m.by, m.seed, m.dim, m.p, m.keep.tolist() if isinstance(m.keep, Tensor) else m.keep)
            for m in (self, other)
        )
        return mine == theirs

    def __hash__(self) -> int:
        return hash((self.density, self.by, self.seed, self.dim, self.p))


def _lists(keep: Any) -> Any:
    """Nested lists of 0 and 1."""
    keep = keep.tolist() if hasattr(keep, "tolist") else keep
    if isinstance(keep, list | tuple):
        return [_lists(item) for item in keep]
    if keep in (0, 1):
        return int(keep)
    raise SpecError(f"mask: got {keep!r} in keep; expected a tensor, or nested lists of 0 and 1")


def check_values(name: str, weight: Tensor, remedy: str) -> None:
    """Refuse a weight whose magnitudes cannot be compared."""
    if weight.is_meta or not weight.isfinite().all():
        raise SpecError(f"{name}: magnitudes of a weight that holds NaN, infinity or no values at all{remedy}")


def slice_norms(weight: Tensor, dim: int, p: float) -> Tensor:
    """The ``p``-norm of each slice along ``dim``, relative to the largest element, so that no power overflows."""
    slices = widened(weight).abs().movedim(dim, 0).flatten(1)
    return torch.linalg.vector_norm(slices / slices.amax().clamp(min=torch.finfo(slices.dtype).tiny), p, dim=1)


@dataclass(frozen=True, repr=False)
class SemiStructured(Entry):
    """``W = mask · X`` that keeps the ``n`` largest of every ``m`` consecutive elements (Mishra et al. 2021).

    The pattern is that of the start, by absolute value (ties: the first), and fixed when the map is built. The default is
    the 2:4 sparsity of NVIDIA's tensor cores, along the inputs of ``nn.Linear`` and the input channels of convolutions.

    Args:
        n: how many to keep, from 1 to ``m``.
        m: the length of a group.
        dim: the dimension along which elements are consecutive; its size must be a multiple of ``m``. None: the inputs of the
            layer, 0 in transposed convolutions, else 1 (also without a layer).

    Raises:
        SpecError: an option out of range; at build, the weight has no such dimension, or one of another size, or is
            neither floating-point nor complex, or not finite.
    """

    name: ClassVar[str] = "semi_structured"
    n: int = 2
    m: int = 4
    dim: int | None = None
    follows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option in ("n", "m"):
            check_integer(self.name, option, getattr(self, option), least=1)
        if self.dim is not None:
            check_integer(self.name, "dim", self.dim)
        if self.n > self.m:
            raise SpecError(f"semi_structured: got n={self.n}, m={self.m}; expected n <= m")

    def placed(self, place: Place) -> SemiStructured:
        """With the dimension of the inputs of this layer, where none is given."""
        return self if self.dim is not None else replace(self, dim=input_dim(place))

    def build(self, weight: Tensor) -> MaskMap:
        """The map for ``weight``, whose values decide the pattern."""
        check_inexact(self.name, weight)
        check_filled(self.name, weight)
        dim = check_dim(self.name, weight, 1 if self.dim is None else self.dim)
        size = weight.shape[dim]
        if size % self.m:
            raise SpecError(
                f"semi_structured: got dim={dim} of size {size} for a weight of shape {shape_text(weight)}; expected a "
                f"multiple of m={self.m}"
            )
        check_values(self.name, weight, "; load or repair the weight first")
        return MaskMap(weight, self._pattern(weight.detach(), dim).to(weight.dtype))

    def settle(self, module: nn.Module, value: Tensor) -> None:
        """Behind other maps it is their values that decide."""
        dim = check_dim(self.name, value, 1 if self.dim is None else self.dim)
        module.mask.copy_(self._pattern(value.detach(), dim))  # type: ignore[operator]

    def _pattern(self, weight: Tensor, dim: int) -> Tensor:
        groups = weight.abs().unflatten(dim, (-1, self.m))
        order = groups.argsort(dim=dim + 1, descending=True, stable=True)
        kept = torch.zeros_like(groups).scatter(dim + 1, order.narrow(dim + 1, 0, self.n), 1.0)
        return kept.flatten(dim, dim + 1).contiguous()


class MaskMap(Constrained):
    """``W = 0`` wherever ``mask`` is.

    The buffer ``mask`` has the weight's shape and dtype, as in ``torch.nn.utils.prune``.
    """

    constraint = "zero off the mask"
    mask: Tensor

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        super().__init__(weight)
        self.register_buffer("mask", mask)

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """The weight's shape."""
        return latent * self.mask

    def distance(self, weight: Tensor) -> Tensor:
        """The largest absolute value off the mask."""
        return (weight * (self.mask == 0)).abs().amax()

    def tolerance(self, weight: Tensor) -> float:
        """Zero: nothing is rounded."""
        return 0.0

    def invert(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight.clone()

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The weight with zeros off the mask."""
        self.require_finite(weight)
        return self.forward(weight)

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal elements on the mask."""
        return self.forward(self.normal(*self.shape, generator=generator).to(self._like.dtype))

    def extra_repr(self) -> str:
        """How much is kept."""
        return f"kept={int(self.mask.count_nonzero())} of {self.mask.numel()}"
