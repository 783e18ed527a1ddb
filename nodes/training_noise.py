"""Noise and noise levels for a trainer: densities of timesteps, immiscible noise."""

from __future__ import annotations

import logging

from ..kernels.training_noise import STEEPEST_MODE, TimestepDensity, stages
from ._draw.axes import to_image
from ._draw.plots import draw_density
from ._host.api import advanced, io, say_on_node, schema, shown_on
from ._host.training_noise import AS_DRAWN, PAIRINGS, TrainingNoise, levels_of, with_training_noise
from ._plan.training_noise import DENSITIES, training_report

LOG = logging.getLogger(__name__)
CATEGORY = "attune/training"


class AttuneTrainingNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneTrainingNoise", "Attune Training Noise", CATEGORY,
            "Decides how often Train LoRA draws which noise levels, and which noise goes with which picture.",
            search_aliases=[
                "timestep sampling", "logit-normal", "min SNR", "immiscible diffusion", "curriculum", "loss weighting",
                "Train LoRA",
            ],
            is_experimental=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that Train LoRA will train, behind its ModelSampling nodes."
                ),
                io.Combo.Input(
                    "timesteps", options=DENSITIES, default="stock",
                    tooltip="stock: evenly over the training time. logit-normal, mode: more of the middle. flat "
                    "prediction: the network's own error counts alike at every level; on flow models that is the "
                    "error of the velocity. min-SNR: levels count by their signal-to-noise ratio, up to 'gamma'. "
                    "clusters: groups of similar noise are drawn equally often. curriculum: noisy levels come first.",
                ),
                io.Combo.Input(
                    "noise", options=PAIRINGS, default=AS_DRAWN,
                    tooltip="as drawn: stock. immiscible batch: each noise of the batch goes with the picture that "
                    "it is nearest to. nearest of several: the nearest of several draws is taken, also for a batch "
                    "of 1.",
                ),
                io.Float.Input(
                    "highest_sigma", default=0.0, min=0.0, max=10000.0, step=0.001,
                    tooltip="No level above this one is drawn. 0 means the model's own highest level. Take 0.875 or "
                    "0.9 for Wan's low noise expert.",
                ),
                io.Float.Input(
                    "lowest_sigma", default=0.0, min=0.0, max=10000.0, step=0.001,
                    tooltip="No level below this one is drawn. 0 means the model's own lowest level. Take 0.875 or "
                    "0.9 for Wan's high noise expert.",
                ),
                io.Int.Input(
                    "planned_draws", default=1000, min=1, max=100000000,
                    tooltip="For curriculum: how many draws the whole training makes, which is Train LoRA's steps x "
                    "batch size x gradient accumulation. From half of them on all levels are drawn.",
                ),
                *advanced(
                    io.Int.Input(
                        "draws", default=4, min=1, max=64,
                        tooltip="For nearest of several: how many draws. 4 as published.",
                    ),
                    io.Float.Input(
                        "mean", default=0.0, min=-6.0, max=6.0, step=0.05,
                        tooltip="For logit-normal: above 0 draws more noisy levels, below 0 more clean ones.",
                    ),
                    io.Float.Input(
                        "spread", default=1.0, min=0.05, max=5.0, step=0.05,
                        tooltip="For logit-normal: less keeps nearer to the middle.",
                    ),
                    io.Float.Input(
                        "scale", default=1.29, min=-1.0, max=1.75, step=0.01,
                        tooltip="For mode: 0 is stock, more draws the middle more often; 1.29 as published.",
                    ),
                    io.Float.Input(
                        "gamma", default=5.0, min=0.01, max=1000.0, step=0.1,
                        tooltip="For min-SNR: the signal-to-noise ratio from which on all levels weigh alike.",
                    ),
                    io.Int.Input(
                        "clusters", default=5, min=1, max=50,
                        tooltip="For clusters and curriculum: how many groups of noise levels.",
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For Train LoRA. Runs that sample with it do not change.",
                ),
                io.Image.Output(display_name="plot", tooltip="How often each noise level is drawn."),
                io.String.Output(display_name="report", tooltip="What will be drawn, in numbers."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, timesteps="stock", noise=AS_DRAWN, highest_sigma=0.0, lowest_sigma=0.0, planned_draws=1000, draws=4,
        mean=0.0, spread=1.0, scale=1.29, gamma=5.0, clusters=5,
    ) -> io.NodeOutput:  # fmt: skip
        density = TimestepDensity(
            timesteps, mean, spread, min(scale, STEEPEST_MODE), gamma, clusters, planned_draws, highest_sigma,
            lowest_sigma,
        )  # fmt: skip
        levels = levels_of(model.get_model_object("model_sampling"))
        found = stages(density, levels)
        choice = TrainingNoise(density, noise, draws)
        report = training_report(density, levels, found, noise, draws)
        LOG.info("Attune Training Noise: %s", report.replace("\n", " "))
        say_on_node(cls, report)
        plot = to_image(draw_density(levels, found, timesteps))
        return io.NodeOutput(with_training_noise(model, choice), plot, report, ui=shown_on(cls, plot))


NODES = [AttuneTrainingNoise]
