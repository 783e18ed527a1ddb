"""Fit the schedule, or the timesteps alone, to a model, sampler, guidance, size and number of steps."""

from __future__ import annotations

import logging
import time

import torch

from ..kernels.gate import FEWEST, Verdict, judge
from ..kernels.schedules import check_sigmas
from ..kernels.timestep_aligner import CALLS_PER_STEP, align
from ..kernels.tuner import (
    TUNER_PRESETS,
    Progress,
    Runner,
    check_candidates,
    picture_errors,
    reference_error,
    reference_levels,
    tune,
)
from ..models.axes import to_image
from ..models.plots import Curve, draw_schedules
from ..models.tuning import (
    Setting,
    affordable,
    aligned_profile,
    stopped_profile,
    tuned_profile,
    tuning_report,
)
from ._host.api import Profile, io, schema, shown_on
from ._host.candidates import known_schedules
from ._host.folders import keep_fit, keep_profile
from ._host.models import noise_range, pixels
from ._host.session import ProgressBar, Solver, Solves, draw_noises, empty_latent, run_session, solver_of

LOG = logging.getLogger(__name__)
CATEGORY = "attune/schedules"

OUTPUTS = [
    Profile.Output(display_name="profile", tooltip="For Attune Apply Profile and Attune Save Profile."),
    io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels alone, for any custom sampler."),
    io.Image.Output(display_name="plot", tooltip="The levels before and after; dashed, what the network is told."),
    io.String.Output(display_name="report", tooltip="What was measured, kept and refused."),
]


def _run_inputs():
    """The run to fit to, as in the stock SamplerCustom."""
    return [
        io.Model.Input("model", tooltip="The model, with the LoRAs and model patches that it will run with."),
        io.Conditioning.Input("positive", tooltip="A typical prompt."),
        io.Conditioning.Input("negative", tooltip="The negative prompt that you usually take."),
        io.Float.Input(
            "cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01,
            tooltip="The guidance that you will sample with; the result holds for about half to twice of it.",
        ),
        io.Sampler.Input(
            "sampler",
            tooltip="The solver that you will sample with. For one that adds noise, its sibling without noise is run.",
        ),
        io.Latent.Input(
            "latent",
            tooltip="An empty latent of the size that you will sample; its content is not used. Of a batch, all "
            "pictures are fitted at once, at the cost of sampling them: worth it for small pictures.",
        ),
    ]  # fmt: skip


def _seed():
    return io.Int.Input(
        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
        tooltip="The first of the noises that are fitted on and held out; the others follow it.",
    )  # fmt: skip


class AttuneTuneSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="AttuneTuneSchedule",
            display_name="Attune Tune Schedule",
            category=CATEGORY,
            description="Find better noise levels and timesteps for your model, sampler and steps, and prove the gain.",
            search_aliases=["align your steps", "optimize schedule", "sigmas", "timestep aligner", "calibrate"],
            inputs=[
                *_run_inputs(),
                io.Int.Input(
                    "steps", default=8, min=2, max=100,
                    tooltip="The number of steps to fit for. The gain is largest from 5 to 12.",
                ),
                io.Combo.Input(
                    "preset", options=list(TUNER_PRESETS), default="mini",
                    tooltip="How thorough: at 8 steps at most about 800, 1700 or 3400 evaluations of the model. The "
                    "time is measured before it starts.",
                ),
                io.Float.Input(
                    "budget_minutes", default=30.0, min=0.0, max=10000.0, step=1.0,
                    tooltip="When the preset would take longer, a smaller one is taken, or none. 0: no limit.",
                ),
                _seed(),
                io.Sigmas.Input(
                    "sigmas", optional=True,
                    tooltip="A schedule of your own with as many steps: it enters the contest first.",
                ),
            ],
            outputs=OUTPUTS,
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        cfg,
        sampler,
        latent,
        steps,
        preset,
        budget_minutes,
        seed,
        sigmas=None,
    ) -> io.NodeOutput:
        solver, setting, empty = _setting(model, cfg, sampler, latent, seed)
        known = known_schedules(model, steps)
        if sigmas is not None:
            known = {"your sigmas": _own(sigmas, steps), **known}
        check_candidates(known)
        began = time.monotonic()

        def work(solves: Solves):
            seconds = solves.seconds_per_evaluation(setting.model.sigma_max, *draw_noises(empty, seed, 1))
            chosen, plan = affordable(
                preset, steps, len(known), solver.order, solver.first_order, seconds, budget_minutes
            )
            LOG.info("Attune Tune Schedule: %s", plan)
            reference = reference_levels(
                chosen.reference_steps, setting.space, setting.model.sigma_min, setting.model.sigma_max
            )
            deadline = began + 60 * budget_minutes
            draws = draw_noises(empty, seed, chosen.fit + chosen.held_out)
            in_time = lambda: not budget_minutes or time.monotonic() < deadline
            runner = _runner(solves, solver, setting)
            fit = tune(runner, known, reference, draws, chosen, setting.space, in_time)
            return _watched(fit, lambda now, levels: _stopped(now, levels, known, setting)), plan

        whole = torch.tensor([setting.model.sigma_max, 0.0])
        tuned, plan = run_session(model, positive, negative, cfg, solver, whole, empty, seed, setting.space, work)
        took = time.monotonic() - began
        report = tuning_report(tuned, setting, took, plan)
        LOG.info("Attune Tune Schedule:\n%s", report)
        a_map = tuned.alignment and tuned.alignment.through(setting.space)
        told = None if a_map is None else tuple(a_map(tuned.sigmas).tolist())
        curves = [
            Curve(f"start: {tuned.start}", tuple(known[tuned.start].tolist())),
            Curve("tuned" if tuned.changed else "kept", tuple(tuned.sigmas.tolist()), told),
        ]
        profile = tuned_profile(tuned, setting, preset, took)
        plot = draw_schedules(curves, f"{steps} steps of {solver.name}")
        ProgressBar(1).update(1, plot)  # the page shows the last live preview rather than what a node hands out
        picture = to_image(plot)
        if tuned.changed:
            report = f"{report}\n{keep_fit(profile)}"
        return io.NodeOutput(profile, tuned.sigmas.clone(), picture, report, ui=shown_on(cls, picture))


