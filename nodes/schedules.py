"""Aligned step schedules: as SIGMAS for the custom samplers, and in a KSampler of their own."""

from __future__ import annotations

import logging

from ..models.calibration import SAMPLER, size_text
from ..models.store import is_profile_file
from ._draw.plots import draw_learned
from ._draw.sheets import draw_card
from ._host.api import advanced, io, say_on_node, schema
from ._host.clock import matching_denoise
from ._host.fitted_sampler import Drawing, fast_for, fast_stamp
from ._host.folders import find_profile, has_profile, missing_profile, profiles_of_kind, schedule_files
from ._host.identity import identify, sampled
from ._host.solvers import run_stock_node, sample, sampler_names, scheduler_names
from ._plan.fitted_sampler import NOT_FAST, USES, Wish
from ._plan.named_schedules import AUTO, DETAIL, of_auto, schedule, schedule_names
from ._plan.profile_on_model import apply_profile, listed
from ._plan.refine import REFINES

LOG = logging.getLogger(__name__)
CATEGORY = "attune/schedules"

STEPS_TIP = "How many steps the sampler takes. Align Your Steps was published for 10 and gains most from 5 to 20."
DENOISE_TIP = (
    "1 starts from pure noise; a lower value keeps more of the input picture. The run has 'steps' steps in any "
    "case, as in the stock KSampler: they are the last ones of a schedule of 'steps' / 'denoise' steps."
)
SCHEDULE_TIP = (
    "auto: what is published for this model's family: Align Your Steps, or what its maker runs at the latent's size; "
    "without either the stock schedule. AYS …: Align Your Steps for that model. "
    "KL-optimal: a closed form for every model, flow models (SD3, Flux) too; c is the spread of the data: "
    "1.4 puts more steps at high noise, 0.5 at low noise. tuned for …: fitted to a demo model and this sampler, the "
    "nearest number of steps. Turbo, distilled, Lightning …: the makers' own levels for such a model; another family "
    "is refused. by latent dimensions: flow models whose maker states no shift. refine …: for runs that start from a "
    "blurred, small or noisy picture, at its authors' level, or by 'detail'; the node says which denoise that is. "
    "Files: your profiles in models/attune, their schedule only; Attune Apply Profile also applies their timestep "
    "alignment."
)


def _model():
    tip = "The model that will be sampled; its family and noise range choose the schedule."
    return io.Model.Input("model", tooltip=tip)


def _steps():
    return io.Int.Input("steps", default=10, min=1, max=10000, tooltip=STEPS_TIP)


def _denoise():
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=DENOISE_TIP)


def _schedule():
    names = [*schedule_names(), *schedule_files()]
    return io.Combo.Input("schedule", options=names, default="auto", tooltip=SCHEDULE_TIP)


def _detail():
    return io.Float.Input(
        "detail", default=DETAIL, min=0.5, max=4096.0, step=0.5, optional=True,
        tooltip="For 'refine: by detail': detail finer than so many pixels is drawn anew, coarser detail is kept. How "
        "many times a picture was enlarged, or over how many pixels a blur smears its edges.",
    )  # fmt: skip


def _levels(node: type[io.ComfyNode], model, steps: int, denoise: float, name: str, latent: dict | None, detail: float):
    """The SIGMAS, with one line in the log on what was chosen."""
    if (known := _known(name)) is not True:
        raise ValueError(known)
    made = sampled(model, latent)
    about = identify(model)
    if has_profile(name):
        applied = apply_profile(
            find_profile(name), identify(model, weights=True), steps, denoise, "comfy", resolution=made.size,
            strength=0.0,
        )  # fmt: skip
        sigmas, said = applied.sigmas, " ".join(applied.report)
    elif name == AUTO and of_auto(about) is None:
        stock = scheduler_names()[0]
        (sigmas,) = run_stock_node("BasicScheduler", model=model, scheduler=stock, steps=steps, denoise=denoise)
        said = f"no schedule is published for {about.family}: the stock '{stock}', as in a stock KSampler"
    else:
        sigmas, said = schedule(name, about, steps, denoise, made, detail)
    if name in REFINES:
        said += f"; as 'denoise' {matching_denoise(model, sigmas[0]):.2f} of the stock schedule 'simple'"
    size = "" if made.size is None else f", picture {size_text(made.size)}"
    levels = f"{len(sigmas) - 1} steps: {listed(sigmas)}" if len(sigmas) else (
        f"there is no step to sample, because 'denoise' is {denoise:g}: the latent comes back as it is"
    )  # fmt: skip
    LOG.info("%s: %s%s; %s", node.define_schema().display_name, said, size, levels)
    say_on_node(node, said)
    return sigmas


