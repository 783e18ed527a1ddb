"""One More Step: load its network, begin runs from its prediction; signal leak from examples."""

from __future__ import annotations

from ..kernels.one_more_step import NOISE_LEVELS
from ..models.one_more_step import LATENT_SPACES, PREDICTIONS, colour_map
from ._host import one_more_step as host
from ._host.api import ExecutionBlocker, advanced, io, schema, shown_on
from ._host.folders import MODULES, file_names, file_path, state_of

CATEGORY = "attune/one more step"
AUTO, DEFAULT = "auto", "default"
OmsModel = io.Custom("OMS_MODEL")
Leak = io.Custom("ATTUNE_SIGNAL_LEAK")

STRENGTH = (
    "How far the start moves from the sampler's own noise to the corrected one. 0 leaves the model as it is, bit for "
    "bit; above 1 exaggerates the correction."
)  # fmt: skip
LEVEL = (
    "How much noise the start holds. exact: as in training. official: as the authors' code, 0.2 % less. unit: as "
    "without the node, 0.2 % more."
)  # fmt: skip
CFG = "The guidance of this prediction alone. Above 1 it strengthens the colours and needs 'negative'."
DIVERSITY = (
    "The module predicts the mean of a prompt's pictures. This adds how they differ in brightness and colour: 1 is "
    "as much as the examples of the module or of 'signal_leak' differ."
)


