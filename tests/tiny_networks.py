"""Each network of the host in small, with random weights: what a family of models needs to be built and sampled."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

WIDTH = 16  # of the conditioning, where the network is free to choose it
PICTURES, VIDEO, SOUND, SHAPES = "pictures", "video", "sound", "3D shapes"
SOUND_FILM = "video with sound"


@dataclass(frozen=True)
class Tiny:
    """Of one family: what its network's constructor is given, what is sampled, and the conditioning it wants.

    latent: its shape, or those of several that are sampled at once. extras: of the conditioning, the name -> a tensor's
    shape, or the value. weights: of a file, without which the host builds no model. spread: of the weights, small enough
    that 20 steps of Euler stay finite. written: the module that has its sizes in its source, and smaller ones.
    """

    settings: dict[str, Any]
    latent: tuple[Any, ...]
    width: int = WIDTH
    tokens: int = 6
    extras: dict[str, Any] = field(default_factory=dict)
    weights: Callable[[], dict[str, Tensor]] = dict
    makes: str = PICTURES
    spread: float = 0.08
    trim: Callable[[nn.Module], None] = lambda network: None
    written: tuple[str, dict[int, int]] = ("", {})


UNET = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "transformer_depth": [1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1],
    "num_heads": 2, "num_head_channels": -1, "use_spatial_transformer": True, "context_dim": WIDTH,
    "use_linear_in_transformer": False, "adm_in_channels": None, "num_classes": None, "use_temporal_attention": False,
    "legacy": False, "image_size": 32,
}  # fmt: skip
FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 16, "context_in_dim": WIDTH, "hidden_size": 48,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 4, "depth_single_blocks": 8, "axes_dim": [8, 8, 8], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
CHROMA = {
    **{key: value for key, value in FLUX.items() if key not in ("vec_in_dim", "guidance_embed")},
    "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 48, "hidden_dim": 32, "n_layers": 2,
}  # fmt: skip
WAN = {
    "in_dim": 16, "out_dim": 16, "dim": 48, "ffn_dim": 32, "freq_dim": 16, "text_dim": WIDTH, "num_heads": 2,
    "num_layers": 10, "patch_size": (1, 2, 2), "text_len": 16, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
COSMOS = {
    "out_channels": 16, "max_img_h": 64, "max_img_w": 64, "max_frames": 16, "patch_spatial": 2, "patch_temporal": 1,
    "model_channels": 48, "num_blocks": 10, "num_heads": 2, "concat_padding_mask": True,
    "crossattn_emb_channels": WIDTH, "pos_emb_cls": "rope3d",
}  # fmt: skip


def _seconds() -> dict[str, Tensor]:
    """The embedders of a sound's beginning and length."""
    from comfy.ldm.audio.embedders import NumberConditioner

    return {
        f"conditioner.conditioners.{name}.{key}": value
        for name in ("seconds_start", "seconds_total")
        for key, value in NumberConditioner(768, min_val=0, max_val=512).state_dict().items()
    }


def _one_layer_for_lyrics(network: Any) -> None:
    del network.lyric_encoder.encoders[1:]


def _no_adapter(network: Any) -> None:
    """Of a prompt's encoder, 130 million weights that no size can be given."""
    network.llm_adapter = None