def _known(name) -> bool | str:
    """True, or what to do about a schedule that is not in the list."""
    if isinstance(name, str) and (name in schedule_names() or has_profile(name)):
        return True
    if isinstance(name, str) and is_profile_file(name):
        return missing_profile(name)
    return f"There is no schedule {name!r}. Choose one of: {', '.join(schedule_names())}."


class AttuneScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneScheduler", "Attune Scheduler", CATEGORY,
            "Gives noise levels that fit the model: Align Your Steps, or what its maker runs at this size.",
            search_aliases=[
                "align your steps", "AYS", "sigmas", "scheduler", "kl optimal", "shift", "mu", "turbo sigmas",
                "lightning", "Flux2Scheduler", "LTXVScheduler",
            ],
            hidden=[io.Hidden.unique_id],
            inputs=[
                _model(),
                _steps(),
                _denoise(),
                _schedule(),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="The latent to sample: schedules that depend on the picture's size take it from here.",
                ),
                *advanced(_detail()),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="steps + 1 noise levels, from the first one to 0.")
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, schedule=None):
        return schedule is None or _known(schedule)  # None: linked, not known yet, or missing, which the host says

    @classmethod
    def execute(cls, model, steps, denoise, schedule, latent=None, detail=DETAIL) -> io.NodeOutput:
        return io.NodeOutput(_levels(cls, model, steps, denoise, schedule, latent, detail))


class AttuneKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneKSampler", "Attune KSampler", CATEGORY,
            "Samples as the stock KSampler does, with schedules that fit the model in place of the stock list.",
            search_aliases=["KSampler", "sampler", "align your steps", "AYS"],
            essentials_category="Image Generation",
            inputs=[
                _model(),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="The seed of the starting noise; the same seed gives the noise of the stock KSampler.",
                ),
                _steps(),
                io.Float.Input(
                    "cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Classifier-free guidance: higher follows the prompt more closely; 1 switches it off.",
                ),
                io.Combo.Input(
                    "sampler_name", options=sampler_names(), default="dpmpp_2m",
                    tooltip="The solver. Align Your Steps was published with DDIM (euler), dpmpp_2m and dpmpp_2m_sde.",
                ),
                _schedule(),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What the picture should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise: empty, or a picture for img2img."),
                _denoise(),
                *advanced(
                    io.Combo.Input(
                        "fast", options=[NOT_FAST, *USES, *profiles_of_kind(SAMPLER)], default=NOT_FAST, optional=True,
                        tooltip="off: every picture is made in full. The other choices are those of 'use' in Attune "
                        "Fast Sampler, with 10 evaluations: the first picture is made in full and learned from, and "
                        "the next ones are fast.",
                    ),
                    _detail(),
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The denoised latent.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, schedule=None, fast=None):
        if schedule is not None and (known := _known(schedule)) is not True:  # None: linked, or missing: the host says
            return known
        return fast in (None, NOT_FAST, *USES) or has_profile(fast) or missing_profile(fast)

    @classmethod
    def fingerprint_inputs(cls, fast=NOT_FAST, **_):
        return NOT_FAST if fast in (None, NOT_FAST) else fast_stamp(cls, fast, "fast")

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, schedule, positive, negative, latent_image, denoise=1.0,
        fast=NOT_FAST, detail=DETAIL,
    ) -> io.NodeOutput:  # fmt: skip
        sigmas = _levels(cls, model, steps, denoise, schedule, latent_image, detail)
        given = (model, seed, cfg, sampler_name, sigmas, positive, negative, latent_image)
        if fast == NOT_FAST:
            return io.NodeOutput(sample(*given))
        drawing = Drawing(draw_card, draw_learned)
        return io.NodeOutput(sample(*given, through=fast_for(cls, Wish(fast), "fast", drawing)))


NODES = [AttuneScheduler, AttuneKSampler]
