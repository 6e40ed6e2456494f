"""Computed weights that a model already has: found on one module, taken off it, and written as plain steps.

==================== ============================ ================================================================
origin               latents                      weight
==================== ============================ ================================================================
parametrize          original / original0, ...    step_n(... step_1(originals))
weight_norm hook     g, v                         g v / |v|           (Salimans & Kingma 2016, eq. 2)
spectral_norm hook   orig, with buffers u, v      orig / (uᵀ orig v)  (Miyato et al. 2018, eq. 8, algorithm 1)
prune                orig, with buffer mask       mask * orig
==================== ============================ ================================================================

The last three are forward pre-hooks that assign the weight as an attribute before each forward. What looks like one of
them but overrides how the weight is computed is a hook of the user and stays where it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.weight_norm import WeightNorm

from fxparam.tracer.legacy_maps import MaskStep, SpectralNormStep, WeightNormStep

# What each legacy hook keeps on its module, "<tensor><suffix>", and the name of the same tensor under
# "parametrizations.<tensor>." in the scheme of torch.nn.utils.parametrize. Names in "original*" are latents.
_SCHEME: Mapping[str, Mapping[str, str]] = {
    "weight_norm hook": {"_g": "original0", "_v": "original1"},
    "spectral_norm hook": {"_orig": "original", "_u": "0._u", "_v": "0._v"},
    "prune": {"_orig": "original", "_mask": "0.mask"},
}
LEGACY_SCHEMES = tuple(_SCHEME.values())
"""For each legacy hook, what it appends to the name of its tensor, and the name of the same tensor in a site."""
_UNDO = {
    "parametrize": "torch.nn.utils.parametrize.remove_parametrizations(module, {!r})",
    "weight_norm hook": "torch.nn.utils.remove_weight_norm(module, {!r})",
    "spectral_norm hook": "torch.nn.utils.remove_spectral_norm(module, {!r})",
    "prune": "torch.nn.utils.prune.remove(module, {!r})",
}


@dataclass(frozen=True, eq=False)
class Adopted:
    """One computed weight, taken off the module that held it.

    Attributes:
        owner: the module of the copy that held the parametrization and no longer does; it has no ``tensor_name`` now.
        tensor_name: the name of the weight in its owner, ``"weight"``.
        origin: ``"parametrize"``, ``"weight_norm hook"``, ``"spectral_norm hook"`` or ``"prune"``.
        steps: modules of the ``torch.nn.utils.parametrize`` protocol; the first takes the originals, each other one the
            result of the one before.
        originals: the latents; plain tensors where the computed tensor was a buffer.
        is_buffer: whether the computed tensor was a buffer.
        legacy_names: names that a checkpoint of the old form uses for the tensors of this weight -> the names they
            have relative to the owner in the scheme of ``torch.nn.utils.parametrize``.
        inner: latents that are themselves computed (a parametrization on ``layer.parametrizations.weight.original``), by the
            name of the original; ``originals`` has their present values.
    """

    owner: nn.Module
    tensor_name: str
    origin: str
    steps: tuple[nn.Module, ...]
    originals: tuple[Tensor, ...]
    is_buffer: bool
    legacy_names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    inner: Mapping[str, Adopted] = field(default_factory=lambda: MappingProxyType({}))


def parametrized_names(module: nn.Module) -> tuple[str, ...]:
    """The tensors of this module that ``torch.nn.utils.parametrize`` computes, in the order of their registration."""
    # Not parametrize.is_parametrized: a user may have a ModuleDict of that name, or a __getattr__ of his own.
    lists = module.__dict__.get("_modules", {}).get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return ()
    return tuple(name for name, child in lists._modules.items() if isinstance(child, parametrize.ParametrizationList))


def has_generated_class(module: nn.Module) -> bool:
    """Whether the class of this module is the one ``torch.nn.utils.parametrize`` generated for it."""
    names = parametrized_names(module)
    return bool(names) and all(isinstance(vars(type(module)).get(name), property) for name in names)


def reparametrize(module: nn.Module, names: Iterable[str]) -> None:
    """Give a module that has ``parametrizations`` a generated class of its own, with a property for each name.

    A generated class must not be shared: ``remove_parametrizations`` deletes the property from the class, and the
    property keys the cache of ``parametrize.cached()`` by the module it was made for.
    """
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)


def take_over(module: nn.Module, path: str) -> tuple[list[Adopted], list[str]]:
    """Take every computed weight that can be taken off ``module``, which changes.

    Args:
        module: the *copy* of a module, its class already the one before parametrization.
        path: its dotted name, for messages.

    Returns:
        The weights, parametrizations first, then hooks, each in the order of their registration; and for each
        parametrization or hook that has to stay a note that says why.
    """
    hooks = _legacy_hooks(module)
    stay = _dependent(module, hooks)
    adopted, notes = [], [f"{dotted(path, name)}: {reason}" for name, reason in stay.items()]
    for name in parametrized_names(module):
        reason = _obstacle(_parametrizations(module)[name])
        if name in stay:
            continue
        if reason:
            notes.append(f"{dotted(path, name)}: keeps its torch parametrization, {reason}")
        else:
            adopted.append(_take_parametrization(module, name))
    adopted += [_take_legacy(module, hook) for hook in hooks if hook.tensor_name not in stay]
    for taken in adopted:
        _strip_state_dict_hooks(module, taken.tensor_name)
        _forget_flat_weight(module, taken.tensor_name)
    return adopted, notes


def dotted(path: str, name: str) -> str:
    """``name`` under the module at ``path``."""
    return f"{path}.{name}" if path else name


# --- torch.nn.utils.parametrize -------------------------------------------------------------------------------------


def _parametrizations(module: nn.Module) -> dict[str, Any]:
    """The parametrization lists of a parametrized module by tensor name."""
    return module._modules["parametrizations"]._modules  # type: ignore[union-attr]


def _obstacle(steps: parametrize.ParametrizationList) -> str:
    """Why this list is more than its steps applied to its originals; empty where it is not."""
    nested = parametrized_names(steps)
    if type(steps) is not parametrize.ParametrizationList and not (nested and _is_generated_list(steps)):
        return f"because the list itself is a {type(steps).__name__}"
    for name in nested:
        if name not in _original_names(steps):
            return f"because its {name} is computed"
        if reason := _obstacle(_parametrizations(steps)[name]):
            return reason
    hooked = (steps._forward_pre_hooks, steps._forward_hooks, steps._backward_pre_hooks, steps._backward_hooks)
    if any(hooked):
        return "because the list of its steps has hooks"
    if not all(isinstance(original, Tensor) for original in _originals(steps)):
        return "because it has originals that are no tensors"
    return ""


def _is_generated_list(steps: parametrize.ParametrizationList) -> bool:
    return has_generated_class(steps) and type(steps).__mro__[1] is parametrize.ParametrizationList


def _original_names(steps: parametrize.ParametrizationList) -> list[str]:
    return ["original"] if steps.is_tensor else [f"original{i}" for i in range(steps.ntensors)]


def _originals(steps: parametrize.ParametrizationList) -> tuple[Any, ...]:
    return tuple(getattr(steps, name) for name in _original_names(steps))


def _take_parametrization(module: nn.Module, name: str) -> Adopted:
    lists = _parametrizations(module)
    steps = lists[name]
    values = dict(zip(_original_names(steps), _originals(steps), strict=True))
    inner = {one: _take_parametrization(steps, one) for one in parametrized_names(steps)}
    for local, one in inner.items():
        trains = any(original.requires_grad for original in one.originals)
        values[local] = values[local].detach() if one.is_buffer else nn.Parameter(values[local].detach(), requires_grad=trains)
    del lists[name]
    if not lists:
        del module._modules["parametrizations"]
    originals = tuple(values.values())
    return Adopted(
        owner=module,
        tensor_name=name,
        origin="parametrize",
        steps=tuple(steps),
        originals=originals,
        is_buffer=not any(isinstance(original, nn.Parameter) for original in originals),
        inner=MappingProxyType(inner),
        legacy_names=_under(name, _SCHEME["weight_norm hook"]) if _compat_hooks(module, name) else MappingProxyType({}),
    )


# --- legacy hooks ---------------------------------------------------------------------------------------------------


class _Legacy(NamedTuple):
    """A legacy pre-hook of a module: its key in ``_forward_pre_hooks``, its kind and the tensor it assigns."""

    key: int
    origin: str
    tensor_name: str
    hook: Any

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of the tensors it reads."""
        return tuple(self.tensor_name + suffix for suffix in _SCHEME[self.origin])


