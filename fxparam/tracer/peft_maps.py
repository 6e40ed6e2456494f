"""What a LoRA layer of the package ``peft`` computes, and the same as one map from its tensors to a weight.

==================== ======================================================= =========================================
adapter              weight                                                  source
==================== ======================================================= =========================================
LoRA                 W + s B A                                               Hu et al. 2022, section 4.1
LoRA, rank-stable    the same, with s = alpha / sqrt(r)                      Kalajdzievski 2023
DoRA                 m (W + s B A) / |W0 + s B A|, the norm a constant       Liu et al. 2024, equations 5 and 11
==================== ======================================================= =========================================

``W`` is ``W0`` after the adapters before it, so several active ones are applied in their order. Norms are over all dimensions
but that of the outputs. ``A`` is (r, inputs), ``B`` (outputs, r).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

Layout = Literal["linear", "transposed", "conv", "embedding"]
"""How a base layer keeps its weight: (outputs, inputs), (inputs, outputs), (outputs, inputs, ...), (entries, outputs)."""


_DORA = ("DoraLinearVariant", "DoraEmbeddingVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)


class Obstacle(Exception):
    """Why no weight of the base layer does what a LoRA layer does."""


class Adapter(NamedTuple):
    """How an adapter takes part in a weight."""

    name: str
    scaling: float
    dora: bool


class Slot(NamedTuple):
    """Which tensors of an adapter a map is given: A and B, and these after them."""

    name: str
    bias: bool
    magnitude: bool


class Factors(NamedTuple):
    """The tensors of an adapter."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    magnitude: Tensor | None


