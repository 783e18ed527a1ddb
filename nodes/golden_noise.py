"""Golden noise from an NPNet, on a MODEL: for the stock KSampler and every other sampler."""

from __future__ import annotations

from ._host.api import advanced, io, schema
from ._host.folders import NPNETS, file_names, file_path, state_of
from ._host.golden_noise import GoldenNoise, HostNPNet, NPNetType
from ._host.start import with_start
from ._plan.golden_noise import LONG_PROMPTS, OTHER_SIZES, GoldenSettings

CATEGORY = "attune/noise"
SVD = ("cpu", "model device")


class AttuneLoadNPNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneLoadNPNet", "Attune Load NPNet", CATEGORY,
            "Loads a noise prompt network (NPNet), which fits the starting noise to the prompt: a published file, "
            "or one that you trained.",
            search_aliases=["golden noise", "NPNet", "noise prompt network", "load npnet"],
            inputs=[
                io.Combo.Input(
                    "npnet_name", options=file_names(NPNETS),
                    tooltip="Files in models/npnet (.safetensors, .pth), then the demo model's. Press R after copying "
                    "one there.",
                )
            ],
            outputs=[
                NPNetType.Output(display_name="npnet", tooltip="For Attune Golden Noise."),
                io.String.Output(display_name="info", tooltip="What the network was made for, as its file says."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, npnet_name=None):
        return state_of(NPNETS, npnet_name)

    @classmethod
    def execute(cls, npnet_name) -> io.NodeOutput:
        npnet = HostNPNet.load(file_path(NPNETS, npnet_name))
        return io.NodeOutput(npnet, npnet.file.describe())


class AttuneGoldenNoiseModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneGoldenNoiseModel", "Attune Golden Noise", CATEGORY,
            "Gives a MODEL whose samplers, the stock KSampler too, start from noise that a network has fitted to "
            "the prompt.",
            search_aliases=["golden noise", "NPNet", "noise prompt", "KSampler"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled."),
                NPNetType.Input(
                    "npnet",
                    tooltip="The network from Attune Load NPNet or Attune Train NPNet. It must be made for this kind "
                    "of model.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.05,
                    tooltip="How much of the network's correction is used. 0 is the plain noise, bit for bit; 1 is "
                    "what the network was trained for.",
                ),
                *advanced(
                    io.Combo.Input(
                        "other_sizes", options=list(OTHER_SIZES), default="windows",
                        tooltip="For latents of another size than the network's. windows: its own size, side by side, "
                        "blended. refuse: stop with an error.",
                    ),
                    io.Combo.Input(
                        "long_prompt", options=list(LONG_PROMPTS), default="first part",
                        tooltip="The network reads as many tokens as one part of a prompt has (77 for SDXL). first "
                        "part: leave the rest out. average: the mean of the noises for all parts.",
                    ),
                    io.Combo.Input(
                        "svd_on", options=list(SVD), default=SVD[0],
                        tooltip="Where singular values are computed. cpu: the same picture on every machine. model "
                        "device: faster for large latents.",
                    ),
                    io.Combo.Input(
                        "partial_denoise", options=["skip", "apply"], default="skip",
                        tooltip="What happens in runs that start from a picture (img2img, a second pass). skip: "
                        "their noise stays as it is.",
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For any sampler, or for Attune Noise.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, npnet, strength=1.0, other_sizes="windows", long_prompt="first part", svd_on=SVD[0],
        partial_denoise="skip",
    ) -> io.NodeOutput:  # fmt: skip
        settings = GoldenSettings(strength, other_sizes, long_prompt, svd_on == SVD[0])
        return io.NodeOutput(with_start(model, GoldenNoise(npnet, settings, partial_denoise == "apply")))


NODES = [AttuneLoadNPNet, AttuneGoldenNoiseModel]
