"""Models with LoRA layers, and how two of them are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
LoraConfig, get_peft_model = peft.LoraConfig, peft.get_peft_model

TOLERANCE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
LAYERS = ["embed", "linear", "conv1", "conv2", "conv3", "head"]


class Net(nn.Module):
    """One layer of each kind that can carry LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=2)
        self.linear = nn.Linear(6, 8)
        self.conv1 = nn.Conv1d(8, 6, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(1, 3, (3, 2), padding="valid")
        self.conv3 = nn.Conv3d(1, 2, (1, 2, 2), bias=False)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.linear(self.embed(x)).transpose(1, 2))
        pooled = self.conv2(h.unsqueeze(1)).sin().mean((1, 2, 3)) + self.conv3(h[:, None, None]).sin().mean((1, 2, 3, 4))
        return self.head(h.transpose(1, 2).tanh()) + pooled.view(-1, 1, 1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def tokens() -> Tensor:
    x = torch.randint(0, 11, (4, 9))
    x[0, :2] = 2
    return x


def filled(model: nn.Module) -> Any:
    """The model with adapters that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.3).add_(0.1)
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def adapted(**options: Any) -> Any:
    layers = [name for name in LAYERS if name != "embed"] if options.get("lora_bias") else LAYERS
    return filled(get_peft_model(Net(), LoraConfig(r=4, lora_alpha=3, target_modules=layers, **options)))


def several() -> Any:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["linear", "conv1", "embed"], use_dora=True))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["linear", "conv2", "embed"], use_dora=True))
    model.add_adapter("third", LoraConfig(r=1, target_modules=["linear", "head"], use_rslora=True))
    model.base_model.set_adapter(["default", "second", "third"])
    return filled(model)


CASES: dict[str, Any] = {
    "lora": lambda: adapted(),
    "rank-stabilised": lambda: adapted(use_rslora=True),
    "dora": lambda: adapted(use_dora=True),
    "bias of the adapters": lambda: adapted(lora_bias=True),
    "bias of the model": lambda: adapted(bias="all"),
    "several adapters": several,
}


def measured(model: nn.Module, parameters: list[nn.Parameter], *args: Tensor) -> list[Tensor | None]:
    """The output and the gradients of all parameters."""
    output = model(*args)
    direction = torch.cos(torch.arange(output.numel()).view_as(output))
    gradients = torch.autograd.grad(output, parameters, direction, allow_unused=True)
    return [output.detach(), *gradients]


def assert_same(got: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def lora_nodes(graph: torch.fx.Graph) -> list[str]:
    return [str(node) for node in graph.nodes if "lora" in f"{node.name} {node.target}"]


def with_lora(net: nn.Module, *names: str, **options: Any) -> Any:
    return filled(get_peft_model(net, LoraConfig(r=2, target_modules=list(names), **options)))


def line() -> Tensor:
    return torch.randn(5, 4)
