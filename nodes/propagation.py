"""Propagation: a MODEL that runs whole on key steps and reuses features in between, and the fit of its key steps."""

from __future__ import annotations

import logging

from PIL import Image

from ..models.calibration import KeySteps, Point
from ._draw.axes import to_image
from ._draw.plots import draw_calibration, draw_speeds
from ._host.api import Profile, advanced, io, more_prompts, schema, shown_on
from ._host.folders import keep_fit
from ._host.live import show_live
from ._host.propagation import DEVICES, DTYPES, add_propagation, key_steps_for
from ._host.propagation.fit import fit_profile, measures_too_few
from ._host.solvers import sampler_names, scheduler_names
from ._plan import propagation as plan

LOG = logging.getLogger(__name__)
CATEGORY = "attune/speed"
LINKED = "'profile' takes a link, from 'Attune Fit Propagation' or 'Attune Load Profile'."


class AttunePropagation(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttunePropagation", "Attune Propagation", CATEGORY,
            "Saves time on every picture: most steps reuse what the inner layers computed on a few key steps.",
            search_aliases=[
                "encoder propagation", "block propagation", "faster diffusion", "deepcache", "first block cache",
                "teacache", "spectrum", "easycache", "cache", "speed",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A UNet (SD 1.x, SD 2.x, SDXL) or a transformer (SD3, Flux, Qwen-Image, Wan, …).",
                ),
                io.Combo.Input(
                    "mode", options=plan.MODES, default=plan.UNIFORM,
                    tooltip="Which steps compute the whole network. uniform: every n-th step. speed target: as few "
                    "as 'speed' needs. calibrated profile: those measured for this model; 'reuse' and 'forecast' are "
                    "then the profile's own. published keys: those of the paper.",
                ),
                io.Int.Input(
                    "interval", default=3, min=1, max=12,
                    tooltip="For uniform: how many steps lie from one key step (a step that is computed whole) to "
                    "the next. 1 switches the node off.",
                ),
                io.Float.Input(
                    "speed", default=1.5, min=1.0, max=10.0, step=0.05,
                    tooltip="For speed target: how many times less is computed. With a profile the log says what "
                    "this costs in fidelity.",
                ),
                io.Combo.Input(
                    "reuse", options=plan.PARTS, default=plan.AUTOMATIC,
                    tooltip="What the steps in between compute. automatic: 'top level fresh' of a UNet, or 'two levels "
                    "fresh' where that is cheap and more faithful, as in SDXL with a solver that adds noise; 'first "
                    "block fresh' of a transformer. encoder reused, first two thirds reused: as in the paper.",
                ),
                *advanced(
                    io.Boolean.Input(
                        "forecast", default=True,
                        tooltip="Extrapolate the features from the last two key steps instead of holding the last "
                        "ones.",
                    ),
                    io.Int.Input(
                        "keep_last", default=4, min=0, max=20,
                        tooltip="For uniform and speed target: how many steps at the end compute the whole network, "
                        "because no later step could repair their errors.",
                    ),
                    io.Float.Input(
                        "start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                        tooltip="Where in the sampling the node begins to work. Before that, every step computes "
                        "the whole network.",
                    ),
                    io.Float.Input(
                        "end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                        tooltip="Where in the sampling the node stops working. After that, every step computes the "
                        "whole network.",
                    ),
                    io.Float.Input(
                        "prior_noise", default=0.0, min=0.0, max=0.01, step=0.0005,
                        tooltip="A little of the first noise, added again in the second half; the paper uses 0.003.",
                    ),
                    *_keeping(),
                ),
                io.Combo.Input(
                    "guidance", options=plan.GUIDANCES, default=plan.EVERY_STEP, optional=True,
                    tooltip="How often the negative prompt is computed. every second step: in between its answer is "
                    "predicted, which saves up to a quarter of the computing. With 'interval' at 1 this is all that "
                    "the node does, on every network.",
                ),
                Profile.Input(
                    "profile", optional=True,
                    tooltip="A calibration of this model by Attune Fit Propagation, for the modes calibrated profile "
                    "and speed target.",
                ),
                io.Float.Input(
                    "fidelity", default=0.0, min=0.0, max=100.0, step=1.0, optional=True,
                    tooltip="For calibrated profile: how near the pictures must stay to the run without reuse, in "
                    "dB. The node takes the fastest setting that was measured to stay so near. If there is none, "
                    "every step computes the whole network. 0 means 45 dB or, if no setting reaches that, the most "
                    "faithful one.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, to be sampled faster.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, profile=None):
        return True if profile is None else LINKED  # None: linked, not known yet

    @classmethod
    def execute(cls, model, mode, profile=None, **inputs) -> io.NodeOutput:
        if profile is None and mode == plan.CALIBRATED:
            raise ValueError(plan.NEEDS_PROFILE)
        calibration = None if profile is None else key_steps_for(model, profile)
        settings = plan.ReuseSettings(mode, **inputs, calibration=calibration)
        patched, curve = add_propagation(model, settings), None
        if calibration is not None and mode in (plan.CALIBRATED, plan.TARGET):
            curve = shown_on(cls, to_image(plot_of(settings, calibration)))
        return io.NodeOutput(patched, ui=curve)


def plot_of(settings: plan.ReuseSettings, fit: KeySteps):
    """Fidelity over speed, with what is asked for and the setting that runs."""
    wanted = settings.fidelity if settings.mode == plan.CALIBRATED else 0.0
    return draw_speeds(fit.points, plan.chosen_point(settings, fit), wanted or plan.FIDELITY)


def _keeping() -> list:
    """How features are kept, and how many steps of a decoder run at once."""
    return [
        io.Combo.Input(
            "cache_dtype", options=list(DTYPES), default="as computed",
            tooltip="How the features are kept. half: float16, for models that compute in float32.",
        ),
        io.Combo.Input(
            "cache_device", options=list(DEVICES), default="as computed",
            tooltip="Where the features are kept. cpu frees video memory and costs a transfer per step.",
        ),
        io.Int.Input(
            "memory_limit", default=0, min=0, max=65536,
            tooltip="How much memory the features may take, in MB. Above that, the node first halves their "
            "precision, then keeps fewer of them, then moves them to the CPU. 0 means no limit.",
        ),
        io.Combo.Input(
            "parallel", options=["auto", "off", "2", "3", "4", "6", "8"], default="auto",
            tooltip="For encoder reused: how many coming steps are decoded in one batch. auto: up to 4, as memory "
            "allows. This is faster on a large GPU with small pictures, and costs memory.",
        ),
    ]  # fmt: skip


class AttuneFitPropagation(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneFitPropagation", "Attune Fit Propagation", CATEGORY,
            "Measures on your model which steps need the network, and what each speed costs in fidelity.",
            search_aliases=[
                "calibrate", "faster diffusion", "deepcache", "block propagation", "encoder propagation", "spectrum",
                "taylorseer", "forecast",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to calibrate, UNet or transformer, as loaded."),
                io.Conditioning.Input("positive", tooltip="A typical prompt: the calibration holds for others, too."),
                io.Conditioning.Input("negative", tooltip="The usual negative prompt."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the usual size. Take a batch of 4 if the solver adds noise.",
                ),
                *advanced(
                    io.Int.Input(
                        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                        tooltip="The seed of the picture that is measured.",
                    ),
                ),
                io.Int.Input("steps", default=25, min=8, max=200, tooltip="Steps of the run to be made faster."),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance of that run.",
                ),
                io.Combo.Input(
                    "sampler_name", options=sampler_names(), default="euler", tooltip="The solver of that run.",
                ),
                io.Combo.Input(
                    "scheduler", options=scheduler_names(), default="normal", tooltip="The schedule of that run.",
                ),
                io.Combo.Input(
                    "reuse", options=plan.FITTED_PARTS, default=plan.AUTOMATIC,
                    tooltip="What the steps in between compute. automatic: 'nothing asked', which forecasts the "
                    "network's answers from earlier ones and works on every network; for SDXL and a solver that adds "
                    "noise, the features that cost little. The others reuse features of a UNet or a transformer; "
                    "'encoder reused' takes longest.",
                ),
                io.Float.Input(
                    "fastest", default=8.0, min=1.25, max=10.0, step=0.25,
                    tooltip="Settings up to this speed are tried, a short run or two for each.",
                ),
                *advanced(
                    io.Int.Input(
                        "longest", default=4, min=2, max=8,
                        tooltip="For reused features: the most steps from one key step to the next. The measuring "
                        "time grows with the square of this number.",
                    ),
                ),
                *advanced(
                    io.Int.Input(
                        "search", default=0, min=0, max=100, optional=True,
                        tooltip="For forecasts: how many short runs look for better steps, for each setting of 3x "
                        "and more, or below 50 dB. 10 to 30 are good.",
                    ),
                ),
                *more_prompts(
                    "Another typical prompt. A fit to four prompts holds for other prompts far better than a fit to "
                    "one."
                ),
            ],
            outputs=[
                Profile.Output(display_name="profile", tooltip="The calibration, for Attune Apply Profile."),
                io.Image.Output(
                    display_name="plot",
                    tooltip="Left: how much the features change, and the key steps. Right: fidelity against speed.",
                ),
                io.String.Output(display_name="report", tooltip="The settings found, and what each of them costs."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, **inputs) -> io.NodeOutput:
        profile, fit, changes = fit_profile(model, draw=_drawn, **inputs)
        chosen = plan.calibrated_point(fit)
        too_few = measures_too_few(inputs["sampler_name"], inputs["latent_image"])
        report = report_of(profile.name, fit, chosen, too_few)
        LOG.info("Attune Fit Propagation: %s", report.replace("\n", "; "))
        drawn = _drawn(fit, changes)
        show_live(drawn)
        plot = to_image(drawn)
        return io.NodeOutput(profile, plot, f"{report}\n{keep_fit(profile)}", ui=shown_on(cls, plot))


def _drawn(fit: KeySteps, changes: dict[str, list[float]]) -> Image.Image:
    """The calibration as far as it is."""
    chosen = plan.calibrated_point(fit) if fit.points else None
    return draw_calibration(changes, len(fit.sigmas) - 1, fit.points, chosen)


def report_of(name: str, fit: KeySteps, chosen: Point, too_few: bool = False) -> str:
    """One line per setting, the recommended one marked; too_few: what was measured holds for one picture only."""
    lines = [f"{name}: {fit.solver}, {len(fit.sigmas) - 1} steps. Fidelity is to the run without reuse."]
    for point in fit.points:
        mark = " <- calibrated profile" if point is chosen else ""
        lines.append(f"{point.speed:.2f}x: {point.psnr:.1f} dB, {plan.kinds_of(point)}{mark}")
    if chosen.psnr < plan.FIDELITY:
        least = f"{plan.FIDELITY:g} dB"
        lines.append(f"No setting stays within {least}: prefer fewer steps, or a better solver, for this run.")
    if too_few:
        lines.append(
            f"{fit.solver} adds noise, and every picture has its own: connect a latent of 4 pictures, so that the key "
            "steps hold for others, too."
        )
    return "\n".join(lines)


NODES = [AttunePropagation, AttuneFitPropagation]
