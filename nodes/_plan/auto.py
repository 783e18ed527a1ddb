"""What of the pack suits a run, and why: the decisions of Attune Auto, without a host.

Each function answers for one method: what to use, or why nothing and which file or switch would change that. "Shown to
help" means a table of docs/results.md on the demo model of that kind, or a publication that measured this very family.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from ...models.calibration import (
    ASPECTS,
    BLOCKS,
    ENCODER,
    FORECAST,
    NOISE_SHIFT,
    OF_THE_MODEL,
    SCHEDULE,
    Calibration,
    Misfit,
    ModelIdentity,
    Planned,
    Size,
    misfits,
    pick_profile,
    size_text,
)
from ...models.makers import published_for, shipped_makers
from ...models.npnet import NPNetConfig
from ...models.one_more_step import ENCODERS
from .makers import Sampled, makers_schedule
from .named_schedules import AUTO
from .noise_shift import shift_for
from .propagation import FIDELITY, FIRST, ONE, TWO_LEVELS, calibrated_point
from .solvers import SOLVERS, table_name

SHOWN, ALWAYS, OFF = "where shown to help", "wherever it fits", "off"
WISHES = [SHOWN, ALWAYS, OFF]
FAITHFUL, FAST = "faithful", "fast"
SPEEDS = [OFF, FAITHFUL, FAST]

TOLD, SHIFT = "aligned timesteps", "noise shift"
START, NOISE, SPEED = "one more step", "golden noise", "propagation"
METHODS = [SCHEDULE, TOLD, SHIFT, START, NOISE, SPEED]
REDENOISE = "re-denoise"

TABLE_SOLVERS = ("euler", "ddim", "dpmpp_2m", "dpmpp_2m_sde")  # those that Align Your Steps was published with
TABLE_STEPS = range(5, 51)
SHOWN_FORMS = {  # solver -> what beats every stock schedule on the demo model of these families, and at which steps
    "dpmpp_2m": ("KL-optimal, c = 1.4", range(5, 9), ("SD3",)),
    "uni_pc": ("KL-optimal", range(5, 11), ("SD3", "SD15", "AttuneDemo")),
}
# Of the missing trace to the noise of the mean: at 1.2 nothing was gained with guidance, at 19 it was.
MISSING_TRACE = 5.0
FEW = 8  # steps of distilled models, at most
PURE_NOISE = 500  # sigma_max of models that begin at pure noise
# What is reused, solver -> (steps at least, one key step in so many, dB to the run without): docs/results.md
REUSE = {
    (ONE, "euler"): ((50, 5, 48.0), (25, 3, 45.8), (20, 2, 53.0)),
    (ONE, "dpmpp_2m"): ((50, 3, 52.9), (20, 2, 51.0)),
    (ONE, "euler_ancestral"): ((25, 2, 45.1),),
    (TWO_LEVELS, "euler_ancestral"): ((25, 3, 49.8),),
    (TWO_LEVELS, "dpmpp_2m_sde"): ((25, 3, 51.6),),
    (FIRST, "euler"): ((20, 2, 52.7),),
}
EVERY = ", every "
FEWEST_BLOCKS = 8  # of a transformer: with fewer the first block costs more than it saves
TUNE = "Attune Fit Sampler fits one for this model and sampler, and keeps it"


@dataclass(frozen=True)
class Facts:
    """What a MODEL and a LATENT tell.

    network: "unet", "transformer" or "" for others; blocks: of a transformer. latent_space: the class of the latents,
    of so many channels; text_width: of the prompts that a UNet takes, None where unknown. size: of the picture in
    pixels (width, height), None for what is no picture; area: latent pixels of one channel.
    """

    model: ModelIdentity
    network: str
    latent_space: str
    channels: int
    size: Size | None
    area: int
    blocks: int = 0
    text_width: int | None = None
    distilled: bool = False  # as its noise says: ModelSamplingDiscrete with lcm
    frames: int = 1  # of the latent
    deep: bool = False  # most of a UNet's work lies below its two highest levels, as in SDXL

    @property
    def family(self) -> str:
        return self.model.families[0]

    @property
    def sampled(self) -> Sampled:
        return Sampled(self.size, self.frames, self.area * self.channels * self.frames)


@dataclass(frozen=True)
class Run:
    """What is to be sampled. prompt_width: of the prompt connected for One More Step, None without one. levels: of the
    stock schedule, () where they are not known."""

    steps: int
    solver: str
    cfg: float
    denoise: float = 1.0
    prompt_width: int | None = None
    stock: str = "stock"  # the schedule that runs where none is chosen
    levels: tuple[float, ...] = ()


def looks_distilled(facts: Facts, run: Run) -> bool:
    """Turbo and Lightning models have the network of their base: they are known by how they are run, in a few steps
    without guidance."""
    return facts.distilled or run.solver == "lcm" or (run.steps <= FEW and run.cfg < 2)


@dataclass(frozen=True)
class Wishes:
    schedule: str = SHOWN
    one_more_step: str = SHOWN
    noise_shift: str = SHOWN
    golden_noise: str = SHOWN
    speed: str = OFF


@dataclass(frozen=True)
class Shelf:
    """What is installed, by the names of the loader nodes.

    profiles; modules of One More Step: the latents they are for, and the width of their prompts; networks for golden
    noise with the latents they are for, "" where the file does not say.
    """

    profiles: Mapping[str, Calibration] = field(default_factory=dict)
    modules: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    npnets: Mapping[str, tuple[NPNetConfig, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """pick: what is used, "" where the method is left out; enable: what would bring it in, "" where nothing does."""

    method: str
    pick: str
    why: str
    enable: str = ""

    def __str__(self) -> str:
        if self.pick:
            return f"+ {self.method}: {self.pick}. {self.why}" + (f" Closer: {self.enable}." if self.enable else "")
        return f"- {self.method}: left out. {self.why}" + (f" To have it: {self.enable}." if self.enable else "")


def decide(facts: Facts, run: Run, wishes: Wishes, shelf: Shelf, start: float | None = None) -> list[Decision]:
    """All decisions, one a method, in the order of METHODS; `start`: the stock schedule's first level, if known."""
    schedule = decide_schedule(facts, run, wishes.schedule, shelf)
    start = facts.model.sigma_max if schedule.pick or start is None else start
    return [
        schedule,
        decide_told(schedule, shelf),
        decide_shift(facts, run, wishes.noise_shift, shelf),
        decide_start(facts, run, wishes.one_more_step, shelf, start),
        decide_noise(facts, run, wishes.golden_noise, shelf),
        decide_speed(facts, replace(run, levels=()) if schedule.pick else run, wishes.speed, shelf),
    ]


