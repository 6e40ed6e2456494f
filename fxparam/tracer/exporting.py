"""The export layer: one flat graph of a plain model by ``torch.export``, on given inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxparam.errors import TraceError
from fxparam.tracer.hazards import error_line, python_random_states


def export_program(
    plain: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = None
) -> ExportedProgram:
    """Export a model without computed weights.

    Args:
        plain: the model.
        args: positional inputs.
        kwargs: keyword inputs.
        dynamic_shapes: as for ``torch.export.export``.

    Raises:
        TraceError: ``torch.export`` refuses it; the message is its first line with the source line.
    """
    with warnings.catch_warnings():
        # Recurrent layers keep their weights in a list besides; the tracer warns that it does not see writes to it.
        warnings.filterwarnings("ignore", message=".*_flat_weights.*", category=UserWarning)
        before = python_random_states()
        try:
            exported = torch.export.export(plain, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            reason = f"torch.export raised {type(error).__name__}: {first}"
            raise TraceError(" at ".join(filter(None, (reason, error_line(error))))) from error
        if before != python_random_states():
            raise TraceError("the forward draws random numbers that are not PyTorch's, and an exported graph would repeat them")
    return exported
