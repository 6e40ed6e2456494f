"""A model with three computed weights, and the oracle that computes them at each forward."""
# mypy: disable-error-code="list-item"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from runtime.models import skew_exp, through_one_node
from torch import Tensor, nn

import fxparam as fxp

N = 6
DTYPE = torch.float64
Case = Callable[["Model"], list[Any]]


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


X, Y = _noise(9, 4, N), _noise(10, 4, N)


def apply_weights(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(torch.tanh(x @ weights[0]) @ weights[1])
    return hidden @ weights[2]


class Net(nn.Module):
    """The user's model: three plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(3):
            self.register_parameter(f"w{number}", nn.Parameter(0.3 * _noise(number, N, N)))

    def read(self) -> list[Tensor]:
        return [self.w0, self.w1, self.w2]

    def forward(self, x: Tensor) -> Tensor:
        return apply_weights(self.read(), x)


class Plain(nn.Module):
    """The oracle: the same latents, the weights computed by plain PyTorch at each forward."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(3):
            self.register_parameter(f"latent{number}", nn.Parameter(0.3 * _noise(number, N, N)))

    def read(self) -> list[Tensor]:
        a, b, c = self.parameters()
        return [skew_exp(a), *through_one_node(b, c)]

    def forward(self, x: Tensor) -> Tensor:
        return apply_weights(self.read(), x)


class Model:
    """A model under test, with its latents in the oracle's order."""

    def __init__(self, module: nn.Module, latents: Sequence[Tensor]) -> None:
        self.module, self.latents = module, list(latents)

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    def read(self) -> list[Tensor]:
        if isinstance(self.module, fxp.ParametrizedModule):
            weights = self.module.weights()
            return [weights[name] for name in ("w0", "w1", "w2")]
        return self.module.read()  # type: ignore[operator]

    def named(self) -> dict[str, Tensor]:
        """Latents by name, in the oracle's order."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return {names[id(latent)]: latent for latent in self.latents}

    def grads(self) -> list[Tensor | None]:
        return [None if latent.grad is None else latent.grad.clone() for latent in self.latents]


def plain() -> Model:
    module = Plain()
    return Model(module, list(module.parameters()))


def transformed(trace: str) -> Model:
    spec = {
        "w0": fxp.custom(skew_exp, init=lambda weight: weight),
        fxp.joint("w1", "w2"): fxp.custom(through_one_node, init=lambda weights: tuple(weights)),
    }
    module = fxp.transform(Net(), spec, trace=trace)
    latents = module.latents()
    return Model(
        module,
        [
            latents["parametrizations.w0.original"],
            latents["parametrizations.joint1.original0"],
            latents["parametrizations.joint1.original1"],
        ],
    )


def outcome(function: Callable[[], object], text: str = "") -> str:
    """What happens: the type of the error (and whether its text says so), or that there is none."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}{': ' + text if text and text in str(error) else ''}"
    return "no error"
