"""Fixed sparsity patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import (
    Constrained,
    check_choice,
    check_filled,
    check_floating,
    check_integer,
    check_number,
    shape_text,
)
from fxparam.declaration import Entry
from fxparam.errors import SpecError

Pattern = Tensor | Sequence[Any]


@dataclass(frozen=True, repr=False, eq=False)
class Mask(Entry):
    """``W = mask · X`` with a pattern of zeros and ones that is fixed when the map is built.

    Args:
        density: the fraction of elements to keep, in ``(0, 1]``; at least one element is kept.
        by: ``"magnitude"`` keeps the largest absolute values of the weight (ties: the first), ``"random"`` any.
        seed: for ``"random"``; the pattern does not depend on the device.
        keep: instead of a density, the pattern: a tensor or nested lists, nonzero where an element is kept, of the
            weight's shape or one that broadcasts to it. It is copied.

    Raises:
        SpecError: not exactly one of density and keep is given, or an option is out of range; at build, the pattern
            does not fit the weight, or the weight is not floating-point or (for magnitudes) not finite.
    """

    name: ClassVar[str] = "mask"
    density: float | None = None
    by: str = "magnitude"
    seed: int = 0
    keep: Pattern | None = None

    def __post_init__(self) -> None:
        check_choice(self.name, "by", self.by, ("magnitude", "random"))
        check_integer(self.name, "seed", self.seed)
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

    def build(self, weight: Tensor) -> MaskMap:
        """The map for ``weight``, whose values decide the pattern under ``by="magnitude"``."""
        check_floating(self.name, weight)
        check_filled(self.name, weight)
        return MaskMap(weight, self._pattern(weight.detach()).to(weight.device, weight.dtype))

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
        count = max(1, round(self.density * weight.numel()))
        if self.by == "random":
            order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(self.seed)).to(weight.device)
        elif weight.is_meta or not weight.isfinite().all():
            raise SpecError(
                'mask: magnitudes of a weight that holds NaN, infinity or no values at all; use by="random" or keep=...'
            )
        else:
            order = weight.abs().flatten().argsort(descending=True, stable=True)
        pattern = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        pattern[order[:count]] = True
        return pattern.reshape(weight.shape)

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
            (m.density, m.by, m.seed, m.keep.tolist() if isinstance(m.keep, Tensor) else m.keep) for m in (self, other)
        )
        return mine == theirs

    def __hash__(self) -> int:
        return hash((self.density, self.by, self.seed))


def _lists(keep: Any) -> Any:
    """Nested lists of 0 and 1."""
    if isinstance(keep, list | tuple):
        return [_lists(item) for item in keep]
    if keep in (0, 1):
        return int(keep)
    raise SpecError(f"mask: got {keep!r} in keep; expected a tensor, or nested lists of 0 and 1")


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