@final
class LoraMap(nn.Module):
    """``(W0, [bias,] A_1, B_1, [bias_1,] [m_1,] A_2, ...) -> weight``, and with ``biased`` the bias as well.

    Args:
        layout: how the base layer keeps its weight.
        slots: the adapters whose tensors it is given, in order.
        has_bias: whether the bias of the base layer is given.
        biased: whether adapters add to the bias.
        padding_idx: the row of an embedding that gets no gradient of its own.

    Attributes:
        recipe: the adapters that take part, in the order of application; those of the layer as it was looked at last.
    """

    def __init__(
        self, layout: Layout, slots: tuple[Slot, ...], *, has_bias: bool, biased: bool, padding_idx: int | None
    ) -> None:
        super().__init__()
        self.layout, self.slots, self.has_bias, self.biased, self.padding_idx = layout, slots, has_bias, biased, padding_idx
        self.recipe: tuple[Adapter, ...] = ()

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The weight, of the shape and dtype of ``W0``."""
        given = iter(tensors)
        base = next(given)
        bias = next(given) if self.has_bias else None
        factors = {
            slot.name: Factors(
                next(given), next(given), next(given) if slot.bias else None, next(given) if slot.magnitude else None
            )
            for slot in self.slots
        }
        used = ((adapter, factors[adapter.name]) for adapter in self.recipe)
        weight, extra = weight_of(self.layout, base, used, self.padding_idx)
        if not self.biased:
            return weight
        zero = base.new_zeros(base.shape[_outputs(self.layout)]) if bias is None else bias
        return weight, zero.clone() if extra is None else zero + extra


def weight_of(
    layout: Layout, base: Tensor, adapters: Iterable[tuple[Adapter, Factors]], padding_idx: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """The weight with these adapters, and what they add to the bias (None: nothing).

    Args:
        layout: how the base layer keeps its weight.
        base: the weight without adapters; the result is a tensor of its own, of the same shape.
        adapters: those that take part, in order, with their tensors; all of one dtype with ``base``.
        padding_idx: the row of an embedding that gets no gradient of its own.
    """
    base = _without_gradient_at(base, padding_idx)
    weight, extra = base, None
    for adapter, factors in adapters:
        update = adapter.scaling * _product(layout, factors, base, padding_idx)
        weight = weight + update
        if adapter.dora:
            assert factors.magnitude is not None
            factor = factors.magnitude.reshape(-1) / _norms(layout, base + update).detach()
            weight = _along_outputs(layout, factor, base.dim()) * weight
            extra = None if extra is None else factor * extra
        if factors.bias is not None:
            added = adapter.scaling * factors.bias
            extra = added if extra is None else extra + added
    return weight.clone() if weight is base else weight, extra


def _product(layout: Layout, factors: Factors, base: Tensor, padding_idx: int | None) -> Tensor:
    """``B A`` in the layout of the weight."""
    if layout == "conv":
        return (factors.b.flatten(1) @ factors.a.flatten(1)).view(base.shape)
    if layout == "linear":
        return factors.b @ factors.a
    return _without_gradient_at(factors.a.T, padding_idx) @ factors.b.T


def _outputs(layout: Layout) -> int:
    """The dimension of the outputs."""
    return 0 if layout in ("linear", "conv") else 1


def _norms(layout: Layout, weight: Tensor) -> Tensor:
    """The norm of what belongs to each output."""
    return torch.linalg.vector_norm(weight, dim=[d for d in range(weight.dim()) if d != _outputs(layout)])


def _along_outputs(layout: Layout, values: Tensor, dim: int) -> Tensor:
    """One value for each output, to be multiplied with a weight of ``dim`` dimensions."""
    shape = [1] * dim
    shape[_outputs(layout)] = -1
    return values.view(shape)


def _without_gradient_at(rows: Tensor, number: int | None) -> Tensor:
    """``rows``, where the one with this number gets no gradient."""
    if number is None:
        return rows
    chosen = (torch.arange(rows.shape[0], device=rows.device) == number).unsqueeze(1)
    return torch.where(chosen, rows.detach(), rows)


# --- what a layer is ------------------------------------------------------------------------------------------------


def peft_layers() -> Any:
    """The module with the LoRA layers, if anyone has imported it."""
    return sys.modules.get("peft.tuners.lora.layer")


def layout_of(layer: Any) -> Layout:
    """How the base layer keeps its weight.

    Raises:
        Obstacle: base layer and LoRA layer do other things than their known classes.
    """
    peft, base, cls = peft_layers(), layer._modules.get("base_layer"), type(layer)
    if not hasattr(layer, "lora_variant") or not hasattr(peft, "ParamWrapper"):
        raise Obstacle("because only peft from 0.17 on can be looked into")
    if isinstance(layer, peft.ParamWrapper):
        raise Obstacle("because a ParamWrapper registers torch parametrizations inside its forward")
    if cls.forward not in (peft.Linear.forward, peft.Embedding.forward, peft._ConvNd.forward) or "forward" in layer.__dict__:
        raise Obstacle(f"because a {cls.__name__} has a forward of its own")
    if getattr(layer, "quantization_backend", None) is not None or getattr(layer, "ephemeral_gpu_offload", False):
        raise Obstacle("because its base weight is quantized or offloaded")
    if cls.forward is peft.Linear.forward:
        return _linear_layout(layer, base)
    return _conv_layout(base) if cls.forward is peft._ConvNd.forward else _embedding_layout(layer, base)


def _linear_layout(layer: Any, base: Any) -> Layout:
    transformers = sys.modules.get("transformers.pytorch_utils")
    transposed = transformers is not None and type(base).forward is transformers.Conv1D.forward
    if not transposed and type(base).forward is not nn.Linear.forward:
        raise _of_its_own(base)
    if bool(layer.fan_in_fan_out) is not transposed:
        raise Obstacle(f"because fan_in_fan_out={layer.fan_in_fan_out} does not fit a {type(base).__name__}")
    return "transposed" if transposed else "linear"


def _conv_layout(base: Any) -> Layout:
    kind = next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if type(base).forward is kind.forward), None)
    if kind is None or type(base)._conv_forward is not kind._conv_forward:
        raise _of_its_own(base)
    if base.groups != 1:
        raise Obstacle(f"because adapters mix the groups of a convolution, and it has groups={base.groups}")
    return "conv"


def _embedding_layout(layer: Any, base: Any) -> Layout:
    if type(base).forward is not nn.Embedding.forward or hasattr(base, "embed_scale"):
        raise _of_its_own(base)
    if base.max_norm is not None:
        raise Obstacle(f"because max_norm={base.max_norm} writes the weight that it reads")
    if layer.tp_layer is not None:
        raise Obstacle("because it is split over devices")
    return "embedding"


def _of_its_own(base: Any) -> Obstacle:
    return Obstacle(f"because its base layer, a {type(base).__name__}, has a forward of its own")


# --- what its adapters are ------------------------------------------------------------------------------------------


def adapters_of(layer: Any) -> tuple[str, ...]:
    """The names of all adapters of a layer."""
    modules = layer._modules
    return (*modules["lora_A"]._modules, *modules["lora_embedding_A"]._parameters)


def parts_of(layer: Any, name: str) -> tuple[nn.Module, ...]:
    """The modules of an adapter: of A, of B, and of its magnitude, if it has one."""
    modules = layer._modules
    magnitude = modules["lora_magnitude_vector"]._modules.get(name)
    if name in modules["lora_A"]._modules:
        pair = (modules["lora_A"]._modules[name], modules["lora_B"]._modules[name])
    else:
        pair = (modules["lora_embedding_A"], modules["lora_embedding_B"])
    return pair if magnitude is None else (*pair, magnitude)


def slot_of(layer: Any, name: str) -> Slot:
    """Which tensors an adapter has."""
    parts = parts_of(layer, name)
    return Slot(name, parts[1]._parameters.get("bias") is not None and name in layer.lora_A, len(parts) == 3)


def tensor_names(layer: Any, slot: Slot) -> tuple[str | None, ...]:
    """The names of an adapter's tensors, relative to its layer, as ``Factors`` has them."""
    name = slot.name
    if name in layer.lora_A:
        pair = (f"lora_A.{name}.weight", f"lora_B.{name}.weight", f"lora_B.{name}.bias" if slot.bias else None)
    else:
        pair = (f"lora_embedding_A.{name}", f"lora_embedding_B.{name}", None)
    return (*pair, f"lora_magnitude_vector.{name}.weight" if slot.magnitude else None)


