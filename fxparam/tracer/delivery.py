"""Delivering computed weights to Python that stays: a property on one generated class per owner.

The property finds its runtime through the instance, by a weak reference: a deep copy of a submodule does not read the
original's weights but computes its own, as ``torch.nn.utils.parametrize`` would.
"""

from __future__ import annotations

import copy
import copyreg
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxparam.errors import FxparamError, SpecError
from fxparam.spec.names import PARAMETRIZATIONS
from fxparam.tracer.site import SiteModule, Sites

BINDING = "_fxparam_binding"
"""The attribute under which an owner keeps its binding."""


_DELETED: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], str, Any]] = weakref.WeakKeyDictionary()
"""The parameter that was last deleted from an owner, and the names of all before."""


class WeightReader(Protocol):
    """What a binding asks for weights: the runtime, or a tracer."""

    def read_weight(self, name: str) -> Any:
        """The weight with this dotted name, now."""

    def lowered(self, name: str, value: Any, reader: CodeType) -> Any:
        """What to hand to this reader under autocast: the weight, or its cast where that is all the reader needs."""

    def write_weight(self, name: str, value: Tensor) -> None:
        """Set the weight through the right inverse of its site."""


_tracing: ContextVar[WeightReader | None] = ContextVar("fxparam_tracing", default=None)


@contextmanager
def weights_read_by(reader: WeightReader) -> Iterator[None]:
    """Inside the block, every computed weight is asked of ``reader`` (a tracer) in this thread."""
    token = _tracing.set(reader)
    try:
        yield
    finally:
        _tracing.reset(token)


