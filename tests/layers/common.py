"""One layer, some of its weights computed, and the plain layer run on weights that PyTorch computes, to compare with."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations as stock
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import fxparam as fxp

TRACES = ("live", "auto", "record")
DTYPE = torch.float64


class Tanh2(nn.Module):
    """A map of a user's own."""

    def forward(self, latent: Tensor) -> Tensor:
        return 2 * latent.tanh()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return (weight / 2).atanh()


class Masked(nn.Module):
    mask: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros_like(like))

    def forward(self, latent: Tensor) -> Tensor:
        return latent * self.mask


def _registered(make: Callable[[Tensor], nn.Module]) -> Callable[[nn.Module], Any]:
    return lambda holder: parametrize.register_parametrization(holder, "weight", make(holder.get_parameter("weight")))


@dataclass(frozen=True)
class Map:
    """A declaration of fxparam, and the same on the tensor ``weight`` of a module, by PyTorch."""

    entry: Callable[[], Any]
    register: Callable[[nn.Module], Any]


MAPS: dict[str, Map] = {
    "weight_norm": Map(fxp.weight_norm, stock.weight_norm),
    "weight_norm dim 1": Map(lambda: fxp.weight_norm(dim=1), lambda holder: stock.weight_norm(holder, dim=1)),
    "orthogonal": Map(fxp.orthogonal, stock.orthogonal),
    "spectral_norm": Map(lambda: fxp.spectral_norm(dim=0), lambda holder: stock.spectral_norm(holder, dim=0)),
    "spectral_norm dim 1": Map(lambda: fxp.spectral_norm(dim=1), lambda holder: stock.spectral_norm(holder, dim=1)),
    "module": Map(Tanh2, _registered(lambda weight: Tanh2())),
    "mask": Map(lambda: fxp.mask(density=0.5), _registered(Masked)),
}
ALL = ("weight_norm", "orthogonal", "module", "mask")
FLAT = ("weight_norm", "module", "mask")
"""For tensors that are no matrices."""


@dataclass(frozen=True)
class Case:
    """A layer, selectors of the weights to compute, and inputs.

    Attributes:
        make: builds the net.
        weights: globs.
        inputs: gives the positional arguments; floating ones get gradients.
        kinds: the maps to try.
        folds: whether the net can be folded on these inputs.
    """

    make: Callable[[], nn.Module]
    weights: tuple[str, ...]
    inputs: Callable[[], tuple[Any, ...]]
    kinds: tuple[str, ...] = ALL
    folds: bool = True


class _Holder(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())


class Oracle:
    """The plain net, called on weights computed anew for each call, each by a module that holds nothing else."""

    def __init__(self, net: nn.Module, model: fxp.ParametrizedModule, kind: str) -> None:
        self.net = net
        self.names = {site.home: site.names[0] for site in model.sites}
        self.holders = {home: _Holder(_get(net, name)) for home, name in self.names.items()}
        for holder in self.holders.values():
            MAPS[kind].register(holder)
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Take the values of all tensors of the transformed model."""
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        for home, holder in self.holders.items():
            prefix = f"{home}."
            own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
            holder.load_state_dict({f"parametrizations.weight.{name}": value for name, value in own.items()})
        # A module under several names has its state under each of them.
        state = {name: value for name, value in state.items() if ".parametrizations." not in name}
        missing, unexpected = self.net.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) <= {alias for name in self.names.values() for alias in _aliases(self.net, name)}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter under the name it has in the transformed model."""
        computed = {alias for name in self.names.values() for alias in _aliases(self.net, name)}
        own = {name: p for name, p in self.net.named_parameters() if name not in computed}
        for home, holder in self.holders.items():
            own |= {f"{home}.{name.split('.', 2)[2]}": p for name, p in holder.named_parameters()}
        return own

    def weights(self) -> dict[str, Tensor]:
        return {name: self.holders[home].get_submodule("parametrizations.weight")() for home, name in self.names.items()}

    def train(self, mode: bool) -> None:
        for module in (self.net, *self.holders.values()):
            module.train(mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.net, self.weights(), args, kwargs)


def _get(net: nn.Module, name: str) -> Tensor:
    path, _, local = name.rpartition(".")
    value: Tensor = getattr(net.get_submodule(path), local)
    return value


def _aliases(net: nn.Module, name: str) -> set[str]:
    found = dict(net.named_parameters(remove_duplicate=False))
    return {alias for alias, value in found.items() if value is found[name]}


