"""Inputs of a network from your own runs, for quantisers outside of ComfyUI."""

from __future__ import annotations

import logging

from ..models.calibration_set import samples_in
from ._host.api import advanced, io, say_on_node, schema, text_on
from ._host.calibration_set import (
    EMBEDDINGS,
    NO_CONDITIONING,
    NORMALLY,
    UNIFORMLY,
    Wanted,
    collecting,
    made_of,
    set_folder,
)

LOG = logging.getLogger(__name__)
CATEGORY = "attune/precision"


class AttuneCalibrationSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneCalibrationSet", "Attune Calibration Set", CATEGORY,
            "Records what goes into the network during your runs, as calibration data for quantisers.",
            search_aliases=["quantization", "calibration data", "Q-Diffusion", "PTQ4DM", "GPTQ"],
            is_experimental=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled. Its pictures do not change."),
                io.String.Input(
                    "name", default="my_model", tooltip="The folder in output/attune_calibration. More runs add to it."
                ),
                io.Int.Input(
                    "samples", default=512, min=1, max=1000000,
                    tooltip="How many samples are kept in all. When they are there, further runs add none.",
                ),
                io.Int.Input("per_run", default=8, min=1, max=1000, tooltip="How many steps of each run are kept."),
                io.Combo.Input(
                    "spacing", options=[UNIFORMLY, NORMALLY], default=UNIFORMLY,
                    tooltip="uniform: evenly spread steps (Q-Diffusion). normal: more around 'centre' (PTQ4DM).",
                ),
                io.Combo.Input(
                    "conditioning", options=[NO_CONDITIONING, EMBEDDINGS], default=NO_CONDITIONING,
                    tooltip="none: the latent x and its sigma alone. embeddings: also what the text encoder made of "
                    "the prompts; a prompt can be guessed from that.",
                ),
                *advanced(
                    io.Float.Input(
                        "centre", default=0.4, min=0.0, max=1.0, step=0.01,
                        tooltip="For normal: the middle, as a part of the training time; 0 is without noise.",
                    ),
                    io.Float.Input(
                        "spread", default=0.5, min=0.01, max=5.0, step=0.01,
                        tooltip="For normal: the standard deviation, as a part of the training time.",
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler."),
                io.String.Output(display_name="report", tooltip="Where the samples are, and how many there were."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, name="my_model", samples=512, per_run=8, spacing=UNIFORMLY, conditioning=NO_CONDITIONING,
        centre=0.4, spread=0.5,
    ) -> io.NodeOutput:  # fmt: skip
        folder, made = set_folder(name), made_of(model, spacing, conditioning)
        report = f"{samples_in(folder, made)} of {samples} samples in {folder}."
        LOG.info("Attune Calibration Set: %s", report)
        say_on_node(cls, report)
        wanted = Wanted(folder, made, samples, per_run, spacing, centre, spread, conditioning, text_on(cls))
        return io.NodeOutput(collecting(model, wanted), report)


NODES = [AttuneCalibrationSet]
