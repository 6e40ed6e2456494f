"""Calibrated fake quantization of ``torch.ao.quantization`` as what it computes, without the observers.

``FakeQuantize`` decides in its forward, by the value of a buffer, whether it observes and whether it quantizes, which
``torch.export`` cannot follow. Once calibrated it does one thing only, and is replaced by a module that does it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fxparam.errors import ExportError

_FORWARDS = ("FakeQuantize", "FusedMovingAvgObsFakeQuantize")  # classes whose forward is known; others keep theirs


class Calibrated(nn.Module):
    """One fake quantization; ``scale`` and ``zero_point`` have the names that the observing module gave them."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, observing: Any) -> None:
        super().__init__()
        self.register_buffer("scale", observing.scale)
        self.register_buffer("zero_point", observing.zero_point)
        self.limits = int(observing.activation_post_process.quant_min), int(observing.activation_post_process.quant_max)
        self.axis = int(observing.ch_axis) if observing.is_per_channel else None

    def forward(self, x: Tensor) -> Tensor:
        """The shape and dtype of ``x``."""
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.limits)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, *self.limits)


def without_observers(model: nn.Module) -> nn.Module:
    """The model with its calibrated fake quantization written out, in place; the root itself may be one.

    Raises:
        ExportError: one of them still observes: its scale would change with every input.
    """
    module: Any = sys.modules.get("torch.ao.quantization.fake_quantize")
    if module is None:
        return model
    forwards = {getattr(module, name).forward for name in _FORWARDS}
    found: dict[Any, str] = {m: name for name, m in model.named_modules() if type(m).forward in forwards}
    if observing := [name for m, name in found.items() if m.observer_enabled[0] == 1]:
        raise ExportError(
            f"the fake quantization {', '.join(map(repr, observing))} still observes, and its scale would change with every "
            "input; calibrate the model and type model.apply(torch.ao.quantization.disable_observer)"
        )
    new = {m: Calibrated(m) if m.fake_quant_enabled[0] == 1 else nn.Identity() for m in found}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)
