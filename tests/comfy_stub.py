"""Real MODELs of the host's own classes, small and with random weights: family and noise are what counts."""

from __future__ import annotations

import torch

UNET = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "transformer_depth": [1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1],
    "num_heads": 2, "num_head_channels": -1, "use_spatial_transformer": True, "context_dim": 16,
    "use_linear_in_transformer": False, "adm_in_channels": None, "num_classes": None, "use_temporal_attention": False,
    "legacy": False, "image_size": 32,
}  # fmt: skip
MMDIT = {
    "in_channels": 16,
    "depth": 1,
    "patch_size": 2,
    "adm_in_channels": 16,
    "pos_embed_max_size": 8,
    "num_patches": 64,
}


def tiny_model(family: str):
    """A ModelPatcher whose configuration class is the host's `family`."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, family)({**(MMDIT if family == "SD3" else UNET)})
    config.unet_config.update({**(MMDIT if family == "SD3" else UNET), "dtype": torch.float32})
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    if family == "SVD_img2vid":  # its own class wants conditions that a schedule does not need
        model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.V_PREDICTION_EDM, device=cpu)
    elif family == "SDXL":
        model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS, device=cpu)
    else:
        model = config.get_model({}, device=cpu)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


NETWORKS = {  # host's family -> its network in small
    "Flux": {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": 16, "context_in_dim": 16, "hidden_size": 48,
        "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 8, 8], "theta": 10000,
        "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    },
    "Flux2": {
        "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 16, "hidden_size": 64,
        "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 8, 8, 8], "theta": 2000,
        "patch_size": 1, "qkv_bias": False, "guidance_embed": True, "global_modulation": True, "mlp_silu_act": True,
        "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
    },
    "QwenImage": {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 1, "attention_head_dim": 24,
        "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (8, 8, 8),
    },
    "ZImage": {
        "patch_size": 2, "in_channels": 16, "dim": 256, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2,
        "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 16,
        "axes_dims": [32, 48, 48], "axes_lens": [300, 64, 64], "rope_theta": 256.0, "ffn_dim_multiplier": 0.5,
        "z_image_modulation": True, "time_scale": 1000.0,
    },
    "WAN21_T2V": {
        "in_dim": 16, "out_dim": 16, "dim": 48, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16, "num_heads": 2,
        "num_layers": 1, "patch_size": (1, 2, 2), "text_len": 16, "window_size": (-1, -1), "qk_norm": True,
        "cross_attn_norm": True, "eps": 1e-6,
    },
}  # fmt: skip


def family_model(family: str, **network):
    """A ModelPatcher of the host's class `family`, with a small random network of it, or with none (the schedule asks
    the configuration alone) where NETWORKS has none; KeyError and the like for classes that want files first."""
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams

    kind = getattr(comfy.supported_models, family)
    own = NETWORKS.get(family, {"disable_unet_model_creation": True})
    if "axes_dim" in own and "txt_ids_dims" in FluxParams.__dataclass_fields__:  # newer hosts
        own = {**own, "txt_ids_dims": [3] if family == "Flux2" else []}
    config = kind({**kind.unet_config, **own, **network})
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    model = config.get_model({}, device=cpu).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.05)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
