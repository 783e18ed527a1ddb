"""NoiseShift: calibrate what the network is told at other picture sizes."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace

import torch

from ..kernels.noise_shift import FEWEST, SHIFT_PRESETS, Shift
from ..models.calibration import ModelIdentity, Size
from ..models.store import SUFFIX, file_stem
from ._draw.axes import to_image
from ._draw.plots import draw_search, draw_shift
from ._host.api import Profile, advanced, io, schema, shown_on
from ._host.calibrating import calibrating
from ._host.folders import find_profile, keep_fit, keep_profile, keep_update, profile_path
from ._host.identity import identify, pixels, pixels_a_side
from ._host.live import ProgressBar, show_live
from ._host.noise_shift import (
    STEPS,
    calibrate,
    check_prompts,
    data_hash,
    draw_own,
    encoded_at,
    prompts_of,
    without_text,
)
from ._plan.noise_shift import continues, noise_shift_profile, parse_sizes, shift_plan, shift_report

LOG = logging.getLogger(__name__)
CATEGORY = "attune/noise shift"
MULTIPLE = 8  # pixels


class AttuneFitNoiseShift(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneFitNoiseShift", "Attune Fit Noise Shift", CATEGORY,
            "Measures what to tell the network about the noise at picture sizes it was not trained on.",
            search_aliases=["noiseshift", "low resolution", "small pictures", "calibrate", "resolution"],
            inputs=[
                io.Model.Input("model", tooltip="The model to calibrate, with the LoRAs that it will run with."),
                io.String.Input(
                    "sizes", default="512x512, 640x640, 768x768",
                    tooltip="Picture sizes to calibrate, width x height, separated by commas. Not used with 'latent', "
                    "which has a size of its own.",
                ),
                io.Int.Input(
                    "native_width", default=1024, min=16, max=16384, step=8,
                    tooltip="The width that the model was trained at. At this size the network is told the true "
                    "noise level, unless you calibrate this size, too.",
                ),
                io.Int.Input(
                    "native_height", default=1024, min=16, max=16384, step=8,
                    tooltip="The height that the model was trained at.",
                ),
                io.Combo.Input(
                    "preset", options=list(SHIFT_PRESETS), default="quick",
                    tooltip="How much is measured for each size. quick: 8 pictures and 896 evaluations of the "
                    "network. normal: 32 and 7168. thorough: 128 and 28672.",
                ),
                *advanced(io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=False,
                    tooltip="The seed of the noise that is added to the pictures.",
                )),
                io.String.Input(
                    "save_as", default="",
                    tooltip="A file in models/attune that is written after every size; the same run continues it "
                    "after a stop. Take another name for another checkpoint. If it is empty, a gain is written at "
                    "the end, under a name made of the model's.",
                ),
                *advanced(io.Float.Input(
                    "cfg", default=4.0, min=1.0, max=100.0, step=0.1, round=0.01,
                    tooltip="The guidance for pictures that the model draws itself. It needs 'negative'.",
                )),
                io.Conditioning.Input(
                    "positive", optional=True,
                    tooltip="A prompt that says what the pictures show: one for all, or one for each. If nothing is "
                    "connected, the text is zeroed.",
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Clean pictures, encoded at the size to calibrate, at least 6."
                ),
                io.Image.Input(
                    "images", optional=True,
                    tooltip="At least 6 clean pictures, as large as the largest of 'sizes' or larger. The node crops "
                    "them to the middle, scales them down and encodes them with 'vae'.",
                ),
                io.Vae.Input(
                    "vae", optional=True,
                    tooltip="The VAE that encodes 'images'. Pictures that the model draws itself need it, too.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True,
                    tooltip="The negative prompt, only for pictures that the model draws itself.",
                ),
            ],
            outputs=[
                Profile.Output(display_name="profile", tooltip="For Attune Apply Profile and Attune Save Profile."),
                io.Image.Output(
                    display_name="plot",
                    tooltip="The level that the network is told, over the true level, with one curve for each size.",
                ),
                io.String.Output(display_name="report", tooltip="What was measured, kept and refused."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, sizes, native_width, native_height, preset="quick", seed=0, save_as="", cfg=4.0, positive=None,
        latent=None, images=None, vae=None, negative=None,
    ) -> io.NodeOutput:  # fmt: skip
        native, effort = (native_width, native_height), SHIFT_PRESETS[preset]
        wanted = _wanted(model, sizes, latent, images, vae)
        pictures = images if latent is None else latent["samples"]
        given = effort.pictures if pictures is None else len(pictures)
        lines = _sources(pictures, positive)
        prompts = without_text(model) if positive is None else positive
        check_prompts(prompts, given)
        count = min(given, effort.pictures)
        prompts, effort = prompts_of(prompts, 0, count, given), replace(effort, pictures=count)
        how = {"preset": preset, "seed": seed, "pictures": count, "data": data_hash(latent, images, prompts)}
        kept = _Kept(save_as, identify(model, weights=True), native, how)
        left = [size for size in wanted if size not in kept.sizes]
        if kept.sizes:
            lines.append(f"Continued from '{save_as}': {len(wanted) - len(left)} of {len(wanted)} sizes were there.")
        lines.append(shift_plan(left, effort, count))
        LOG.info("Attune Fit Noise Shift: %s", " ".join(lines))
        began = time.monotonic()
        if pictures is None and left:
            images = draw_own(calibrating(model), vae, prompts, negative, cfg, native, count, seed)
        bar, done = ProgressBar(max(len(left) * effort.evaluations, 1)), 0

        def told(evaluations: int, least: dict[float, float] | None) -> None:
            bar.update(done + evaluations, None if least is None else draw_search(least, kept.space, size))

        for size in left:
            x0 = (encoded_at(vae, images, size) if latent is None else latent["samples"].float())[:count]
            chunk = max(1, 2 * math.prod(native) // math.prod(size))
            shift = calibrate(model, prompts, x0, chunk, effort, seed, told)
            done += effort.evaluations
            lines.append(shift_report(size, shift, kept.space))
            LOG.info("Attune Fit Noise Shift: %s", lines[-1])
            kept.add(size, shift)
        profile = kept.profile
        assert profile is not None
        lines.append(f"{done} evaluations in {time.monotonic() - began:.0f} s.")
        if all(one.sigma == one.sigma_cond for one in profile.alignments):
            lines.append("Nothing is to be gained at any of these sizes: the profile changes nothing.")
        elif not save_as.strip():
            lines.append(keep_fit(profile))
        drawn = draw_shift(profile)
        show_live(drawn)
        plot = to_image(drawn)
        return io.NodeOutput(profile, plot, "\n".join(lines), ui=shown_on(cls, plot))


class _Kept:
    """The calibration as far as it is, in the file that the user named, or in no file.

    ValueError where that file holds another calibration, or this one from other pictures or settings.
    """

    def __init__(self, save_as: str, about: ModelIdentity, native: Size, how: dict):
        self.save_as, self.about, self.native, self.how = save_as.strip(), about, native, how
        self.space = about.noise_space
        self.path = profile_path(file_stem(save_as) + SUFFIX) if self.save_as else None
        self.profile = None if self.path is None else find_profile(self.path.name)
        if self.profile is not None and not continues(self.profile, about, native, **how):
            raise ValueError(
                f"'save_as' names {file_stem(save_as)}{SUFFIX}, which holds another calibration "
                f"('{self.profile.name}'), or this one with other pictures or settings. Choose another name, or move "
                "the file away."
            )

    @property
    def sizes(self) -> set[Size]:
        return set() if self.profile is None else {one.resolution for one in self.profile.alignments}

    def add(self, size: Size, shift: Shift) -> None:
        old = self.profile
        self.profile = noise_shift_profile(self.about, self.native, {size: shift}, old, **self.how)
        if self.path is not None and old is not None:
            self.path = keep_update(self.path, old, self.profile)
        elif self.save_as:
            self.path = keep_profile(self.profile, self.save_as)


def _wanted(model, sizes: str, latent: dict | None, images, vae) -> list[tuple[int, int]]:
    """The sizes to calibrate; everything about the pictures that can be refused is refused here."""
    if latent is not None and images is not None:
        raise ValueError("Connect 'latent' or 'images', not both: they are two ways to give the clean pictures.")
    if latent is not None:
        size = pixels(model, latent)
        if size is None or latent["samples"].ndim < 4:
            raise ValueError("'latent' must hold pictures: sound and video with sound cannot be calibrated.")
        if not torch.count_nonzero(latent["samples"]):
            raise ValueError("'latent' is empty, but clean pictures are needed: encode some with VAE Encode.")
        wanted = [size]
    else:
        if vae is None:
            raise ValueError(
                "Connect 'vae': it encodes the pictures. Or connect 'latent' with pictures encoded before."
            )
        side = pixels_a_side(model.get_model_object("latent_format"))
        wanted = parse_sizes(sizes, max(MULTIPLE, side))
        if not wanted:
            raise ValueError("'sizes' is empty: list at least one picture size, such as 512x512.")
    if images is not None:
        height, width = images.shape[1:3]
        larger = [size for size in wanted if size[0] > width or size[1] > height]
        if larger:
            raise ValueError(
                f"'images' are {width}x{height}, smaller than {'x'.join(map(str, larger[0]))} in 'sizes'. Give larger "
                "pictures, or leave that size out: enlarged pictures are not clean."
            )
    for name, pictures in (("latent", latent and latent["samples"]), ("images", images)):
        count = FEWEST if pictures is None else len(pictures)
        if count < FEWEST:
            raise ValueError(
                f"'{name}' holds {count} {'picture' if count == 1 else 'pictures'}, but at least {FEWEST} are needed: "
                "half of them are held out. Eight different ones are better."
            )
    return wanted


def _sources(pictures, positive) -> list[str]:
    """What the evidence rests on, where it is weak."""
    said = []
    if pictures is None:
        said.append(
            f"No pictures are given, so the model draws its own at the native size, {STEPS} steps each. That is weaker "
            "evidence, because its faults count as truth."
        )
    if positive is None:
        said.append("No 'positive' is given, so the text is zeroed.")
    return said


NODES = [AttuneFitNoiseShift]