class AttuneAlignTimesteps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="AttuneAlignTimesteps",
            display_name="Attune Align Timesteps",
            category=CATEGORY,
            description="Keep the noise levels; fit what the network is told at each of them, for euler (DDIM).",
            search_aliases=["timestep aligner", "TTA", "ddim", "euler", "calibrate"],
            inputs=[
                *_run_inputs(),
                io.Sigmas.Input("sigmas", tooltip="The levels to keep, such as those of Attune Scheduler."),
                io.Int.Input(
                    "noises", default=2, min=1, max=16,
                    tooltip="How many noises are fitted on, each for 48 evaluations and 15 more for each step. Six "
                    "more pictures are held out to measure the gain.",
                ),
                _seed(),
            ],
            outputs=[OUTPUTS[0], OUTPUTS[2], OUTPUTS[3]],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, cfg, sampler, latent, sigmas, noises, seed) -> io.NodeOutput:
        solver, setting, empty = _setting(model, cfg, sampler, latent, seed)
        if not solver.first_order:
            raise ValueError(
                f"Timesteps are aligned to 'euler' (or 'ddim'), but the sampler is '{solver.name}': a fit would make "
                "it worse. Connect a KSamplerSelect with 'euler', or tune the levels with Attune Tune Schedule."
            )
        levels = _own(sigmas, len(sigmas) - 1)
        metrics, fitted, verdict = run_session(
            model, positive, negative, cfg, solver, levels, empty, seed, setting.space,
            lambda solves: _align(
                solves, setting, levels, draw_noises(empty, seed, noises + _held_out(empty)), noises
            ),
        )  # fmt: skip
        kept = verdict.accepted
        said = "kept" if kept else "not kept: the profile tells the network the true levels"
        report = "\n".join(
            [
                f"{len(levels) - 1} steps of {solver.name}, cfg {cfg:g}, {metrics['evaluations']} evaluations.",
                f"On held-out pictures {verdict.said}; {said}.",
                "sigma -> told to the network: "
                + ", ".join(f"{s:.4g} -> {t:.4g}" for s, t in zip(fitted.sigma, fitted.sigma_cond, strict=True)),
            ]
        )
        LOG.info("Attune Align Timesteps:\n%s", report)
        a_map = fitted.through(setting.space) if kept else None
        told = None if a_map is None else tuple(a_map(levels).tolist())
        profile = aligned_profile(fitted if kept else None, levels.tolist(), setting, metrics)
        picture = to_image(draw_schedules([Curve("levels", tuple(levels.tolist()), told)], "Aligned timesteps"))
        if kept:
            report = f"{report}\n{keep_fit(profile)}"
        return io.NodeOutput(profile, picture, report, ui=shown_on(cls, picture))


