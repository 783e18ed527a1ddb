"""Real MODELs of the host's own classes, small and with random weights: family and noise are what counts."""

from __future__ import annotations

import torch

from tiny_networks import UNET, tiny_network

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


NETWORKS = ("Flux", "Flux2", "QwenImage", "ZImage", "WAN21_T2V")  # of which the tests of schedules sample


def family_model(family: str):
    """A ModelPatcher of the host's class `family`: with its small network for those in NETWORKS, else with none (a
    schedule asks the configuration alone); KeyError and the like for classes that want files first."""
    import comfy.model_patcher
    import comfy.supported_models

    if family in NETWORKS:
        return tiny_network(family)
    kind = getattr(comfy.supported_models, family)
    config = kind({**kind.unet_config, "disable_unet_model_creation": True})
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, device=cpu), load_device=cpu, offload_device=cpu)
