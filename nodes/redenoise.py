"""Golden noise without weights: re-denoise the noise, once or while sampling."""

from __future__ import annotations

from ._host.api import advanced, io, schema
from ._host.redenoise import Redenoise, zigzag_sampler
from ._host.start import with_start

CATEGORY = "attune/noise"


class AttuneRedenoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneRedenoise", "Attune Redenoise", CATEGORY,
            "Fits the starting noise to the prompt without a trained network, by one step down with strong guidance "
            "and one step back with weak guidance.",
            search_aliases=["golden noise", "re-denoise", "zigzag", "Z-Sampling", "noise refinement"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled, flow models (SD3, Flux) too."),
                io.Float.Input(
                    "strong_cfg", default=0.0, min=0.0, max=100.0, step=0.1,
                    tooltip="Guidance on the way down. 0: the sampler's own. For Flux, the guidance that the network "
                    "is told.",
                ),
                io.Float.Input(
                    "weak_cfg", default=1.0, min=0.1, max=100.0, step=0.1,
                    tooltip="Guidance on the way back. The noise takes up the difference between strong and weak "
                    "guidance. 1 is the published value.",
                ),
                io.Int.Input(
                    "rounds", default=1, min=1, max=10,
                    tooltip="How many zigzags follow each other. Each takes 2 evaluations of the model.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.05,
                    tooltip="How much of the change before the run is used. 0 leaves the model as it is, bit for bit.",
                ),
                *advanced(
                    io.Combo.Input(
                        "mode", options=["two-step", "direct"], default="two-step",
                        tooltip="two-step: down and back, as published. direct: an approximation of the same, with "
                        "both evaluations at the first level.",
                    ),
                    io.Float.Input(
                        "depth", default=0.39, min=0.0, max=0.95, step=0.01,
                        tooltip="How far the noise goes down, as a share of the first noise level; the published "
                        "data used 0.39. 0: down to the run's second level, which depends on its schedule.",
                    ),
                    io.Combo.Input(
                        "evaluate_at", options=["next level", "first level"], default="next level",
                        tooltip="The level at which the model is asked on the way back. first level: as in the "
                        "authors' code; not for flow models.",
                    ),
                    io.Boolean.Input(
                        "renormalize", default=False, tooltip="Keep each sample's noise as large as it was drawn."
                    ),
                    io.Combo.Input(
                        "partial_denoise", options=["skip", "apply"], default="skip",
                        tooltip="What happens in runs that start from a picture (img2img, a second pass). skip: "
                        "their noise stays as it is.",
                    ),
                ),
                io.Int.Input(
                    "zigzag_steps", default=0, min=0, max=10000,
                    tooltip="0: one zigzag before the run. A higher number: a zigzag before each of that many first "
                    "steps (Z-Sampling). The output 'sampler' then makes the zigzags, the output 'model' is the "
                    "MODEL as it came, and 'strength' and the advanced inputs have no effect.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler, or for Attune Noise."),
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="Euler with the zigzags of 'zigzag_steps', for SamplerCustom or SamplerCustomAdvanced; "
                    "plain euler at 0.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, strong_cfg=0.0, weak_cfg=1.0, rounds=1, strength=1.0, zigzag_steps=0, mode="two-step", depth=0.39,
        evaluate_at="next level", renormalize=False, partial_denoise="skip",
    ) -> io.NodeOutput:  # fmt: skip
        if not zigzag_steps:
            partial = partial_denoise == "apply"
            start = Redenoise(strong_cfg, weak_cfg, rounds, strength, mode, depth, evaluate_at, renormalize, partial)
            model = with_start(model, start)
        return io.NodeOutput(model, zigzag_sampler(zigzag_steps, strong_cfg, weak_cfg, rounds))


NODES = [AttuneRedenoise]