POOLED = {"pooled_output": (1, 16)}
TINY = {
    "SD15": Tiny({**UNET}, (1, 4, 16, 16), spread=0.04),
    "SDXL": Tiny(
        {**UNET, "adm_in_channels": 2816, "num_classes": "sequential", "use_linear_in_transformer": True},
        (1, 4, 16, 16), extras={"pooled_output": (1, 1280)}, spread=0.04,
    ),
    "SVD_img2vid": Tiny(
        {
            **UNET, "in_channels": 8, "adm_in_channels": 768, "num_classes": "sequential",
            "use_linear_in_transformer": True, "use_temporal_attention": True, "use_temporal_resblock": True,
            "extra_ff_mix_layer": True, "use_spatial_context": True, "merge_strategy": "learned_with_images",
            "merge_factor": 0.0, "video_kernel_size": [3, 1, 1],
        },
        (3, 4, 16, 16), tokens=1, makes=VIDEO,
    ),
    "Stable_Cascade_C": Tiny(
        {
            "c_cond": 32, "c_hidden": [32, 32], "nhead": [2, 2], "blocks": [[2, 4], [4, 2]], "c_clip_text": WIDTH,
            "c_clip_text_pooled": 16,
        },
        (1, 16, 8, 8), extras=POOLED,
    ),
    "Stable_Cascade_B": Tiny(
        {
            "c_cond": 32, "c_hidden": [16, 16, 32, 32], "nhead": [-1, -1, 2, 2], "blocks": [[1, 1, 2, 1], [1, 2, 1, 1]],
            "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]], "c_clip": 16,
        },
        (1, 4, 32, 32), extras=POOLED,
    ),
    "SD3": Tiny(
        {
            "in_channels": 16, "depth": 6, "patch_size": 2, "adm_in_channels": 16, "pos_embed_max_size": 8,
            "num_patches": 64, "input_size": None,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 384}},
        },
        (1, 16, 8, 8), extras=POOLED, spread=0.04,
    ),
    "StableAudio": Tiny(
        {"embed_dim": 64, "num_heads": 2, "depth": 8, "project_cond_tokens": True}, (1, 64, 32), width=768, weights=_seconds, makes=SOUND,
    ),
    "AuraFlow": Tiny(
        {"max_seq": 256, "cond_seq_dim": WIDTH, "n_double_layers": 4, "n_layers": 12, "n_heads": 2, "dim": 48,
         "global_conddim": 48},
        (1, 4, 8, 8),
    ),
    "PixArtSigma": Tiny(
        {
            "in_channels": 4, "hidden_size": 32, "depth": 10, "num_heads": 2, "caption_channels": WIDTH,
            "micro_condition": False, "pe_interpolation": 1,
        },
        (1, 4, 40, 40), spread=0.03,
    ),
    "HunyuanDiT": Tiny(
        {"hidden_size": 64, "depth": 10, "num_heads": 2, "text_states_dim": WIDTH, "text_states_dim_t5": 16},
        (1, 4, 16, 16), tokens=77,
        extras={
            "conditioning_mt5xl": (1, 256, 16), "attention_mask": torch.ones(1, 77),
            "attention_mask_mt5xl": torch.ones(1, 256),
        },
    ),
    "Flux": Tiny({**FLUX}, (1, 16, 8, 8), extras=POOLED),
    "Flux2": Tiny(
        {
            **FLUX, "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "hidden_size": 64,
            "axes_dim": [8, 8, 8, 8], "theta": 2000, "patch_size": 1, "qkv_bias": False, "global_modulation": True,
            "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
        },
        (1, 128, 8, 8), extras=POOLED,
    ),
    "GenmoMochi": Tiny(
        {
            "depth": 10, "patch_size": 2, "num_heads": 2, "hidden_size_x": 48, "hidden_size_y": 32, "mlp_ratio_x": 256.0,
            "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
            "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True,
            "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True,
            "t5_feat_dim": WIDTH, "t5_token_length": 6, "rope_theta": 10000.0,
        },
        (1, 12, 2, 8, 8), extras={"attention_mask": torch.ones(1, 6, dtype=torch.long)}, makes=VIDEO,
    ),
    "LTXV": Tiny(
        {
            "in_channels": 128, "cross_attention_dim": 48, "attention_head_dim": 24, "num_attention_heads": 2,
            "caption_channels": WIDTH, "num_layers": 10,
        },
        (1, 128, 2, 4, 4), extras={"attention_mask": torch.ones(1, 6, dtype=torch.long)}, makes=VIDEO,
    ),
    "HunyuanVideo": Tiny(
        {
            **FLUX, "patch_size": [1, 2, 2], "theta": 256, "byt5": False, "meanflow": False,
            "use_cond_type_embedding": False, "vision_in_dim": None,
        },
        (1, 16, 2, 8, 8), extras=POOLED, makes=VIDEO,
    ),
    "CosmosT2V": Tiny(
        {
            **COSMOS, "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 16,
            "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
        },
        (1, 16, 2, 8, 8), makes=VIDEO,
    ),
    "CosmosT2IPredict2": Tiny({**COSMOS, "use_adaln_lora": False}, (1, 16, 1, 8, 8)),
    "Lumina2": Tiny(
        {
            "patch_size": 2, "in_channels": 16, "dim": 48, "n_layers": 10, "n_refiner_layers": 1, "n_heads": 2,
            "n_kv_heads": 1, "multiple_of": 16, "qk_norm": True, "cap_feat_dim": WIDTH, "axes_dims": [8, 8, 8],
            "axes_lens": [300, 64, 64], "ffn_dim_multiplier": 1.0,
        },
        (1, 16, 8, 8),
    ),
    "ZImage": Tiny(
        {
            "patch_size": 2, "in_channels": 16, "dim": 256, "n_layers": 10, "n_refiner_layers": 1, "n_heads": 2,
            "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": WIDTH,
            "axes_dims": [32, 48, 48], "axes_lens": [300, 64, 64], "rope_theta": 256.0, "ffn_dim_multiplier": 0.5,
            "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
        },
        (1, 16, 8, 8), spread=0.04,
    ),
    "WAN21_T2V": Tiny({**WAN}, (1, 16, 2, 8, 8), makes=VIDEO),
    "WAN21_Vace": Tiny({**WAN, "vace_layers": 5, "vace_in_dim": 96}, (1, 16, 2, 8, 8), makes=VIDEO),
    "WAN21_Camera": Tiny({**WAN, "in_dim": 32}, (1, 16, 2, 8, 8), makes=VIDEO),
    "WAN22_S2V": Tiny(
        {**WAN, "audio_dim": 16, "audio_inject_layers": [0, 4, 8]}, (1, 16, 2, 8, 8),
        extras={"audio_embed": (1, 25, 16, 8)}, makes=VIDEO,
    ),
    "WAN21_HuMo": Tiny({**WAN}, (1, 16, 2, 8, 8), makes=VIDEO),
    "WAN22_Animate": Tiny({**WAN, "in_dim": 36}, (1, 16, 2, 8, 8), makes=VIDEO),
    "Hunyuan3Dv2": Tiny(
        {
            "in_channels": 64, "context_in_dim": WIDTH, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 1, "depth": 4,
            "depth_single_blocks": 8, "qkv_bias": True, "guidance_embed": False,
        },
        (1, 64, 32), makes=SHAPES,
    ),
    "Hunyuan3Dv2_1": Tiny(
        {
            "in_channels": 64, "context_dim": WIDTH, "hidden_size": 48, "num_heads": 2, "depth": 10, "num_moe_layers": 2,
            "num_experts": 2, "guidance_cond_proj_dim": None,
        },
        (1, 64, 32), makes=SHAPES,
    ),
    "HiDream": Tiny(
        {
            "attention_head_dim": 24, "axes_dims_rope": [8, 8, 8], "caption_channels": [WIDTH, WIDTH],
            "max_resolution": [16, 16], "in_channels": 16, "llama_layers": [0, 1] * 6, "num_attention_heads": 2,
            "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 3, "num_single_layers": 9,
            "out_channels": 16, "patch_size": 2, "text_emb_dim": 16,
        },
        (1, 16, 8, 8), extras={**POOLED, "conditioning_llama3": (1, 2, 6, WIDTH)},
    ),
    "Chroma": Tiny({**CHROMA}, (1, 16, 8, 8), extras=POOLED),
    "ChromaRadiance": Tiny(
        {
            **CHROMA, "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 8, "nerf_mlp_ratio": 2,
            "nerf_depth": 1, "nerf_max_freqs": 2, "nerf_tile_size": 0, "nerf_final_head_type": "conv",
            "nerf_embedder_dtype": torch.float32,
        },
        (1, 3, 64, 64), extras=POOLED,
    ),
    "ACEStep": Tiny(
        {
            "attention_head_dim": 24, "num_attention_heads": 2, "inner_dim": 48, "num_layers": 10, "mlp_ratio": 2.0,
            "max_position": 256, "max_width": 256, "text_embedding_dim": WIDTH, "ssl_latent_dims": [16, 16],
            "ssl_encoder_depths": [2, 2], "lyric_encoder_vocab_size": 32,
        },
        (1, 8, 16, 16), extras={"conditioning_lyrics": torch.arange(8)[None]}, makes=SOUND,
        trim=_one_layer_for_lyrics,
    ),
    "Omnigen2": Tiny(
        {
            "axes_dim_rope": [8, 8, 8], "axes_lens": [64, 64, 64], "hidden_size": 48, "in_channels": 16,
            "multiple_of": 16, "num_attention_heads": 2, "num_kv_heads": 1, "num_layers": 10, "num_refiner_layers": 1,
            "text_feat_dim": WIDTH, "timestep_scale": 1000.0,
        },
        (1, 16, 8, 8), extras={"attention_mask": torch.ones(1, 6, dtype=torch.long)},
    ),
    "QwenImage": Tiny(
        {
            "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 12, "attention_head_dim": 24,
            "num_attention_heads": 2, "joint_attention_dim": WIDTH, "pooled_projection_dim": 16,
            "axes_dims_rope": (8, 8, 8),
        },
        (1, 16, 1, 8, 8),
    ),
}  # fmt: skip


