"""Stories of recorded models: what a model goes through, transformed and eager side by side, and how the two are compared.

The oracle is the same model in plain PyTorch, with ``torch.nn.utils.parametrizations.weight_norm`` where the other one has a
rule. Each case is told of the module as a model of its own, and of the same module inside a host that nobody can trace, so that
it is a region there. ``Naive`` is what a recorder without guards would do; a case says whether that one must go wrong.
"""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import fxparam as fxp

N = 4
WAYS = ("model-auto", "model-record", "region-auto", "region-record")


class Base(nn.Module):
    """A layer that gets a rule, and weight arithmetic of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(N, N)
        self.raw = nn.Parameter(torch.randn(N, N))

    def mixed(self, x: Tensor) -> Tensor:
        """What every case computes of its input: ``x`` has N columns."""
        return self.lin(x) + x @ F.normalize(self.raw, dim=0)


class Host(nn.Module):
    """Runs a module, and does what no graph can show."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("switch", torch.tensor(2.0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) if self.switch.item() < 5 else None


class Naive(nn.Module):
    """A recorder without guards: what the first call did with tensors is all that later calls do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tapes: dict[Any, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
        kind = (self.model.training, torch.is_grad_enabled(), len(given))
        if kind not in self.tapes:
            with _Tape() as tape:
                output = self.model(*args, **kwargs)
            self.tapes[kind] = (given, tape.ops, output)
            return output
        then, ops, output = self.tapes[kind]
        known = dict(zip(map(id, then), given, strict=True))

        def now(value: Any) -> Any:
            return known.get(id(value), value) if isinstance(value, Tensor) else value

        for func, taken, options, result in ops:
            fresh = func(*tree_map(now, taken), **tree_map(now, options))
            known |= dict(zip(map(id, tree_leaves(result)), tree_leaves(fresh), strict=True))
        return tree_map(now, output)


class _Tape(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, result))
        return result


@dataclass(frozen=True)
class Call:
    """One forward: inputs made from a seed, so that all models get equal ones of their own."""

    args: Callable[[], tuple[Any, ...]] = lambda: (torch.randn(5, N),)
    kwargs: Callable[[], dict[str, Any]] = dict
    grad: bool = True
    inputs: bool = True
    """Whether its inputs require grad."""
    raises: tuple[type[BaseException], ...] = ()
    around: Callable[[], Any] = contextlib.nullcontext
    after: Callable[[Any], None] = lambda output: None
    """What the caller does with the output."""


def given(*args: Callable[[], Any], **kwargs: Callable[[], Any]) -> Call:
    return Call(lambda: tuple(a() for a in args), lambda: {k: v() for k, v in kwargs.items()})


def x() -> Tensor:
    return torch.randn(5, N)


def small() -> Tensor:
    return torch.randn(3, N)


def step(model: nn.Module) -> None:
    """One step of gradient descent, with the gradients of the last call."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


to_eval, to_train = nn.Module.eval, nn.Module.train
CALL, SMALL = Call(), given(small)
STORY = (CALL, CALL, SMALL, SMALL, CALL, step, CALL, Call(inputs=False), Call(inputs=False), to_eval, CALL, CALL, SMALL)
STORY += (Call(grad=False), Call(grad=False), to_train, CALL, step, CALL)


def mutate(statement: str, **names: Any) -> Callable[[nn.Module], None]:
    """A statement on ``model``, the module of the case; ``names`` are what else it may name."""

    def change(model: nn.Module) -> None:
        exec(statement, {"model": model, "torch": torch, "np": np, "nn": nn, **names})

    return change


def changes(*parts: str | Callable[[nn.Module], None], call: Call = CALL, **names: Any) -> tuple[Any, ...]:
    """Calls before and after each change."""
    found: tuple[Any, ...] = (call, call)
    for part in parts:
        found += (mutate(part, **names) if isinstance(part, str) else part, call, call, call)
    return found


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    story: Sequence[Any] = ()
    graph: bool | None = True
    """Whether the module runs as a graph in the end; None where either is right."""
    why: str = ""
    """A part of the reason where it does not."""
    naive: bool = False
    """Whether a recorder without guards must get this wrong."""
    spec: bool = True
    reset: Callable[[], None] = lambda: None
    """Puts back what a model may have changed outside of itself."""


