"""``transform(..., trace="export")``: the body of a model by ``torch.export``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fxparam.api.inputs import Call
from fxparam.api.restore import restore
from fxparam.runtime.module import ParametrizedModule
from fxparam.tracer.exporting import exported_body


def export_bodies(model: ParametrizedModule, call: Call) -> None:
    """Give a model graphs by ``torch.export`` for calls like the given one, in train and in eval mode.

    Raises:
        TraceError: ``torch.export`` refuses the model, or loses something of it.
    """
    live: nn.Module = model._fxp_live
    for mode in (not live.training, live.training):
        with _in_mode(live, mode):
            plain = restore(model, copy=False)
            model._fxp_runtime.regions.add(exported_body(live, plain, *call))


@contextmanager
def _in_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """The model in the mode it is in, or all of it in the other one."""
    flags = [(module, module.training) for module in model.modules()]
    if mode != model.training:
        model.train(mode)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