# Those that ComfyUI 0.3.75 does not know.
TINY |= {
    "Lens": Tiny(
        {"num_layers": 10, "attention_head_dim": 24, "num_attention_heads": 2, "enc_hidden_dim": 8, "axes_dims_rope": (8, 8, 8),
         "selected_layer_index": (0, 1)},
        (1, 128, 8, 8),
    ),
    "MageFlow": Tiny(
        {"num_layers": 10, "attention_head_dim": 24, "num_attention_heads": 2, "joint_attention_dim": WIDTH,
         "axes_dims_rope": (8, 8, 8)},
        (1, 128, 8, 8),
    ),
    "ErnieImage": Tiny(
        {"hidden_size": 48, "num_attention_heads": 2, "num_layers": 10, "ffn_hidden_size": 32, "text_in_dim": WIDTH,
         "rope_axes_dim": (8, 8, 8)},
        (1, 128, 8, 8),
    ),
    "Krea2": Tiny(
        {"features": 64, "tdim": 16, "txtdim": WIDTH, "heads": 2, "kvheads": 1, "multiplier": 2, "layers": 10,
         "txtlayers": 1, "txtheads": 2, "txtkvheads": 2},
        (1, 16, 1, 8, 8),
    ),
    "Ideogram4": Tiny(
        {"num_layers": 10, "num_attention_heads": 2, "attention_head_dim": 24, "intermediate_size": 32, "adaln_dim": 16,
         "llm_features_dim": WIDTH, "mrope_section": (4, 4, 4)},
        (1, 128, 8, 8),
    ),
    "JoyImage": Tiny(
        {"hidden_size": 48, "num_attention_heads": 2, "text_dim": WIDTH, "mlp_width_ratio": 2.0, "num_layers": 10,
         "rope_dim_list": [8, 8, 8]},
        (1, 16, 1, 8, 8),
    ),
    "Boogu": Tiny(
        {"hidden_size": 48, "num_layers": 10, "num_double_stream_layers": 2, "num_refiner_layers": 1,
         "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (8, 8, 8),
         "axes_lens": (64, 64, 64), "instruction_feat_dim": WIDTH},
        (1, 16, 8, 8), extras={"attention_mask": torch.ones(1, 6, dtype=torch.long)},
    ),
    "Anima": Tiny({**COSMOS, "in_channels": 16, "use_adaln_lora": False}, (1, 16, 1, 8, 8), trim=_no_adapter),
    "Kandinsky5": Tiny(
        {"in_text_dim": WIDTH, "in_text_dim2": 16, "time_dim": 16, "model_dim": 48, "ff_dim": 32, "num_text_blocks": 1,
         "num_visual_blocks": 10, "axes_dims": (8, 8, 8)},
        (1, 16, 2, 8, 8), extras=POOLED, makes=VIDEO,
    ),
    "PixelDiTT2I": Tiny(
        {"num_groups": 2, "hidden_size": 48, "pixel_hidden_size": 8, "pixel_attn_hidden_size": 32,
         "pixel_num_groups": 2, "patch_depth": 10, "pixel_depth": 2, "patch_size": 4, "txt_embed_dim": WIDTH,
         "txt_max_length": 6},
        (1, 3, 32, 32),
    ),
    "PiD": Tiny(
        {"num_groups": 2, "hidden_size": 48, "pixel_hidden_size": 8, "pixel_attn_hidden_size": 32,
         "pixel_num_groups": 2, "patch_depth": 10, "pixel_depth": 1, "patch_size": 16, "txt_embed_dim": WIDTH,
         "txt_max_length": 6, "lq_hidden_dim": 32, "lq_num_res_blocks": 1},
        (1, 3, 64, 64), extras={"lq_latent": (1, 16, 2, 2), "degrade_sigma": torch.zeros(1)},
    ),
    "ZImagePixelSpace": Tiny(
        {
            **TINY["ZImage"].settings, "in_channels": 3, "patch_size": 8, "decoder_hidden_size": 32,
            "decoder_num_res_blocks": 1, "decoder_max_freqs": 2,
        },
        (1, 3, 64, 64), spread=0.04,
    ),
    "WAN21_CausalAR_T2V": Tiny({**WAN}, (1, 16, 2, 8, 8), makes=VIDEO),
    "WAN21_SCAIL": Tiny({**WAN, "in_dim": 20}, (1, 16, 2, 8, 8), makes=VIDEO),
    "WAN21_SCAIL2": Tiny({**WAN, "in_dim": 20}, (1, 16, 2, 8, 8), makes=VIDEO),
    "WAN22_WanDancer": Tiny(
        {**WAN, "in_dim": 36, "audio_inject_layers": [0, 4, 8], "music_dim": 16, "music_heads": 2, "music_latent_dim": 16},
        (1, 16, 2, 8, 8), makes=VIDEO,
    ),
    "WAN_Animate2": Tiny({**WAN, "in_dim": 36}, (1, 16, 2, 8, 8), makes=VIDEO),
    "CogVideoX_T2V": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 24, "time_embed_dim": 16, "text_embed_dim": WIDTH,
         "num_layers": 10, "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 6},
        (1, 16, 2, 8, 8), makes=VIDEO,
    ),
    "HiDreamO1": Tiny(
        {
            "text_config_overrides": {
                "hidden_size": 64, "num_hidden_layers": 10, "num_attention_heads": 2, "num_key_value_heads": 1,
                "head_dim": 32, "intermediate_size": 64,
            },
            "vision_config_overrides": {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32},
        },
        (1, 3, 64, 64), extras={"text_input_ids": torch.arange(8)[None]},
    ),
    "ACEStep15": Tiny(
        {"hidden_size": 48, "text_hidden_dim": WIDTH, "num_dit_layers": 10, "num_lyric_layers": 1,
         "num_timbre_layers": 1, "num_tokenizer_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 24,
         "intermediate_size": 32, "fsq_dim": 48, "encoder_hidden_size": 48, "encoder_intermediate_size": 32,
         "encoder_num_heads": 2},
        (1, 64, 32), extras={"conditioning_lyrics": (1, 8, WIDTH)}, makes=SOUND,
    ),
}  # fmt: skip


