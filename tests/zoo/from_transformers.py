"""Tiny configurations of the architectures in ``transformers``, built in code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn
from zoo.entry import Entry, Inputs

# What every small transformer here has in common.
TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "attn_implementation": "eager",
}


def model(name: str, **options: Any) -> Callable[[], nn.Module]:
    """``<name>Model`` or ``<name>`` of a configuration of the same name; ``head`` names another class."""

    def build() -> nn.Module:
        transformers = import_module("transformers")
        head = options.get("head", f"{name}Model")
        config = getattr(transformers, f"{name}Config")
        return getattr(transformers, head)(config(**{k: v for k, v in options.items() if k != "head"}))

    return build


def normed(build: Callable[[], nn.Module], path: str = "") -> Callable[[], nn.Module]:
    """With the weight norm that the package puts on for training."""

    def build_normed() -> nn.Module:
        made = build()
        part: Any = made.get_submodule(path)
        part.apply_weight_norm()
        return made

    return build_normed


def ids(**more: Callable[[], Any]) -> Callable[[], Inputs]:
    return lambda: ((), {"input_ids": torch.randint(3, 32, (2, 7)), **{key: make() for key, make in more.items()}})


def keyword(name: str, *shape: int) -> Callable[[], Inputs]:
    return lambda: ((), {name: torch.randn(*shape)})


def entry(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[], Inputs],
    spec: Mapping[str, str] | None = None,
    **options: Any,
) -> Entry:
    return Entry(name, "transformers", build, inputs, spec, **options)


def mixtral(experts: str) -> Callable[[], nn.Module]:
    routing = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": experts}
    return model("Mixtral", head="MixtralForCausalLM", **TEXT, **routing, use_cache=False)


def clip() -> nn.Module:
    transformers = import_module("transformers")
    text = TEXT | {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def sam() -> nn.Module:
    transformers = import_module("transformers")
    vision = {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "mlp_dim": 24,
        "num_pos_feats": 4,
        "global_attn_indexes": [1],
        "window_size": 2,
    }
    decoder = {
        "hidden_size": 8,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
        "attention_downsample_rate": 2,
    }
    prompt = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    return transformers.SamModel(config)


def clip_inputs() -> Inputs:
    return (), {"input_ids": torch.randint(3, 32, (2, 7)), "pixel_values": torch.randn(2, 3, 16, 16)}


def sam_inputs() -> Inputs:
    return (), {"pixel_values": torch.randn(1, 3, 32, 32), "input_points": 32 * torch.rand(1, 1, 2, 2)}


def whisper_inputs() -> Inputs:
    return (), {
        "input_features": torch.randn(2, 8, 16),
        "decoder_input_ids": torch.randint(3, 32, (2, 5)),
        "use_cache": False,
    }


TEXT_ENTRIES = (
    entry("BERT", model("Bert", **TEXT, **DROPOUT), ids(), {"encoder.*.query.weight": "low rank"}, light=True),
    entry(
        "DeBERTa-v2",
        model(
            "DebertaV2",
            **TEXT,
            **DROPOUT,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
        ids(),
        {"encoder.layer.*.value_proj.weight": "weight norm"},
    ),
    entry(
        "GPT-2",
        model(
            "GPT2",
            head="GPT2LMHeadModel",
            **{"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
            **{"bos_token_id": 1, "eos_token_id": 2},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False},
        ),
        ids(),
        {"*.attn.c_attn.weight": "lora"},
    ),
    entry(
        "Llama",
        model("Llama", head="LlamaForCausalLM", **TEXT, num_key_value_heads=1, use_cache=False),
        ids(),
        {"*.q_proj.weight": "lora", "*.v_proj.weight": "lora"},
    ),
    entry("Mixtral", mixtral("batched_mm"), ids(), {"*.o_proj.weight": "orthogonal"}),
    entry(
        "Mixtral, a loop over experts",
        mixtral("eager"),
        ids(),
        {"*.o_proj.weight": "orthogonal"},
        refused=dict.fromkeys(("fold", "onnx"), "GuardOnDataDependentSymNode"),
    ),
    entry(
        "T5",
        model(
            "T5",
            **{"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
            **{"dropout_rate": 0.0, "use_cache": False},
        ),
        ids(decoder_input_ids=lambda: torch.randint(3, 32, (2, 5))),
        {"*.wo.weight": "weight norm"},
    ),
    entry(
        "Mamba",
        model(
            "Mamba",
            **{"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "expand": 2},
            **{"conv_kernel": 3, "time_step_rank": 2, "use_cache": False},
        ),
        ids(),
    ),
)

VISION_ENTRIES = (
    entry(
        "ViT",
        model("ViT", **VISION, **DROPOUT),
        keyword("pixel_values", 2, 3, 16, 16),
        {"*.dense.weight": "orthogonal"},
    ),
    entry(
        "DINOv2",
        model("Dinov2", **{k: v for k, v in VISION.items() if k != "intermediate_size"}, mlp_ratio=2, **DROPOUT),
        keyword("pixel_values", 2, 3, 16, 16),
        {"*.fc1.weight": "weight norm"},
    ),
    entry(
        "Swin",
        model("Swin", image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, **DROPOUT),
        keyword("pixel_values", 2, 3, 16, 16),
        {"*.q_proj.weight": "low rank"},
    ),
    entry(
        "ConvNeXt",
        model("ConvNext", num_stages=2, hidden_sizes=[8, 16], depths=[1, 2], image_size=32, drop_path_rate=0.0),
        keyword("pixel_values", 2, 3, 32, 32),
        {"*.pwconv1.weight": "weight norm"},
    ),
    entry("CLIP", clip, clip_inputs, {"*.q_proj.weight": "lora"}),
    entry("SAM", sam, sam_inputs, {"vision_encoder.*.lin1.weight": "weight norm"}),
)

SPEECH_ENTRIES = (
    entry("wav2vec 2.0", model("Wav2Vec2", **SPEECH), keyword("input_values", 2, 256), light=True),
    entry("HuBERT", model("Hubert", **SPEECH), keyword("input_values", 2, 256)),
    entry(
        "Whisper",
        model(
            "Whisper",
            **{"vocab_size": 32, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
            **{"max_source_positions": 8, "max_target_positions": 8, "dropout": 0.0, "use_cache": False},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        ),
        whisper_inputs,
        {"*.fc1.weight": "weight norm"},
    ),
    entry(
        "EnCodec",
        model(
            "Encodec",
            **{"num_filters": 4, "hidden_size": 8, "codebook_size": 16, "codebook_dim": 8, "upsampling_ratios": [4, 2]},
            **{"num_lstm_layers": 1, "target_bandwidths": [6.0], "sampling_rate": 8000},
        ),
        keyword("input_values", 1, 1, 128),
        refused=dict.fromkeys(("fold", "onnx"), "GuardOnDataDependentSymNode"),
    ),
    entry(
        "DAC",
        normed(
            model(
                "Dac",
                **{"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [2, 4], "n_codebooks": 2},
                **{"codebook_size": 16, "codebook_dim": 4, "quantizer_dropout": 0.0, "hidden_size": 16},
            )
        ),
        keyword("input_values", 1, 1, 128),
    ),
    entry(
        "VITS",
        normed(
            model(
                "Vits",
                **{"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16},
                **{
                    "flow_size": 8,
                    "spectrogram_bins": 9,
                    "prior_encoder_num_flows": 2,
                    "posterior_encoder_num_wavenet_layers": 1,
                },
                **{"prior_encoder_num_wavenet_layers": 1, "duration_predictor_num_flows": 2, "depth_separable_num_layers": 2},
                **{"upsample_initial_channel": 16, "upsample_rates": [4, 2], "upsample_kernel_sizes": [8, 4]},
                **{
                    "resblock_kernel_sizes": [3],
                    "resblock_dilation_sizes": [[1, 3]],
                    "use_stochastic_duration_prediction": False,
                },
                **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0},
                # Without its noise, which no file reproduces.
                **{"duration_predictor_dropout": 0.0, "duration_predictor_filter_channels": 8, "noise_scale": 0.0},
            ),
            "decoder",
        ),
        ids(),
    ),
    entry(
        "UnivNet",
        normed(
            model(
                "UnivNet",
                **{
                    "model_in_channels": 8,
                    "model_hidden_channels": 8,
                    "num_mel_bins": 10,
                    "resblock_kernel_sizes": [3],
                },
                **{"resblock_stride_sizes": [4], "resblock_dilation_sizes": [[1, 3]], "kernel_predictor_num_blocks": 1},
                **{"kernel_predictor_hidden_channels": 8, "kernel_predictor_dropout": 0.0},
            )
        ),
        lambda: ((), {"input_features": torch.randn(1, 6, 10), "noise_sequence": torch.randn(1, 6, 8)}),
    ),
    entry(
        "SpeechT5 HiFi-GAN",
        normed(
            model(
                "SpeechT5HifiGan",
                head="SpeechT5HifiGan",
                **{
                    "model_in_dim": 8,
                    "upsample_initial_channel": 16,
                    "upsample_rates": [4, 2],
                    "upsample_kernel_sizes": [8, 4],
                },
                **{"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]},
            )
        ),
        keyword("spectrogram", 1, 6, 8),
        light=True,
    ),
)

ENTRIES = (*TEXT_ENTRIES, *VISION_ENTRIES, *SPEECH_ENTRIES)
