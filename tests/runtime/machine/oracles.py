"""What the transformed models must be: the same weights, written by hand and computed anew for each forward.

No cache, no graph, no code of fxparam.
"""

# mypy: disable-error-code="operator,union-attr,arg-type,attr-defined,misc", warn-unused-ignores=False

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from runtime.machine.models import HEADS, PER_OUTPUT, N
from torch import Tensor, nn


def own(name: str) -> str:
    """The oracle's name for a tensor of the model."""
    return name.replace(".", "/")


class Needed(torch.autograd.Function):
    """Weights as they are, whose backward needs the sources behind them unchanged: it computes the weights again."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors[count:])
        ctx.rest = len(tensors) - count
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _ = ctx.saved_tensors
        return (None, *gradients, *(None for _ in range(ctx.rest)))


class Oracle(nn.Module):
    """The parameters and buffers of a transformed model, and its weights by components that train apart from each other.

    A forward computes a component where it first reads one of its weights, and again where autocast was switched since, or
    ``renew`` was called, as a script does that has just written to a latent.

    Args:
        model: the transformed model.
        recompute: whether the backward of a component needs its sources unchanged, all of them.
    """

    def __init__(self, model: nn.Module, *, recompute: bool = False) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            self.register_parameter(own(name), nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        for name, buffer in model.named_buffers():
            self.register_buffer(own(name), buffer.clone())
        self.tap = nn.Identity()
        self.recompute = recompute
        self.found: dict[tuple[bool, str], Tensor] = {}
        self.reads: list[Tensor] = []

    def __getitem__(self, name: str) -> Tensor:
        tensor = getattr(self, own(name))
        # A leaf that autograd saved takes part in ``leaf.data = ...`` afterwards; a view of it keeps what it had.
        view = tensor.view_as(tensor)
        self.reads.append(view)
        return view

    def latent(self, weight: str, name: str = "original") -> Tensor:
        owner, _, local = weight.rpartition(".")
        return self[f"{owner}.parametrizations.{local}.{name}"]

    def parts(self) -> dict[tuple[str, ...], Callable[[], Sequence[Tensor]]]:
        """For each component its weights and what computes them."""
        raise NotImplementedError

    def body(self, x: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.renew()
        try:
            return self.body(x)
        finally:
            self.renew()

    def renew(self) -> None:
        """Compute every weight anew where it is read next."""
        self.found, self.reads = {}, []

    def weight(self, name: str) -> Tensor:
        key = torch.is_autocast_enabled("cpu"), name
        if key not in self.found:
            names, compute = next((names, compute) for names, compute in self.parts().items() if name in names)
            self.reads = []
            values = tuple(compute())
            inline = torch._C._functorch.maybe_current_level() is not None
            if self.recompute and not inline and any(value.requires_grad for value in values):
                values = Needed.apply(len(values), *values, *self.reads)
            self.found |= {(key[0], one): value for one, value in zip(names, values, strict=True)}
        return self.found[key]

    def weights(self) -> dict[str, Tensor]:
        """All of them, as a read outside of a forward."""
        self.renew()
        try:
            return {name: self.weight(name) for names in self.parts() for name in names}
        finally:
            self.renew()

    def linear(self, x: Tensor, name: str, bias: bool = True) -> Tensor:
        return F.linear(x, self.weight(f"{name}.weight"), self[f"{name}.bias"] if bias else None)


class NetOracle(Oracle):
    def parts(self) -> dict[tuple[str, ...], Callable[[], Sequence[Tensor]]]:
        return {
            ("orth.weight",): self.orth,
            ("norm.weight",): lambda: [self.weight_norm("norm.weight")],
            ("enc.weight", "dec.weight"): self.tied,
            ("left.weight", "right.weight"): self.pair,
        }

    def orth(self) -> Sequence[Tensor]:
        lower = self.latent("orth.weight").tril()
        skew, eye = lower - lower.mT, torch.eye(N, dtype=lower.dtype)
        cayley = torch.linalg.solve(eye - skew / 2, eye + skew / 2)
        # A product of half precision under autocast, and a weight of the latent's.
        return [(self.latent("orth.weight", "0.base") @ cayley).to(lower.dtype)]

    def weight_norm(self, name: str) -> Tensor:
        return torch._weight_norm(self.latent(name, "original1"), self.latent(name, "original0"), 0)

    def tied(self) -> Sequence[Tensor]:
        enc = self.weight_norm("enc.weight")
        return [enc, enc.mT]

    def pair(self) -> Sequence[Tensor]:
        latent = self["left.parametrizations.joint4.original"]
        shared = latent.exp()
        return [(shared * latent).view(3, N), (shared + 1).view(3, N)]

    def body(self, x: Tensor) -> tuple[Tensor, ...]:
        enc = self.linear(x, "enc")
        hidden = self.tap(torch.tanh(self.linear(x, "orth")))
        hidden = torch.tanh(self.linear(hidden, "orth"))
        return (
            self.linear(hidden, "norm"),
            enc,
            self.linear(x[:, :3], "dec"),
            self.linear(x, "left", bias=False),
            self.linear(hidden, "right", bias=False),
        )


class HeadsOracle(Oracle):
    def parts(self) -> dict[tuple[str, ...], Callable[[], Sequence[Tensor]]]:
        def compute(number: int) -> Callable[[], Sequence[Tensor]]:
            return lambda: [self.head(number)]

        return {(f"heads.{number}.weight",): compute(number) for number in range(HEADS)}

    def head(self, number: int) -> Tensor:
        name = f"heads.{number}.weight"
        if number % 8 == 0:
            latent = self.latent(name)
            return latent - latent.mT
        return torch._weight_norm(self.latent(name, "original1"), self.latent(name, "original0"), 0)

    def body(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for start in range(0, HEADS, PER_OUTPUT):
            if start == HEADS // 2:
                x = self.tap(x)
            numbers = range(start, start + PER_OUTPUT)
            outputs.append(sum(self.linear(x[:, :2], f"heads.{number}", bias=False) for number in numbers))
        return tuple(outputs)


class Stateful(Oracle):
    """Something in it moves once for each evaluation of the subject, and only when it is told to."""

    def advance(self, autocast: bool, drew: bool) -> None:
        """The subject computed its weights, under autocast or not, and did or did not move the generator."""
        raise NotImplementedError

    def body(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.tanh(self.linear(x, "first"))
        return self.linear(torch.tanh(self.linear(hidden, "first")), "second"), self.linear(x, "first")


class SpectralOracle(Stateful):
    """Power iteration."""

    @torch.no_grad()
    def advance(self, autocast: bool, drew: bool) -> None:
        for name in ("first.weight", "second.weight"):
            latent, u, v = (self.latent(name, local) for local in ("original", "0._u", "0._v"))
            u.data.copy_(F.normalize(latent @ v, dim=0, eps=1e-12))
            v.data.copy_(F.normalize(latent.mT @ u, dim=0, eps=1e-12))

    def parts(self) -> dict[tuple[str, ...], Callable[[], Sequence[Tensor]]]:
        return {
            ("first.weight",): lambda: [self.divided("first.weight")],
            ("second.weight",): lambda: [self.divided("second.weight")],
        }

    def divided(self, name: str) -> Tensor:
        latent, u, v = (self.latent(name, local) for local in ("original", "0._u", "0._v"))
        return latent / torch.vdot(u.clone(), torch.mv(latent, v.clone()))


class NoiseOracle(Stateful):
    """Noise that is drawn once for each evaluation: from the generator, in the order of the weights, as it stands then."""

    STD = 0.5

    def __init__(self, model: nn.Module, *, recompute: bool = False) -> None:
        super().__init__(model, recompute=recompute)
        # Evaluations with and without autocast stand side by side, with the same numbers within a step.
        self.drawn: dict[bool, tuple[Tensor, Tensor]] = {}
        self.drawn_for: dict[bool, list[Tensor]] = {}

    def advance(self, autocast: bool, drew: bool) -> None:
        latents = [parameter.detach().clone() for parameter in self.parameters()]
        if drew:
            self.drawn[autocast] = (torch.randn(N, N, dtype=torch.float64), torch.randn(3, N, dtype=torch.float64))
        else:
            assert all(map(torch.equal, latents, self.drawn_for[not autocast])), "numbers of an earlier step"
            self.drawn[autocast] = self.drawn[not autocast]
        self.drawn_for[autocast] = latents

    def parts(self) -> dict[tuple[str, ...], Callable[[], Sequence[Tensor]]]:
        return {("first.weight",): lambda: [self.noisy(0)], ("second.weight",): lambda: [self.noisy(1)]}

    def noisy(self, at: int) -> Tensor:
        if at == 0:
            mean = self.latent("first.weight")
        else:
            v, g = (self.latent("second.weight", name) for name in ("original1", "original0"))
            mean = torch._weight_norm(v, g, 0)
        if not self.training:
            return mean
        return mean + self.STD * self.drawn[torch.is_autocast_enabled("cpu")][at]