def _known_places(network: Any) -> None:
    """Its file brings the frequencies of the embedding of places."""
    network.rope.inv_freq.copy_(10000.0 ** -torch.linspace(0, 1, len(network.rope.inv_freq)))


MUSIC = {2048: 64, 2304: 320, 8192: 96, 4096: 16, 36: 10}  # 2 x 128 of latents and 64 of the condition are 320


def _small_condition(network: Any) -> None:
    """Its layers of text, the frequencies and shifts that its file brings."""
    network.aligned_condition = MethodType(_in_small(type(network).aligned_condition, MUSIC), network)
    places = network.diffusion_transformer.transformer.rotary_pos_emb.inv_freq
    places.copy_(10000.0 ** -torch.linspace(0, 1, len(places)))
    for name, shift in network.named_buffers():
        if name.endswith("beta"):
            shift.zero_()


# Of several latents, and of a kind of their own.
TINY |= {
    "MiniMaxMusic3": Tiny(
        {}, (1, 128, 700), width=8 * 16, extras={"conditioning_scale": torch.ones(1, 1, 1)}, makes=SOUND,
        trim=_small_condition, written=("comfy.ldm.minimax_music.dit", MUSIC),
    ),
    "LTXAV": Tiny(
        {
            "in_channels": 128, "audio_in_channels": 128, "cross_attention_dim": 48, "audio_cross_attention_dim": 32,
            "attention_head_dim": 24, "audio_attention_head_dim": 16, "num_attention_heads": 2,
            "audio_num_attention_heads": 2, "caption_channels": WIDTH, "num_layers": 10,
            "connector_attention_head_dim": 8, "connector_num_attention_heads": 2, "connector_num_layers": 1,
        },
        ((1, 128, 2, 4, 4), (1, 8, 8, 16)), width=2 * WIDTH, makes=SOUND_FILM,
    ),
    "MiniMaxH3": Tiny(
        {
            "hidden_size": 48, "num_layers": 10, "token_refiner_num_layers": 1, "num_attention_heads": 2,
            "attention_head_dim": 24, "ffn_hidden_size": 32, "text_dim": WIDTH, "timestep_input_dim": 16,
            "time_embed_hidden_size": 16, "time_embed_dim": 16, "rope_inv_freq_len": 4,
        },
        ((1, 24, 2, 4, 4), (1, 32, 2, 8)), makes=SOUND_FILM, trim=_known_places,
    ),
    "TripoSplat": Tiny(
        {
            "q_token_length": 32, "model_channels": 64, "cond_channels": WIDTH, "num_blocks": 10,
            "num_refiner_blocks": 1, "num_head_channels": 32, "cond2_channels": 16, "mlp_ratio": 2,
        },
        ((1, 32, 16), (1, 1, 5)), makes=SHAPES,
    ),
    "SeedVR2": Tiny(
        {
            "norm_eps": 1e-5, "num_layers": 10, "mlp_type": "swiglu", "vid_dim": 48, "txt_in_dim": WIDTH, "heads": 2,
            "head_dim": 24, "expand_ratio": 2, "rope_dim": 24, "vid_out_norm": True,
        },
        (1, 16, 1, 8, 8), extras={"condition": (1, 17, 1, 8, 8)}, makes=VIDEO,
    ),
}  # fmt: skip