def fields_of(value: Any) -> Any:
    """The parts of an object of a user's, or None."""
    if isinstance(value, Tensor | nn.Module | type | types.FunctionType | dict | list | tuple):
        return None
    return dict(vars(value)) if dataclasses.is_dataclass(value) or type(value) is types.SimpleNamespace else None


def leaves_of(value: Any) -> list[Any]:
    found: list[Any] = []
    for leaf in tree_leaves(value):
        inner = fields_of(leaf)
        found += [leaf] if inner is None else leaves_of(inner)
    return found


def shape_of(value: Any) -> Any:
    """How a value is made up, to be compared."""
    inner = fields_of(value)
    if inner is not None:
        return (type(value).__name__, shape_of(inner))
    if isinstance(value, dict):
        return (type(value).__name__, {key: shape_of(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return (type(value).__name__, [shape_of(item) for item in value])
    return type(value).__name__ if value is not None else None


@dataclass
class Seen:
    """What a call left to compare."""

    structure: Any
    error: str
    told: str
    values: dict[str, Any]


def observe(model: nn.Module, call: Call, seed: int) -> Seen:
    """Call a model, and its backward; returns everything that somebody could notice."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    args, kwargs = call.args(), call.kwargs()
    inputs = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    for leaf in inputs:
        if leaf.is_leaf and not isinstance(leaf, nn.Parameter):
            leaf.requires_grad_(call.inputs)
    named = [(name.removeprefix("model."), one) for name, one in model.named_parameters()]
    for _, parameter in named:
        parameter.grad = None
    told, error, output = io.StringIO(), "", None
    with (
        torch.set_grad_enabled(call.grad),
        call.around(),
        contextlib.redirect_stdout(told),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        try:
            output = model(*args, **kwargs)
        except call.raises as raised:
            error = f"{type(raised).__name__}: {raised}"
        call.after(output)
    outputs = [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor)]
    plain = [leaf for leaf in leaves_of(output) if not isinstance(leaf, Tensor)]
    losses = [(o * torch.linspace(0.5, 1.5, o.numel()).view_as(o)).sum() for o in outputs if o.requires_grad]
    if losses:
        sum(losses).backward()
    values: dict[str, Any] = {f"output {n}": _still(o) for n, o in enumerate(outputs)}
    values |= {f"plain output {n}": repr(leaf) for n, leaf in enumerate(plain)}
    values |= {f"output {n} requires grad": o.requires_grad for n, o in enumerate(outputs)}
    values |= {f"input {n}": _still(leaf) for n, leaf in enumerate(inputs)}
    values |= {f"gradient of input {n}": leaf.grad for n, leaf in enumerate(inputs) if leaf.is_leaf}
    values |= {f"gradient of {n}": None if p.grad is None else p.grad.clone() for n, p in named}
    values |= {f"buffer {n.removeprefix('model.')}": _still(b) for n, b in model.named_buffers() if "parametrizations" not in n}
    values |= {"torch's generator": torch.get_rng_state(), "Python's": random.random(), "numpy's": np.random.rand()}
    return Seen(shape_of(output), error, told.getvalue() + "".join(str(one.message) for one in said), values)


def _still(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def compare(found: Seen, expected: Seen, at: str) -> None:
    assert found.error == expected.error, f"{at}: raised {found.error!r}, expected {expected.error!r}"
    assert found.structure == expected.structure, f"{at}: returned {found.structure}, expected {expected.structure}"
    assert found.told == expected.told, f"{at}: said {found.told!r}, expected {expected.told!r}"
    assert found.values.keys() == expected.values.keys(), f"{at}: {found.values.keys() ^ expected.values.keys()}"
    for what, b in expected.values.items():
        a = found.values[what]
        if not isinstance(b, Tensor):
            assert a == b, f"{at}: {what}: got {a}, expected {b}"
            continue
        assert isinstance(a, Tensor), f"{at}: {what}: got {a}, expected {b}"
        torch.testing.assert_close(
            a, b, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda text, what=what: f"{at}: {what}: {text}"
        )


def attributes(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of all modules, to be compared."""
    found: dict[str, Any] = {}
    for path, one in vars(module).get("_fxp_live", module).named_modules():
        if "parametrizations" not in path:
            found |= {f"{path}.{k}": _plain(v) for k, v in vars(one).items() if not k.startswith("_")}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [round(number, 10) for number in value.detach().double().flatten().tolist()]
    if isinstance(value, dict):
        return {repr(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if fields_of(value) is not None:
        return _plain(fields_of(value))
    return value if isinstance(value, int | float | str | None) and value == value else type(value).__name__


def build(case: Case, *, region: bool, parametrized: bool) -> nn.Module:
    torch.manual_seed(0)
    inner = case.make().double()
    if parametrized and case.spec:
        for module in [one for one in inner.modules() if isinstance(one, Base)]:
            parametrizations.weight_norm(module.lin, "weight", dim=0)
    return Host(inner).double() if region else inner


def transformed(case: Case, way: str) -> fxp.ParametrizedModule:
    kind, trace = way.split("-")
    model = build(case, region=kind == "region", parametrized=False)
    rules = {"*lin.weight": fxp.weight_norm(dim=0)} if case.spec else None
    return fxp.transform(model, rules, trace=trace)


def inner_of(model: nn.Module) -> nn.Module:
    """The module of the case: the model, or what is in its host."""
    return model.model if isinstance(model, Naive) else model.inner if hasattr(model, "switch") else model


@contextlib.contextmanager
def seeing(code: types.CodeType) -> Iterator[list[str]]:
    """Notes each time that this Python code runs inside the block."""
    ran: list[str] = []
    sys.setprofile(lambda frame, event, arg: ran.append(event) if event == "call" and frame.f_code is code else None)
    try:
        yield ran
    finally:
        sys.setprofile(None)


def tell(case: Case, model: nn.Module) -> Iterator[tuple[str, Seen, dict[str, Any]]]:
    """What a model leaves at each call of the story."""
    case.reset()
    try:
        for number, part in enumerate(case.story or STORY):
            if isinstance(part, Call):
                yield f"part {number}", observe(model, part, number), attributes(inner_of(model))
            else:
                part(model if part in (step, to_eval, to_train) else inner_of(model))
    finally:
        case.reset()


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """Inside the block, tensors are made in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@doubles()
def check(case: Case, way: str) -> None:
    """The story of a case, told by the eager and by the transformed model."""
    eager = list(tell(case, build(case, region=way.startswith("region"), parametrized=True)))
    model = transformed(case, way)
    for (at, got, state), (_, want, state_then) in zip(tell(case, model), eager, strict=True):
        compare(got, want, f"{at} ({way})")
        assert state == state_then, at
    check_layers(case, model, way)


def check_layers(case: Case, model: fxp.ParametrizedModule, way: str) -> None:
    path = "inner" if way.startswith("region") else ""
    layer = model.report.layer_of(path)
    # A graph of symbolic tracing may show what a recording cannot.
    if case.graph is False and layer.layer != "symbolic":
        assert layer.layer == "live", f"{way}: {layer}"
        assert case.why in f"{layer.reason} {model.report.why_live}", f"{way}: {layer}"
    elif case.graph:
        assert layer.layer != "live" and layer.path == path, f"{way}: {layer}"
        assert model.report.body in ("graph", "regions"), f"{way}: {model.report.why_live}"


@doubles()
def check_naive(case: Case) -> None:
    """A recorder without guards gets the story wrong."""
    if not case.naive:
        return
    eager = list(tell(case, build(case, region=False, parametrized=True)))
    naive = Naive(build(case, region=False, parametrized=True))
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError, TypeError)):
        for (at, got, state), (_, want, state_then) in zip(tell(case, naive), eager, strict=True):
            compare(got, want, at)
            assert state == state_then, at


def cases(table: Sequence[Case]) -> list[Any]:
    """Each case in one of the four ways, all of them in the exhaustive runs."""

    def marks(number: int, at: int) -> list[Any]:
        return [] if (number + at) % len(WAYS) == 0 else [pytest.mark.exhaustive]

    return [
        pytest.param(case, way, id=f"{case.name}-{way}", marks=marks(number, at))
        for number, case in enumerate(table)
        for at, way in enumerate(WAYS)
    ]


def naive_cases(table: Sequence[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in table if case.naive]