def _setting(model, cfg: float, sampler, latent: dict, seed: int):
    """Solver, Setting and an empty latent; everything that can be refused is refused here."""
    solver = solver_of(sampler, model)
    empty = empty_latent(model, latent)
    about = noise_range(model, weights=True)
    size = pixels(model, {"samples": empty})
    assert size is not None  # only nested latents have none
    return solver, Setting(about, solver.name, solver.runs, cfg, size, seed), empty


def _own(sigmas: torch.Tensor, steps: int) -> torch.Tensor:
    levels = check_sigmas(sigmas.detach().float().cpu().clone())
    if len(levels) - 1 != steps:
        raise ValueError(
            f"'steps' is {steps}, but 'sigmas' has {len(levels) - 1} steps ({len(levels)} levels). Make them agree."
        )
    if levels[-1] != 0:
        raise ValueError(
            f"'sigmas' must end in 0, but it ends in {float(levels[-1]):.4g}: connect a whole schedule, without "
            "SplitSigmas."
        )
    return levels


def _runner(solves: Solves, solver: Solver, setting: Setting) -> Runner:
    denoise = solves.denoise if solver.first_order else None
    return Runner(solves.solve, solves.record, denoise, solver.order, setting.model.sigma_max)


def _watched(fit, stopped):
    """The result of `tune`, with the node's bar and its best curve while it runs; `stopped`: told how far it came."""
    bar, shown, picture, best = None, None, None, None
    try:
        while True:
            now = next(fit)
            bar = bar or ProgressBar(now.predicted)
            best = now
            if now.best is not None and now.best is not shown:
                shown = now.best
                title = f"{now.stage}: error {now.error:.4f}"
                picture = draw_schedules([Curve("best so far", tuple(shown.tolist()))], title)
            bar.update(now.evaluations, picture)
    except StopIteration as end:
        return end.value
    except BaseException:
        if best is not None and best.best is not None:
            stopped(best, best.best)
        raise


def _stopped(now: Progress, best: torch.Tensor, known: dict[str, torch.Tensor], setting: Setting) -> None:
    """Keep what the search has found so far; a known schedule needs no keeping."""
    levels = ", ".join(f"{s:.4f}" for s in best.tolist())
    where = "a known schedule"
    if not any(torch.equal(best, one) for one in known.values()):
        try:
            where = f"kept as {keep_profile(stopped_profile(now, setting)).name}, not proved on held-out noises"
        except ValueError as error:
            where = str(error)
    LOG.warning("Attune Tune Schedule stopped while %s. Best levels so far: %s; %s", now.stage, levels, where)


def _held_out(empty: torch.Tensor) -> int:
    """How many noises hold the pictures that the gate needs."""
    return -(-FEWEST // len(empty))


def _align(solves: Solves, setting: Setting, levels: torch.Tensor, draws: list[torch.Tensor], fit_on: int):
    """Metrics, the fit on the first `fit_on` of `draws`, and what the gate finds on the others, which are held out."""
    reference = reference_levels(
        TUNER_PRESETS["standard"].reference_steps, setting.space, setting.model.sigma_min, float(levels[0])
    )
    paths = [solves.record(reference, noise) for noise in draws]
    coarse = solves.record(torch.cat([reference[:-1:2], reference[-1:]]), draws[0]).end
    doubt, done, steps = reference_error(paths[0].end, coarse), solves.evaluations, len(levels) - 1
    bar = ProgressBar(done + CALLS_PER_STEP * steps * fit_on + 2 * steps * (len(draws) - fit_on))
    fit = align(solves.denoise, levels, paths[:fit_on], setting.space, setting.model.sigma_max)
    try:
        while True:
            bar.update(done + next(fit))
    except StopIteration as end:
        fitted = end.value

    def errors(a_map) -> torch.Tensor:
        unseen = zip(draws[fit_on:], paths[fit_on:], strict=True)
        return torch.cat([picture_errors(solves.solve(levels, noise, a_map), path.end) for noise, path in unseen])

    before = errors(None)
    after = errors(fitted.through(setting.space)) if fitted.changes else before
    verdict: Verdict = judge(before, after, doubt=doubt)
    metrics = {
        "held_out": {"start": verdict.before, "aligned": verdict.after},
        "gain_per_step": list(fitted.gain),
        "evaluations": solves.evaluations,
    }
    return metrics, fitted, verdict


NODES = [AttuneTuneSchedule, AttuneAlignTimesteps]
