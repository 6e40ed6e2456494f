"""Architectures in plain PyTorch that compute weights by other means than weight norm hooks alone: by hand in their forward,
by parametrizations, by pruning; and two that get a spec.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization
from zoo.entry import Entry, Inputs


def images(channels: int, size: int = 8) -> Inputs:
    return (torch.randn(2, channels, size, size),), {}


def tokens(length: int = 7) -> Inputs:
    return (torch.randint(0, 20, (2, length)),), {}


# ---- flows -----------------------------------------------------------------------------------------------------------


class InvertibleConv(nn.Module):
    """A 1x1 convolution by ``P L U`` (Kingma and Dhariwal 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        p, lower, upper = torch.linalg.lu(nn.init.orthogonal_(torch.empty(channels, channels)))
        diagonal = upper.diagonal()
        self.p: Tensor
        self.sign: Tensor
        self.mask: Tensor
        self.register_buffer("p", p)
        self.register_buffer("sign", diagonal.sign())
        self.register_buffer("mask", torch.ones(channels, channels).tril(-1))
        self.lower, self.upper = nn.Parameter(lower), nn.Parameter(upper)
        self.log_scale = nn.Parameter(diagonal.abs().log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower = self.lower * self.mask + torch.eye(self.mask.shape[0], dtype=x.dtype, device=x.device)
        upper = self.upper * self.mask.T + torch.diag(self.sign * self.log_scale.exp())
        weight = self.p @ lower @ upper
        return F.conv2d(x, weight[:, :, None, None]), x.shape[2] * x.shape[3] * self.log_scale.sum()


class Glow(nn.Module):
    """Two steps of flow; latents and the log-determinant of each sample."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(InvertibleConv(channels) for _ in range(2))
        self.couplings = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels // 2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, channels, 3, padding=1))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for mixer, coupling in zip(self.mixers, self.couplings, strict=True):
            x, constant = mixer(x)
            kept, changed = x.chunk(2, 1)
            shift, scale = coupling(kept).chunk(2, 1)
            scale = torch.sigmoid(scale + 2)
            x = torch.cat([kept, (changed + shift) * scale], 1)
            total = total + constant + scale.log().sum((1, 2, 3))
        return x, total


class MaskedLinear(nn.Linear):
    def __init__(self, before: Tensor, after: Tensor, *, strict: bool = False) -> None:
        super().__init__(len(before), len(after))
        self.mask: Tensor
        mask = after[:, None] > before if strict else after[:, None] >= before
        self.register_buffer("mask", mask.float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask * self.weight, self.bias)


class Made(nn.Module):
    """A masked autoregressive flow (Germain and others 2015): an output depends on the inputs before it."""

    def __init__(self, size: int = 6, hidden: int = 24) -> None:
        super().__init__()
        order, degree = torch.arange(size), torch.arange(hidden) % (size - 1)
        self.net = nn.Sequential(
            MaskedLinear(order, degree),
            nn.ReLU(),
            MaskedLinear(degree, degree),
            nn.ReLU(),
            MaskedLinear(degree, order.repeat(2), strict=True),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.net(x).chunk(2, 1)
        return (x - shift) * (-log_scale).exp(), -log_scale.sum(1)


# ---- GANs and vocoders ------------------------------------------------------------------------------------------------


def discriminator(normed: str) -> nn.Module:
    ways: dict[str, Any] = {"new": parametrizations.spectral_norm, "legacy": nn.utils.spectral_norm}
    norm = ways[normed]
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        norm(nn.Conv2d(8, 16, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        norm(nn.Linear(64, 1)),
    )


class ResBlock(nn.Module):
    def __init__(self, channels: int, dilations: tuple[int, ...] = (1, 3)) -> None:
        super().__init__()
        self.wide = nn.ModuleList(
            nn.utils.weight_norm(nn.Conv1d(channels, channels, 3, padding=d, dilation=d)) for d in dilations
        )
        self.narrow = nn.ModuleList(nn.utils.weight_norm(nn.Conv1d(channels, channels, 3, padding=1)) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(F.leaky_relu(wide(F.leaky_relu(x, 0.1)), 0.1))
        return x


class HifiGan(nn.Module):
    """The generator (Kong and others 2020), with the legacy weight norm it is published with."""

    def __init__(self, bands: int = 10, channels: int = 16) -> None:
        super().__init__()
        self.first = nn.utils.weight_norm(nn.Conv1d(bands, channels, 7, padding=3))
        widths = [channels >> i for i in range(3)]
        self.ups = nn.ModuleList(nn.utils.weight_norm(nn.ConvTranspose1d(a, b, 4, 2, 1)) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(nn.ModuleList(ResBlock(b) for _ in range(2)) for b in widths[1:])
        self.last = nn.utils.weight_norm(nn.Conv1d(widths[-1], 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            assert isinstance(blocks, nn.ModuleList)
            x = up(F.leaky_relu(x, 0.1))
            x = torch.stack([block(x) for block in blocks]).mean(0)
        return self.last(F.leaky_relu(x)).tanh()


class EqualLinear(nn.Module):
    """Equalized learning rate (Karras and others 2018)."""

    def __init__(self, inputs: int, outputs: int, rate: float = 0.01, start: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), start))
        self.scale, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


class ModulatedConv(nn.Module):
    """A convolution whose weight the style of each sample scales, as one grouped convolution (Karras and others 2020)."""

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.style = EqualLinear(style, inputs, rate=1.0, start=1.0)
        self.scale = 1 / math.sqrt(inputs * 9)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        weight = (self.weight * self.scale)[None] * self.style(w)[:, None, :, None, None]
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        y = F.conv2d(x.reshape(1, batch * channels, height, width), weight.flatten(0, 1), padding=1, groups=batch)
        return y.view(batch, -1, height, width)


class StyleGan(nn.Module):
    def __init__(self, style: int = 16, channels: int = 8) -> None:
        super().__init__()
        self.mapping = nn.Sequential(EqualLinear(style, style), nn.LeakyReLU(0.2), EqualLinear(style, style))
        self.start = nn.Parameter(torch.randn(1, channels, 4, 4))
        self.convs = nn.ModuleList(ModulatedConv(channels, channels, style) for _ in range(2))
        self.to_rgb = ModulatedConv(channels, 3, style)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())
        x = self.start.repeat(z.shape[0], 1, 1, 1)
        for conv in self.convs:
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2.0), w), 0.2)
        return self.to_rgb(x, w)


# ---- classifiers -------------------------------------------------------------------------------------------------------


class StandardizedConv(nn.Conv2d):
    """Weight standardization (Qiao and others 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        variance = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / (variance + 1e-5).sqrt(), self.bias, self.stride, self.padding)


class StandardizedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), StandardizedConv(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), StandardizedConv(outputs, outputs, 3, 1, 1, bias=False)
        self.skip = nn.Identity() if stride == 1 else StandardizedConv(inputs, outputs, 1, stride, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).relu()
        return self.skip(x) + self.conv2(self.norm2(self.conv1(y)).relu())


def standardized_resnet() -> nn.Module:
    blocks = [StandardizedBlock(8, 8, 1), StandardizedBlock(8, 16, 2), StandardizedBlock(16, 16, 1)]
    return nn.Sequential(StandardizedConv(3, 8, 3, 1, 1, bias=False), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class CosineClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16))
        self.prototypes = nn.Parameter(torch.randn(10, 16))
        self.scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, x: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(self.features(x), dim=1), F.normalize(self.prototypes, dim=1))
        return self.scale.exp() * cosine


