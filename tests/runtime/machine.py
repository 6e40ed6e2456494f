"""What a training script does, in any order, to a model and to an oracle that computes its weights anew at each forward.

A *world* is a model with what a script holds beside it: optimizers, losses that wait for their backward, hooks, a copy. Each
action runs in two worlds, and all that it yields, parameters, buffers, gradients and errors included, must be the same.
The oracle is written by hand: no cache, no graph, no code of fxparam.
"""

# mypy: disable-error-code="operator,union-attr,arg-type,attr-defined,misc", warn-unused-ignores=False

from __future__ import annotations

import copy
import pickle
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import fxparam as fxp

DTYPE = torch.float64
TOLERANCE = 1e-9
N = 4


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def rotation(seed: int) -> Tensor:
    return torch.linalg.qr(noise(seed, N, N))[0]


# --- models


class Pair(nn.Module):
    """Two weights from one latent, through a node they share."""

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        shared = latent.exp()
        return (shared * latent).view(3, N), (shared + 1).view(3, N)


class Net(nn.Module):
    """Outputs that each reach some of the weights; one weight is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.orth, self.norm = nn.Linear(N, N), nn.Linear(N, 3)
        self.enc, self.dec = nn.Linear(N, 3), nn.Linear(3, N)
        self.left, self.right = nn.Linear(N, 3, bias=False), nn.Linear(N, 3, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.tanh(self.orth(torch.tanh(self.orth(x))))
        return self.norm(hidden), self.enc(x), self.dec(x[:, :3]), self.left(x), self.right(hidden)


class Mix(nn.Module):
    """Weights of a mixture, by mode."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(3))

    def forward(self) -> Tensor:
        return torch.softmax(self.logits if self.training else self.logits / 2, 0)


class Handwritten(nn.Module):
    """Weight arithmetic in the forward, some of it by mode; one weight is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, 3)
        self.gain, self.mix = nn.Parameter(torch.rand(N, 1) + 0.5), Mix()
        self.register_buffer("mask", (torch.rand(N, N) < 0.7).to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weight = (self.first.weight - self.first.weight.mean(1, keepdim=True)) * self.mask
        weight = self.gain * F.normalize(weight + 0.1, dim=1)
        mix = self.mix()
        hidden = torch.tanh(F.linear(x, weight, self.first.bias))
        return self.second(hidden), (mix[:, None] * self.second.weight).exp().sum(0) * x, F.linear(x, weight.abs())


class Spectral(nn.Module):
    """Maps with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x))))), self.first(x)


class Oracle(nn.Module):
    """The parameters and buffers of a transformed model, and its weights computed anew for each forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            self.register_parameter(own(name), nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        for name, buffer in model.named_buffers():
            self.register_buffer(own(name), buffer.clone())

    def __getitem__(self, name: str) -> Tensor:
        tensor = getattr(self, own(name))
        # A leaf that autograd saved takes part in ``leaf.data = ...`` afterwards; a view of it keeps what it had.
        return tensor.view_as(tensor)

    def latent(self, weight: str, name: str = "original") -> Tensor:
        owner, _, local = weight.rpartition(".")
        return self[f"{owner}.parametrizations.{local}.{name}"]

    def weights(self) -> dict[str, Tensor]:
        raise NotImplementedError


def own(name: str) -> str:
    """The oracle's name for a tensor of the model."""
    return name.replace(".", "/")


class NetOracle(Oracle):
    def weights(self) -> dict[str, Tensor]:
        lower = self.latent("orth.weight").tril()
        skew, eye = lower - lower.mT, torch.eye(N, dtype=DTYPE)
        cayley = torch.linalg.solve(eye - skew / 2, eye + skew / 2)
        norm, enc = (
            torch._weight_norm(self.latent(name, "original1"), self.latent(name, "original0"), 0)
            for name in ("norm.weight", "enc.weight")
        )
        latent = self["left.parametrizations.joint4.original"]
        shared = latent.exp()
        return {
            "orth.weight": self.latent("orth.weight", "0.base") @ cayley,
            "norm.weight": norm,
            "enc.weight": enc,
            "dec.weight": enc.mT,
            "left.weight": (shared * latent).view(3, N),
            "right.weight": (shared + 1).view(3, N),
        }

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        w = self.weights()
        hidden = torch.tanh(F.linear(x, w["orth.weight"], self["orth.bias"]))
        hidden = torch.tanh(F.linear(hidden, w["orth.weight"], self["orth.bias"]))
        return (
            F.linear(hidden, w["norm.weight"], self["norm.bias"]),
            F.linear(x, w["enc.weight"], self["enc.bias"]),
            F.linear(x[:, :3], w["dec.weight"], self["dec.bias"]),
            F.linear(x, w["left.weight"]),
            F.linear(hidden, w["right.weight"]),
        )