def factors_of(layer: Any, slot: Slot) -> Factors:
    """The tensors of an adapter."""

    def tensor(name: str | None) -> Any:
        path, _, local = (name or "").rpartition(".")
        return None if name is None else getattr(layer.get_submodule(path), local)

    return Factors(*map(tensor, tensor_names(layer, slot)))


def recipe_of(layer: Any, *, training: bool) -> tuple[Adapter, ...]:
    """The adapters that take part now.

    Args:
        layer: a LoRA layer.
        training: whether gradients and training mode count, or only the values in eval mode.

    Raises:
        Obstacle: what one of them does is not in a weight.
    """
    if any(_GLOBAL_HOOKS) or is_hooked(layer._modules["base_layer"]):
        raise Obstacle("because modules in it have hooks")
    own = adapters_of(layer)
    return tuple(adapter_of(layer, name, training) for name in layer.active_adapters if name in own)


def in_dtype(factors: Factors, dtype: torch.dtype) -> Factors:
    """The tensors of an adapter in another dtype."""
    bias, magnitude = (None if t is None else t.to(dtype) for t in (factors.bias, factors.magnitude))
    return Factors(factors.a.to(dtype), factors.b.to(dtype), bias, magnitude)


def adapter_of(layer: Any, name: str, training: bool) -> Adapter:
    """How one adapter takes part; see ``recipe_of``."""
    variant, scaling, dropout = layer.lora_variant.get(name), layer.scaling[name], layer._modules["lora_dropout"]._modules[name]
    kind, dora, identity = type(variant), variant is not None, isinstance(dropout, nn.Identity)
    if dora and (kind.__name__ not in _DORA or kind.__module__ != "peft.tuners.lora.variants"):
        raise Obstacle(f"because its adapter {name!r} is a {kind.__name__}")
    if not isinstance(scaling, int | float):
        raise Obstacle(f"because the scaling of its adapter {name!r} is a {type(scaling).__name__}")
    parts = parts_of(layer, name)
    if any(map(is_hooked, (*parts, dropout))):
        raise Obstacle("because modules in it have hooks")
    if name in layer._modules["lora_A"]._modules and not _fit(layer._modules["base_layer"], *parts[:2]):
        raise Obstacle(f"because its adapter {name!r} does not read its input as the base layer does")
    if training and not identity and getattr(dropout, "p", None) != 0:
        raise Obstacle(f"because its adapter {name!r} has dropout {getattr(dropout, 'p', type(dropout).__name__)}")
    if training and dora and not identity and len(layer.active_adapters) > 1:
        raise Obstacle(f"because its adapter {name!r} takes other adapters into account in eval mode only")
    return Adapter(name, float(scaling), dora)


def _fit(base: Any, a: Any, b: Any) -> bool:
    """Whether B after A is a layer like the base layer."""
    if not isinstance(base, nn.modules.conv._ConvNd):
        return type(a).forward is nn.Linear.forward and type(b).forward is nn.Linear.forward
    same = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "groups")
    return (
        type(a).forward is type(b).forward is type(base).forward
        and all(getattr(a, name) == getattr(base, name) for name in same)
        and a.padding_mode == "zeros"
        and {*b.kernel_size, *b.stride, *b.dilation, b.groups} == {1}
        and set(b.padding) == {0}
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class says."""
    state = module.__dict__
    return any(state[hooks] for hooks in _HOOKS) or "forward" in state
