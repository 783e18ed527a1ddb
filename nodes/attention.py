"""A faster attention on the steps that tolerate it: by noise level, per MODEL, with levels found by a fit."""

from __future__ import annotations

import logging

from ..models.calibration import Calibration
from ._draw.axes import to_image
from ._draw.plots import draw_errors
from ._host.api import ExecutionBlocker, Profile, advanced, io, more_prompts, schema, shown_on
from ._host.attention import FastBetween, fit_attention_profile, kernels, levels_of_profile, with_attention
from ._host.folders import keep_fit
from ._host.live import show_live
from ._host.solvers import sampler_names, scheduler_names

LOG = logging.getLogger(__name__)
CATEGORY = "attune/speed"
STOCK_ATTENTION = "stock"


class AttuneAttentionBySigma(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneAttentionBySigma", "Attune Attention by Sigma", CATEGORY,
            "Uses a faster attention between two noise levels, on this model alone; above and below it stays exact.",
            search_aliases=["sage attention", "flash attention", "xformers", "attention override", "FPSAttention"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled."),
                io.Combo.Input(
                    "kernel", options=[STOCK_ATTENTION, *kernels()], default=STOCK_ATTENTION,
                    tooltip="The attention function, of those that this ComfyUI has. sage, flash and xformers are "
                    "listed if they are installed and switched on. stock: the model as it is.",
                ),
                io.Float.Input(
                    "highest_sigma", default=5.0, min=0.0, max=10000.0, step=0.001,
                    tooltip="Above this level attention is exact. Attune Fit Attention finds both levels.",
                ),
                io.Float.Input(
                    "lowest_sigma", default=0.5, min=0.0, max=10000.0, step=0.001,
                    tooltip="Below this level attention is exact. Flow models have levels from 0 to 1.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For any sampler; other models stay as they are.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, kernel=STOCK_ATTENTION, highest_sigma=5.0, lowest_sigma=0.5) -> io.NodeOutput:
        if kernel == STOCK_ATTENTION:
            return io.NodeOutput(model)
        if highest_sigma < lowest_sigma:
            raise ValueError(
                f"'highest_sigma' is {highest_sigma:g} and 'lowest_sigma' is {lowest_sigma:g}: no level lies between "
                "them. Exchange them."
            )
        return io.NodeOutput(with_attention(model, FastBetween(kernel, highest_sigma, lowest_sigma)))


class AttuneFitAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneFitAttention", "Attune Fit Attention", CATEGORY,
            "Finds on your model between which noise levels a faster attention keeps the picture.",
            search_aliases=["calibrate", "sage attention", "flash attention", "attention by sigma"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to measure, as it will be sampled."),
                io.Conditioning.Input("positive", tooltip="A typical prompt."),
                io.Conditioning.Input("negative", tooltip="The usual negative prompt."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the usual size; several pictures are measured together.",
                ),
                io.Combo.Input(
                    "kernel", options=kernels() or [STOCK_ATTENTION],
                    tooltip="The faster attention, of those that this ComfyUI has.",
                ),
                io.Float.Input(
                    "wanted", default=45.0, min=10.0, max=120.0, step=0.5,
                    tooltip="How near the pictures must stay to the run with exact attention, in dB. At 45 dB "
                    "nobody sees a difference.",
                ),
                io.Int.Input("steps", default=20, min=8, max=200, tooltip="Steps of the run."),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance of the run."
                ),
                *advanced(
                    io.Combo.Input(
                        "sampler_name", options=sampler_names(), default="euler", tooltip="The solver of the run."
                    ),
                    io.Combo.Input(
                        "scheduler", options=scheduler_names(), default="normal", tooltip="The schedule of the run."
                    ),
                    io.Int.Input(
                        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                        tooltip="The seed of the picture that is measured.",
                    ),
                ),
                *more_prompts(
                    "Another typical prompt. With two or more prompts, the levels are chosen so that nine in ten "
                    "other prompts should keep 'wanted'. With one prompt, only that one is measured."
                ),
            ],
            outputs=[
                Profile.Output(display_name="profile", tooltip="The two levels, for Attune Apply Profile."),
                io.Image.Output(display_name="plot", tooltip="How much each step's error changes the end of the run."),
                io.String.Output(display_name="report", tooltip="The levels, the share of fast steps, and the dB."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, kernel, wanted=45.0, steps=20, cfg=7.0, sampler_name="euler",
        scheduler="normal", seed=0, **more_positives,
    ) -> io.NodeOutput:  # fmt: skip
        profile, errors = fit_attention_profile(
            model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, kernel, wanted,
            draw_errors, **more_positives,
        )  # fmt: skip
        exact = None if profile is None or profile.key_steps is None else profile.key_steps.points[0].keys
        drawn = draw_errors(errors, exact)
        show_live(drawn)
        plot = to_image(drawn)
        report = fit_report(profile, kernel, wanted, steps)
        LOG.info("Attune Fit Attention: %s", report.replace("\n", " "))
        if profile is None:
            return io.NodeOutput(ExecutionBlocker(None), plot, report, ui=shown_on(cls, plot))
        return io.NodeOutput(profile, plot, f"{report}\n{keep_fit(profile)}", ui=shown_on(cls, plot))


def fit_report(profile: Calibration | None, kernel: str, wanted: float, steps: int) -> str:
    if profile is None:
        return f"Not one of {steps} steps tolerates '{kernel}' at {wanted:g} dB: lower 'wanted', or keep the exact one."
    assert profile.key_steps is not None
    (point,), levels = profile.key_steps.points, levels_of_profile(profile)
    return (
        f"{steps - len(point.keys)} of {steps} steps tolerate '{kernel}' at {point.psnr:.1f} dB: highest_sigma "
        f"{levels.highest:.4g}, lowest_sigma {levels.lowest:.4g}. {kept_by(profile.metrics['prompts'])}"
    )


def kept_by(prompts: int) -> str:
    """Which prompts keep the dB of a fit."""
    if prompts > 1:
        return f"Judged by {prompts} prompts, nine in ten others should keep this."
    return "Other prompts may keep 10 dB less: connect 'positive_2' to 'positive_4' to fit for them."


NODES = [AttuneAttentionBySigma, AttuneFitAttention]
