"""Golden noise without weights: re-denoise the noise, zigzag while sampling, or pick the most stable of some draws."""

from __future__ import annotations

import logging

from ._host.api import io, schema
from ._host.redenoise import Redenoise, select_noise, with_redenoise, zigzag_sampler
from ._host.session import empty_latent

LOG = logging.getLogger(__name__)
CATEGORY = "attune/noise"
STRONG_TIP = "Guidance on the way down. 0: the sampler's own. For Flux, the guidance that the network is told."
WEAK_TIP = "Guidance on the way back. The difference to the strong one is what the noise takes up; 1 is the published."


def _guidance(weak: float) -> list:
    return [
        io.Float.Input("strong_cfg", default=0.0, min=0.0, max=100.0, step=0.1, tooltip=STRONG_TIP),
        io.Float.Input("weak_cfg", default=weak, min=0.1, max=100.0, step=0.1, tooltip=WEAK_TIP),
        io.Int.Input("rounds", default=1, min=1, max=10, tooltip="Zigzags in a row; each costs 2 calls of the model."),
    ]


class AttuneRedenoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="AttuneRedenoise",
            display_name="Attune Redenoise",
            category=CATEGORY,
            description="Golden noise without weights: one guided step down, one weakly guided step back.",
            search_aliases=["golden noise", "re-denoise", "zigzag", "noise refinement"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled, flow models (SD3, Flux) too."),
                *_guidance(1.0),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.05,
                    tooltip="How much of the change: 0 leaves the model as it is, bit for bit.",
                ),
                io.Combo.Input(
                    "mode", options=["two-step", "direct"], default="two-step",
                    tooltip="two-step: down and back, as published. direct: the same to first order, both calls at "
                    "the start.",
                ),
                io.Float.Input(
                    "depth", default=0.39, min=0.0, max=0.95, step=0.01,
                    tooltip="How far down, as a part of the first noise level: 0.39 is that of the published data. 0: "
                    "to the run's second level, which depends on its schedule.",
                ),
                io.Combo.Input(
                    "evaluate_at", options=["next level", "first level"], default="next level",
                    tooltip="Which level the model is asked at on the way back. first level: as the authors' code has "
                    "it, not for flow models.",
                ),
                io.Boolean.Input(
                    "renormalize", default=False, tooltip="Keep each sample's noise as large as it was drawn."
                ),
                io.Combo.Input(
                    "partial_denoise", options=["skip", "apply"], default="skip",
                    tooltip="Runs that start from a picture (img2img, a second pass): skip keeps their noise.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For any sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, strong_cfg=0.0, weak_cfg=1.0, rounds=1, strength=1.0, mode="two-step", depth=0.39,
        evaluate_at="next level", renormalize=False, partial_denoise="skip",
    ) -> io.NodeOutput:  # fmt: skip
        settings = Redenoise(strong_cfg, weak_cfg, rounds, strength, mode, depth, evaluate_at, renormalize)
        return io.NodeOutput(with_redenoise(model, settings, partial_denoise == "apply"))


class AttuneZigzagSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="AttuneZigzagSampler",
            display_name="Attune Zigzag Sampler",
            category=CATEGORY,
            description="Euler's method that goes back over its first steps with weak guidance (Z-Sampling).",
            search_aliases=["Z-Sampling", "zigzag diffusion", "sampler"],
            inputs=[
                io.Int.Input(
                    "zigzag_steps", default=5, min=0, max=10000,
                    tooltip="The first so many steps cost three calls of the model instead of one. 0 is plain euler.",
                ),
                *_guidance(1.0),
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom or SamplerCustomAdvanced.")
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, zigzag_steps=5, strong_cfg=0.0, weak_cfg=1.0, rounds=1) -> io.NodeOutput:
        return io.NodeOutput(zigzag_sampler(zigzag_steps, strong_cfg, weak_cfg, rounds))


class AttuneSelectNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="AttuneSelectNoise",
            display_name="Attune Select Noise",
            category=CATEGORY,
            description="Of some draws of noise, for each picture the one that best survives the way down and back.",
            search_aliases=["best of n", "seed selection", "golden noise", "inversion stability"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What the picture should not show."),
                io.Latent.Input("latent_image", tooltip="The latent that the sampler gets; its size and batch count."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Of the first draw, the noise of RandomNoise; the others are the next seeds.",
                ),
                io.Int.Input(
                    "candidates", default=4, min=1, max=64, tooltip="How many draws. 1 is the noise of the seed itself."
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1,
                    tooltip="Guidance of the test. 1 is cheapest; with more, few steps do not come back.",
                ),
                io.Int.Input(
                    "steps", default=4, min=1, max=100,
                    tooltip="Steps down, and as many back; each draw costs 2 x steps calls of the model.",
                ),
            ],
            outputs=[
                io.Noise.Output(display_name="noise", tooltip="For SamplerCustomAdvanced."),
                io.String.Output(display_name="scores", tooltip="Cosine of each draw and what came back, by seed."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, candidates=4, cfg=1.0, steps=4) -> io.NodeOutput:
        latent = empty_latent(model, latent_image)
        noise, scores = select_noise(model, positive, negative, cfg, latent, seed, candidates, steps)
        best = scores.argmax(dim=0)
        lines = [
            f"picture {i + 1}: seed {seed + int(best[i])} of "
            + ", ".join(f"{seed + j} ({float(score):.4f})" for j, score in enumerate(scores[:, i]))
            for i in range(len(best))
        ]
        LOG.info("Attune Select Noise: %d x %d calls of the model; %s", candidates, 2 * steps, "; ".join(lines))
        return io.NodeOutput(noise, "\n".join(lines))


NODES = [AttuneRedenoise, AttuneZigzagSampler, AttuneSelectNoise]