NEWER = {
    "txt_ids_dims": [],
    "vec_in_dim": None,
    "use_x0": False,
    "use_sequential_txt_ids": False,
    "meanflow_sum": False,
}
PARAMETERS = {  # where they are not Flux' own
    "HunyuanVideo": "hunyuan_video.model.HunyuanVideoParams", "Chroma": "chroma.model.ChromaParams",
    "ChromaRadiance": "chroma_radiance.model.ChromaRadianceParams",
}  # fmt: skip


def settings_of(family: str) -> dict:
    """Those of TINY; networks of Flux' kind are given what newer hosts ask besides, and not what older do not know."""
    settings = TINY[family].settings
    if "axes_dim" not in settings:
        return settings
    module, _, name = PARAMETERS.get(family, "flux.model.FluxParams").rpartition(".")
    asked = getattr(importlib.import_module(f"comfy.ldm.{module}"), name).__dataclass_fields__
    more = {one: [3] if (one, family) == ("txt_ids_dims", "Flux2") else NEWER[one] for one in asked if one in NEWER}
    return {**more, **{key: value for key, value in settings.items() if key in asked}}


def tiny_network(family: str):
    """A ModelPatcher of the host's class `family` and its own `get_model`, as in TINY, with random weights."""
    import comfy.model_patcher
    import comfy.supported_models

    if not hasattr(comfy.supported_models, family):
        pytest.skip(f"the host has no {family}")
    tiny, kind = TINY[family], getattr(comfy.supported_models, family)
    settings = settings_of(family)
    config = kind({**kind.unet_config, **settings})
    config.unet_config |= settings  # for the class has its say after the caller
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    with _written_in_small(*tiny.written):
        model = config.get_model(tiny.weights(), device=cpu).eval()
    tiny.trim(model.diffusion_model)
    for name, weight in model.named_parameters():
        scales = "norm" in name or name.endswith(("scale", "gamma"))
        torch.nn.init.normal_(
            weight, mean=float(scales and weight.ndim == 1), std=tiny.spread if weight.ndim > 1 else 0.02
        )
    for buffer in model.diffusion_model.buffers():
        if buffer.is_floating_point() and not (buffer.isfinite().all() and buffer.abs().max() < 1e6):
            buffer.copy_(0.1 * torch.randn_like(buffer))
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@contextlib.contextmanager
def _written_in_small(module: str, sizes: dict[int, int]) -> Iterator[None]:
    """The classes of a module build themselves with other sizes than those in their source."""
    with contextlib.ExitStack() as stack:
        for kind in vars(importlib.import_module(module)).values() if module else ():
            if isinstance(kind, type) and kind.__module__ == module:
                stack.enter_context(mock.patch.object(kind, "__init__", _in_small(kind.__init__, sizes)))
        yield


