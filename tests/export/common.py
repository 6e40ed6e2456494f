"""Models to export, and how the tests export them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxparam.exporters.onnx import OnnxReport, export_program


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20, bias=False), nn.ReLU(), nn.Linear(20, 3))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.head = nn.Linear(4 * 4 * 4, 3)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


class Decoder(nn.Module):
    """Integer input, a state, a loop, a tied weight, a keyword input, nested outputs with None and repetition."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.cell = nn.GRUCell(8, 16)
        self.project = nn.Linear(16, 8)
        self.decode = nn.Linear(8, 10, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor, state: Tensor, *, scale: Tensor) -> dict[str, Any]:
        for step in range(tokens.shape[1]):
            state = self.cell(self.embed(tokens[:, step]), state)
        hidden = self.project(state) * scale
        return {"logits": self.decode(hidden), "state": (hidden, state, hidden), "attention": None}


class Shapes(nn.Module):
    """Two inputs whose sizes hang together, and a size as an output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(a).sum(1), torch.cat([b, b * 2])[: a.shape[0]].logical_not()


class Returns(nn.Module):
    """Returns its input, a parameter, a value and a copy of that value."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = x @ self.w
        return x, self.w, h, h.clone(), h


class Clash(nn.Module):
    """Parameters called as the exporter would call an input and an intermediate value."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(3))
        self.mul = nn.Parameter(torch.randn(3))
        self.add = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.x * self.mul + self.add


BATCH = Dim("batch", min=2, max=64)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], dict[str, Any], Any]] = {
    "mlp": (Mlp, lambda: (torch.randn(4, 6),), {}, None),
    "mlp-dynamic": (Mlp, lambda: (torch.randn(4, 6),), {}, ({0: BATCH},)),
    "conv": (ConvNet, lambda: (torch.randn(2, 2, 6, 6),), {}, None),
    "conv-dynamic": (ConvNet, lambda: (torch.randn(2, 2, 6, 6),), {}, ({0: BATCH},)),
    "decoder": (
        Decoder,
        lambda: (torch.randint(0, 10, (2, 3)), torch.zeros(2, 16)),
        {"scale": torch.rand(8)},
        None,
    ),
    "shapes": (
        Shapes,
        lambda: (torch.randn(6, 7, 5), torch.rand(6) > 0.5),
        {},
        ({0: BATCH, 1: Dim("time")}, {0: BATCH}),
    ),
    "returns": (Returns, lambda: (torch.randn(2, 3),), {}, None),
    "clash": (Clash, lambda: (torch.randn(2, 3),), {}, None),
}


@functools.cache  # the tests share the exported programs, which exporting leaves as they are
def program(name: str) -> tuple[torch.export.ExportedProgram, nn.Module, tuple[Any, ...], dict[str, Any]]:
    build, inputs, kwargs, dynamic = CASES[name]
    model, args = build().eval(), inputs()
    return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic), model, args, kwargs


def export(name: str, path: Path, **options: Any) -> tuple[OnnxReport, nn.Module]:
    exported, model, args, kwargs = program(name)
    return export_program(exported, path, reference=model, args=args, kwargs=kwargs, **options), model


def simple(module: nn.Module, path: Path, *args: Tensor, **options: Any) -> OnnxReport:
    exported = torch.export.export(module.eval(), args)
    return export_program(exported, path, **{"reference": module, "args": args, **options})


def stored(path: Path) -> dict[str, Tensor]:
    return {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in onnx.load(path).graph.initializer}