class MixedOp(nn.Module):
    """One edge of a cell: candidate operations, mixed (Liu and others 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.candidates = nn.ModuleList(
            [
                nn.Identity(),
                nn.MaxPool2d(3, 1, 1),
                nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)),
                nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 2, 2, bias=False), nn.BatchNorm2d(channels)),
            ]
        )

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum((w * f(x) for w, f in zip(weights, self.candidates, strict=True)), torch.zeros_like(x))


class Darts(nn.Module):
    def __init__(self, channels: int = 6, nodes: int = 3) -> None:
        super().__init__()
        edges = nodes * (nodes + 1) // 2
        self.stem = nn.Conv2d(3, channels, 3, 1, 1)
        self.edges = nn.ModuleList(MixedOp(channels) for _ in range(edges))
        self.alphas = nn.Parameter(torch.randn(edges, 4))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.alphas.softmax(-1)
        states, edge = [self.stem(x)], 0
        while edge < len(self.edges):
            states.append(sum(self.edges[edge + i](s, weights[edge + i]) for i, s in enumerate(states)))
            edge += len(states) - 1
        return self.head(states[-1].mean((2, 3)))


def pruned_mlp() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    layers = [model[0], model[3], model[5]]
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.6)
    prune.ln_structured(model[3], "weight", 0.25, n=2, dim=0)
    return model


class Bjorck(nn.Module):
    """Orthonormal rows by iteration (Björck and Bowie 1971; Anil and others 2019)."""

    def forward(self, weight: Tensor) -> Tensor:
        weight = weight / (weight.abs().sum(0).max() * weight.abs().sum(1).max()).sqrt()
        for _ in range(15):
            weight = 1.5 * weight - 0.5 * weight @ weight.T @ weight
        return weight


class GroupSort(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).sort(-1).values.flatten(-2)


def lipschitz_mlp() -> nn.Module:
    layers = [nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 8)]
    for layer in layers:
        register_parametrization(layer, "weight", Bjorck())
    return nn.Sequential(layers[0], GroupSort(), layers[1], GroupSort(), layers[2])


ENTRIES = (
    Entry("Glow, invertible 1x1", "plain", Glow, lambda: images(4), light=True),
    Entry("MADE", "plain", Made, lambda: ((torch.randn(3, 6),), {}), light=True),
    Entry("SN-GAN discriminator", "plain", lambda: discriminator("new"), lambda: images(3), light=True),
    Entry("SN-GAN discriminator, legacy", "plain", lambda: discriminator("legacy"), lambda: images(3), light=True),
    Entry("HiFi-GAN generator, legacy", "plain", HifiGan, lambda: ((torch.randn(2, 10, 6),), {}), light=True),
    Entry("StyleGAN2 generator", "plain", StyleGan, lambda: ((torch.randn(2, 16),), {})),
    Entry("ResNet, weight standardization", "plain", standardized_resnet, lambda: images(3), light=True),
    Entry("cosine classifier", "plain", CosineClassifier, lambda: images(3), light=True),
    Entry("DARTS supernet", "plain", Darts, lambda: images(3)),
    Entry("pruned MLP", "plain", pruned_mlp, lambda: ((torch.randn(5, 12),), {})),
    Entry("Lipschitz MLP, Bjorck", "plain", lipschitz_mlp, lambda: ((torch.randn(5, 12),), {})),
)
