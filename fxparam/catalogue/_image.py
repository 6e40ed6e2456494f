"""What the entries share: checks of options and shapes, rounding, and the refusal of weights outside the image."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fxparam.declaration import Latents, Parametrization
from fxparam.errors import ImageError, SpecError

_HALF = (torch.float16, torch.bfloat16)


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is: linear algebra has no kernels for half precision."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as ``dtype``; a cast that changes nothing would still be a node of the trace, with the dtype baked in."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of ``dtype`` are computed."""
    return torch.float32 if dtype in _HALF else dtype


def rounding(dtype: torch.dtype, size: int = 1) -> float:
    """Relative error to expect of a stored tensor of ``dtype`` that a computation over ``size`` terms produced.

    Storing rounds once, whatever the size; computing adds up, in float32 or better. Were both charged to a
    half-precision epsilon, the tolerance of a large matrix would exceed 1 and accept anything.
    """
    return 4 * torch.finfo(dtype).eps + 10 * size * torch.finfo(computing_dtype(dtype)).eps


def shape_text(weight: Tensor) -> str:
    """``(3, 4)`` as errors print it."""
    return str(tuple(weight.shape))


def check_floating(name: str, weight: Tensor) -> None:
    """Refuse integers, booleans and complex numbers."""
    if not weight.is_floating_point():
        raise SpecError(f"{name}: got a weight of dtype {weight.dtype}; expected a floating-point dtype such as torch.float32")


def check_inexact(name: str, weight: Tensor) -> None:
    """Refuse integers and booleans."""
    if not (weight.is_floating_point() or weight.is_complex()):
        raise SpecError(f"{name}: got a weight of dtype {weight.dtype}; expected a floating-point or complex dtype")


def check_matrix(name: str, weight: Tensor, *, square: bool = False) -> None:
    """Refuse what is no matrix, batch of matrices or, where asked, square matrix."""
    if weight.ndim < 2:
        raise SpecError(f"{name}: got a weight of shape {shape_text(weight)}; expected a matrix or a batch (..., m, n)")
    if square and weight.shape[-2] != weight.shape[-1]:
        raise SpecError(f"{name}: got a weight of shape {shape_text(weight)}; expected square matrices (..., n, n)")
    check_filled(name, weight)


def check_filled(name: str, weight: Tensor) -> None:
    """Refuse a weight without elements."""
    if weight.numel() == 0:
        raise SpecError(f"{name}: got an empty weight of shape {shape_text(weight)}; expected at least one element")


def check_dim(name: str, weight: Tensor, dim: int, option: str = "dim") -> int:
    """``dim`` counted from the front.

    Raises:
        SpecError: the weight has no such dimension.
    """
    if not -weight.ndim <= dim < weight.ndim:
        raise SpecError(
            f"{name}: got {option}={dim} for a weight of shape {shape_text(weight)}; "
            f"expected {-weight.ndim} <= {option} < {weight.ndim}"
        )
    return dim % weight.ndim


def check_integer(name: str, option: str, value: Any, *, least: int | None = None) -> None:
    """Refuse an option that is no integer, or too small a one."""
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise SpecError(f"{name}: got {option}={value!r}; expected an integer{bound}{_as_python(value, 'int')}")


def check_number(name: str, option: str, value: Any) -> None:
    """Refuse an option that is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpecError(f"{name}: got {option}={value!r}; expected a finite number{_as_python(value, 'float')}")


def _as_python(value: Any, kind: str) -> str:
    """What to type where an array or a tensor holds the number."""
    return f" of Python's own; type {kind}(...) around it" if hasattr(value, "item") else ""


def check_flag(name: str, option: str, value: Any) -> None:
    """Refuse an option that is no boolean."""
    if not isinstance(value, bool):
        raise SpecError(f"{name}: got {option}={value!r}; expected True or False")


def check_choice(name: str, option: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse an option that is none of ``choices``."""
    if value not in choices:
        raise SpecError(f"{name}: got {option}={value!r}; expected one of {', '.join(map(repr, choices))}")