class SpectralOracle(Oracle):
    """Its power iteration moves only when it is told to."""

    @torch.no_grad()
    def advance(self) -> None:
        for name in ("first.weight", "second.weight"):
            latent, u, v = (self.latent(name, local) for local in ("original", "0._u", "0._v"))
            u.data.copy_(F.normalize(latent @ v, dim=0, eps=1e-12))
            v.data.copy_(F.normalize(latent.mT @ u, dim=0, eps=1e-12))

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for name in ("first.weight", "second.weight"):
            latent, u, v = (self.latent(name, local) for local in ("original", "0._u", "0._v"))
            found[name] = latent / torch.vdot(u.clone(), torch.mv(latent, v.clone()))
        return found

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        w = self.weights()
        hidden = torch.tanh(F.linear(x, w["first.weight"], self["first.bias"]))
        hidden = torch.tanh(F.linear(hidden, w["first.weight"], self["first.bias"]))
        return F.linear(hidden, w["second.weight"], self["second.bias"]), F.linear(x, w["first.weight"], self["first.bias"])


# --- worlds


@dataclass(eq=False)
class World:
    """A model and what a script holds beside it. Names are those of the transformed model.

    Attributes:
        model: the model.
        own: the model's own name for a tensor.
        read: one weight of the model.
        read_all: its weights by name.
        pending: for each forward that waits for its backward, its partial losses and their sum.
        deferred: losses that were made inside ``defer_backward`` and wait for their backward.
    """

    model: nn.Module
    own: Callable[[str], str] = str
    read: Callable[[Any, str], Tensor] = lambda model, name: attrgetter(name)(model)
    read_all: Callable[[Any], dict[str, Tensor]] = lambda model: model.weights()
    pending: list[list[Tensor]] = field(default_factory=list)
    deferred: list[Tensor] = field(default_factory=list)
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    spare: tuple[nn.Module, dict[str, torch.optim.Optimizer]] | None = None

    def run(self, action: str, *args: Any) -> Any:
        """One of the actions below, by its name."""
        return getattr(self, action)(*args)

    # Looking.

    def parameters(self) -> dict[str, nn.Parameter]:
        """By the model's own names, in one order for all worlds."""
        return dict(self.model.named_parameters())

    def parameter(self, at: int) -> tuple[str, nn.Parameter]:
        named = sorted((name.replace("/", "."), parameter) for name, parameter in self.parameters().items())
        return named[at % len(named)]

    def state(self) -> dict[str, Any]:
        """All that a script can see without reading a weight."""
        found: dict[str, Any] = {}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            name = name.replace("/", ".")
            found |= {name: tensor, f"{name}.grad": tensor.grad, f"{name}.requires_grad": tensor.requires_grad}
        return {name: found[name] for name in sorted(found)} | {
            "training": self.model.training,
            "fired": dict(sorted(self.fired.items())),
        }

    def clean(self) -> None:
        """After an error in a backward: how far it got is not defined."""
        for model in (self.model, *(() if self.spare is None else self.spare[:1])):
            for parameter in model.parameters():
                parameter.grad = None

    # Forward and backward.

    def losses(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        parts = [output.square().sum() for output in outputs]
        return [*parts, torch.stack(parts).sum()]

    def forward(self, mode: str, seed: int) -> list[Tensor]:
        x = noise(seed, 3, N)
        with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, nullcontext)():
            outputs = self.model(x)
        if mode == "grad":
            self.pending = [*self.pending[-4:], self.losses(outputs)]
        return [output.detach().clone() for output in outputs]

    def checkpointed(self, seed: int, reentrant: bool) -> None:
        """The forward runs again in its backward."""
        x = noise(seed, 3, N).requires_grad_(reentrant)
        self.losses(checkpoint(self.model, x, use_reentrant=reentrant))[-1].backward()

    def backward(self, at: int, part: int, retain: bool, keep: bool, stepping: bool) -> None:
        """One partial loss (or all of them) of one forward; stepping: each parameter moves as soon as it has its gradient."""
        losses = self._taken(at, keep)
        handles = []
        for parameter in self.model.parameters() if stepping else ():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(step_at_once))
        try:
            losses[part % len(losses)].backward(retain_graph=retain)
        finally:
            for handle in handles:
                handle.remove()

    def gradients(self, at: int, part: int, penalty: bool) -> list[Tensor | None]:
        """``autograd.grad`` to all parameters; the penalty goes through it once more."""
        losses = self._taken(at, True)
        trained = [parameter for _, parameter in self._sorted() if parameter.requires_grad]
        found = torch.autograd.grad(
            losses[part % len(losses)], trained, create_graph=penalty, retain_graph=True, allow_unused=True
        )
        if penalty:
            self._taken(at, False)
            torch.stack([gradient.square().sum() for gradient in found if gradient is not None]).sum().backward()
        return [None if gradient is None else gradient.detach() for gradient in found]

    def input_penalty(self, seed: int) -> Tensor:
        x = noise(seed, 3, N).requires_grad_()
        (gradient,) = torch.autograd.grad(self.losses(self.model(x))[-1], x, create_graph=True)
        gradient.square().sum().backward()
        return gradient.detach()

    def read_one(self, name: str, mode: str, keep: bool) -> list[Tensor | None]:
        with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, nullcontext)():
            weight = self.read(self.model, name)
        if mode == "grad" and keep:
            self.pending = [*self.pending[-4:], self.losses([weight, weight.exp()])]
        return [weight.detach().clone()]

    def read_weights(self, keep: bool) -> list[Tensor | None]:
        """All weights; the gradient of a loss of each to it, and later through it."""
        weights = self.read_all(self.model)
        names = sorted(weights)
        losses = self.losses([weights[name].sin() for name in names])
        found = [
            torch.autograd.grad(loss, weights[name], retain_graph=True)[0]
            for name, loss in zip(names, losses[:-1], strict=True)
            if weights[name].requires_grad
        ]
        if keep:
            self.pending = [*self.pending[-4:], losses]
        return [*(weights[name].detach().clone() for name in names), *found]

    def micro_batches(self, count: int, seed: int, older: bool, keep: bool) -> None:
        """Several backwards in a row; one of them may be of a loss from before, one loss may be kept for later."""
        before = Counter(self.fired)
        with self._deferring():
            for number in range(count):
                self.losses(self.model(noise(seed + number, 3, N)))[-1].backward()
            if older and self.pending:
                self._taken(0, False)[-1].backward()
            if keep:
                self.deferred.append(self.losses(self.model(noise(seed, 3, N)))[-1])
        # One call of a hook for all of them, or one for each.
        self.fired = before

    def backward_of_deferred(self) -> None:
        """A loss of a block, after the block."""
        before = Counter(self.fired)
        self.deferred.pop().backward()
        self.fired = before

    def _deferring(self) -> AbstractContextManager[None]:
        return self.model.defer_backward() if hasattr(self.model, "defer_backward") else nullcontext()

    def _taken(self, at: int, keep: bool) -> list[Tensor]:
        at %= len(self.pending)
        return self.pending[at] if keep else self.pending.pop(at)

    def _sorted(self) -> list[tuple[str, nn.Parameter]]:
        return sorted((name.replace("/", "."), parameter) for name, parameter in self.parameters().items())

    # Writing.

    def step(self, name: str) -> None:
        if name not in self.optimizers:
            self.optimizers[name] = OPTIMIZERS[name](list(self._trained_or_not()))
        self.optimizers[name].step()

    def _trained_or_not(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self._sorted())

    def lbfgs(self, seed: int) -> None:
        optimizer = torch.optim.LBFGS(list(self._trained_or_not()), lr=0.01, max_iter=2)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.losses(self.model(noise(seed, 3, N)))[-1]
            loss.backward()
            return loss

        optimizer.step(closure)

    def step_by_hand(self, how: str) -> None:
        held = [parameter for parameter in self._trained_or_not() if parameter.grad is not None]
        with torch.inference_mode() if how == "inference" else torch.no_grad():
            if how == "foreach" and held:
                torch._foreach_add_(held, [parameter.grad for parameter in held], alpha=-0.01)
            elif how == "data":
                for parameter in held:
                    parameter.data = parameter.data - 0.01 * parameter.grad
            else:
                for parameter in held:
                    parameter -= 0.01 * parameter.grad

    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none)

    def load(self, seed: int, assign: bool, buffers: bool) -> None:
        state = self.model.state_dict()
        fixed = set() if buffers else {name for name, _ in self.model.named_buffers()}
        for name in state.keys() - fixed:
            # By its name: the oracle's state has more in it.
            state[name] = state[name] + 0.1 * noise(seed + zlib.crc32(name.replace("/", ".").encode()), *state[name].shape)
        self.model.load_state_dict(state, assign=assign)
        if assign:
            self.optimizers, self.handles = {}, []

    def write(self, at: int, seed: int, how: str) -> None:
        """One parameter gets a new value."""
        _, parameter = self.parameter(at)
        value = parameter.detach() + 0.1 * noise(seed, *parameter.shape)
        if how == "data":
            parameter.data = value
        elif how == "set":
            with torch.no_grad():
                parameter.set_(value)  # type: ignore[call-overload]
        elif how == "vector":
            vector = torch.cat([p.detach().flatten() for p in self._trained_or_not()])
            torch.nn.utils.vector_to_parameters(vector + 0.01, self._trained_or_not())
        else:
            with torch.inference_mode() if how == "inference" else torch.no_grad():
                parameter.copy_(value)

    def exchange(self, first: int, second: int) -> None:
        """Two parameters of one shape exchange their memory: no sum over addresses or versions tells."""
        (_, a), (_, b) = self.parameter(first), self.parameter(second)
        if a.shape == b.shape:
            a.data, b.data = b.data, a.data

    def write_buffer(self, at: int, seed: int) -> None:
        named = sorted((name.replace("/", "."), buffer) for name, buffer in self.model.named_buffers() if buffer.numel())
        buffer = named[at % len(named)][1]
        with torch.no_grad():
            buffer.copy_(buffer + 0.1 * noise(seed, *buffer.shape))

    def write_weight(self, name: str) -> None:
        """Into the computed tensor itself, which is nobody's."""
        with torch.no_grad():
            self.read(self.model, name).mul_(2)

    def exponential_average(self, seed: int, mode_first: bool) -> list[Tensor]:
        """Other values for an evaluation, by writes that nothing can see."""
        parameters = list(self._trained_or_not())
        kept = [parameter.detach().clone() for parameter in parameters]

        def put(values: Sequence[Tensor]) -> None:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data.copy_(value)

        self.model.train(not mode_first)
        put([value + 0.1 * noise(seed + number, *value.shape) for number, value in enumerate(kept)])
        self.model.eval()
        outputs = self.forward("no_grad", seed)
        self.model.train(mode_first)
        put(kept)
        self.model.train()
        return outputs

    # Modes, structure.

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def train_part(self, name: str, mode: bool) -> None:
        self.model.get_submodule(name).train(mode)

    def require(self, at: int, flag: bool) -> None:
        self.parameter(at)[1].requires_grad_(flag)

    def require_all(self, prefix: str, flag: bool) -> None:
        for name, parameter in self._sorted():
            if name.startswith(prefix):
                parameter.requires_grad_(flag)

    def hook(self, at: int, how: str) -> None:
        name, parameter = self.parameter(at)
        if not parameter.requires_grad:
            return
        if how == "double":
            self.handles.append(parameter.register_hook(lambda gradient: 2 * gradient))
        else:
            self.handles.append(parameter.register_post_accumulate_grad_hook(lambda _: self.fired.update([name])))

    def unhook(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def duplicate(self, how: str) -> None:
        """Go on with a copy; the original stays at hand."""
        twin = copy.deepcopy(self.model) if how == "deepcopy" else pickle.loads(pickle.dumps(self.model))
        self.spare = (self.model, self.optimizers)
        self.model, self.optimizers = twin, {}

    def swap(self) -> None:
        """Go on with the other copy."""
        if self.spare is not None:
            (self.model, self.optimizers), self.spare = self.spare, (self.model, self.optimizers)

    def functional(self, seed: int, how: str, some: int) -> list[Tensor | None]:
        """Other parameters for one call."""
        chosen = {
            name: parameter.detach() + 0.1 * noise(seed + number, *parameter.shape)
            for number, (name, parameter) in enumerate(self._sorted())
            if some == 0 or number % some == 0
        }
        x = noise(seed, 3, N)

        def loss(tensors: Mapping[str, Tensor]) -> Tensor:
            outputs = functional_call(self.model, {self.own(name): tensor for name, tensor in tensors.items()}, (x,))
            return torch.stack([output.square().sum() for output in outputs]).sum()

        if how == "func":
            found = grad(loss)(chosen)
            return [found[name] for name in chosen]
        leaves = {name: tensor.requires_grad_() for name, tensor in chosen.items()}
        value = loss(leaves)
        if how == "backward":
            # The other parameters get theirs as well.
            value.backward()
            return [value.detach(), *(leaf.grad for leaf in leaves.values())]
        return [value.detach(), *torch.autograd.grad(value, list(leaves.values()), allow_unused=True)]


def step_at_once(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter.sub_(0.01 * parameter.grad)
    parameter.grad = None


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda held: torch.optim.SGD(held, 0.01, foreach=False),
    "sgd-foreach": lambda held: torch.optim.SGD(held, 0.01, foreach=True, momentum=0.9),
    "sgd-fused": lambda held: torch.optim.SGD(held, 0.01, fused=True),
    "adam": lambda held: torch.optim.Adam(held, 0.01, eps=1e-3),
    "adam-fused": lambda held: torch.optim.Adam(held, 0.01, eps=1e-3, fused=True),
}


# --- the two of them


class Mismatch(AssertionError):
    """The model and its oracle differ."""


def compare(got: Any, expected: Any, what: str) -> None:
    """Raise ``Mismatch`` where two results differ."""
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        if got.shape != expected.shape or not torch.allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            raise Mismatch(f"{what}: got {got}, expected {expected}")
    elif isinstance(expected, Mapping) and isinstance(got, Mapping):
        if list(got) != list(expected):
            raise Mismatch(f"{what}: got {list(got)}, expected {list(expected)}")
        for name in expected:
            compare(got[name], expected[name], f"{what}, {name}")
    elif isinstance(expected, list) and isinstance(got, list) and len(got) == len(expected):
        for number, (one, other) in enumerate(zip(got, expected, strict=True)):
            compare(one, other, f"{what}[{number}]")
    elif type(got) is not type(expected) or got != expected:
        raise Mismatch(f"{what}: got {got}, expected {expected}")


def attempt(action: Callable[..., Any], *args: Any) -> Any:
    """What an action returns, or the kind of error it raises."""
    try:
        return action(*args)
    except RuntimeError as error:
        kinds = ("a second time", "inplace operation", "does not require grad", "unused")
        return next((f"error: {kind}" for kind in kinds if kind in str(error)), f"error: {error}")


@dataclass(frozen=True)
class Kind:
    """A subject and its oracle.

    Attributes:
        build: both worlds, from a seed.
        weights: the computed weights.
        assignable: a value for each weight that can be written through its right inverse.
        parts: submodules that both have.
        stateful: maps advance once per evaluation; the oracle is told when.
    """

    build: Callable[[int], tuple[World, World]]
    weights: tuple[str, ...] = ()
    assignable: Mapping[str, Callable[[int], Tensor]] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    stateful: bool = False


seeds = st.integers(0, 9)
places = st.integers(0, 15)
flags = st.booleans()
modes = st.sampled_from(["grad", "grad", "grad", "no_grad", "inference"])


class Script(RuleBasedStateMachine):
    """A random training script. Subclasses set ``kind``."""

    kind: ClassVar[Kind]
    steps: ClassVar[int] = 0
    scripts: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        Script.scripts += 1
        torch.manual_seed(0)
        self.subject, self.oracle = self.kind.build(0)
        # Whether the weights are at hand: reads must not compute them again.
        self.at_hand = False

    def do(self, action: str, *args: Any, keeps: bool = False, reads: bool = False) -> None:
        """Run an action in both worlds and compare everything.

        Args:
            action: a method of ``World``.
            *args: its arguments.
            keeps: whether weights that were at hand before must still be.
            reads: whether they are at hand afterwards.
        """
        Script.steps += 1
        model, before = self.subject.model, self._refreshes()
        got = attempt(self.subject.run, action, *args)
        computed = self._refreshes() - before if self.subject.model is model else 0
        if keeps and self.at_hand and computed:
            raise Mismatch(f"{action}{args}: the weights were computed again, and nothing had changed")
        if self.kind.stateful and computed and self.oracle.model.training:
            if computed > 1:
                raise Mismatch(f"{action}{args}: the weights were computed {computed} times")
            self.oracle.model.advance()
        expected = attempt(self.oracle.run, action, *args)
        compare(got, expected, f"{action}{args}")
        if not isinstance(self.oracle.model, Oracle) and {"data", "vector"} & {*args} | {"exchange"} & {action}:
            # A plain model's autograd would mix the old and the new values.
            for world in (self.subject, self.oracle):
                world.pending, world.deferred = [], []
        failed = isinstance(expected, str)
        if failed:
            # How far a backward got before its error, and what moved on the way, is not defined.
            self.subject.clean()
            self.oracle.clean()
            self.oracle.fired = Counter(self.subject.fired)
            self.settle()
        self.at_hand = not failed and (reads or (keeps and self.at_hand)) and self.subject.model.training
        self.compare_states(f"after {action}{args}")

    def compare_states(self, what: str) -> None:
        compare(self.subject.state(), self.oracle.state(), what)
        # Rounding must not add up.
        self.settle()

    def settle(self) -> None:
        """Give the oracle the subject's values behind autograd's back: its pending losses are none the wiser."""
        state, other = self.subject.state(), self.oracle.state()
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and not name.endswith(".grad"):
                other[name].data.copy_(tensor.detach())

    def follow(self, what: str, home: str) -> None:
        """The subject wrote to a site through its right inverse: the oracle takes its latents and buffers over."""
        state, other = self.subject.state(), self.oracle.state()
        with torch.no_grad():
            for name, tensor in state.items():
                if name.startswith(home) and isinstance(tensor, Tensor) and not name.endswith(".grad"):
                    other[name].copy_(tensor)
        self.at_hand = False
        self.compare_states(what)

    def _refreshes(self) -> int:
        stats = getattr(self.subject.model, "stats", None)
        return 0 if stats is None else stats.refreshes

    def _pending(self) -> bool:
        return bool(self.subject.pending)

    def teardown(self) -> None:
        """Whatever came before: one more step is right."""
        self.do("clean")
        self.do("forward", "grad", 11)
        self.do("backward", -1, -1, False, False, False)

    # Forward and backward.

    @rule(mode=modes, seed=seeds)
    def forward(self, mode: str, seed: int) -> None:
        self.do("forward", mode, seed, keeps=True, reads=True)

    @precondition(_pending)
    @rule(at=places, part=places, retain=flags, keep=flags)
    def backward(self, at: int, part: int, retain: bool, keep: bool) -> None:
        self.do("backward", at, part, retain, keep, False, keeps=True)

    @precondition(_pending)
    @rule(at=places)
    def backward_of_all(self, at: int) -> None:
        self.do("backward", at, -1, False, False, False, keeps=True)

    @precondition(_pending)
    @rule(at=places)
    def backward_that_steps(self, at: int) -> None:
        self.do("backward", at, -1, False, False, True)

    @precondition(_pending)
    @rule(at=places, part=places, penalty=flags)
    def gradients(self, at: int, part: int, penalty: bool) -> None:
        self.do("gradients", at, part, penalty)

    @rule(seed=seeds)
    def input_penalty(self, seed: int) -> None:
        self.do("input_penalty", seed, keeps=True, reads=True)

    @rule(seed=seeds, reentrant=flags)
    def checkpointed(self, seed: int, reentrant: bool) -> None:
        self.do("checkpointed", seed, reentrant, keeps=True, reads=not reentrant)

    @precondition(lambda self: self.kind.weights)
    @rule(at=places, mode=st.sampled_from(["grad", "grad", "no_grad", "inference"]), keep=flags)
    def read_one(self, at: int, mode: str, keep: bool) -> None:
        self.do("read_one", self.kind.weights[at % len(self.kind.weights)], mode, keep, keeps=True, reads=True)

    @precondition(lambda self: self.kind.weights)
    @rule(keep=flags)
    def read_weights(self, keep: bool) -> None:
        self.do("read_weights", keep, keeps=True, reads=True)

    @rule(count=st.integers(1, 3), seed=seeds, older=flags, keep=flags)
    def micro_batches(self, count: int, seed: int, older: bool, keep: bool) -> None:
        self.do("micro_batches", count, seed, older, keep, keeps=True)

    @precondition(lambda self: self.subject.deferred)
    @rule()
    def backward_of_deferred(self) -> None:
        self.do("backward_of_deferred", keeps=True)

    # Writing.

    @rule(name=st.sampled_from(sorted(OPTIMIZERS)))
    def step(self, name: str) -> None:
        self.do("step", name)

    @rule(seed=seeds)
    def zero_forward_backward_step(self, seed: int) -> None:
        self.do("zero_grad", True)
        self.do("forward", "grad", seed)
        self.do("backward", -1, -1, False, False, False)
        self.do("step", "sgd-fused")

    @precondition(lambda self: not self.kind.stateful)
    @rule(seed=seeds)
    def lbfgs(self, seed: int) -> None:
        self.do("lbfgs", seed)

    @rule(how=st.sampled_from(["inplace", "foreach", "data", "inference"]))
    def step_by_hand(self, how: str) -> None:
        self.do("step_by_hand", how)

    @rule(set_to_none=flags)
    def zero_grad(self, set_to_none: bool) -> None:
        self.do("zero_grad", set_to_none)

    @rule(seed=seeds, assign=flags, buffers=flags)
    def load(self, seed: int, assign: bool, buffers: bool) -> None:
        self.do("load", seed, assign, buffers)

    @rule(at=places, seed=seeds, how=st.sampled_from(["copy", "inference", "data", "set", "vector"]))
    def write(self, at: int, seed: int, how: str) -> None:
        self.do("write", at, seed, how)

    @rule(first=places, second=places)
    def exchange(self, first: int, second: int) -> None:
        self.do("exchange", first, second)

    @rule(at=places, seed=seeds)
    def write_buffer(self, at: int, seed: int) -> None:
        self.do("write_buffer", at, seed)

    @precondition(lambda self: self.kind.weights and not self.subject.pending and not self.subject.deferred)
    @rule(at=places)
    def write_weight(self, at: int) -> None:
        self.do("write_weight", self.kind.weights[at % len(self.kind.weights)])

    @precondition(lambda self: self.kind.assignable)
    @rule(at=places, seed=seeds, by_name=flags)
    def assign(self, at: int, seed: int, by_name: bool) -> None:
        Script.steps += 1
        names = sorted(self.kind.assignable)
        name = names[at % len(names)]
        owner, _, local = name.rpartition(".")
        value = self.kind.assignable[name](seed)
        if by_name:
            self.subject.model.assign(name, value)
        else:
            setattr(self.subject.model.get_submodule(owner), local, value)
        self.follow(f"after {name} = ...", f"{owner}.parametrizations.{local}.")
        self.do("read_one", name, "grad", False)
        compare(self.oracle.read(self.oracle.model, name).detach(), value, f"the assigned {name}")

    @precondition(lambda self: self.kind.assignable)
    @rule(at=places)
    def retract(self, at: int) -> None:
        Script.steps += 1
        names = sorted(self.kind.assignable)
        name = names[at % len(names)]
        owner, _, local = name.rpartition(".")
        before = self.oracle.read(self.oracle.model, name).detach()
        if name.startswith("orth") and not torch.allclose(before @ before.mT, torch.eye(N, dtype=DTYPE), atol=1e-12):
            # Its buffer was overwritten; what it computes is not in the image any more.
            return
        self.subject.model.retract(name)
        self.follow(f"after retract({name})", f"{owner}.parametrizations.{local}.")
        compare(self.oracle.read(self.oracle.model, name).detach(), before, f"the retracted {name}")

    @precondition(lambda self: hasattr(self.subject.model, "invalidate") and not self.kind.stateful)
    @rule()
    def invalidate(self) -> None:
        self.subject.model.invalidate()
        self.at_hand = False

    @precondition(lambda self: not self.kind.stateful)
    @rule(seed=seeds, mode_first=flags)
    def exponential_average(self, seed: int, mode_first: bool) -> None:
        if self.subject.model.training:
            self.do("exponential_average", seed, mode_first)

    # Modes, structure.

    @rule(mode=flags)
    def train(self, mode: bool) -> None:
        self.do("train", mode)

    @precondition(lambda self: self.kind.parts)
    @rule(at=places, mode=flags)
    def train_part(self, at: int, mode: bool) -> None:
        self.do("train_part", self.kind.parts[at % len(self.kind.parts)], mode)

    @rule(at=places, flag=flags)
    def require(self, at: int, flag: bool) -> None:
        self.do("require", at, flag)

    @rule(prefix=st.sampled_from(["", "orth.", "enc.", "left.", "first."]), flag=flags)
    def require_all(self, prefix: str, flag: bool) -> None:
        self.do("require_all", prefix, flag)

    @rule(at=places, how=st.sampled_from(["double", "count"]))
    def hook(self, at: int, how: str) -> None:
        self.do("hook", at, how)

    @rule()
    def unhook(self) -> None:
        self.do("unhook")

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def duplicate(self, how: str) -> None:
        self.do("duplicate", how)

    @rule()
    def swap(self) -> None:
        self.do("swap")

    @precondition(lambda self: not self.kind.stateful)
    @rule(seed=seeds, how=st.sampled_from(["grad", "backward", "func"]), some=st.integers(0, 3))
    def functional(self, seed: int, how: str, some: int) -> None:
        self.do("functional", seed, how, some, keeps=True)


# --- the kinds


def net_kind(trace: str) -> Kind:
    """Maps of the catalogue, a chain of weights, two weights of one latent."""

    def build(seed: int) -> tuple[World, World]:
        torch.manual_seed(seed)
        spec = {
            "orth.weight": fxp.orthogonal(map="cayley"),
            "norm.weight": fxp.weight_norm(),
            "enc.weight": fxp.weight_norm(),
            "dec.weight": fxp.ref("enc.weight") >> fxp.transpose(),
            fxp.joint("left.weight", "right.weight"): fxp.custom(Pair(), init=0.3 * torch.randn(12, dtype=DTYPE)),
        }
        model = fxp.transform(Net().double(), spec, trace=trace)
        oracle = NetOracle(model)
        return World(model), oracle_world(oracle)

    weights = ("orth.weight", "norm.weight", "enc.weight", "dec.weight", "left.weight", "right.weight")
    assignable = {
        "orth.weight": rotation,
        "norm.weight": lambda seed: noise(seed, 3, N),
        "enc.weight": lambda seed: noise(seed, 3, N),
    }
    return Kind(build, weights, assignable)


def handwritten_kind(trace: str) -> Kind:
    """An empty spec. The oracle is the given model."""

    def build(seed: int) -> tuple[World, World]:
        torch.manual_seed(seed)
        net = Handwritten().double()
        return World(fxp.transform(copy.deepcopy(net), trace=trace)), World(net)

    return Kind(build, parts=("mix", "first"))


def spectral_kind(trace: str) -> Kind:
    """Maps with a state."""

    def build(seed: int) -> tuple[World, World]:
        torch.manual_seed(seed)
        model = fxp.transform(Spectral().double(), {"*.weight": fxp.spectral_norm()}, trace=trace)
        return World(model), oracle_world(SpectralOracle(model))

    return Kind(build, ("first.weight", "second.weight"), stateful=True)


def oracle_world(oracle: Oracle) -> World:
    return World(oracle, own, lambda model, name: model.weights()[name], lambda model: model.weights())


KINDS = {
    "net-live": net_kind("live"),
    "net-auto": net_kind("auto"),
    "handwritten-auto": handwritten_kind("auto"),
    "spectral-live": spectral_kind("live"),
    "spectral-auto": spectral_kind("auto"),
}