def _legacy_hooks(module: nn.Module) -> list[_Legacy]:
    found = []
    for key, hook in module._forward_pre_hooks.items():
        if type(hook) is WeightNorm:
            found.append(_Legacy(key, "weight_norm hook", hook.name, hook))
        elif type(hook) is SpectralNorm:
            found.append(_Legacy(key, "spectral_norm hook", hook.name, hook))
        # A pruning method is meant to be subclassed, for its mask; what it does at a forward is not.
        elif isinstance(hook, BasePruningMethod) and all(
            getattr(type(hook), method) is getattr(BasePruningMethod, method) for method in ("__call__", "apply_mask")
        ):
            found.append(_Legacy(key, "prune", hook._tensor_name, hook))
    return found


def has_legacy_hooks(module: nn.Module) -> bool:
    """Whether the legacy ``weight_norm``, ``spectral_norm`` or ``prune`` computes a weight of this module."""
    return bool(_legacy_hooks(module))


def _dependent(module: nn.Module, hooks: list[_Legacy]) -> dict[str, str]:
    """The computed tensors that stay with their hooks, and why: a hook reads what another computes as of the forward before."""
    computed = {name: ["parametrize"] for name in parametrized_names(module)}
    for hook in hooks:
        computed.setdefault(hook.tensor_name, []).append(hook.origin)
    stay: dict[str, str] = {}
    for hook in hooks:
        keeps = f"keeps its {hook.origin}, because"
        if len(computed[hook.tensor_name]) > 1:
            stay[hook.tensor_name] = f"{keeps} several compute it ({', '.join(computed[hook.tensor_name])})"
        for leaf in hook.leaves:
            if leaf in computed:
                remedy = _UNDO[computed[leaf][0]].format(leaf)
                stay[hook.tensor_name] = (
                    f"{keeps} it reads {leaf}, which is itself computed ({computed[leaf][0]}); to have both adopted type "
                    f"{remedy} and say it in the spec"
                )
                reader = f"the {hook.origin} of {hook.tensor_name}"
                stay.setdefault(leaf, f"keeps its {computed[leaf][0]}, because {reader} reads it")
            elif _stored(module, leaf) is None:
                stay[hook.tensor_name] = f"{keeps} it reads {leaf}, which is neither a parameter nor a buffer of the module"
    return stay


