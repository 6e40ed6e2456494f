"""Example inputs as users give them: positional ones as a tuple, keyword ones as a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxparam.errors import SpecError

Inputs = tuple[Any, ...] | Mapping[str, Any] | Tensor
"""One tensor, a tuple of positional inputs, or a mapping from names to keyword inputs."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def as_call(inputs: Inputs) -> Call:
    """The arguments of a call with these inputs.

    Raises:
        SpecError: they are of another kind.
    """
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs):
        return (), dict(inputs)
    raise SpecError(
        f"got example_inputs of type {type(inputs).__name__}, expected a tuple of positional inputs, (x, ...), or a mapping of "
        'keyword inputs, {"x": x, ...}'
    )