def decide_schedule(facts: Facts, run: Run, wish: str, shelf: Shelf) -> Decision:
    """A fit for this very run, else what is published or shown for such models, else the stock schedule.

    Distilled models get what their makers run, or nothing: a schedule for many steps is wrong for them.
    """
    if wish == OFF:
        return Decision(SCHEDULE, "", "Switched off.")
    facts_of_solver = SOLVERS.get(table_name(run.solver))
    if facts_of_solver is not None and facts_of_solver.own_levels:
        return Decision(SCHEDULE, "", f"{run.solver} chooses its own levels.")
    fits = {name: one for name, one in shelf.profiles.items() if one.kind == SCHEDULE and one.is_fitted}
    ranked = [(*_rank(one, facts, run, wish), name) for name, one in fits.items()]
    stage, _, reason, name = min(ranked, default=(0, (0.0, 0), "", ""), key=lambda rank: (-rank[0], rank[1]))
    if stage == len(ASPECTS):
        return Decision(SCHEDULE, name, f"Fitted to this network with {run.solver}.{_measured(fits[name])}")
    near = f" The nearest fit, '{name}', is {reason}." if stage > ASPECTS.index("network") else ""
    flow = facts.model.space == "flow"
    if looks_distilled(facts, run):
        return _of_makers(facts, run, near) or _none_for_distilled(facts, near)
    if table := _table(facts, run, wish, shelf, near):
        return table
    shown = _closed_form(facts, run, SHOWN, near)
    of_makers = _of_makers(facts, run, near) if flow and not shown.pick else None
    return of_makers or _closed_form(facts, run, wish, near)