def _stored(module: nn.Module, name: str) -> Tensor | None:
    stored = module._parameters.get(name)
    return module._buffers.get(name) if stored is None else stored


def _take_legacy(module: nn.Module, hook: _Legacy) -> Adopted:
    scheme = _SCHEME[hook.origin]
    tensors = {scheme[leaf.removeprefix(hook.tensor_name)]: _take_stored(module, leaf) for leaf in hook.leaves}
    del module._forward_pre_hooks[hook.key]
    module.__dict__.pop(hook.tensor_name, None)
    step: nn.Module
    if hook.origin == "weight_norm hook":
        step = WeightNormStep(hook.hook.dim)
    elif hook.origin == "spectral_norm hook":
        old: SpectralNorm = hook.hook
        step = SpectralNormStep(
            tensors["0._u"], tensors["0._v"], dim=old.dim, n_power_iterations=old.n_power_iterations, eps=old.eps
        )
    else:
        step = MaskStep(tensors["0.mask"])
    originals = tuple(tensor for name, tensor in tensors.items() if name.startswith("original"))
    return Adopted(
        owner=module,
        tensor_name=hook.tensor_name,
        origin=hook.origin,
        steps=(step.train(module.training),),
        originals=originals,
        is_buffer=not any(isinstance(original, nn.Parameter) for original in originals),
        legacy_names=_under(hook.tensor_name, scheme),
    )


def _take_stored(module: nn.Module, name: str) -> Tensor:
    tensor = module._parameters.pop(name, None)
    return module._buffers.pop(name) if tensor is None else tensor  # type: ignore[return-value]


def _under(name: str, scheme: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType({name + suffix: f"parametrizations.{name}.{new}" for suffix, new in scheme.items()})


# --- what else refers to the weight ---------------------------------------------------------------------------------


def _compat_hooks(module: nn.Module, name: str) -> list[int]:
    """Keys of the hooks by which PyTorch's own weight norm on ``name`` loads checkpoints of the legacy one."""
    return [
        key
        for key, hook in module._load_state_dict_pre_hooks.items()
        if (function := getattr(hook, "hook", None)) is not None
        and getattr(function, "__module__", None) == "torch.nn.utils.parametrizations"
        and getattr(function, "__name__", None) == "_weight_norm_compat_hook"
        and any(cell.cell_contents == name for cell in function.__closure__)
    ]


def _strip_state_dict_hooks(module: nn.Module, name: str) -> None:
    """Drop what PyTorch registered to load and save the checkpoints of this weight; ``legacy_names`` says the same."""
    for key, saving in list(module._state_dict_hooks.items()):
        if isinstance(saving, SpectralNormStateDictHook) and saving.fn.name == name:
            del module._state_dict_hooks[key]
    for key, loading in list(module._load_state_dict_pre_hooks.items()):
        function = getattr(loading, "hook", None)
        if isinstance(function, SpectralNormLoadStateDictPreHook) and function.fn.name == name:
            del module._load_state_dict_pre_hooks[key]
    for key in _compat_hooks(module, name):
        del module._load_state_dict_pre_hooks[key]


def _forget_flat_weight(module: nn.Module, name: str) -> None:
    """Make a recurrent module read this weight by its name at the next forward, not from its list of tensors."""
    names = module.__dict__.get("_flat_weights_names", ())
    if isinstance(module, nn.RNNBase) and name in names:
        index = names.index(name)
        module._flat_weights[index] = None
        # A dead reference means "changed"; None would mean "was never there", and the list would stay as it is.
        module._flat_weight_refs[index] = weakref.ref(nn.Parameter(torch.empty(0)))
