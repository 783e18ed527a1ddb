"""Train a module of One More Step on latents and captions of your own."""

from __future__ import annotations

import logging

from ..models.train_one_more_step import MODULE_SIZES
from ._host.api import advanced, io, schema
from ._host.train_one_more_step import Course, given_examples, read_examples, train

LOG = logging.getLogger(__name__)
SMALL = list(MODULE_SIZES)[1]


class AttuneTrainOneMoreStep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneTrainOneMoreStep", "Attune Train One More Step", "attune/one more step",
            "Trains a module for your model's latents and your pictures, with any text encoder.",
            search_aliases=["train oms", "one more step training"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model whose kind of latents the module is for. The model itself is neither trained "
                    "nor run.",
                ),
                io.Clip.Input("clip", tooltip="The text encoder for the captions, and later for the module's prompts."),
                io.String.Input(
                    "folder", default="latents",
                    tooltip="A folder in ComfyUI's input or output with latents from SaveLatent and captions as .txt "
                    "files of the same name.",
                ),
                io.String.Input(
                    "name", default="my_module",
                    tooltip="The name of the file in models/one_more_step. A finished file is never replaced: the "
                    "next one gets a number.",
                ),
                io.Combo.Input(
                    "size", options=list(MODULE_SIZES), default=SMALL,
                    tooltip="The size of the network. Even the largest is small.",
                ),
                io.Int.Input(
                    "steps", default=5000, min=1, max=1000000,
                    tooltip="How many training steps: 2,000 to 20,000. A training that was stopped goes on when you "
                    "run the node again.",
                ),
                *advanced(
                    io.Int.Input(
                        "batch_size", default=16, min=1, max=4096,
                        tooltip="How many pictures a training step sees: 16 or more; 64 is better.",
                    ),
                    io.Float.Input(
                        "learning_rate", default=0.0, min=0.0, max=0.1, step=0.00001, round=False,
                        tooltip="How fast the network learns. 0 takes the rate of its size: 0.001 for tiny, 0.0003 "
                        "for small, 0.0001 as published.",
                    ),
                    io.Float.Input(
                        "empty_prompts", default=0.1, min=0.0, max=1.0, step=0.01,
                        tooltip="The share of captions that are left out in training. A cfg other than 1 needs some.",
                    ),
                    io.Int.Input(
                        "seed", default=0, min=0, max=2**31 - 1, control_after_generate=False,
                        tooltip="The same seed on the same machine trains the same module.",
                    ),
                ),
                io.String.Input(
                    "captions", default="", multiline=True,
                    tooltip="The captions of 'latents': one line for each of them, or one line for all. Without "
                    "'latents' this text is not used.",
                ),
                io.Latent.Input(
                    "latents", optional=True, tooltip="Encoded pictures in place of the folder, for a small training."
                ),
            ],
            outputs=[
                io.Custom("OMS_MODEL").Output(
                    display_name="oms_model", tooltip="The trained module, loaded from its file."
                ),
                io.String.Output(display_name="report", tooltip="The file, its loss, and the loss without captions."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, clip, folder="latents", name="my_module", size=SMALL, steps=5000, captions="", batch_size=16,
        learning_rate=0.0, empty_prompts=0.1, seed=0, latents=None,
    ) -> io.NodeOutput:  # fmt: skip
        examples = read_examples(folder, model) if latents is None else given_examples(latents, captions, model)
        course = Course(size, steps, batch_size, learning_rate, empty_prompts, seed)
        module, report = train(model, clip, examples, name, course)
        LOG.info("Attune Train One More Step: %s", report)
        return io.NodeOutput(module, report)


NODES = [AttuneTrainOneMoreStep]
