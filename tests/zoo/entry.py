"""One architecture of the zoo, and the declarations that give computed weights to those that carry none."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

import fxparam as fxp

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A small public architecture with random weights.

    Attributes:
        name: unique in the zoo.
        source: the package it comes from, ``"plain"`` for those written here.
        build: makes the model, float32, with a given seed of torch's generator.
        inputs: positional and keyword inputs, never both; floating ones are float32.
        spec: glob of weight names to a key of ``KINDS``; None where the model computes weights itself.
        light: whether each run of the tests checks it, not ``make zoo`` alone.
        refused: ``"fold"`` or ``"onnx"`` to a part of the error, where PyTorch itself cannot export the plain model either.
        limits: check to reason, where fxparam does not yet do what it promises.
    """

    name: str
    source: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    spec: Mapping[str, str] | None = None
    light: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)

    def absent(self) -> str:
        """Why the package cannot be used here; empty if it can."""
        return "" if self.source == "plain" else _why_absent(self.source)

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model, the same weights each time."""
        torch.manual_seed(1)
        with warnings.catch_warnings():
            # The packages call the legacy norms and other deprecated parts of themselves.
            warnings.simplefilter("ignore")
            return self.build().to(dtype)

    def given(self, dtype: torch.dtype = torch.float64, seed: int = 2) -> Inputs:
        """Inputs, the same each time for one seed."""
        torch.manual_seed(seed)
        return _cast(self.inputs(), dtype)

    def declared(self) -> dict[str, Any] | None:
        """The spec for ``transform``."""
        return None if self.spec is None else {glob: KINDS[kind].declaration for glob, kind in self.spec.items()}

    def oracle(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model as PyTorch alone computes it: its own weights, or the spec by ``torch.nn.utils.parametrize``."""
        model = self.make(dtype)
        for glob, kind in (self.spec or {}).items():
            names = [name for name, _ in model.named_parameters() if fnmatchcase(name, glob)]
            for name in names:
                path, _, local = name.rpartition(".")
                KINDS[kind].register(model.get_submodule(path), local)
        return model


@cache
def _why_absent(package: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # an extension built for another torch raises RuntimeError
        return f"{package} cannot be imported: {str(error).splitlines()[0]}"
    return ""


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return type(value)(_cast(item, dtype) for item in value) if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class Kind:
    """One way to compute a weight, twice: declared for fxparam, and registered with PyTorch's own means."""

    declaration: Any
    register: Callable[[nn.Module, str], object]


class Factors(nn.Module):
    """``L R`` of rank 2."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[:, :2].clone(), weight[:2].clone()


class LoRA(nn.Module):
    """``W + B A`` of rank 2."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(0.1 * torch.randn(2, columns, dtype=weight.dtype))
        self.b = nn.Parameter(0.1 * torch.randn(rows, 2, dtype=weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def _register_lora(module: nn.Module, name: str) -> None:
    register_parametrization(module, name, LoRA(getattr(module, name)))


KINDS: dict[str, Kind] = {
    "weight norm": Kind(fxp.weight_norm(), parametrizations.weight_norm),
    "orthogonal": Kind(
        fxp.orthogonal(map="cayley"),
        lambda module, name: parametrizations.orthogonal(module, name, "cayley"),
    ),
    "low rank": Kind(fxp.low_rank(2), lambda module, name: register_parametrization(module, name, Factors(), unsafe=True)),
    "lora": Kind(LoRA, _register_lora),
}