def made(case: Case, kind: str, trace: str) -> tuple[fxp.ParametrizedModule, Oracle]:
    """The transformed net and its oracle; the weights have not changed."""
    net = case.make().to(DTYPE)
    names = [
        name
        for name, _ in net.named_parameters(remove_duplicate=False)
        if any(fnmatchcase(name, glob) for glob in case.weights)
    ]
    assert names, "the case computes nothing"
    with torch.no_grad():
        for name in names:
            if kind == "orthogonal":
                nn.init.orthogonal_(_get(net, name))
            else:  # biases start at zero, which has no direction and would hide what is lost
                _get(net, name).copy_(torch.rand_like(_get(net, name)) - 0.5)
    given = {name: _get(net, name).detach().clone() for name in names}
    model = fxp.transform(net, dict.fromkeys(case.weights, MAPS[kind].entry()), trace=trace, copy=True)
    if kind in ("weight_norm", "weight_norm dim 1", "module", "orthogonal"):
        same({name: _get(model, name) for name in names}, given)
    return model, Oracle(net, model, kind)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a value, in order."""
    return list(_walk(value))


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _walk(item)


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def loss_of(outputs: Iterable[Tensor]) -> Tensor:
    """A number that each element of the outputs has a part of its own in."""
    return torch.stack([(t.sin() * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in outputs]).sum()


def outputs_of(model: Any, case: Case, seed: int) -> list[Tensor]:
    """The outputs on the inputs of this seed, random numbers of the layer seeded as well."""
    torch.manual_seed(seed)
    args = case.inputs()
    torch.manual_seed(seed)
    return tensors(model(*args))


def gradients_of(model: Any, parameters: dict[str, nn.Parameter], case: Case, seed: int) -> dict[str, Tensor | None]:
    """Gradients of a loss of the outputs, for parameters by name and inputs by position."""
    torch.manual_seed(seed)
    args = case.inputs()
    floating = [t.requires_grad_() for t in tensors(args) if t.is_floating_point() and t.is_leaf]
    torch.manual_seed(seed)
    loss = loss_of(t for t in tensors(model(*args)) if t.is_floating_point())
    wanted = {**parameters, **{f"input {i}": t for i, t in enumerate(floating)}}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def check_gradients(model: fxp.ParametrizedModule, oracle: Oracle, case: Case, seed: int) -> dict[str, Tensor]:
    """Compare all gradients; returns those of the oracle."""
    wanted = gradients_of(oracle, oracle.parameters(), case, seed)
    found = gradients_of(model, dict(model.named_parameters()), case, seed)
    assert set(found) == set(wanted)
    # A latent that the loss does not reach has no gradient in PyTorch, and zeros where it shares a graph with others.
    for name, want in wanted.items():
        got = found[name]
        if want is None:
            assert got is None or not got.any(), name
        else:
            assert got is not None, name
            same(got, want)
    for home in oracle.names:
        assert any(g is not None and bool(g.any()) for name, g in wanted.items() if name.startswith(f"{home}.")), home
    return {name: g for name, g in wanted.items() if g is not None}


QUIET: tuple[Callable[[], AbstractContextManager[Any]], ...] = (torch.no_grad, torch.inference_mode)


def check_eval(model: fxp.ParametrizedModule, oracle: Oracle, case: Case, seed: int) -> None:
    """The values of eval mode, with gradients, and under ``no_grad`` and ``inference_mode``, where layers have fast paths."""
    model.eval()
    oracle.train(False)
    want = [t.detach() for t in outputs_of(oracle, case, seed)]
    same([t.detach() for t in outputs_of(model, case, seed)], want)
    for quiet in QUIET:
        with quiet():
            same(outputs_of(model, case, seed), outputs_of(oracle, case, seed))


def step(model: nn.Module, oracle: Oracle, case: Case, seed: int) -> None:
    """One step of SGD, of each by itself."""
    for module, parameters in ((model, dict(model.named_parameters())), (oracle, oracle.parameters())):
        optimizer = torch.optim.SGD(parameters.values(), lr=0.002)
        for name, gradient in gradients_of(module, parameters, case, seed).items():
            if name in parameters:
                parameters[name].grad = gradient
        optimizer.step()
        optimizer.zero_grad()


def check_training(case: Case, kind: str, trace: str) -> None:
    """Values and gradients in train and eval, before and after steps."""
    model, oracle = made(case, kind, trace)
    for seed in range(3):
        model.train()
        oracle.train(True)
        same(outputs_of(model, case, seed), outputs_of(oracle, case, seed))
        check_gradients(model, oracle, case, seed)
        buffers = dict(model.named_buffers())
        same({name: buffers[name] for name in _buffers(oracle)}, _buffers(oracle))
        check_eval(model, oracle, case, seed)
        check_gradients(model, oracle, case, seed)
        model.train()
        oracle.train(True)
        step(model, oracle, case, seed)


def _buffers(oracle: Oracle) -> dict[str, Tensor]:
    own = dict(oracle.net.named_buffers())
    for home, holder in oracle.holders.items():
        own |= {f"{home}.{name.split('.', 2)[2]}": b for name, b in holder.named_buffers()}
    return own


def check_assigned(case: Case, kind: str, trace: str) -> None:
    """What is assigned, written or loaded in eval is seen by the next call, fast path or not."""
    model, oracle = made(case, kind, trace)
    check_eval(model, oracle, case, 0)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    for name in oracle.names.values():
        model.assign(name, model.weights()[name].flip(0) if kind != "mask" else model.weights()[name] * 0.5)
    oracle.follow(model)
    check_eval(model, oracle, case, 1)
    with torch.no_grad():
        for latent in model.latents().values():
            latent.mul_(1.1)
    oracle.follow(model)
    check_eval(model, oracle, case, 2)
    model.load_state_dict(saved)
    oracle.follow(model)
    check_eval(model, oracle, case, 3)


def check_copies(case: Case, kind: str, trace: str) -> None:
    """Deep copies, pickles and casts compute their own weights, and leave the original as it is."""
    model, oracle = made(case, kind, trace)
    model.eval()
    before = [t.detach() for t in outputs_of(model, case, 0)]
    duplicates: list[fxp.ParametrizedModule] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for duplicate in duplicates:
        other = Oracle(copy.deepcopy(oracle.net), duplicate, kind)
        check_eval(duplicate, other, case, 0)
        duplicate.train()
        other.train(True)
        step(duplicate, other, case, 0)
        check_eval(duplicate, other, case, 1)
    same([t.detach() for t in outputs_of(model, case, 0)], before)
    model.to(torch.float32)
    assert all(w.dtype is torch.float32 for w in model.weights().values())
    model.to(DTYPE)
    oracle.follow(model)
    check_eval(model, oracle, case, 2)


def check_restored(case: Case, kind: str, trace: str) -> None:
    """The restored net has the names, class and outputs of the plain one."""
    model, oracle = made(case, kind, trace)
    step(model, oracle, case, 0)
    model.eval()
    oracle.train(False)
    restored = fxp.restore(model)
    assert type(restored) is type(oracle.net)
    assert list(restored.state_dict()) == list(oracle.net.state_dict())
    assert [n for n, _ in restored.named_parameters()] == [n for n, _ in oracle.net.named_parameters()]
    quiets: list[Callable[[], AbstractContextManager[Any]]] = [torch.enable_grad, *QUIET]
    for quiet in quiets:
        with quiet():
            same([t.detach() for t in outputs_of(restored, case, 1)], [t.detach() for t in outputs_of(oracle, case, 1)])


def check_folded(case: Case, kind: str, trace: str) -> None:
    """The folded graph has the outputs of eval mode, and only constants of the plain model's names."""
    model, oracle = made(case, kind, trace)
    step(model, oracle, case, 0)
    model.eval()
    oracle.train(False)
    torch.manual_seed(1)
    folded = fxp.fold(model, example_inputs=case.inputs())
    with torch.no_grad():
        same(outputs_of(folded, case, 1), outputs_of(oracle, case, 1))
    names = {name for name, _ in folded.named_parameters(remove_duplicate=False)}
    names = {name for name in names if not name.startswith(("hoisted.", "constants."))}
    assert names <= {name for name, _ in oracle.net.named_parameters(remove_duplicate=False)}
    assert not any(p.requires_grad for p in folded.parameters())


