"""Whether two worlds are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Mismatch(AssertionError):
    """The model and its oracle differ."""


@dataclass(frozen=True)
class Tolerance:
    """How far two tensors may be apart.

    Attributes:
        each: relative to each element, and absolute.
        largest: relative to the largest element.
    """

    each: float = 1e-9
    largest: float = 0.0

    def holds(self, got: Tensor, expected: Tensor) -> bool:
        if self.largest and expected.numel():
            scale = float(expected.detach().double().nan_to_num().abs().amax())
            return torch.allclose(got, expected, rtol=0, atol=self.each + self.largest * scale, equal_nan=True)
        return torch.allclose(got, expected, rtol=self.each, atol=self.each, equal_nan=True)


EXACT = Tolerance()


def compare(got: Any, expected: Any, what: str, tolerance: Tolerance) -> None:
    """Raise ``Mismatch`` where two results differ."""
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        kinds = [(tensor.shape, tensor.dtype) for tensor in (got, expected)]
        if kinds[0] != kinds[1] or not tolerance.holds(got, expected):
            raise Mismatch(f"{what}: got {got}, expected {expected}")
    elif isinstance(expected, Mapping) and isinstance(got, Mapping):
        if list(got) != list(expected):
            raise Mismatch(f"{what}: got {list(got)}, expected {list(expected)}")
        for name in expected:
            compare(got[name], expected[name], f"{what}, {name}", tolerance)
    elif isinstance(expected, list) and isinstance(got, list) and len(got) == len(expected):
        for number, (one, other) in enumerate(zip(got, expected, strict=True)):
            compare(one, other, f"{what}[{number}]", tolerance)
    elif type(got) is not type(expected) or got != expected:
        raise Mismatch(f"{what}: got {got}, expected {expected}")


def attempt(action: Callable[..., Any], *args: Any) -> Any:
    """What an action returns, or the kind of error it raises."""
    try:
        return action(*args)
    except RuntimeError as error:
        kinds = ("a second time", "inplace operation", "does not require grad", "unused")
        return next((f"error: {kind}" for kind in kinds if kind in str(error)), f"error: {error}")
