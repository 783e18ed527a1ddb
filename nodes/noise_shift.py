"""NoiseShift: calibrate what the network is told at other picture sizes, and apply it."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace

import torch

from ..kernels.noise_shift import FEWEST, SHIFT_PRESETS, Shift, fit_joint
from ..kernels.space import NoiseSpace
from ..models.calibration import SUFFIX, Calibration, file_stem
from ._draw.axes import to_image
from ._draw.noise_shift import draw_shift
from ._host.api import Profile, io, schema, shown_on
from ._host.folders import find_profile, keep_fit, keep_profile, profile_path
from ._host.identity import identify, pixels
from ._host.noise_shift import (
    STEPS,
    calibrate,
    check_prompts,
    draw_own,
    encode,
    first_prompts,
    limits,
    with_noise_shift,
    without_text,
)
from ._host.session import ProgressBar
from ._plan.noise_shift import (
    check_noise_shift,
    continues,
    noise_shift_profile,
    parse_sizes,
    plan,
    shift_for,
    shift_report,
)

LOG = logging.getLogger(__name__)
CATEGORY = "attune/noise shift"
MULTIPLE = 8  # pixels


class AttuneFitNoiseShift(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="AttuneFitNoiseShift",
            display_name="Attune Fit Noise Shift",
            category=CATEGORY,
            description="Measure what to tell the network about the noise at picture sizes it was not trained on.",
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
                    tooltip="Width that the model was trained at. There the network is told the truth, unless you "
                    "calibrate that size, too.",
                ),
                io.Int.Input("native_height", default=1024, min=16, max=16384, step=8, tooltip="Its height."),
                io.Combo.Input(
                    "preset", options=list(SHIFT_PRESETS), default="quick",
                    tooltip="Per size: quick 8 pictures and 896 evaluations of the network, normal 32 and 7168, "
                    "thorough 128 and 28672.",
                ),
                io.Combo.Input(
                    "method", options=["joint"], default="joint",
                    tooltip="joint: one smooth curve, kept only if it proves itself on held-out pictures.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=False,
                    tooltip="Of the noise put on the pictures.",
                ),
                io.String.Input(
                    "save_as", default="",
                    tooltip="A file in models/attune that is written after every size; the same run continues it "
                    "after a stop. Take another name for another checkpoint. Empty: none.",
                ),
                io.Float.Input(
                    "cfg", default=4.0, min=1.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Only for pictures that the model draws itself, with 'negative' connected.",
                ),
                io.Conditioning.Input(
                    "positive", optional=True,
                    tooltip="What the pictures show: one prompt for all, or one for each. Without it: zeroed text.",
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Clean pictures, encoded at the size to calibrate, at least 6."
                ),
                io.Image.Input(
                    "images", optional=True,
                    tooltip="Clean pictures, at least 6 and as large as the largest of 'sizes': they are cut to the "
                    "middle, made smaller and encoded with 'vae'.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Needed with 'images' and for pictures of the model's own."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Only for pictures that the model draws itself."
                ),
            ],
            outputs=[
                Profile.Output(display_name="profile", tooltip="For Attune Noise Shift and Attune Save Profile."),
                io.Image.Output(display_name="plot", tooltip="What is told over the true level, one curve a size."),
                io.String.Output(display_name="report", tooltip="What was measured, kept and refused."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, sizes, native_width, native_height, preset, method, seed, save_as, cfg=4.0, positive=None,
        latent=None, images=None, vae=None, negative=None,
    ) -> io.NodeOutput:  # fmt: skip
        native, effort = (native_width, native_height), SHIFT_PRESETS[preset]
        wanted = _wanted(model, sizes, latent, images, vae)
        given = effort.pictures if latent is None and images is None else len(_pictures(latent, images))
        lines = _sources(latent, images, positive)
        prompts = without_text(model) if positive is None else positive
        check_prompts(prompts, given)
        count = min(given, effort.pictures)
        prompts = first_prompts(prompts, count, given)
        how = {"preset": preset, "seed": seed, "pictures": count}
        about = identify(model)
        found = _unfinished(save_as, about, native, method, how)
        left = [size for size in wanted if found is None or size not in {one.resolution for one in found.alignments}]
        if found is not None:
            lines.append(f"Continued from '{save_as}': {len(wanted) - len(left)} of {len(wanted)} sizes were there.")
        lines.append(plan(left, effort, count))
        LOG.info("Attune Fit Noise Shift: %s", " ".join(lines))
        began = time.monotonic()
        if latent is None and images is None and left:
            images = draw_own(model, vae, prompts, negative, cfg, native, count, seed)
        bar = ProgressBar(max(len(left) * replace(effort, pictures=count).evaluations, 1))
        profile, done = found, 0
        for size in left:
            x0 = _clean(latent, images, vae, size)[:count]
            chunk = max(1, 2 * math.prod(native) // math.prod(size))
            space = NoiseSpace(about.space)

            def work(x0, denoise, space=space, done=done) -> Shift:
                fit = fit_joint(denoise, x0, replace(effort, pictures=len(x0)), space, limits(model), seed)
                return _finished(fit, lambda evaluations: bar.update(done + evaluations))

            shift = calibrate(model, prompts, x0, chunk, space, work)
            done += replace(effort, pictures=count).evaluations
            lines.append(shift_report(size, shift, space))
            LOG.info("Attune Fit Noise Shift: %s", lines[-1])
            profile = noise_shift_profile(about, native, {size: shift}, method, profile, **how)
            if save_as.strip():
                keep_profile(profile, save_as, replace=True)
        assert profile is not None
        lines.append(f"{done} evaluations in {time.monotonic() - began:.0f} s.")
        if all(one.sigma == one.sigma_cond for one in profile.alignments):
            lines.append("Nothing is to be gained at any of these sizes: the profile changes nothing.")
        elif not save_as.strip():
            lines.append(keep_fit(profile))
        plot = to_image(draw_shift(profile))
        return io.NodeOutput(profile, plot, "\n".join(lines), ui=shown_on(cls, plot))


class AttuneNoiseShift(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="AttuneNoiseShift",
            display_name="Attune Noise Shift",
            category=CATEGORY,
            description="Tell the network the noise level that a picture of this size looks like to it.",
            search_aliases=["noiseshift", "low resolution", "small pictures", "512", "resolution"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled, at any size."),
                Profile.Input("profile", tooltip="From Attune Fit Noise Shift, or from Attune Load Profile."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.0, step=0.05,
                    tooltip="0 leaves the model as it is, bit for bit.",
                ),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="For the report: what a picture of this size gets. Every run decides anew, by the latent "
                    "that it samples.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler; the sigmas stay as they are."),
                io.String.Output(display_name="report", tooltip="Which sizes are calibrated and what is told at each."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, profile, strength=1.0, latent=None) -> io.NodeOutput:
        about = identify(model)
        check_noise_shift(profile, about)
        lines = [f"Noise shift '{profile.name}' at strength {strength:g}."]
        size = None if latent is None else pixels(model, latent)
        asked = [one.resolution for one in profile.alignments] if size is None else [size]
        lines += [shift_for(profile, one, strength)[1] for one in asked]
        if profile.config_hash and about.config_hash and profile.config_hash != about.config_hash:
            lines.append("Note: same family, but another network configuration than the profile was fitted on.")
        LOG.info("Attune Noise Shift: %s", " ".join(lines))
        shifted = with_noise_shift(model, profile, strength)
        plot = None if cls.hidden is None else shown_on(cls, to_image(draw_shift(profile)))
        return io.NodeOutput(shifted, "\n".join(lines), ui=plot)


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
        wanted = parse_sizes(sizes, MULTIPLE)
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
    if latent is not None or images is not None:
        count = len(_pictures(latent, images))
        if count < FEWEST:
            name = "latent" if images is None else "images"
            raise ValueError(
                f"'{name}' holds {count} {'picture' if count == 1 else 'pictures'}, but at least {FEWEST} are needed: "
                "half of them are held out. Eight different ones are better."
            )
    return wanted


def _pictures(latent: dict | None, images):
    return images if latent is None else latent["samples"]


def _sources(latent: dict | None, images, positive) -> list[str]:
    """What the evidence rests on, where it is weak."""
    said = []
    if latent is None and images is None:
        said.append(
            f"No pictures given: the model draws its own at the native size, {STEPS} steps each. Weaker evidence: its "
            "faults count as truth."
        )
    if positive is None:
        said.append("No 'positive' given: the text is zeroed.")
    return said


def _clean(latent: dict | None, images, vae, size: tuple[int, int]) -> torch.Tensor:
    return encode(vae, images, size) if latent is None else latent["samples"].float()


def _unfinished(save_as: str, about, native: tuple[int, int], method: str, how: dict) -> Calibration | None:
    """The profile that an earlier run of this fit has left under the name, None if there is none."""
    if not save_as.strip():
        return None
    name = file_stem(save_as) + SUFFIX
    if profile_path(name) is None:
        return None
    found = find_profile(name)
    if not continues(found, about, native, method, **how):
        raise ValueError(
            f"'save_as' names {name}, which holds another calibration ('{found.name}'), or this one with other "
            "settings. Choose another name, or move the file away."
        )
    return found


def _finished(fit, update) -> Shift:
    while True:
        try:
            update(next(fit))
        except StopIteration as end:
            return end.value


NODES = [AttuneFitNoiseShift, AttuneNoiseShift]