Check = Callable[[Case, str, str], None]
CHECKS: dict[str, Check] = {
    "trains": check_training,
    "set": check_assigned,
    "copies": check_copies,
    "restores": check_restored,
    "folds": check_folded,
}


def every_check(cases: dict[str, Case], kinds: int) -> Any:
    """Parametrizes a test over ``check``, ``case``, the map and ``trace``.

    Each check runs on every other case, with one map and one trace, others for each; all cases train. The exhaustive runs have
    all cases and traces, and as many maps for training as ``kinds`` says.
    """

    def row(check: str, name: str, number: int, i: int, trace: str) -> Any:
        case = cases[name]
        kind = case.kinds[(number + i) % len(case.kinds)]
        chosen = check == "trains" or (number + list(CHECKS).index(check)) % 2 == 0
        first = chosen and i == 0 and trace == TRACES[(number + len(check)) % len(TRACES)]
        marks = [] if first else [pytest.mark.exhaustive]
        return pytest.param(CHECKS[check], case, kind, trace, id=f"{check}-{name}-{kind}-{trace}", marks=marks)

    rows = [
        row(check, name, number, i, trace)
        for check in CHECKS
        for number, (name, case) in enumerate(cases.items())
        if check != "folds" or case.folds
        for i in range(min(kinds if check == "trains" else 1, len(case.kinds)))
        for trace in TRACES
    ]
    return pytest.mark.parametrize(("check", "case", "kind", "trace"), rows)