def _of_makers(facts: Facts, run: Run, near: str) -> Decision | None:
    """What the model's maker runs, None where that is not known."""
    one = published_for(facts.model)
    if one is None:
        return None
    _, said = makers_schedule(one, facts.model, run.steps, run.denoise, facts.sampled)
    return Decision(SCHEDULE, AUTO, f"{said}.{near}", "" if near else TUNE)


def _none_for_distilled(facts: Facts, near: str) -> Decision:
    fits = lambda one: one.space == facts.model.space and set(one.families) & set(facts.model.families)
    names = [name for name, one in shipped_makers().items() if not one.auto and fits(one)]
    why = "This run looks like that of a distilled model, which has timesteps of its own: take its makers' schedule."
    enable = f"choose its own in Attune Scheduler: {', '.join(names)}" if names else ""
    return Decision(SCHEDULE, "", why + near, enable)


def _table(facts: Facts, run: Run, wish: str, shelf: Shelf, near: str) -> Decision | None:
    tables = {one.name: name for name, one in shelf.profiles.items() if one.kind == SCHEDULE and not one.is_fitted}
    model = facts.model
    table = pick_profile([shelf.profiles[name] for name in tables.values()], model.families, facts.size)
    if table is None or table.space != model.space or not 0.9 < table.sigmas[0] / model.sigma_max < 1.01:
        return None
    shown = run.solver in TABLE_SOLVERS and run.steps in TABLE_STEPS
    if shown or wish == ALWAYS:
        why = f"{table.method} for {table.families[0]}" + ("" if shown else f", not shown with {run.solver}")
        return Decision(SCHEDULE, tables[table.name], why + f".{near}", "" if near else TUNE)
    return None


def _closed_form(facts: Facts, run: Run, wish: str, near: str) -> Decision:
    name, steps, families = SHOWN_FORMS.get(run.solver, ("KL-optimal, c = 1.4", range(0), ()))
    shown = run.steps in steps and bool({*families} & {*facts.model.families})
    if shown:
        return Decision(SCHEDULE, name, f"On the demo model of this kind it beats stock schedules.{near}", TUNE)
    if wish == ALWAYS:
        return Decision(SCHEDULE, name, f"It runs on every model; its gain on this one is not known.{near}", TUNE)
    return Decision(SCHEDULE, "", f"No gain is shown for such models with this solver and steps.{near}", TUNE)


def blocking(one: Calibration, facts: Facts, run: Run, wish: str) -> list[Misfit]:
    """The misfits that keep Auto from using a calibration: all but what LoRAs and a shift make uncertain, and other
    weights of the same network where the user wants it wherever it fits."""
    planned = Planned(table_name(run.solver), run.steps, run.cfg, facts.size or (0, 0), run.levels)
    allowed = {"patches", "shift", *(["weights"] if wish == ALWAYS else [])}
    return [misfit for misfit in misfits(one, facts.model, planned) if misfit.aspect not in allowed]


def _rank(one: Calibration, facts: Facts, run: Run, wish: str) -> tuple[int, tuple[float, int], str]:
    """How many of ASPECTS a fitted schedule meets in a row, how far its steps and its LoRAs are off, and what it is for
    instead."""
    found = blocking(one, facts, run, wish)
    stage, reason = (ASPECTS.index(found[0].aspect), found[0].short) if found else (len(ASPECTS), "")
    return stage, (abs(math.log(one.steps / run.steps)), len(misfits(one, facts.model))), reason


def _measured(profile: Calibration) -> str:
    """What fitting gained on noises that it had not seen: the last stage kept, against the best known schedule."""
    held = profile.metrics.get("held_out")
    errors = [error for error in held.values() if isinstance(error, float)] if isinstance(held, dict) else []
    if len(errors) < 2 or errors[0] <= 0:
        return ""
    return f" On held-out noise it has {errors[-1] / errors[0]:.2f} of the best known schedule's error."


def decide_told(schedule: Decision, shelf: Shelf) -> Decision:
    """The timesteps told to the network belong to the schedule that they were fitted with."""
    profile = shelf.profiles.get(schedule.pick)
    if profile is None or not profile.is_fitted:
        return Decision(TOLD, "", "Aligned timesteps come with a fitted schedule only.")
    if not profile.alignments:
        return Decision(TOLD, "", "The fit found no timesteps that help.")
    return Decision(TOLD, schedule.pick, "Fitted together with the schedule.")


