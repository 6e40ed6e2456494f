"""LoRA layers of the package ``peft``: found on a copy, given a class that uses one computed weight, and merged for a fold.

A LoRA layer stays what it is: ``base_layer.weight`` and the tensors of its adapters are registered under their own names, and
the methods of ``peft`` work on them. Below it lives a site that computes the weight with the active adapters from these
tensors. The generated class runs the base layer with that weight wherever this is what the layer does; else (disabled or
merged, hooks, adapters per example, dropout, an adapter that came after the transform) it runs the layer's own forward.

Nothing of ``peft`` is imported here: whoever has a model with its layers has done so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxparam.spec.names import join
from fxparam.tracer.peft_class import BIAS, WEIGHT, LoraState, install_class
from fxparam.tracer.peft_maps import (
    LoraMap,
    Obstacle,
    adapter_of,
    adapters_of,
    factors_of,
    in_dtype,
    is_hooked,
    layout_of,
    parts_of,
    peft_layers,
    recipe_of,
    slot_of,
    tensor_names,
    weight_of,
)
from fxparam.tracer.site import SiteModule

ORIGIN = "peft"
"""The origin of the sites of LoRA layers."""


@dataclass(frozen=True, eq=False)
class LoraSite:
    """The computed weight of one LoRA layer; see ``take_over``.

    Attributes:
        layer: the layer, of its generated class.
        paths: its dotted names.
        module: computes the weight (with some adapters also the bias) from what it reads; it has no latents of its own.
        weights: the local names of what it computes: ``("merged_weight",)``, perhaps with ``"merged_bias"``.
        reads: the dotted names of what it reads.
        declaration: what it computes, as text.
    """

    layer: nn.Module
    paths: tuple[str, ...]
    module: SiteModule
    weights: tuple[str, ...]
    reads: tuple[str, ...]
    declaration: str


def take_over(
    root: nn.Module, value: Callable[[str], Tensor | None], *, shared: bool
) -> tuple[tuple[LoraSite, ...], tuple[str, ...]]:
    """Give the LoRA layers of a copy their generated classes.

    Args:
        root: the copy of a model; its LoRA layers change.
        value: the present value of a tensor by its dotted name, whether it is registered or computed; None: there is none.
        shared: whether its tensors are also those of the given model.

    Returns:
        The weights that can be computed before their layer is called, and for each other layer a note that says why not.
    """
    sites, notes = [], []
    unmeant, inner = _read_by_attention(root), _inside_lora_attention(root)
    storages = _names_by_storage(root)
    for layer, paths in _lora_layers(root):
        state = LoraState(shared=shared)
        try:
            if id(layer) in unmeant:
                raise Obstacle("because the attention around it reads its base weight and does not call it")
            sites.append(_site(layer, paths, state, value))
        except Obstacle as obstacle:
            notes.append(f"{paths[0] or '(root)'}: keeps its LoRA layer, {obstacle}")
        if id(layer) not in inner and isinstance(layer, (peft_layers().Linear, peft_layers().Embedding, peft_layers()._ConvNd)):
            base = layer.get_submodule("base_layer")._parameters.get("weight")
            own = {join(path, "base_layer.weight") for path in paths}
            if base is not None:
                state.tied = tuple(name for name in storages.get(base.data_ptr(), ()) if name not in own)
            install_class(layer, state)
    return tuple(sites), tuple(notes)


@torch.no_grad()
def merged(root: nn.Module, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """Put base layers whose weights contain the adapters in place of LoRA layers, as eval mode has them.

    Args:
        root: a model that shares no tensor with another one and changes; its LoRA layers have their own classes.
        compute_dtype: compute the weights in this dtype and round once.

    Returns:
        The root; another one if that is a LoRA layer.
    """
    plain: dict[int, nn.Module] = {}
    done: set[int] = set()
    unmeant, modules = _read_by_attention(root), list(root.modules())
    for layer, _ in _lora_layers(root):
        try:
            if id(layer) in done or is_hooked(layer):
                continue
            if _merges_in_forward(layer):
                # By a method of its own, and together with those inside.
                done.update(map(id, layer.modules()))
                plain[id(layer)] = _merged_by_itself(layer)
            elif id(layer) not in unmeant:
                plain[id(layer)] = _base_layer_with_adapters(layer, compute_dtype)
        except Obstacle:
            # It runs as it is in the folded model, too.
            continue
    for module in modules if plain else ():
        if id(module) not in plain and not isinstance(module, torch.jit.ScriptModule):
            module._modules.update({name: plain.get(id(child), child) for name, child in module._modules.items()})
    return plain.get(id(root), root)


def _merges_in_forward(layer: nn.Module) -> bool:
    classes = (getattr(peft_layers(), name, None) for name in ("MultiheadAttention", "ParamWrapper"))
    return isinstance(layer, tuple(cls for cls in classes if cls is not None))


def _merged_by_itself(layer: Any) -> nn.Module:
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    merge = not (layer.disable_adapters or layer.merged)
    return layer.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)


def _base_layer_with_adapters(layer: Any, compute_dtype: torch.dtype | None) -> nn.Module:
    layout = layout_of(layer)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    given: nn.Module = layer.base_layer
    base = object.__new__(type(given))
    # Whoever holds the base layer besides the LoRA layer keeps it as it is.
    base.__dict__.update({name: dict(v) if name == "_parameters" else v for name, v in given.__dict__.items()})
    if layer.disable_adapters or layer.merged:
        return base
    recipe = recipe_of(layer, training=False)
    weight = base._parameters.get("weight")
    if weight is None:
        raise Obstacle("because the weight of its base layer is no parameter")
    used = [(adapter, factors_of(layer, slot_of(layer, adapter.name))) for adapter in recipe]
    tensors = [tensor for _, factors in used for tensor in factors if tensor is not None]
    dtype = compute_dtype or weight.dtype
    for tensor in () if compute_dtype else tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    wide = [(adapter, in_dtype(factors, dtype)) for adapter, factors in used]
    value, extra = weight_of(layout, weight.to(dtype), wide)
    base._parameters["weight"] = nn.Parameter(value.to(weight.dtype), requires_grad=False)
    if extra is not None:
        bias = base._parameters.get("bias")
        extra = extra if bias is None else bias.to(dtype) + extra
        base._parameters["bias"] = nn.Parameter(extra.to(weight.dtype), requires_grad=False)
    return base


def _lora_layers(root: nn.Module) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """The LoRA layers of a model, each with its dotted names."""
    if peft_layers() is None:
        return []
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, peft_layers().LoraLayer):
            found.setdefault(id(module), (module, []))[1].append(path)
    return [(layer, tuple(paths)) for layer, paths in found.values()]


def _read_by_attention(root: nn.Module) -> set[int]:
    """Ids of output projections, whose weights ``nn.MultiheadAttention`` reads itself."""
    return {id(module.out_proj) for module in root.modules() if isinstance(module, nn.MultiheadAttention)}


def _inside_lora_attention(root: nn.Module) -> set[int]:
    """Ids of output projections that a LoRA layer around them merges and unmerges in each forward, in its own way."""
    cls = getattr(peft_layers(), "MultiheadAttention", ())
    return {id(module.base_layer.out_proj) for module in root.modules() if isinstance(module, cls)}


def _names_by_storage(root: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    if peft_layers() is not None:
        for name, tensor in root.named_parameters(remove_duplicate=False):
            if not is_lazy(tensor) and tensor.layout is torch.strided and tensor.numel() and not tensor.is_meta:
                names.setdefault(tensor.data_ptr(), []).append(name)
    return names


def _site(layer: Any, paths: tuple[str, ...], state: LoraState, value: Callable[[str], Tensor | None]) -> LoraSite:
    """The site of a layer; fills ``state``.

    Raises:
        Obstacle: the layer has to run as it is.
    """
    layout, recipe = layout_of(layer), recipe_of(layer, training=True)
    base, path = layer.base_layer, paths[0]
    if layout == "embedding" and (base.sparse or base.scale_grad_by_freq):
        raise Obstacle("because its base layer has sparse or scaled gradients")
    slots, reads = [], [join(path, "base_layer.weight")]
    for name in adapters_of(layer):
        try:
            adapter = adapter_of(layer, name, True)
        except Obstacle:
            # One of the active ones is none of these: they were asked for above.
            continue
        slots.append(slot_of(layer, adapter.name))
        reads += [join(path, tensor) for tensor in tensor_names(layer, slots[-1]) if tensor is not None]
    biased = any(slot.bias for slot in slots)
    has_bias = biased and value(join(path, "base_layer.bias")) is not None
    if has_bias:
        reads.insert(1, join(path, "base_layer.bias"))
    kinds = {(tensor.dtype, tensor.device) for tensor in map(value, reads) if tensor is not None}
    if len(kinds) != 1 or not next(iter(kinds))[0].is_floating_point:
        raise Obstacle("because its tensors are " + ", ".join(sorted(f"{d} on {at}" for d, at in kinds)))
    padding_idx = base.padding_idx if layout == "embedding" else None
    state.map = LoraMap(layout, tuple(slots), has_bias=has_bias, biased=biased, padding_idx=padding_idx)
    state.map.recipe = () if layer.merged else recipe
    state.base, state.parts = base, {slot.name: parts_of(layer, slot.name) for slot in slots}
    return LoraSite(
        layer=layer,
        paths=paths,
        module=SiteModule([state.map], None, n_weights=2 if biased else 1),
        weights=(WEIGHT, BIAS) if biased else (WEIGHT,),
        reads=tuple(reads),
        declaration=f"lora({', '.join(slot.name for slot in slots)})",
    )
