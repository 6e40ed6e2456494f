"""Small architectures of ``timm``; skipped where it or the torchvision it needs cannot be imported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from zoo.entry import Entry, Inputs


def model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return import_module("timm").create_model(name, pretrained=False, num_classes=10, **options)

    return build


def images(size: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(2, 3, size, size),), {})


def normalizer_free() -> nn.Module:
    timm = import_module("timm.models.nfnet")
    config = timm.NfCfg(
        depths=(1, 1),
        channels=(16, 32),
        stem_type="3x3",
        stem_chs=8,
        ch_div=8,
        group_size=8,
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5},
    )
    return timm.NormFreeNet(config, num_classes=10)


def standardized() -> nn.Module:
    norm = partial(import_module("timm.layers").GroupNormAct, num_groups=4)
    resnet = import_module("timm.models.resnetv2").ResNetV2
    return resnet(layers=(1, 1), channels=(16, 32), num_classes=10, stem_chs=8, stem_type="", norm_layer=norm)


ENTRIES = (
    Entry("ResNetV2 (BiT), standardized convolutions", "timm", standardized, images(32)),
    Entry("NFNet, scaled standardized convolutions", "timm", normalizer_free, images(32)),
    Entry(
        "ViT of timm",
        "timm",
        model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2),
        images(32),
        spec={"blocks.*.attn.qkv.weight": "lora"},
    ),
)
