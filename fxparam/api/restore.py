"""``restore``: the user's own class again, with plain parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fxparam.errors import SpecError
from fxparam.runtime.module import ParametrizedModule
from fxparam.spec.names import PARAMETRIZATIONS
from fxparam.tracer.copying import structural_copy
from fxparam.tracer.delivery import binding_of, uninstall
from fxparam.tracer.looking import present_values
from fxparam.tracer.peft_class import is_lora, release
from fxparam.tracer.peft_layers import ORIGIN as LORA
from fxparam.tracer.site import SiteModule


@torch.no_grad()
def restore(model: ParametrizedModule, *, compute_dtype: torch.dtype | None = None, copy: bool = True) -> nn.Module:
    """The model with its present weights as plain parameters, in the user's own classes.

    Args:
        model: what ``transform`` returned. It is not changed.
        compute_dtype: compute the weights in this dtype and round once; default: the dtype of the latents.
        copy: whether the other tensors are copied too; if not, they are shared with ``model``.

    Returns:
        A module of the class that was given to ``transform``, in the same mode, with the same names and ties. LoRA layers are
        LoRA layers again, with their base weights and adapters apart; ``fold`` merges them.
    """
    if not isinstance(model, ParametrizedModule):
        raise SpecError(f"got {type(model).__name__}, expected a model that fxp.transform returned")
    live: nn.Module = model._fxp_live
    weights = weight_values(model, compute_dtype)
    owners = [module for module in live.modules() if binding_of(module) is not None and not is_lora(module)]
    copied = structural_copy(live, adopt=False, copy_tensors=copy)
    release(copied.root)
    fresh: dict[str, Tensor] = {}
    for owner in owners:
        _restore_owner(copied.memo[id(owner)], weights, fresh)
    for module in copied.root.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return copied.root


@torch.no_grad()
def weight_values(model: ParametrizedModule, compute_dtype: torch.dtype | None = None) -> dict[str, tuple[Tensor, bool, bool]]:
    """Each computed weight by every name: its value now, whether it trains, and whether it is a buffer."""
    live: nn.Module = model._fxp_live
    values: dict[str, Tensor] = {}
    found: dict[str, tuple[Tensor, bool, bool]] = {}
    for site in model.sites:
        if site.origin == LORA:
            # Its layer has what it is computed from under their own names.
            continue
        module: SiteModule = live.get_submodule(site.home)  # type: ignore[assignment]
        reads = [values[name] if name in values else model._fxp_runtime.tensor(name).detach() for name in site.reads]
        results = present_values(module, reads)
        wide = results if compute_dtype is None else _in_dtype(module, reads, compute_dtype)
        trains = any(t.requires_grad for t in (*module.parameters(), *(model._fxp_runtime.tensor(n) for n in site.reads)))
        is_buffer = bool(site.latents) and not any(name in module._parameters for name in module.latent_names)
        for aliases, value, exact in zip(site.aliases, results, wide, strict=True):
            values |= dict.fromkeys(aliases, exact)
            found |= dict.fromkeys(aliases, (exact.detach().to(value.dtype).clone(), trains, is_buffer))
    return found


def _in_dtype(module: SiteModule, reads: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    wide = copy.deepcopy(module).to(dtype)
    return present_values(wide, [read.to(dtype) if read.is_floating_point() else read for read in reads])


def _restore_owner(owner: nn.Module, weights: dict[str, tuple[Tensor, bool, bool]], fresh: dict[str, Tensor]) -> None:
    binding = uninstall(owner)
    owner._modules.pop(PARAMETRIZATIONS, None)
    for local, name in binding.names.items():
        value, trains, is_buffer = weights[name]
        if name not in fresh:
            fresh[name] = value if is_buffer else nn.Parameter(value, requires_grad=trains)
        registry: dict[str, Any] = owner._buffers if is_buffer else owner._parameters
        registry[local] = fresh[name]
    for registry, names in (
        (owner._parameters, binding.order["parameters"]),
        (owner._buffers, binding.order["buffers"]),
    ):
        in_order = {name: registry[name] for name in (*names, *registry) if name in registry}
        registry.clear()
        registry.update(in_order)
