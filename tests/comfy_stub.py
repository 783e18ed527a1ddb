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
