"""Recording: one call of a model, run as it is, and graphs of every part of it that a graph can show.

The call is real: it returns what it returns and leaves what it leaves, whatever the recorder thinks of it. Beside it goes a
tape of operations and the tree of module calls. What no graph shows happens somewhere in that tree, and taints the calls it
happened in, up to the root; every other call can be cut out of the tape as a graph of its own.
"""

from __future__ import annotations

import contextvars
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import _pop_mode, _push_mode

from fxparam.spec.names import first_names, named_tensors
from fxparam.tracer.delivery import WeightReader, weights_read_by
from fxparam.tracer.hazards import ambient_modes, python_random_states, user_line
from fxparam.tracer.observer import Observer
from fxparam.tracer.outside import Members, Reads, classes_of, contents_of, same
from fxparam.tracer.signature import Signature, Structure, flatten, signature_of
from fxparam.tracer.tape import Op, Tape, refs_in
from fxparam.tracer.watch import Watch

_DEPTH = 6


CHOOSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Layers that choose fused kernels by themselves, other ones where a mode is active: called as a whole, without one."""


@dataclass(eq=False)
class Call:
    """One call of a module in a recording.

    Attributes:
        module: the module.
        path: its first dotted name; None for a module outside of the model.
        given: its arguments.
        leaves: the leaves of its arguments.
        structure: how they make up ``(args, kwargs)``.
        start: how many operations came before.
        modes: under which it was called.
        contents: the attributes of the module when it was called.
        stop: how many operations had run when it returned.
        output: what it returned.
        reason: why there can be no graph of it; empty if there can.
        asked: whether its code asked for the shape of a tensor.
        calls: the calls of other modules in it.
        codes: the functions of the user's that ran in it.
        mentioned: attributes that other code looked at in it.
    """

    module: nn.Module
    path: str | None
    given: tuple[tuple[Any, ...], dict[str, Any]]
    leaves: list[Any]
    structure: Structure
    start: int
    modes: tuple[object, ...]
    contents: list[Any]
    stop: int = -1
    output: Any = None
    reason: str = ""
    asked: bool = False
    calls: list[Call] = field(default_factory=list)
    codes: set[CodeType] = field(default_factory=set)
    mentioned: set[str] = field(default_factory=set)

    def signature(self) -> Signature:
        """What other calls must have in common with this one.

        Raises:
            TraceError: no graph can be guarded for an argument.
        """
        found = signature_of(self.leaves, self.structure, shapes=self.asked)
        return Signature(found.structure, found.leaves, self.modes)


@dataclass(frozen=True, eq=False)
class Recording:
    """What a recording knows.

    Attributes:
        root: the call of the model.
        ops: the tape.
        numbers: the number on the tape of each tensor, by ``id``; the call keeps them alive.
        names: the names of registered, computed and otherwise held tensors, by ``id``.
        held: the tensors that are held without being registered, by name.
        written: the names of registered tensors that the call wrote to.
        reads: what each function reads from outside.
        containers: the ids of the containers that the modules hold.
    """

    root: Call
    ops: list[Op]
    numbers: Mapping[int, int]
    names: Mapping[int, str]
    held: Mapping[str, Tensor]
    written: frozenset[str]
    reads: Mapping[CodeType, Reads]
    containers: frozenset[int]

    def watch(self, call: Call, tensors: Collection[str]) -> Watch:
        """What must stay as it is for a graph of this call, which reads these tensors."""
        reads, module = Reads(), call.module
        reads.names.update(call.mentioned)
        for code in call.codes:
            reads.add(self.reads[code])
        names = None if reads.dynamic else frozenset(reads.names)
        classes = [
            (members, name)
            for members in map(Members, classes_of(module))
            for name in vars(members.holder)
            if names is None or name in names
        ]
        return Watch(module.modules(), names=names, places=(*reads.places, *classes, *self._registered(module, tensors)))

    def _registered(self, module: nn.Module, tensors: Collection[str]) -> Iterator[tuple[Any, Any]]:
        """Where the tensors are that a graph reads: another one may be put there for a while, or one of two that are tied."""
        registries = [registry for one in self.root.module.modules() for registry in (one._parameters, one._buffers)]
        for registry in registries:
            for name, tensor in registry.items():
                if tensor is not None and self.names.get(id(tensor)) in tensors:
                    yield registry, name
        for one in module.modules():
            for registry in (one._parameters, one._buffers):
                yield Presence(registry), ""


class Presence:
    """Which tensors a registry has, as one item that is the same as long as they are there and none is missing."""

    def __init__(self, registry: Mapping[str, Tensor | None]) -> None:
        self.registry = registry

    def __getitem__(self, key: str) -> str:
        return " ".join(name for name, tensor in self.registry.items() if tensor is not None)


class Recorder:
    """Records one call of a model.

    Args:
        root: the live module tree.
        reader: what computed weights are read of.
        random: the names of those that are drawn anew at each read.
    """

    def __init__(self, root: nn.Module, reader: WeightReader, random: Collection[str] = ()) -> None:
        self.root, self.reader, self.random = root, reader, random
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._names = first_names(root)
        self._held = {id(tensor): tensor for module in root.modules() for tensor in _held_by(module)}
        self._stack: list[Call] = []
        # How deep in a module that is called as a whole.
        self._inside = 0
        self._done: Call | None = None
        self._tape = Tape(self._hazard, self._asked, self._ran)
        self._observer = Observer(root, self._entered, self._left, self._hazard, lambda: len(self._tape.ops), self._ran_code)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Recording]:
        """Call the model, once; returns what it returns, and the recording."""
        try:
            return self._run(args, kwargs)
        finally:
            # Tape and observer know this recorder: without the garbage collector all tensors of the call would stay alive.
            del self._tape, self._observer

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Recording]:
        before = Watch(self.root.modules())
        held = [(key, tensor, version_of(tensor)) for key, tensor in self._held.items()]
        randomness, context = python_random_states(), contextvars.copy_context()
        registered = [row.tensor for row in named_tensors(self.root)]
        versions = [version_of(tensor) for tensor in registered]
        # Kernels may write buffers without moving their version.
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.root.buffers() if not is_lazy(buffer)]
        with self._observer.watching(), weights_read_by(self), self._tape:
            output = self.root(*args, **kwargs)
        root = self._done or self._unseen(args, kwargs)
        if randomness != python_random_states():
            self._taint(root, "the forward draws random numbers that are not PyTorch's")
        if not _same_context(context, contextvars.copy_context()):
            self._taint(root, "the forward sets a context variable")
        if not before.holds():
            self._taint(root, f"the forward writes {before.first_change()}")
        if self._observer.lost:
            self._taint(root, self._observer.lost)
        if type(self.root).__call__ is not nn.Module.__call__:
            root.reason = root.reason or f"{type(self.root).__name__} has a __call__ of its own"
        self._settle(root)
        written = {
            self._names[id(tensor)]
            for tensor, then in zip(registered, versions, strict=True)
            if version_of(tensor) != then and id(tensor) in self._names
        }
        written |= {self._names[id(one)] for one, then in buffers if id(one) in self._names and not equal(one, then)}
        # What is written through it moves no version.
        written |= {self._names[id(tensor)] for tensor in self._tape.exposed if id(tensor) in self._names}
        rows = [*held, *((key, *row) for key, row in self._observer.held.items())]
        return output, self._recording(root, written, {key for key, tensor, then in rows if version_of(tensor) != then})

    def _unseen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call of a model whose class has a ``__call__`` that nobody can look into."""
        self._entered(self.root, args, kwargs)
        self._left(None)
        assert self._done is not None
        return self._done

    def _settle(self, call: Call) -> bool:
        """Whether all modules called in a call are now what they were then: their graphs are good for the state they are in."""
        settled = all([self._settle(inner) for inner in call.calls])
        if same(contents_of(call.module), call.contents) and settled:
            return True
        call.reason = call.reason or f"attributes of {type(call.module).__name__} change within one forward"
        return False

    def _recording(self, root: Call, written: set[str], held_written: set[int]) -> Recording:
        # A closure may hold what the forward itself has made.
        made = {ref.number for op in self._tape.ops for ref in {*refs_in(op.output)} - {*refs_in((op.args, op.kwargs))}}
        made |= {self._tape.ref(leaf).number for leaf in root.leaves if isinstance(leaf, Tensor)}
        found = {key: tensor for key, (tensor, _) in self._observer.held.items() if self._tape.numbers.get(key) not in made}
        held = {**self._held, **found}
        names = {**{key: f"captured.{number}" for number, key in enumerate(held)}, **self._names}
        return Recording(
            root=root,
            ops=self._tape.ops,
            numbers=self._tape.numbers,
            names=names,
            held={names[key]: tensor for key, tensor in held.items() if names[key].startswith("captured.")},
            written=frozenset(written | {names[key] for key in held_written}),
            reads=self._observer.reads,
            containers=frozenset(id(one) for module in self.root.modules() for one in contents_of(module)),
        )

    def _taint(self, call: Call, reason: str) -> None:
        call.reason = call.reason or reason
        for inner in call.calls:
            self._taint(inner, reason)

    # --- what weights are asked of meanwhile

    def read_weight(self, name: str) -> Any:
        """A computed weight. How it is computed is none of the model's doing."""
        # It is computed under the modes of its reader, and has no gradient where that has none.
        self._ran(ambient_modes(), reads_weight=True)
        with self._unobserved():
            value = self.reader.read_weight(name)
        # The tape keeps it alive, so that no other tensor gets its id.
        self._tape.ref(value)
        self._names[id(value)] = name
        if name in self.random:
            self._hazard(f"{name} is drawn anew at each read")
        return value

    def lowered(self, name: str, value: Any, reader: CodeType) -> Any:
        """A recording shows no casts of autocast."""
        return value

    def mention(self, names: Iterable[str]) -> None:
        """Attributes that code which is not observed looks at."""
        for call in self._stack:
            call.mentioned.update(names)

    def write_weight(self, name: str, value: Tensor) -> None:
        """Assigning weights inside a forward is nothing a graph can show."""
        self._hazard(f"the forward assigns the computed weight {name}")
        with self._unobserved():
            self.reader.write_weight(name, value)

    @contextmanager
    def _unobserved(self) -> Iterator[None]:
        with self._observer.paused(), torch._C.DisableTorchFunction():
            yield

    # --- what happens

    def _hazard(self, what: str) -> None:
        open_ = [call for call in self._stack if not call.reason]
        if open_:
            line = user_line()
            for call in open_:
                call.reason = f"{what} at {line}" if line else what

    def _ran_code(self, code: CodeType) -> None:
        for call in self._stack:
            call.codes.add(code)

    def _asked(self) -> None:
        for call in self._stack:
            call.asked = True

    def _ran(self, modes: tuple[object, ...], *, reads_weight: bool = False) -> None:
        for call in self._stack:
            # A block without gradients can be shown: by what is computed in it from detached tensors.
            without_grad = call.modes[0] and not modes[0] and call.modes[1:] == modes[1:] and not reads_weight
            if call.modes != modes and not without_grad and not call.reason:
                call.reason = f"the forward switches grad mode or autocast at {user_line()}"

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside:
            self._inside += 1
            return
        leaves, structure = flatten((args, kwargs))
        foreign = None
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._tape.ref(leaf)
            elif isinstance(leaf, nn.Module) and id(leaf) not in self._paths:
                foreign = leaf
        path = self._paths.get(id(module))
        call = Call(module, path, (args, kwargs), leaves, structure, len(self._tape.ops), ambient_modes(), contents_of(module))
        self._stack.append(call)
        if foreign is not None:
            self._hazard(f"{path or type(module).__name__} is given a {type(foreign).__name__} that is no part of the model")
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
            self._hazard(f"{path or type(module).__name__} has hooks, which a graph would not run")
        if isinstance(module, torch.jit.ScriptModule):
            self._hazard(f"{path or type(module).__name__} is a ScriptModule, which runs by itself")
        if isinstance(module, CHOOSING) and path is not None and _top_mode() is self._tape:
            _pop_mode()
            self._inside = 1

    def _left(self, output: Any) -> None:
        if not self._stack:
            return
        if self._inside:
            self._inside -= 1
            if self._inside:
                return
            _push_mode(self._tape)
            self._left_whole(output)
            return
        call = self._stack[-1]
        call.stop, call.output = len(self._tape.ops), output
        name = call.path or type(call.module).__name__
        if output is None:
            self._hazard(f"{name} returns nothing, or raised")
        if not same(contents_of(call.module), call.contents):
            self._hazard(f"the forward of {type(call.module).__name__} writes attributes of {name}")
        after, structure = flatten(call.given)
        if list(map(id, after)) != list(map(id, call.leaves)) or structure != call.structure:
            self._hazard(f"the forward of {name} writes into a container it is given")
        self._return()

    def _left_whole(self, output: Any) -> None:
        """The same for a module of which nothing is on the tape: an operation of what called it, and no graph by itself."""
        call = self._stack[-1]
        call.stop, call.output = len(self._tape.ops), output
        call.reason = call.reason or f"{type(call.module).__name__} chooses its kernels by itself"
        self._return()
        args, kwargs = call.given
        assert call.path is not None
        self._tape.note_module(call.path, args, kwargs, output)

    def _return(self) -> None:
        call = self._stack.pop()
        if self._stack:
            self._stack[-1].calls.append(call)
        else:
            self._done = call


def _top_mode() -> Any:
    depth = torch._C._len_torch_function_stack()
    return torch._C._get_function_stack_at(depth - 1) if depth else None


def _same_context(one: contextvars.Context, other: contextvars.Context) -> bool:
    return list(one) == list(other) and all(one[key] is other[key] for key in one)


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN being equal to itself; those that cannot be compared count as equal."""
    if one.is_meta or one.layout is not torch.strided or one.is_quantized:
        return True
    if one.shape != other.shape:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def version_of(tensor: Tensor) -> int:
    """The version of a tensor; -1 for those that have none: of inference mode, or not initialised yet."""
    return -1 if is_lazy(tensor) or tensor.is_inference() else tensor._version


def _held_by(module: nn.Module) -> Iterator[Tensor]:
    """The tensors in plain attributes and containers of a module."""
    todo = [(value, _DEPTH) for name, value in module.__dict__.items() if not name.startswith("_")]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, dict | list | tuple):
            todo += [(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value)]
