"""The weights of a model as the integers that exporters store: those whose last map rounds to a grid."""

from __future__ import annotations

import torch
from torch import Tensor

from fxparam.api.restore import weight_values
from fxparam.catalogue.quantization import QuantizedMap
from fxparam.exporters.onnx_integers import IntegerWeight
from fxparam.program import Site
from fxparam.runtime.module import ParametrizedModule
from fxparam.tracer.looking import present_values
from fxparam.tracer.site import SiteModule


@torch.no_grad()
def integer_weights(model: ParametrizedModule) -> tuple[dict[str, IntegerWeight], tuple[str, ...]]:
    """The present weights on a grid of integers, by every name, and a note on each quantized weight that has left its grid.

    A weight counts if the last map of its chain is a ``QuantizedMap``; a map after it (``fake_quantize() >> mask()``) may
    leave the grid, and several weights of one site (``joint``) have none.
    """
    modules: list[tuple[Site, SiteModule]] = [(site, model._fxp_live.get_submodule(site.home)) for site in model.sites]
    quantized = [(site, module) for site, module in modules if any(isinstance(step, QuantizedMap) for step in module)]
    values = {name: value for name, (value, *_) in weight_values(model).items()} if quantized else {}
    found: dict[str, IntegerWeight] = {}
    notes = []
    for site, module in quantized:
        last = [*module][-1]
        if not isinstance(last, QuantizedMap) or len(site.names) != 1:
            notes.append(
                f"{', '.join(site.names)} stays floating-point: {type(last).__name__} follows the quantization; quantize last "
                "(fxp.mask(...) >> fxp.fake_quantize(...))"
            )
            continue
        reads = [values[name] if name in values else model._fxp_runtime.tensor(name).detach() for name in site.reads]
        found |= dict.fromkeys(site.aliases[0], _integers(last, _arguments(last, module, reads)))
    return found, tuple(notes)


def _arguments(step: QuantizedMap, site: SiteModule, reads: list[Tensor]) -> tuple[Tensor, ...]:
    """What the last map of a site is called with: the latents, or what the maps before it make of them."""
    seen: list[tuple[Tensor, ...]] = []
    handle = step.register_forward_pre_hook(lambda _, args: seen.append(args))
    try:
        present_values(site, reads)
    finally:
        handle.remove()
    return seen[-1]


def _integers(step: QuantizedMap, latents: tuple[Tensor, ...]) -> IntegerWeight:
    values, scale, zero = step.integers(*latents)
    # A scale of 0, of channels that are all zero, is refused by TensorRT; with these integers any other gives the same.
    dead = scale == 0
    values, scale = torch.where(dead, zero, values), torch.where(dead, 1.0, scale)
    shape = () if step.dim is None else (-1,)
    return IntegerWeight(values, scale.reshape(shape), zero.reshape(shape), step.dim, step.bits)
