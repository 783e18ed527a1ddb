"""Profiles: load, save, apply to a MODEL, and look at schedules."""

from __future__ import annotations

import logging

from ..kernels.refine import ratio
from ..models.calibration import NOISE_SHIFT, PROPAGATION, misfits
from ..models.store import shipped_profiles
from ._draw.axes import labels_of, to_image
from ._draw.plots import Curve, applied_curve, draw_detail, draw_schedules, draw_shift, draw_speeds, profile_curve
from ._host.api import Profile, advanced, io, say_on_node, schema, shown_on, ui
from ._host.apply import STOCK, Ready, Use, put_to_use, stock_levels
from ._host.folders import find_profile, has_profile, installed_files, keep_profile, missing_profile, profile_names
from ._host.identity import identify
from ._host.shelf import installed
from ._plan.installed import about, listing
from ._plan.profile_on_model import DENOISE_MODES, POLICIES
from ._plan.propagation import FIDELITY
from ._plan.refine import LATENT_SIDE

LOG = logging.getLogger(__name__)
CATEGORY = "attune/profiles"
PLOTS = ("noise levels", "detail kept")  # by Attune Plot Sigmas


class AttuneLoadProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = profile_names()
        return schema(
            "AttuneLoadProfile", "Attune Load Profile", CATEGORY,
            "Loads a calibration from models/attune, or one that comes with the pack, and lists what is there.",
            search_aliases=["schedule profile", "load schedule", "calibration", "installed", "inventory"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "profile_name", options=names, default=names[0],
                    tooltip="Files in models/attune, then the pack's own. Press R after copying a file there.",
                ),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="Says whether the profile suits this model, and marks those that were made for it.",
                ),
            ],
            outputs=[
                Profile.Output(display_name="profile", tooltip="For Attune Apply Profile."),
                io.String.Output(display_name="info", tooltip="What the profile was made for, and what was measured."),
                io.String.Output(
                    display_name="installed",
                    tooltip="A line for each profile, One More Step module and NPNet, and why a file cannot be read.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, profile_name=None):
        known = has_profile(profile_name) or (isinstance(profile_name, str) and profile_name in shipped_profiles())
        return profile_name is None or known or missing_profile(profile_name)  # None: linked, not known yet

    @classmethod
    def fingerprint_inputs(cls, profile_name=None, model=None):
        return profile_name, installed_files()

    @classmethod
    def execute(cls, profile_name, model=None) -> io.NodeOutput:
        profile = find_profile(profile_name)
        ours = None if model is None else identify(model, weights=True)
        info = about(profile)
        if ours is not None:
            info += "\n" + ("\n".join(map(str, misfits(profile, ours))) or "It suits this model.")
        shelf, unread = installed()
        listed = listing(shelf, unread, ours)
        say_on_node(cls, info)
        return io.NodeOutput(profile, info, listed, ui=ui.PreviewText(info))


class AttuneSaveProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneSaveProfile", "Attune Save Profile", CATEGORY,
            "Keeps a calibration in models/attune, where Attune Load Profile lists it.",
            search_aliases=["schedule profile", "save schedule", "calibration"],
            is_output_node=True,
            inputs=[
                Profile.Input("profile", tooltip="The profile that a fitting node found, such as Attune Fit Sampler."),
                io.String.Input(
                    "name", default="",
                    tooltip="The file's name; empty takes the profile's own. A name that is taken gets a number.",
                ),
            ],
            outputs=[
                Profile.Output(display_name="profile", tooltip="The same profile."),
                io.String.Output(display_name="path", tooltip="The file that was written."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, profile, name="") -> io.NodeOutput:
        path = keep_profile(profile, name)
        LOG.info("Attune Save Profile: %s", path)
        return io.NodeOutput(profile, str(path))


class AttuneApplyProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneApplyProfile", "Attune Apply Profile", CATEGORY,
            "Applies a profile of any kind: it gives MODEL, SAMPLER and SIGMAS as they were fitted.",
            search_aliases=["schedule profile", "sigmas", "timestep alignment", "calibration", "noise shift"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled. It must be of the profile's family."),
                Profile.Input("profile", tooltip="From Attune Load Profile, or fresh from a fitting node."),
                io.Int.Input(
                    "steps", default=0, min=0, max=10000,
                    tooltip="How many steps. 0 takes the profile's own number, at which its gain was measured; other "
                    "numbers are interpolated. A noise shift has no number of its own: 0 means 20 steps. A fitted "
                    "sampler has only the numbers of its fit: 0 takes the smallest that is faithful to 45 dB.",
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="1 starts from pure noise; less keeps more of the input picture.",
                ),
                *advanced(io.Combo.Input(
                    "denoise_mode", options=list(DENOISE_MODES), default="exact",
                    tooltip="What a denoise below 1 does. exact: all steps lie on exactly that part of the schedule. "
                    "comfy: the rule of the stock KSampler. ays: fewer steps, as in ComfyUI's Align Your Steps node.",
                )),
                *advanced(io.Combo.Input(
                    "resolution_policy", options=list(POLICIES), default="ignore",
                    tooltip="What happens when the latent's size differs from the profile's. ignore: the schedule is "
                    "used, and the report says so. shift: more noise for larger pictures. strict: the node stops "
                    "with an error.",
                )),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.0, step=0.05,
                    tooltip="How much of a timestep alignment or a noise shift the network is told. The sigmas do "
                    "not change. 0 leaves the model as it is, bit for bit.",
                ),
                *advanced(io.Float.Input(
                    "speed", default=0.0, min=0.0, max=10.0, step=0.05,
                    tooltip="For a profile of propagation: how many times less is computed. 0 takes the fastest "
                    "setting that is faithful to 45 dB.",
                )),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="The latent to sample, which tells the picture's size. A noise shift looks at the size "
                    "anew in every run.",
                ),
                io.Float.Input(
                    "fidelity", default=0.0, min=0.0, max=100.0, step=1.0, optional=True,
                    tooltip="For a profile of propagation, where 'speed' is 0: how near the pictures must stay to "
                    "the run without reuse, in dB. The node takes the fastest setting that was measured to stay so "
                    "near. If there is none, every step computes the whole network. 0 means 45 dB or, if no setting "
                    "reaches that, the most faithful one.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler or its guider."),
                io.Sampler.Output(display_name="sampler", tooltip="The solver that the profile was fitted with."),
                io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustom or SamplerCustomAdvanced."),
                io.String.Output(display_name="report", tooltip="What was applied, and what was left out and why."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, profile, steps=0, denoise=1.0, denoise_mode="exact", resolution_policy="ignore", strength=1.0,
        speed=0.0, latent=None, fidelity=0.0,
    ) -> io.NodeOutput:  # fmt: skip
        choice = Use(steps, denoise, denoise_mode, resolution_policy, strength, speed, fidelity)
        ready = put_to_use(model, profile, choice, latent)
        said = list(ready.report)
        if latent is not None and latent.get("noise_mask") is not None:
            said.append("Note: the latent has a mask; profiles are measured on whole pictures.")
        LOG.info("Attune Apply Profile: %s", " ".join(said))
        plot = None if cls.hidden is None else shown_on(cls, to_image(_plot(model, profile, ready, choice)))
        return io.NodeOutput(ready.model, ready.sampler, ready.sigmas, "\n".join(said), ui=plot)


def _plot(model, profile, ready: Ready, choice: Use):
    """What is applied: a schedule beside a stock one, the curves of a noise shift, or speed against fidelity."""
    if profile.kind == NOISE_SHIFT:
        return draw_shift(profile)
    if profile.kind in PROPAGATION:
        wanted = FIDELITY if choice.speed else choice.fidelity or FIDELITY
        return draw_speeds(profile.key_steps.points, ready.point, wanted)
    steps = len(ready.sigmas) - 1
    if ready.short is not None:
        long = Curve(f"{profile.steps} steps of {profile.solver}", tuple(profile.sigmas))
        return draw_schedules([Curve(f"fitted, {steps} steps", ready.short.run.sigmas), long], profile.name)
    if steps < 1 or ready.applied is None:
        return draw_schedules([profile_curve(profile)], profile.name)
    stock = Curve(f"stock '{STOCK}'", tuple(stock_levels(model, steps, choice.denoise).tolist()))
    return draw_schedules([applied_curve(ready.applied), stock], profile.name)


class AttunePlotSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        more = [
            io.Sigmas.Input(f"sigmas_{i}", optional=True, tooltip="Another schedule for comparison.") for i in (2, 3, 4)
        ]
        return schema(
            "AttunePlotSigmas", "Attune Plot Sigmas", CATEGORY,
            "Draws up to four schedules and a profile in one picture, or how much detail of a picture the start of "
            "each schedule keeps.",
            search_aliases=["plot schedule", "sigmas graph", "compare schedulers"],
            inputs=[
                io.Sigmas.Input("sigmas_1", optional=True, tooltip="A schedule."),
                *more,
                Profile.Input(
                    "profile", optional=True,
                    tooltip="A profile whose own schedule is drawn. The dashed line is what its alignment tells the "
                    "network.",
                ),
                io.String.Input(
                    "labels", default="", tooltip="Names for the schedules, separated by commas, in their order."
                ),
                *advanced(io.Combo.Input(
                    "show", options=list(PLOTS), default=PLOTS[0], optional=True,
                    tooltip="noise levels: the levels over the run. detail kept: for runs that start from a picture, "
                    "how strong each size of detail is against the noise at the first level of each schedule; needs "
                    "'model'.",
                )),
                io.Model.Input("model", optional=True, tooltip="For detail kept: the model that will be sampled."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The plot, 960 x 600 pixels.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, labels="", profile=None, show=PLOTS[0], model=None, **sigmas) -> io.NodeOutput:
        given = [(key, sigmas[key]) for key in sorted(sigmas) if sigmas[key] is not None]
        names = labels_of(labels)
        names += [key.replace("_", " ") for key, _ in given[len(names) :]]
        if show == PLOTS[1]:
            if model is None:
                raise ValueError("'detail kept' depends on how the model mixes noise and picture: connect 'model'.")
            starts = [(name, levels[:1]) for name, (_, levels) in zip(names, given, strict=False) if len(levels)]
            space = identify(model).noise_space
            return io.NodeOutput(to_image(draw_detail([(n, float(ratio(space, s))) for n, s in starts], LATENT_SIDE)))
        curves = [Curve(name, tuple(levels.tolist())) for name, (_, levels) in zip(names, given, strict=False)]
        if profile is not None:
            curves.append(profile_curve(profile))
        return io.NodeOutput(to_image(draw_schedules(curves)))


NODES = [AttuneLoadProfile, AttuneSaveProfile, AttuneApplyProfile, AttunePlotSigmas]