class Inline:
    """Where weights wait for their readers while ``torch.compile`` or ``torch.export`` runs the Python of a model.

    Attributes:
        values: the weights and hoisted values of the forward that is being traced, by dotted name; else None.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Inline:
        return Inline()


class Binding:
    """The link from one owner to the runtime that computes its weights.

    A copy or an unpickled binding is unbound: its owner computes alone until a runtime takes it over.

    Args:
        names: local name of a computed tensor -> its dotted name in the model.
        homes: local name -> the site that computes it, and its position among that site's weights; only where the site
            needs nothing outside this owner.
        order: the local names of the owner's parameters and buffers before the weights were taken off, for ``restore``.
    """

    def __init__(self, names: dict[str, str], homes: dict[str, tuple[str, int]], order: dict[str, tuple[str, ...]]) -> None:
        self.names, self.homes, self.order = names, homes, order
        self._runtime: weakref.ref[WeightReader] | None = None
        self._inline: Inline | None = None

    def bind(self, runtime: WeightReader, inline: Inline) -> None:
        """Read weights from this runtime from now on, or from ``inline`` where a compiler runs the code."""
        self._runtime, self._inline = weakref.ref(runtime), inline

    @property
    def runtime(self) -> WeightReader | None:
        """The reader in charge: a tracer during a trace, else the runtime, else none."""
        tracer = _tracing.get()
        if tracer is not None:
            return tracer
        return None if self._runtime is None else self._runtime()

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return Binding(dict(self.names), dict(self.homes), dict(self.order))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Binding, (self.names, self.homes, self.order))

    def read(self, owner: nn.Module, name: str) -> Tensor:
        """The weight ``name`` of ``owner``."""
        if torch.compiler.is_compiling():
            return self._read_inline(owner, name)
        runtime = self.runtime
        if runtime is None:
            return self._compute(owner, name)
        value = runtime.read_weight(self.names[name])
        if torch._C._is_any_autocast_enabled():
            # The property was asked by the code two frames up.
            return runtime.lowered(self.names[name], value, sys._getframe(2).f_code)
        return value

    def _read_inline(self, owner: nn.Module, name: str) -> Tensor:
        # No lock, thread or context is touched here: compilers cannot look into those.
        if self._inline is not None and self._inline.values is not None and self.names[name] in self._inline.values:
            return self._inline.values[self.names[name]]
        return self._compute(owner, name)

    def _compute(self, owner: nn.Module, name: str) -> Tensor:
        site, position = self._alone(owner, name)
        value = site()
        return value[position] if isinstance(value, tuple) else value

    def write(self, owner: nn.Module, name: str, value: Tensor) -> None:
        """Set the weight ``name`` of ``owner`` through the right inverse."""
        runtime = self.runtime
        if runtime is not None:
            runtime.write_weight(self.names[name], value)
            return
        site, _ = self._alone(owner, name)
        site.set_latents(site.right_inverse(value))

    def _alone(self, owner: nn.Module, name: str) -> tuple[SiteModule, int]:
        if name not in self.homes:
            raise FxparamError(
                f"{self.names[name]} is computed from tensors outside this {type(owner).__name__}, which was copied or kept "
                "without its model; copy the whole transformed model, or use fxp.restore(model) to get plain parameters"
            )
        local, position = self.homes[name]
        sites: Sites = owner._modules["parametrizations"]  # type: ignore[assignment]
        return sites[local], position


def install(owner: nn.Module, binding: Binding) -> None:
    """Give ``owner`` a property for every computed tensor of ``binding``, in place of the tensors it had."""
    for name in binding.names:
        owner._parameters.pop(name, None)
        owner._buffers.pop(name, None)
        owner.__dict__.pop(name, None)
    owner.__dict__[BINDING] = binding
    base: Any = type(owner)
    owner.__class__ = owner_class(base, tuple(binding.names))
    if isinstance(owner, nn.RNNBase):
        # The list of flat weights is a property now; a stale copy must not shadow it.
        owner.__dict__.pop("_flat_weights", None)


def uninstall(owner: nn.Module) -> Binding:
    """Give ``owner`` its own class back, without values for the computed tensors."""
    binding: Binding = owner.__dict__.pop(BINDING)
    owner.__class__ = type(owner).__mro__[1]
    return binding


def binding_of(module: nn.Module) -> Binding | None:
    """The binding of an owner, or None for a module without computed weights."""
    return module.__dict__.get(BINDING)


@cache
def owner_class(base: Any, names: tuple[str, ...]) -> Any:
    """The subclass of ``base`` in which ``names`` are computed. One class per base and names, so that pickling finds it."""
    body: dict[str, Any] = {name: _weight_property(name) for name in names}
    if issubclass(base, nn.RNNBase):
        body["_flat_weights"] = _flat_weights
        # Packing for cuDNN writes into the weights; computed ones are packed at each call instead.
        body["flatten_parameters"] = lambda self: None
    if issubclass(base, nn.ParameterList):
        body["__getitem__"] = _item_or_slice(base)
    body |= {
        "__init__": _initialize(base),
        "__setattr__": _set_attribute(base, frozenset(names)),
        "__delattr__": _delete_attribute(base),
        "_replicate_for_data_parallel": _replicate(base),
        "__reduce_ex__": _reduce(base, names),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (base,), body)


def _initialize(base: type[nn.Module]) -> Any:
    @wraps(base.__init__)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Owners are never called into being: a module that code makes by type(self)(...) computes nothing.
        self.__class__ = base
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    return __init__


def _item_or_slice(base: type[nn.ParameterList]) -> Any:
    def __getitem__(self: nn.ParameterList, index: int | slice) -> Any:
        if not isinstance(index, slice):
            return base.__getitem__(self, index)
        part = base()
        for position, value in enumerate(self[i] for i in range(*index.indices(len(self)))):
            computed = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
            part.append(None if computed else value)
            if computed:
                # Given to append, it would become a parameter, cut off from its latents.
                part.__dict__[str(position)] = value
        return part

    return __getitem__


def _weight_property(name: str) -> property:
    def get(self: nn.Module) -> Tensor:
        try:
            return self.__dict__[BINDING].read(self, name)
        except AttributeError as error:
            # nn.Module.__getattr__ would turn it into "has no attribute", and hide the cause.
            raise FxparamError(f"computing {name} of {type(self).__name__} failed: {error}") from error

    def set_(self: nn.Module, value: Tensor) -> None:
        self.__dict__[BINDING].write(self, name, value)

    return property(get, set_, doc=f"The computed tensor {name!r}; assigning goes through its right inverse.")


def _set_attribute(base: type[nn.Module], names: frozenset[str]) -> Any:
    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if name in names:
            if not isinstance(value, Tensor):
                raise SpecError(f"cannot assign {type(value).__name__} to the computed weight {name}; expected a tensor")
            # nn.Module would register a Parameter beside the property.
            self.__dict__[BINDING].write(self, name, value.detach())
        elif name == PARAMETRIZATIONS and isinstance(value, nn.ModuleDict):
            self.__class__ = next(cls for cls in type(self).__mro__ if cls.__dict__.get("__setattr__") is __setattr__)
            _put_back(self)
            raise SpecError(
                f"torch.nn.utils.parametrize cannot register on this {base.__name__}: fxparam computes its "
                f"{', '.join(sorted(names))}. Register before the transform, or give all rules to one "
                "fxp.transform(model, spec); to start anew take fxp.restore(model). The tensor is registered as before; if the "
                "map has a right inverse, PyTorch has written that into it"
            )
        elif name == "_flat_weights" and isinstance(getattr(type(self), name, None), property):
            # RNNs rebuild the list after moving; theirs is computed on reading.
            pass
        else:
            base.__setattr__(self, name, value)

    return __setattr__


def _delete_attribute(base: type[nn.Module]) -> Any:
    def __delattr__(self: nn.Module, name: str) -> None:
        if name in self._parameters:
            _DELETED[self] = (tuple(self._parameters), name, weakref.ref(self._parameters[name]))
        base.__delattr__(self, name)

    return __delattr__


def _replicate(base: type[nn.Module]) -> Any:
    def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
        replica = base._replicate_for_data_parallel(self)
        # The latents of a replica are its own: it must not read the weights of the model.
        replica.__dict__[BINDING] = copy.deepcopy(self.__dict__[BINDING])
        return replica

    return _replicate_for_data_parallel


def _put_back(module: nn.Module) -> None:
    """Undo the last deletion of a parameter: registering a parametrization deletes first, and is refused then."""
    order, name, reference = _DELETED.pop(module, ((), "", None))
    parameter = None if reference is None else reference()
    if parameter is not None:
        kept = {**module._parameters, name: parameter}
        module._parameters.clear()
        module._parameters.update({key: kept[key] for key in order})


def _reduce(base: type[nn.Module], names: tuple[str, ...]) -> Any:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = base.__reduce_ex__(self, protocol)
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise FxparamError(
                f"{base.__name__} pickles in a way of its own, which its computed weights cannot follow; use fxp.restore first"
            )
        return (_new, (base, names), *reduced[2:])

    return __reduce_ex__


def _new(base: Any, names: tuple[str, ...]) -> Any:
    cls = owner_class(base, names)
    return cls.__new__(cls)


@property  # type: ignore[misc]
def _flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(self, name) if hasattr(self, name) else None for name in self._flat_weights_names]
