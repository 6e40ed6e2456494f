"""The structural copy: the user's modules once more, same classes and tensors, with the computed weights taken off.

Everything strongly reachable from the model is scanned once. Copied are the modules, the plain containers they hold,
and whatever leads back to one of those (bound methods, partials, closures, weak references, plain objects); all else
is shared. Nothing of the user's runs: modules and objects are made by ``object.__new__`` and written through
``__dict__``, so ``__init__``, ``__setattr__``, ``__deepcopy__`` and ``__getstate__`` have no say, and no random number
is drawn.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer
from torch.nn.utils.parametrize import ParametrizationList

from fxparam.tracer import adoption
from fxparam.tracer.references import PLAIN, TABLES, Immutable, Mutable, is_compiled, kind_of


@dataclass(frozen=True, eq=False)
class Copied:
    """A structural copy.

    Attributes:
        root: the copy of the given model.
        adopted: the computed weights taken off it, in registration order of their owners.
        memo: ``id`` of each module -> its copy; a shared module maps to itself. Valid while the given model lives.
        notes: what is not a copy, or was not adopted, each with its dotted name and the reason.
    """

    root: nn.Module
    adopted: tuple[adoption.Adopted, ...]
    memo: Mapping[int, nn.Module]
    notes: tuple[str, ...]


def structural_copy(model: nn.Module, *, adopt: bool = True, copy_tensors: bool = False) -> Copied:
    """Copy the modules of ``model`` and share its tensors; ``model`` itself stays as it is, down to its hooks.

    Args:
        model: any module, also after a backward, and also where ``deepcopy`` fails.
        adopt: take computed weights (``torch.nn.utils.parametrize``, legacy ``weight_norm`` and ``spectral_norm``,
            ``torch.nn.utils.prune``) off the copy and return them. A parametrization inside a parametrization stays.
        copy_tensors: clone every tensor, each storage once, so that ties and views hold among the clones. What has an
            autograd graph of its own stays shared, and ``.grad`` and gradient hooks of tensors are not copied.
    """
    scan = _Scan(model, copy_tensors)
    memo, notes = _build(scan)
    modules = [module for module in scan.modules if not isinstance(module, torch.jit.ScriptModule)]
    inside = _inside_parametrizations(modules) if adopt else {id(module) for module in modules}
    adopted: list[adoption.Adopted] = []
    # Inner parametrizations first: whether an outer one can be taken over is asked of finished inner ones.
    for module in sorted(modules, key=lambda module: id(module) not in inside):
        new, path = memo[id(module)], scan.path(module)
        names = adoption.parametrized_names(module)
        if id(module) not in inside:
            if names and not adoption.has_generated_class(module):
                notes += [
                    f"{adoption.dotted(path, name)}: keeps its torch parametrization, because the class that PyTorch generated "
                    "for it was changed afterwards (remove_parametrizations on a deep copy does that, and fully_shard); "
                    "transform the model before"
                    for name in names
                ]
                continue
            taken, reasons = adoption.take_over(new, path)
            adopted += taken
            notes += reasons
        elif adopt and not isinstance(module, ParametrizationList) and (names or adoption.has_legacy_hooks(module)):
            notes.append(f"{path}: keeps its own parametrization, because it is part of another one")
        if adoption.has_generated_class(module) and (kept := adoption.parametrized_names(new)):
            adoption.reparametrize(new, kept)
        if copy_tensors:
            notes += [
                f"{adoption.dotted(path, name)}: a tensor computed from others, shared with the given model"
                for name, value in new.__dict__.items()
                if isinstance(value, Tensor) and value.grad_fn is not None
            ]
    copies = {id(module): memo[id(module)] for module in scan.modules}
    return Copied(copies[id(model)], tuple(adopted), types.MappingProxyType(copies), tuple(notes))


def _inside_parametrizations(modules: list[nn.Module]) -> set[int]:
    """Ids of the parametrization lists and of all modules registered below one."""
    stack: list[nn.Module | None] = [module for module in modules if isinstance(module, ParametrizationList)]
    inside: set[int] = set()
    while stack:
        module = stack.pop()
        if module is not None and id(module) not in inside:
            inside.add(id(module))
            if not isinstance(module, torch.jit.ScriptModule):
                stack.extend(module.__dict__["_modules"].values())
    return inside


# --- the scan -------------------------------------------------------------------------------------------------------


class _Scan:
    """What a model reaches, in the order it was found, and which of it must be copied."""

    def __init__(self, model: nn.Module, copy_tensors: bool) -> None:
        self.copy_tensors = copy_tensors
        self.found: dict[int, Any] = {}
        self.strays: list[tuple[Any, nn.Module]] = []
        self._kinds: dict[type, Mutable | Immutable | None] = {}
        self._labels: dict[int, tuple[int | None, str]] = {}
        self._readers: dict[int, list[int]] = {}
        self._own: set[int] = set()
        # Registered modules first: their dotted names are what a user knows them by, whoever else refers to them.
        for parent, name, module in _registered(model):
            self._add(module, parent, name)
        self._explore()
        self.modules: list[nn.Module] = [value for value in self.found.values() if issubclass(type(value), nn.Module)]
        self.needed = self._closure()

    def kind(self, value: object) -> Mutable | Immutable | None:
        """The kind of ``value``. By its type, never ``isinstance``: a proxy says it is what it stands for."""
        cls = type(value)
        if cls not in self._kinds:
            self._kinds[cls] = kind_of(cls)
        return self._kinds[cls]

    def path(self, value: object) -> str:
        """The dotted name under which ``value`` was found; empty for the root."""
        labels = []
        key: int | None = id(value)
        while key is not None:
            key, label = self._labels[key]
            labels.append(label)
        return ".".join(label for label in reversed(labels) if label)

    def _add(self, value: object, parent: object, label: str) -> bool:
        if id(value) in self.found:
            return False
        self.found[id(value)] = value
        self._labels[id(value)] = (None if parent is None else id(parent), label)
        return True

    def _explore(self) -> None:
        queue = list(self.found.values())
        weak: list[tuple[Any, Any]] = []
        for value in queue:  # grows while it is read
            kind = self.kind(value)
            holds_state = issubclass(type(value), nn.Module) or id(value) in self._own
            for label, part, is_weak in kind.parts(value) if kind else ():
                cls = type(part)
                copied_tensor = self.copy_tensors and issubclass(cls, Tensor)
                if self.kind(part) is None and not copied_tensor and not issubclass(cls, torch.jit.ScriptModule):
                    continue
                self._readers.setdefault(id(part), []).append(id(value))
                if is_weak:
                    weak.append((value, part))
                    continue
                # A module's plain containers are its state: a forward of the copy must not write into the original's.
                if holds_state and (cls in PLAIN or label in TABLES):
                    self._own.add(id(part))
                if self._add(part, value, "" if label in TABLES else label):
                    queue.append(part)
        self.strays = [(holder, part) for holder, part in weak if id(part) not in self.found]

    def _closure(self) -> set[int]:
        """Ids of modules, their containers (and tensors, if those are copied), and of all that leads to one of them."""
        seeds = (key for key, value in self.found.items() if issubclass(type(value), nn.Module | Tensor))
        own = (key for key in self._own if isinstance(self.kind(self.found[key]), Mutable))
        stack = [*seeds, *own]
        needed = set(stack)
        while stack:
            for reader in self._readers.get(stack.pop(), ()):
                if reader not in needed:
                    needed.add(reader)
                    stack.append(reader)
        return needed


def _registered(model: nn.Module) -> Iterator[tuple[nn.Module | None, str, nn.Module]]:
    """``(parent, name, module)`` in the order of ``named_modules``, each module once."""
    stack: list[tuple[nn.Module | None, str, nn.Module]] = [(None, "", model)]
    seen: set[int] = set()
    while stack:
        parent, name, module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield parent, name, module
            if not isinstance(module, torch.jit.ScriptModule):
                children = [(module, n, child) for n, child in module.__dict__["_modules"].items() if child is not None]
                stack.extend(reversed(children))


# --- the copies -----------------------------------------------------------------------------------------------------


def _build(scan: _Scan) -> tuple[dict[int, Any], list[str]]:
    """The copies by ``id`` of what they are copies of, and notes on what had to be shared."""
    memo: dict[int, Any] = {}
    notes: list[str] = []
    shells: list[tuple[Mutable, Any, Any]] = []
    storages: dict[int, torch.UntypedStorage] = {}
    for key, value in scan.found.items():
        kind = scan.kind(value)
        if key not in scan.needed or isinstance(kind, Immutable):
            continue
        if issubclass(type(value), torch.jit.ScriptModule):
            memo[key] = value
            notes.append(f"{scan.path(value) or '(root)'}: a ScriptModule cannot be copied and is shared")
        elif kind is None:
            memo[key] = _clone(value, storages)
        else:
            try:
                memo[key] = kind.shell(value)
                shells.append((kind, value, memo[key]))
            except TypeError as error:
                memo[key] = value
                notes.append(f"{scan.path(value)}: cannot be copied and still refers to the given model ({error})")

    def resolve(value: Any) -> Any:
        key = id(value)
        if key in scan.needed and key not in memo:
            kind = scan.kind(value)
            assert isinstance(kind, Immutable)
            memo[key] = kind.build(value, resolve)
        return memo.get(key, value)

    # Hashed containers last: by then whatever computes its hash from its attributes has them.
    for kind, value, new in sorted(shells, key=lambda shell: isinstance(shell[1], dict | set)):
        kind.fill(value, new, resolve)
    for module in scan.modules:
        notes += [f"{scan.path(module) or '(root)'}: {note}" for note in _finish(module, memo[id(module)])]
    for holder, stray in scan.strays:
        if issubclass(type(stray), nn.Module):
            notes.append(f"{scan.path(holder)}: refers weakly to a module outside of the model, which is not copied")
    return memo, notes


def _finish(module: nn.Module, new: nn.Module) -> Iterator[str]:
    """Make good what attributes alone do not carry over."""
    if isinstance(module, fx.GraphModule) and isinstance(new, fx.GraphModule):
        new.graph = copy.deepcopy(module.graph)
    compiled = module.__dict__.get("_compiled_call_impl")
    if compiled is not None and not hasattr(compiled, "of_fxparam"):
        yield "the compiled call was dropped; type .compile() on the result"
    if is_compiled(module):
        new._initialize()  # type: ignore[operator]


def _clone(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """``tensor`` on a clone of its storage, made once for all tensors on that storage."""
    if tensor.grad_fn is not None:
        return tensor
    if isinstance(tensor, UninitializedBuffer):  # has no deepcopy, other than a lazy parameter
        return UninitializedBuffer(tensor.requires_grad, tensor.device, tensor.dtype, tensor.persistent)  # type: ignore
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return copy.deepcopy(tensor)
    storage = tensor.untyped_storage()
    if storage._cdata not in storages:
        storages[storage._cdata] = storage.clone()
    with torch.no_grad():
        new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        new.set_(storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
    new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    new.requires_grad_(tensor.requires_grad)
    new.__dict__.update(tensor.__dict__)
    return new