class Constrained(Parametrization):
    """A parametrization that knows how far a weight is from its image, and refuses what is too far.

    Subclasses give ``distance``, ``tolerance`` and ``invert``.
    """

    constraint: str
    """What the weights satisfy, as errors say it."""

    remedy: str = "; type model.assign(name, weight, project=True) to start from its projection"
    """What to do about a weight that does not, as errors say it."""

    _like: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        # Remembers dtype and device through .to(), .double() and pickling, and is in no state dict.
        self.register_buffer("_like", weight.detach().new_empty(0), persistent=False)

    @abstractmethod
    def distance(self, weight: Tensor) -> Tensor:
        """How far a finite weight of the right shape is from the image: at least 0, relative, a scalar tensor."""

    @abstractmethod
    def invert(self, weight: Tensor) -> Latents:
        """Latents of a weight in the image, in memory of their own."""

    def tolerance(self, weight: Tensor) -> float:
        """The distance up to which a weight counts as in the image."""
        return rounding(weight.dtype)

    @torch.no_grad()
    def contains(self, weight: Tensor, tol: float | None = None) -> bool:
        """Whether ``weight`` has the right shape, is finite and is at most ``tol`` away from the image."""
        if weight.shape != self.shape or not weight.isfinite().all():
            return False
        return bool(self.distance(weight) <= (self.tolerance(weight) if tol is None else tol))

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Latents:
        """Latents that produce ``weight``.

        Raises:
            ImageError: ``weight`` has another shape, is not finite, or is too far from the image.
        """
        self.require_finite(weight)
        distance, tol = float(self.distance(weight)), self.tolerance(weight)
        # Written so that a distance of NaN is refused.
        if not distance <= tol:
            raise self.refusal(weight, f"{self.constraint} is missed by {distance:.3g}, tolerance {tol:.3g}")
        return self.invert(weight)

    def start(self, weight: Tensor) -> Latents:
        """Latents to start training from: those of ``weight``, or of its projection where it is not in the image.

        Raises:
            ImageError: ``weight`` has another shape, is not finite, or has no projection.
        """
        try:
            return self.right_inverse(weight)
        except ImageError:
            return self.right_inverse(self.project(weight))

    def require_finite(self, weight: Tensor) -> None:
        """Refuse another shape, NaN and infinity."""
        if weight.shape != self.shape:
            raise ImageError(f"{type(self).__name__}: got a weight of shape {shape_text(weight)}; expected {tuple(self.shape)}")
        bad = int((~weight.isfinite()).sum())
        if bad:
            raise ImageError(
                f"{type(self).__name__}: {bad} of {weight.numel()} elements of the weight are NaN or infinite "
                f"(infinitely far from the image, tolerance {self.tolerance(weight):.3g}), and have no projection; "
                "repair the weight first"
            )

    def refusal(self, weight: Tensor, reason: str, remedy: str = "") -> ImageError:
        """The error for a weight outside the image."""
        return ImageError(
            f"{type(self).__name__}: a weight of shape {shape_text(weight)}, {weight.dtype}, is not in the image: "
            f"{reason}{remedy or self.remedy}"
        )

    def normal(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        """Standard normal numbers on this map's device, in the dtype it computes in."""
        device = self._like.device if generator is None else generator.device
        dtype = computing_dtype(self._like.dtype)
        return torch.randn(shape, generator=generator, dtype=dtype, device=device).to(self._like.device)


class Unconstrained(Constrained):
    """A parametrization that can make every finite weight; sampling draws standard normal elements."""

    constraint = "being finite"

    def distance(self, weight: Tensor) -> Tensor:
        """Zero."""
        return weight.real.new_zeros(())

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        self.require_finite(weight)
        return weight.clone()

    @torch.no_grad()
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """A weight of independent standard normal elements."""
        return self.normal(*self.shape, generator=generator).to(self._like.dtype)
