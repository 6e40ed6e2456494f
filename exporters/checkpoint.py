"""Training checkpoints: reading one without executing anything of it, and what a prologue takes from it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from fxparam.errors import ExportError, missing_extra
from fxparam.exporters.prologue_format import word

_PREFIXES = ("module.", "_orig_mod.")


@final
@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint.

    Attributes:
        names: its names in the ``state_dict``; more than one if it is tied.
        dtype: such as ``"float32"``.
        shape: its sizes.
    """

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``state_dict`` in a safetensors file (by its ending) or a file of ``torch.save``, on the CPU.

    Raises:
        ExportError: there is no such file, it is corrupt, holds other than tensors, or something else than a ``state_dict``.
        MissingExtraError: safetensors is not installed.
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError(
            f"there is no checkpoint {path}; type torch.save(model.state_dict(), {str(path)!r}) where the model is"
        )
    if file.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise missing_extra("safetensors", "safetensors", "to read this checkpoint") from error
        reader: Any = load_file
    else:
        reader = _load_torch
    try:
        state = reader(file)
    except Exception as error:  # any error of the readers means the same here
        raise ExportError(
            f"the checkpoint {path} is corrupt, or holds other than tensors ({first_line(error)}); "
            "save model.state_dict() by torch.save or safetensors"
        ) from error
    if not isinstance(state, Mapping):
        raise ExportError(
            f"the checkpoint {path} holds a {type(state).__name__}, expected a state_dict; save model.state_dict()"
        )
    if inner := [key for key, value in state.items() if isinstance(value, Mapping)]:
        raise ExportError(
            f"the checkpoint {path} holds more than a state_dict: {', '.join(map(repr, inner))} are dictionaries; "
            f"type torch.save(torch.load(path, weights_only=True)[{inner[0]!r}], other), with the key of the model"
        )
    return dict(state)


def given(sources: Sequence[Source], state: Mapping[str, Tensor]) -> tuple[list[Tensor], tuple[str, ...]]:
    """The tensor for each source, and the names in ``state`` that no source has.

    Args:
        sources: what is needed.
        state: a ``state_dict``; of tied names one is enough, and a prefix that a wrapper put before all names is taken off.

    Raises:
        ExportError: names are missing, or have another shape or dtype, or tied ones differ (all in one message).
    """
    known = {name for source in sources for name in source.names}
    state = _without_prefixes(state, known)
    unknown = tuple(name for name in state if name not in known)
    problems = [problem for source in sources for problem in _problems(source, state, unknown)]
    if problems:
        raise ExportError(
            "the checkpoint does not fit the prologue:\n" + "\n".join(f"  {p}" for p in problems) + "\n"
            "Give the state_dict of the model that the prologue was exported from"
        )
    return [next(state[name] for name in source.names if name in state) for source in sources], unknown


def first_line(error: Exception) -> str:
    """What an error says first; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _problems(source: Source, state: Mapping[str, object], unknown: Sequence[str]) -> Iterator[str]:
    present = [name for name in source.names if name in state]
    if not present:
        near = difflib.get_close_matches(source.names[0], unknown, n=1)
        yield f"{' or '.join(source.names)}: missing" + (f"; the checkpoint has {near[0]}" if near else "")
    first: Tensor | None = None
    for name in present:
        tensor = state[name]
        if type(tensor) not in (Tensor, nn.Parameter):
            yield f"{name}: got {type(tensor).__name__}, expected a tensor"
            continue
        assert isinstance(tensor, Tensor)
        if tuple(tensor.shape) != source.shape:
            yield f"{name}: got shape {tuple(tensor.shape)}, expected {source.shape}"
        elif word(tensor.dtype) != source.dtype:
            yield f"{name}: got dtype {word(tensor.dtype)}, expected {source.dtype}"
        elif first is not None and not torch.equal(first, tensor) and not _both_nan(first, tensor):
            yield f"{name} and {present[0]} are one tied tensor and got different values"
        else:
            first = tensor if first is None else first


def _both_nan(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True) if one.is_floating_point() else False


def _without_prefixes(state: Mapping[str, Tensor], known: set[str]) -> Mapping[str, Tensor]:
    """The state under the model's own names, where a wrapper (data parallel, a compiled model) put its own before all."""
    while state and known.isdisjoint(state):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _load_torch(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)
