"""Tiny configurations of the architectures in ``diffusers``, built in code."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn
from zoo.entry import Entry


def model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(import_module("diffusers"), name)(**options)

    return build


ENTRIES = (
    Entry(
        "UNet2D",
        "diffusers",
        model(
            "UNet2DModel",
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
        ),
        lambda: ((), {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 400])}),
        spec={"*.conv1.weight": "weight norm", "*.to_q.weight": "lora"},
    ),
    Entry(
        "AutoencoderKL",
        "diffusers",
        model(
            "AutoencoderKL",
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=8,
        ),
        lambda: ((), {"sample": torch.randn(2, 3, 8, 8)}),
        spec={"encoder.*.conv*.weight": "weight norm"},
    ),
    Entry(
        "DiT",
        "diffusers",
        model(
            "DiTTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            norm_num_groups=4,
            num_embeds_ada_norm=10,
        ),
        lambda: (
            (),
            {
                "hidden_states": torch.randn(2, 4, 8, 8),
                "timestep": torch.tensor([3, 400]),
                "class_labels": torch.tensor([1, 2]),
            },
        ),
        spec={"*.to_q.weight": "lora", "*.to_v.weight": "lora"},
    ),
)