def decide_shift(facts: Facts, run: Run, wish: str, shelf: Shelf) -> Decision:
    """The noise shift of the picture's size, from a profile of this network."""
    if wish == OFF:
        return Decision(SHIFT, "", "Switched off.")
    if facts.size is None:
        return Decision(SHIFT, "", "This latent is no picture.")
    shifts = {name: one for name, one in shelf.profiles.items() if one.kind == NOISE_SHIFT}
    another = lambda one: any(misfit.aspect in OF_THE_MODEL for misfit in blocking(one, facts, run, wish))
    found = {name: one for name, one in shifts.items() if not another(one)}
    if not found:
        return Decision(SHIFT, "", "No profile for this model is installed.", "a profile of Attune Fit Noise Shift")
    changing = [name for name, one in found.items() if not shift_for(one, facts.size)[0].is_identity]
    if not changing:
        return Decision(SHIFT, "", f"'{next(iter(found))}' changes nothing at {size_text(facts.size)}.")
    changing.sort(key=lambda name: len(misfits(found[name], facts.model)))  # one for these very LoRAs before others
    if wish == SHOWN:
        why = f"'{changing[0]}' is there, but on the demo model no picture got better by it (docs/noise_shift.md)."
        return Decision(SHIFT, "", why, f"set 'noise_shift' to '{ALWAYS}'")
    return Decision(SHIFT, changing[0], shift_for(found[changing[0]], facts.size)[1])


def decide_start(facts: Facts, run: Run, wish: str, shelf: Shelf, start: float) -> Decision:
    """One More Step, where at the first noise level `start` a trace of the picture is left that a run lacks."""
    if wish == OFF:
        return Decision(START, "", "Switched off.")
    if facts.model.space != "ve" or facts.model.sigma_max > PURE_NOISE:
        return Decision(START, "", "This model begins at pure noise: there is nothing to correct.")
    if facts.size is None or run.denoise < 1:
        return Decision(START, "", "The run does not begin from noise alone.")
    for_latents = {name: width for name, (space, width) in shelf.modules.items() if space == facts.latent_space}
    if not for_latents:
        known = {"SD15": "oms_b_openclip_15_21", "SDXL": "oms_b_openclip_xl or oms_l_mixclip_xl"}
        file = known.get(facts.latent_space)
        enable = f"{file} in models/one_more_step" if file else "Attune Train One More Step makes a module"
        return Decision(START, "", f"No module for {facts.latent_space} latents is installed.", enable)
    trace = facts.area / start**2
    if wish == SHOWN and trace < MISSING_TRACE:
        said = f"In a picture's mean brightness the missing trace is only {trace:.2g} times the noise"
        why = f"{said} (SD 1.5 at 512 px: 19 times)."
        return Decision(START, "", why, f"set 'one_more_step' to '{ALWAYS}'")
    if wish == SHOWN and looks_distilled(facts, run):
        why = "Distilled models begin at pure noise; the step may overdo it."
        return Decision(START, "", why, f"set 'one_more_step' to '{ALWAYS}'")
    name = next((name for name, width in for_latents.items() if width == run.prompt_width), "")
    if not name:
        name, width = next(iter(for_latents.items()))
        encoder = f" of {ENCODERS[width]}" if width in ENCODERS else ""
        came = "none is connected" if run.prompt_width is None else f"'positive' is {run.prompt_width} wide"
        why = f"'{name}' reads prompts {width} wide; {came}."
        return Decision(START, "", why, f"connect a prompt{encoder} to 'positive'")
    return Decision(START, name, f"In a picture's mean brightness the missing trace is {trace:.3g} times the noise.")


def decide_noise(facts: Facts, run: Run, wish: str, shelf: Shelf) -> Decision:
    """Golden noise from a network that was made for these latents and prompts, else by re-denoising."""
    if wish == OFF:
        return Decision(NOISE, "", "Switched off.")
    if facts.size is None or run.denoise < 1:
        return Decision(NOISE, "", "The run does not begin from noise alone.")
    if wish == SHOWN:
        return Decision(NOISE, "", "No visible gain is shown.", f"set 'golden_noise' to '{ALWAYS}'")
    fitting = [name for name, (config, space) in shelf.npnets.items() if _reads(config, space, facts)]
    if fitting:
        return Decision(NOISE, fitting[0], "Made for these latents and prompts; no visible gain is shown.")
    enable = "an NPNet for SDXL in models/npnet" if facts.latent_space == "SDXL" else "Attune Train NPNet makes one"
    if looks_distilled(facts, run) or (run.cfg <= 1 and "Flux" not in facts.model.families):
        return Decision(NOISE, "", "No NPNet fits, and re-denoising needs a model with guidance.", enable)
    return Decision(
        NOISE, REDENOISE, "No NPNet fits, so this takes 2 evaluations of the model. No visible gain is shown.", enable
    )


