"""Edit real pictures in their own noise: invert, replay, morph, keep."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch

from ..kernels.noise_space import morphed
from ..models.noise_maps import load_maps, maps_in_words, save_maps
from ..models.training import keep_result
from ._host.api import ExecutionBlocker, advanced, io, say_on_node, schema, ui
from ._host.folders import NOISE_MAPS, file_names, file_path, folder_of, state_of
from ._host.noise_space import (
    NoiseMapsType,
    ReplayPlan,
    at_wire,
    check_same_model,
    fresh_noise,
    invert_picture,
    prompts_between,
    replay_sampler,
)
from ._plan.noise_space import (
    FLIPS,
    PRECISIONS,
    arranged,
    inversion_report,
    morph_factors,
    replay_report,
    step_of,
    with_other,
)

LOG = logging.getLogger(__name__)
CATEGORY = "attune/editing"


def _seed(tooltip: str):
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False, tooltip=tooltip)


class AttuneInvert(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneInvert", "Attune Invert", CATEGORY,
            "Finds the noise of a real picture. Replayed, this noise gives the picture back exactly at any "
            "guidance, or an edit of it.",
            search_aliases=["inversion", "unsample", "edit-friendly DDPM", "DDIM inversion", "noise maps", "LEDITS"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model that will replay it, with its LoRAs and patches."),
                io.Conditioning.Input("positive", tooltip="What the picture shows, in a sentence: the source prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, usually empty."),
                io.Latent.Input("latent", tooltip="The picture from VAE Encode, without a noise mask. A batch "
                "works, too."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="The noise levels of the run, such as BasicScheduler's; 20 to 50 steps are good. They "
                    "must end in 0. With a denoise below 1 the first steps are missing from the maps for good.",
                ),
                io.Float.Input(
                    "cfg", default=3.5, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance of the source prompt; 3.5 as published. The picture comes back exactly at any "
                    "guidance.",
                ),
                _seed("The seed of the noises. Another seed gives other maps of the same picture, and so other edits."),
                *advanced(
                    io.Float.Input(
                        "eta", default=1.0, min=0.0, max=1.0, step=0.05,
                        tooltip="1: the maps hold the picture's structure, as published. 0: DDIM inversion with its "
                        "errors recorded, for Attune Morph; it takes twice as many evaluations.",
                    ),
                    io.Combo.Input(
                        "precision", options=list(PRECISIONS), default="half",
                        tooltip="The precision of the maps in main memory. Both give the picture back exactly; "
                        "float32 is for levels that half precision cannot hold.",
                    ),
                ),
            ],
            outputs=[
                NoiseMapsType.Output(
                    display_name="noise_maps", tooltip="For Attune Replay, Attune Morph and Attune Save Noise Maps."
                ),
                io.String.Output(display_name="report", tooltip="What the inversion cost in time and memory, and "
                "figures of its maps."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent, sigmas, cfg=3.5, seed=0, eta=1.0, precision="half"
    ) -> io.NodeOutput:  # fmt: skip
        began = time.monotonic()
        inverted = invert_picture(model, positive, negative, cfg, latent, sigmas, eta, seed, PRECISIONS[precision])
        report = inversion_report(inverted.maps, cfg, time.monotonic() - began)
        LOG.info("Attune Invert: %s", report)
        say_on_node(cls, report)
        return io.NodeOutput(inverted, report)


class AttuneReplay(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneReplay", "Attune Replay", CATEGORY,
            "Makes a sampler from noise maps. It draws the picture itself, an edit by another prompt, a variation, "
            "or a blend of two pictures.",
            search_aliases=["edit picture", "noise maps", "edit-friendly DDPM", "variation", "inversion", "unsampler"],
            inputs=[
                NoiseMapsType.Input("noise_maps", tooltip="From Attune Invert or Attune Load Noise Maps."),
                io.Float.Input(
                    "skip", default=0.36, min=0.0, max=0.95, step=0.01,
                    tooltip="The share of the steps that is left out at the start, from 0 to 0.4. A lower value lets "
                    "the prompt change more, a higher one keeps more of the picture. 0.36 as published.",
                ),
                io.Float.Input(
                    "detail", default=1.0, min=0.0, max=1.0, step=0.05,
                    tooltip="How much of what the last step misses is put back: 1 is exact, 0 smoother, as published.",
                ),
                io.Float.Input(
                    "focus", default=0.3, min=0.0, max=1.0, step=0.05,
                    tooltip="Keeps the picture wherever the new prompt asks for less than this share of its largest "
                    "change. 0 switches this off. It has no effect on a variation.",
                ),
                io.Float.Input(
                    "variation", default=0.0, min=0.0, max=1.0, step=0.05,
                    tooltip="How much fresh noise is mixed into the maps: other details, same structure.",
                ),
                io.Float.Input(
                    "vary_from", default=0.5, min=0.0, max=1.0, step=0.01,
                    tooltip="From which share of the steps on the fresh noise is mixed in. The earlier, the more "
                    "changes.",
                ),
                _seed("The seed of the fresh noise of 'variation'."),
                *advanced(
                    io.Combo.Input("flip", options=list(FLIPS), default="none", tooltip="Mirrors the picture."),
                    io.Float.Input(
                        "shift_right", default=0.0, min=-1.0, max=1.0, step=0.01,
                        tooltip="Moves the picture by a share of its width, around the edge, in whole latent pixels.",
                    ),
                    io.Float.Input(
                        "shift_down", default=0.0, min=-1.0, max=1.0, step=0.01,
                        tooltip="Moves the picture by a share of its height, around the edge, in whole latent pixels.",
                    ),
                ),
                NoiseMapsType.Input(
                    "other_maps", optional=True,
                    tooltip="A second picture, inverted on the same sigmas, in place of the first inside 'mask'.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="White where the picture of 'other_maps' takes the place of the first.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="For SamplerCustom or SamplerCustomAdvanced; their noise and seed do not matter.",
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="The levels of the maps that are replayed."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The inverted picture, for the sampler. Set Latent Noise Mask on it says what may change.",
                ),
                io.String.Output(display_name="report", tooltip="How many steps, and from which level."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, noise_maps, skip=0.36, detail=1.0, focus=0.3, variation=0.0, vary_from=0.5, seed=0, flip="none",
        shift_right=0.0, shift_down=0.0, other_maps=None, mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        edited = arranged(with_other(noise_maps, other_maps, mask), flip, shift_right, shift_down)
        maps = edited.maps
        start, vary = step_of(maps, skip, "skip"), round(vary_from * maps.steps)
        focus = 0.0 if variation else focus  # fresh noise changes what both prompts agree about
        plan = ReplayPlan(edited, detail, focus, variation, vary, seed)
        if variation:
            plan.check_variation()
        report = replay_report(maps, start, variation, vary)
        sigmas = maps.sigmas[start:].float()
        return io.NodeOutput(replay_sampler(plan), sigmas, {"samples": edited.latent.clone()}, report)


class AttuneMorph(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneMorph", "Attune Morph", CATEGORY,
            "Makes the pictures between two real ones, by NoiseDiffusion's rule; the ends are the two themselves.",
            search_aliases=["interpolate pictures", "NoiseDiffusion", "morphing", "slerp", "between two images"],
            inputs=[
                io.Model.Input("model", tooltip="The model of the noise maps, which samples the frames."),
                NoiseMapsType.Input("maps_1", tooltip="The first picture of the morph, inverted; eta 0 is best."),
                NoiseMapsType.Input("maps_2", tooltip="The last picture of the morph, inverted on the same sigmas, "
                "with the same eta."),
                io.Int.Input(
                    "frames", default=8, min=1, max=4096,
                    tooltip="How many pictures, both ends included. 1: the one at 'factor'.",
                ),
                io.Float.Input(
                    "factor", default=0.5, min=0.0, max=1.0, step=0.01,
                    tooltip="For one frame: 0 is the first picture, 1 the second.",
                ),
                io.Float.Input(
                    "skip", default=0.8, min=0.0, max=0.95, step=0.01,
                    tooltip="The share of the steps before the level at which the two pictures are mixed. A higher "
                    "value is smoother, a lower one invents more in between; 0.44 as published.",
                ),
                *advanced(
                    io.Float.Input(
                        "boost", default=1.4, min=0.0, max=3.0, step=0.05,
                        tooltip="How much contrast the pictures have in the mix: 1 is their own, 1.2 as published. "
                        "Their brightness stays.",
                    ),
                    io.Float.Input(
                        "fresh_noise", default=0.0, min=0.0, max=0.95, step=0.05,
                        tooltip="The share of the mix that is fresh noise: 0 to 0.5, for pictures that do not mix.",
                    ),
                    _seed("The seed of the fresh noise, which is one for all frames."),
                ),
                io.Conditioning.Input("positive_1", optional=True, tooltip="The prompt of the first picture."),
                io.Conditioning.Input("positive_2", optional=True, tooltip="The prompt of the second picture."),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The frames as a batch at their noise level, for any sampler that adds no noise.",
                ),
                io.Sampler.Output(display_name="sampler", tooltip="Replays the mixed maps; the ends are exact."),
                io.Sigmas.Output(display_name="sigmas", tooltip="From the frames' level down to 0."),
                io.Conditioning.Output(
                    display_name="positive", tooltip="From the first prompt to the second, one for each frame."
                ),
                io.String.Output(display_name="report", tooltip="How many frames there are, their noise level, and "
                "how to sample them."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, maps_1, maps_2, frames=8, factor=0.5, skip=0.8, boost=1.4, fresh_noise=0.0, seed=0,
        positive_1=None, positive_2=None,
    ) -> io.NodeOutput:  # fmt: skip
        check_same_model(maps_1, model, "Attune Morph")
        check_same_model(maps_2, model, "Attune Morph")
        factors = morph_factors(frames, factor)
        start = step_of(maps_1.maps, skip, "skip")
        maps = morphed(maps_1.maps, maps_2.maps, factors, start, boost, fresh_noise, _noise(maps_1, fresh_noise, seed))
        latent, note = at_wire(model, maps), "any sampler goes on from 'latent' without adding noise"
        if latent is None:
            latent = torch.cat([torch.lerp(maps_1.latent, maps_2.latent, f) for f in factors])
            note = "no latent can hold a flow's level 1, so sample with the output 'sampler', or raise 'skip'"
        if positive_1 is not None and positive_2 is not None:
            positive = prompts_between(positive_1, positive_2, factors)
        else:
            positive = positive_1 or positive_2 or ExecutionBlocker("Connect 'positive_1' and 'positive_2'.")
        report = f"{len(factors)} frames from sigma {float(maps.sigmas[0]):.4g} in {maps.steps} steps; {note}."
        sampler = replay_sampler(ReplayPlan(replace(maps_1, maps=maps, latent=latent)))
        return io.NodeOutput({"samples": latent}, sampler, maps.sigmas.float(), positive, report)


def _noise(inverted, amount: float, seed: int):
    return fresh_noise(inverted.maps.picture, seed)() if amount else None


class AttuneSaveNoiseMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneSaveNoiseMaps", "Attune Save Noise Maps", CATEGORY,
            "Keeps an inverted picture in models/noise_maps, where Attune Load Noise Maps lists it.",
            search_aliases=["save inversion", "noise maps"],
            is_output_node=True,
            inputs=[
                NoiseMapsType.Input("noise_maps", tooltip="The noise maps from Attune Invert."),
                io.String.Input(
                    "name", default="picture", tooltip="The file's name. A name that is taken gets a number."
                ),
            ],
            outputs=[
                NoiseMapsType.Output(display_name="noise_maps", tooltip="The same noise maps."),
                io.String.Output(display_name="path", tooltip="The file that was written."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, noise_maps, name="picture") -> io.NodeOutput:
        folder = folder_of(NOISE_MAPS)
        try:
            path = keep_result(folder, name, lambda to: save_maps(to, noise_maps, exclusive=True))
        except OSError as error:
            raise ValueError(
                f"The noise maps could not be saved in {folder}: {error.strerror}. Make room or allow writing there, "
                "then run again."
            ) from error
        LOG.info("Attune Save Noise Maps: %s", path)
        return io.NodeOutput(noise_maps, str(path))


class AttuneLoadNoiseMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneLoadNoiseMaps", "Attune Load Noise Maps", CATEGORY,
            "Loads a picture that was inverted before, from models/noise_maps.",
            search_aliases=["load inversion", "noise maps"],
            inputs=[
                io.Combo.Input(
                    "maps_name", options=file_names(NOISE_MAPS),
                    tooltip="Files in models/noise_maps, then the demo's. Press R after copying one there.",
                )
            ],
            outputs=[
                NoiseMapsType.Output(display_name="noise_maps", tooltip="For Attune Replay and Attune Morph."),
                io.Latent.Output(display_name="latent", tooltip="The picture, for VAE Decode."),
                io.String.Output(display_name="info", tooltip="Size, steps, and what it was inverted with."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, maps_name=None):
        return state_of(NOISE_MAPS, maps_name)

    @classmethod
    def execute(cls, maps_name) -> io.NodeOutput:
        inverted = load_maps(file_path(NOISE_MAPS, maps_name))
        info = maps_in_words(inverted)
        return io.NodeOutput(inverted, {"samples": inverted.latent.clone()}, info, ui=ui.PreviewText(info))


NODES = [AttuneInvert, AttuneReplay, AttuneMorph, AttuneSaveNoiseMaps, AttuneLoadNoiseMaps]
