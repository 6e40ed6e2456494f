"""The oracle: adopted weights delivered by a property and computed by hand, and how two models are compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxparam.tracer.adoption import Adopted
from fxparam.tracer.copying import Copied

TOLERANCE = 32 * torch.finfo(torch.float64).eps


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """The legacy one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name, dim)  # type: ignore[arg-type]


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def registered(module: nn.Module, name: str, *steps: nn.Module, unsafe: bool = False) -> nn.Module:
    for step in steps:
        parametrize.register_parametrization(module, name, step, unsafe=unsafe)
    return module


def line() -> Tensor:
    return torch.randn(5, 3)


def call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def weight_of(adopted: Adopted) -> Tensor:
    weight = adopted.steps[0](*adopted.originals)
    for step in adopted.steps[1:]:
        weight = step(weight)
    return weight


def delivery(adopted: Adopted) -> property:
    return property(lambda _: weight_of(adopted))


def attach(copied: Copied) -> nn.Module:
    """Deliver each adopted weight by a property, computed at each read."""
    owners = {id(adopted.owner): adopted.owner for adopted in copied.adopted}
    for key, owner in owners.items():
        names = {a.tensor_name: delivery(a) for a in copied.adopted if id(a.owner) == key}
        owner.__class__ = type(f"Attached{type(owner).__name__}", (type(owner),), names)
    return copied.root


def names_of(copied: Copied) -> list[str]:
    paths = {id(module): name for name, module in copied.root.named_modules()}
    return [f"{paths[id(a.owner)]}.{a.tensor_name}: {a.origin}".removeprefix(".") for a in copied.adopted]


def held(copied: Copied) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters and the buffers of the copy and of what was taken off it, each once, in a fixed order."""
    modules = [copied.root, *(step for adopted in copied.adopted for step in adopted.steps)]
    originals = [original for adopted in copied.adopted for original in adopted.originals]
    parameters = {id(p): p for p in (*(p for m in modules for p in m.parameters()), *originals)}
    buffers = {id(b): b for b in (*(b for m in modules for b in m.buffers()), *originals)}
    return (
        [p for p in parameters.values() if isinstance(p, nn.Parameter)],
        [b for b in buffers.values() if not isinstance(b, nn.Parameter)],
    )


Run = tuple[list[Tensor | None], list[Tensor]]


def run(
    model: nn.Module,
    use: Callable[[nn.Module, Tensor], Tensor],
    x: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
) -> Run:
    """Output and gradients, and what became of the buffers, which are then put back."""
    before = [buffer.clone() for buffer in buffers]
    output = use(model, x)
    cotangent = torch.linspace(-1, 1, output.numel()).view_as(output)
    gradients = torch.autograd.grad(output, [x, *parameters], cotangent, allow_unused=True)
    after = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    return [output.detach(), *gradients], after


def assert_same(got: Run, expected: Run) -> None:
    for actual, wanted in zip(got[0] + [*got[1]], expected[0] + [*expected[1]], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=TOLERANCE, atol=TOLERANCE)