def _reads(config: NPNetConfig, space: str, facts: Facts) -> bool:
    return (
        config.channels == facts.channels
        and space in ("", facts.latent_space)
        and config.text != "pooled"
        and config.width == facts.text_width
    )


def decide_speed(facts: Facts, run: Run, wish: str, shelf: Shelf) -> Decision:
    """Propagation: calibrated for this network, else as far as the demo model of its kind allows. Forecasts are for the
    stock schedule's own levels, and serve every network."""
    if wish == OFF:
        return Decision(SPEED, "", "Switched off.", f"set 'speed' to '{FAITHFUL}' or '{FAST}'")
    kinds = [*([FORECAST] if run.levels else []), {"unet": ENCODER, "transformer": BLOCKS}.get(facts.network, "")]
    nearest = sorted(shelf.profiles.items(), key=lambda item: len(misfits(item[1], facts.model)))
    for kind, (name, one) in itertools.product(kinds, nearest):
        if one.kind == kind and one.key_steps is not None and not blocking(one, facts, run, wish):
            point = calibrated_point(one.key_steps)
            if wish == FAST:
                point = max(one.key_steps.points, key=lambda point: point.speed)
            return Decision(SPEED, name, f"Calibrated on this network: {point.speed:.2f}x at {point.psnr:.1f} dB.")
    if not facts.network:
        return Decision(SPEED, "", "The network is neither a UNet nor a transformer that the pack knows.")
    enable = "Attune Fit Propagation measures this model, and keeps its profile"
    if facts.network == "transformer" and facts.blocks < FEWEST_BLOCKS:
        return Decision(SPEED, "", f"The network has only {facts.blocks} blocks, so fewer steps gain more.", enable)
    solver = run.solver.removesuffix("_gpu")
    reuse = ONE if facts.network == "unet" else FIRST
    if facts.deep and (TWO_LEVELS, solver) in REUSE:
        reuse = TWO_LEVELS
    rows = [row for row in REUSE.get((reuse, solver), ()) if run.steps >= row[0]]
    rows = [row for row in rows if wish == FAST or row[2] >= FIDELITY]
    if not rows:
        least = "" if wish == FAST else f" to keep {FIDELITY:g} dB"
        return Decision(SPEED, "", f"No setting was measured{least} with this solver and so few steps.", enable)
    _, interval, psnr = rows[0]
    why = f"On the demo model of this kind, pictures keep {psnr:.1f} dB to the run without reuse."
    return Decision(SPEED, f"{reuse}{EVERY}{interval}", why, enable)


def key_steps_of(pick: str) -> tuple[str, int] | None:
    """What is reused and one key step in how many, None where a profile was picked."""
    reuse, every, interval = pick.partition(EVERY)
    return (reuse, int(interval)) if every else None


def auto_report(facts: Facts, run: Run, decisions: Collection[Decision], unread: Collection[str] = ()) -> str:
    """What was seen, then one line a method, those in use first; then what could not be read."""
    size = "no picture" if facts.size is None else size_text(facts.size)
    kind = {"ve": f"sigma up to {facts.model.sigma_max:.4g}", "flow": "flow"}[facts.model.space]
    head = f"{facts.family}, {kind}; {size}; {run.steps} steps of {run.solver} at cfg {run.cfg:g}"
    head += f", denoise {run.denoise:g}." if run.denoise < 1 else "."
    if not any(one.pick for one in decisions if one.method == SCHEDULE):
        head += f" The levels are those of '{run.stock}'."
    used = sorted(decisions, key=lambda one: not one.pick)
    return "\n".join([head, *map(str, used), *(f"! {line}" for line in unread)])
