"""Many seeds drafted cheaply, and the one that is worth its full time."""

from __future__ import annotations

import logging

import torch

from ._draw.axes import to_image
from ._draw.sheets import draw_contact_sheet
from ._host.api import ExecutionBlocker, Profile, advanced, io, say_on_node, schema, shown_on
from ._host.draft_seeds import WholeRun, draw_drafts, pictures_of
from ._host.live import ProgressBar, coloured, show_live
from ._host.solvers import sampler_names, scheduler_names
from ._plan.draft_seeds import Drafts, picked

LOG = logging.getLogger(__name__)
CATEGORY = "attune/speed"
SHEET = 256  # pixels of each picture of the sheet, at most
MOST_SEEDS = 2**64
DraftsType = io.Custom("ATTUNE_DRAFTS")
CHOOSE = "Choose by the sheet: set 'number', then run again; only the pick is drawn then."


class AttuneDraftSeeds(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneDraftSeeds", "Attune Draft Seeds", CATEGORY,
            "Draws the pictures of many seeds at a fraction of the time, as a numbered sheet to choose from.",
            search_aliases=["contact sheet", "seed selection", "best of n", "preview seeds", "seed gallery"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that KSampler gets for the whole picture."),
                io.Conditioning.Input("positive", tooltip="As for KSampler."),
                io.Conditioning.Input("negative", tooltip="As for KSampler."),
                io.Latent.Input("latent_image", tooltip="As for KSampler, with one picture: each seed draws one."),
                io.Vae.Input("vae", tooltip="Decodes the drafts."),
                io.Int.Input(
                    "seed", default=0, min=0, max=MOST_SEEDS - 1, control_after_generate=False,
                    tooltip="The first seed; the others follow it.",
                ),
                io.Int.Input("drafts", default=9, min=1, max=64, tooltip="How many seeds."),
                io.Int.Input(
                    "steps", default=20, min=1, max=10000,
                    tooltip="As for the KSampler that draws the whole picture.",
                ),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="As for KSampler.",
                ),
                io.Combo.Input(
                    "sampler_name", options=sampler_names(), default="euler", tooltip="As for KSampler.",
                ),
                io.Combo.Input("scheduler", options=scheduler_names(), default="normal", tooltip="As for KSampler."),
                *advanced(io.Float.Input(
                    "denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip="As for KSampler.",
                )),
                *advanced(
                    io.Float.Input(
                        "speed", default=4.0, min=1.25, max=10.0, step=0.25,
                        tooltip="How many times less is computed for a draft. If a profile is not as fast, its fastest "
                        "setting is used.",
                    ),
                    io.Int.Input(
                        "at_once", default=4, min=1, max=64,
                        tooltip="How many drafts are drawn in one batch. Solvers that add noise draw one at a time, "
                        "because their noise belongs to the seed.",
                    ),
                ),
                Profile.Input(
                    "profile", optional=True,
                    tooltip="A profile of Attune Fit Propagation or of a fitted sampler, for this run. Without it "
                    "the first two seeds are drawn whole, and the node learns from them how to draft the others.",
                ),
            ],
            outputs=[
                DraftsType.Output(display_name="drafts", tooltip="For Attune Pick Seed."),
                io.Image.Output(display_name="images", tooltip="The drafts one by one, for a node that scores them."),
                io.Image.Output(display_name="sheet", tooltip="The drafts with their numbers and seeds."),
                io.String.Output(display_name="report", tooltip="How they were drawn."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, vae, seed, drafts, steps, cfg, sampler_name, scheduler,
        denoise=1.0, speed=4.0, at_once=4, profile=None,
    ) -> io.NodeOutput:  # fmt: skip
        seeds = [(seed + i) % MOST_SEEDS for i in range(drafts)]
        run = WholeRun(positive, negative, latent_image, steps, cfg, sampler_name, scheduler, denoise)
        labels = [f"{number}: seed {one}" for number, one in enumerate(seeds, start=1)]
        bar = ProgressBar(drafts)

        def told(latents: torch.Tensor) -> None:
            quick = torch.cat([to_image(coloured(model, one)) for one in latents.split(1)])
            bar.update(len(latents), draw_contact_sheet(quick, labels[: len(latents)], SHEET))

        latents, report = draw_drafts(model, run, seeds, speed, at_once, profile, told)
        images = pictures_of(vae, latents)
        drawn = draw_contact_sheet(images, labels, min(SHEET, images.shape[2]))
        show_live(drawn)
        sheet = to_image(drawn)
        LOG.info("Attune Draft Seeds: %s", report)
        return io.NodeOutput(Drafts(tuple(seeds)), images, sheet, report, ui=shown_on(cls, sheet))


class AttunePickSeed(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttunePickSeed", "Attune Pick Seed", CATEGORY,
            "Gives the seed of one draft, by its number on the sheet or by the highest score.",
            search_aliases=["choose seed", "best of n", "select by score", "seed selection"],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            inputs=[
                DraftsType.Input("drafts", tooltip="From Attune Draft Seeds."),
                io.Int.Input(
                    "number", default=0, min=0, max=64,
                    tooltip="The number of the draft on the sheet. 0: the draft with the highest of 'scores'. "
                    "Without scores, the nodes behind this one wait for a number.",
                ),
                io.AnyType.Input(
                    "scores", optional=True,
                    tooltip="One number for each draft from any node that scores pictures: numbers, a list or text.",
                ),
            ],
            outputs=[
                io.Int.Output(display_name="seed", tooltip="For KSampler's or RandomNoise's seed: the whole picture."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, drafts, number, scores=None) -> io.NodeOutput:
        (of,), (wanted,) = drafts, number
        index = picked(of, wanted, scores)
        say_on_node(cls, CHOOSE if index is None else f"Draft {index + 1}: seed {of.seeds[index]}.")
        return io.NodeOutput(ExecutionBlocker(None) if index is None else of.seeds[index])


NODES = [AttuneDraftSeeds, AttunePickSeed]