def _in_small(function: Any, sizes: dict[int, int]) -> Any:
    """A function with other whole numbers in its source."""

    def small(code: CodeType) -> CodeType:
        return code.replace(
            co_consts=tuple(
                small(one) if isinstance(one, CodeType) else sizes.get(one, one) if type(one) is int else one
                for one in code.co_consts
            )
        )

    made = FunctionType(small(function.__code__), function.__globals__, closure=function.__closure__)
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made


def conditioning(family: str, seed: int) -> list:
    """What a family's network is asked for: numbers of no meaning, of the shapes that its encoders give."""
    tiny, generator = TINY[family], torch.Generator().manual_seed(seed)
    drawn = lambda *shape: torch.randn(*shape, generator=generator)
    extras = {name: drawn(*one) if isinstance(one, tuple) else one for name, one in tiny.extras.items()}
    return [[drawn(1, tiny.tokens, tiny.width), extras]]


def empty_latent(family: str) -> Any:
    """What is sampled of a family: zeros, of several latents as the host holds them together."""
    shape = TINY[family].latent
    if not isinstance(shape[0], tuple):
        return torch.zeros(shape)
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([torch.zeros(one) for one in shape])


def drawn(host, family: str, model, steps: int) -> torch.Tensor:
    """What the stock KSampler draws with a MODEL of the family; of several latents in one row."""
    samples = host.call(
        "KSampler", model=model, seed=0, steps=steps, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        positive=conditioning(family, 1), negative=conditioning(family, 2),
        latent_image={"samples": empty_latent(family)},
    )[0]["samples"]  # fmt: skip
    return torch.cat([one.flatten() for one in samples.unbind()]) if getattr(samples, "is_nested", False) else samples


class _Asked(Exception):
    pass


def network_class(family: str) -> type:
    """The class of a family's network, which the host's own `get_model` names; nothing is built."""
    import comfy.model_base
    import comfy.supported_models

    kind = getattr(comfy.supported_models, family)
    own, asked = comfy.model_base.BaseModel.__init__, []

    def init(self, model_config, *args, unet_model=comfy.model_base.UNetModel, **kwargs):
        asked.append(unet_model)
        raise _Asked

    comfy.model_base.BaseModel.__init__ = init
    try:
        kind(_AnyNumbers({"in_channels": 4, **kind.unet_config})).get_model(_AnyWeights())
    except _Asked:
        pass
    finally:
        comfy.model_base.BaseModel.__init__ = own
    return asked[0]


class _AnyNumbers(dict):
    """A network's configuration of which no number matters; newer hosts reckon with some."""

    def __missing__(self, key: str) -> int:
        return 64


class _AnyWeights(dict):
    """A file's weights of which only the shapes could matter."""

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(1, 1)