class AttuneLoadOneMoreStep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneLoadOneMoreStep", "Attune Load One More Step", CATEGORY,
            "Loads the small network that predicts the brightness and colours of a prompt before sampling.",
            search_aliases=["oms", "one more step", "terminal snr", "dark images"],
            inputs=[
                io.Combo.Input(
                    "oms_name", options=file_names(MODULES), default="attune_demo.safetensors",
                    tooltip="Files in models/one_more_step, then the pack's own. Press R after copying a file there.",
                ),
                io.Combo.Input(
                    "latent_space", options=[AUTO, *LATENT_SPACES], default=AUTO,
                    tooltip="Which VAE the module belongs to. The files of SD and SDXL look the same inside: choose "
                    "it when auto cannot tell.",
                ),
                io.Combo.Input(
                    "weight_dtype", options=[DEFAULT, *host.MODULE_DTYPES], default=DEFAULT,
                    tooltip="The precision of the module's weights. Take fp32 if the default gives values that are "
                    "not numbers (NaN).",
                ),
                io.Combo.Input(
                    "prediction", options=[AUTO, *PREDICTIONS], default=AUTO,
                    tooltip="What the module's network predicts. auto: what its file says, otherwise v, as in the "
                    "published files.",
                ),
                io.Int.Input(
                    "head_dim", default=0, min=0, max=512,
                    tooltip="How many channels an attention head has. 0: what the file says, otherwise a fifth of "
                    "the width, as published.",
                ),
            ],
            outputs=[OmsModel.Output(display_name="oms_model", tooltip="For the One More Step nodes.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, oms_name=None, **others):
        return (*state_of(MODULES, oms_name), *others.values())

    @classmethod
    def execute(
        cls, oms_name, latent_space=AUTO, weight_dtype=DEFAULT, prediction=AUTO, head_dim=0
    ) -> io.NodeOutput:  # fmt: skip
        path = file_path(MODULES, oms_name)
        space, dtype, says = ("" if value in (AUTO, DEFAULT) else value
                              for value in (latent_space, weight_dtype, prediction))  # fmt: skip
        return io.NodeOutput(host.load_module(path, space, dtype, says, head_dim))


class AttuneOneMoreStep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneOneMoreStep", "Attune One More Step", CATEGORY,
            "Starts every run from the prompt's own brightness and colours, so that SD 1.x, SD 2.x and SDXL draw "
            "true darks and brights.",
            search_aliases=["oms", "brightness", "terminal snr", "dark images", "zero snr", "offset noise"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled, with its LoRAs."),
                OmsModel.Input(
                    "oms_model",
                    tooltip="The module from Attune Load One More Step. It must be for this model's latents.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt for this step, encoded with the text encoder that the module was trained "
                    "with. If it differs from the sampler's prompt, it decides colour and brightness, and the "
                    "sampler's prompt decides the content.",
                ),
                io.Float.Input("cfg", default=1.0, min=0.0, max=20.0, step=0.1, tooltip=CFG),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.05, tooltip=STRENGTH),
                *advanced(
                    io.Combo.Input(
                        "solver", options=list(host.SEEN_NOISE), default="ddpm",
                        tooltip="ddpm: the module sees noise of its own. ddim: it sees the sampler's noise. The "
                        "pictures hardly differ.",
                    ),
                    io.Combo.Input("noise_level", options=list(NOISE_LEVELS), default="exact", tooltip=LEVEL),
                ),
                io.Float.Input("diversity", default=0.0, min=0.0, max=2.0, step=0.05, tooltip=DIVERSITY),
                *advanced(
                    io.Boolean.Input(
                        "share_noise", default=False,
                        tooltip="Makes one prediction for the whole batch. Use it for the frames of a video.",
                    )
                ),
                io.Conditioning.Input(
                    "negative", optional=True,
                    tooltip="Needed when cfg is not 1. The authors always use the empty prompt here, not the "
                    "sampler's negative prompt.",
                ),
                Leak.Input(
                    "signal_leak", optional=True,
                    tooltip="The variety from Attune Signal Leak, fitted to examples of this kind of prompt. It "
                    "replaces the module's own.",
                ),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="For the output 'prediction' alone: the latent that the sampler gets, which tells size and "
                    "batch.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler or guider, or for Attune Noise."),
                io.Latent.Output(
                    display_name="prediction",
                    tooltip="With 'latent' connected: what the module expects, blurred. Decode it to look at it.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, oms_model, positive, cfg=1.0, strength=1.0, solver="ddpm", noise_level="exact", diversity=0.0,
        share_noise=False, negative=None, signal_leak=None, latent=None,
    ) -> io.NodeOutput:  # fmt: skip
        start = host.FirstState(
            oms_model, positive, negative, cfg, strength, solver, noise_level, signal_leak, diversity, share_noise
        )
        patched = host.with_first_state(model, start)
        if latent is None:
            missing = (
                "Attune One More Step: 'prediction' is used, but 'latent' is not connected. Connect the sampler's."
            )
            return io.NodeOutput(patched, ExecutionBlocker(missing))
        found = host.predicted_latent(model, host.FirstState(oms_model, positive, negative, cfg), latent)
        return io.NodeOutput(patched, found, ui=cls._colours(model, found))

    @classmethod
    def _colours(cls, model, found: dict):
        latents = model.get_model_object("latent_format")
        if not latents.latent_rgb_factors:
            return None
        x0 = latents.process_in(found["samples"])
        return shown_on(cls, colour_map(x0, latents.latent_rgb_factors, latents.latent_rgb_factors_bias))


class AttuneSignalLeak(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneSignalLeak", "Attune Signal Leak", CATEGORY,
            "Starts every run from coarse brightness and colours, drawn at random from those of example pictures. "
            "It needs no network.",
            search_aliases=["brightness", "offset noise", "style", "diversity"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled."),
                io.Latent.Input(
                    "examples", tooltip="A batch of encoded pictures that look as results should, 20 or more."
                ),
                io.Int.Input(
                    "frequencies", default=3, min=1, max=8,
                    tooltip="How many waves in each direction the mean and covariance are taken from; 1 takes the "
                    "mean colour alone.",
                ),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.05, tooltip=STRENGTH),
                io.Float.Input(
                    "diversity", default=1.0, min=0.0, max=2.0, step=0.05,
                    tooltip="How much of the examples' variety to draw; 0 starts every picture from their mean.",
                ),
                *advanced(io.Combo.Input("noise_level", options=list(NOISE_LEVELS), default="exact", tooltip=LEVEL)),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler or guider."),
                Leak.Output(
                    display_name="signal_leak",
                    tooltip="For Attune One More Step, which takes its own prediction as the mean and this variety "
                    "around it.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, examples, frequencies=3, strength=1.0, diversity=1.0, noise_level="exact"
    ) -> io.NodeOutput:  # fmt: skip
        leak = host.fitted_leak(model, examples, frequencies)
        start = host.FirstState(None, None, None, strength=strength, level=noise_level, leak=leak, diversity=diversity)
        return io.NodeOutput(host.with_first_state(model, start), leak)


NODES = [AttuneLoadOneMoreStep, AttuneOneMoreStep, AttuneSignalLeak]
