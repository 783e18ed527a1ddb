"""Fit the schedule, or the timesteps alone, to a model, sampler, guidance, size and number of steps."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch

from ..kernels.schedules import check_sigmas
from ..kernels.tuner import TUNER_PRESETS, Progress, Runner, Tuned, check_candidates, reference_levels, tune
from ._draw.axes import to_image
from ._draw.plots import Curve, draw_schedules
from ._draw.sheets import draw_card
from ._host.api import ExecutionBlocker, Profile, advanced, io, more_prompts, schema, shown_on, text_on
from ._host.card import Shown, card_of, keep_card
from ._host.fit_run import Task, fit_run, rival_schedules, rivals_of
from ._host.folders import keep_fit, keep_profile
from ._host.identity import identify, pixels
from ._host.live import ProgressBar, show_live
from ._host.session import REFERENCE, Solver, Solves, draw_noises, empty_latent, in_turn, run_session, solver_of
from ._host.stock_schedules import known_schedules
from ._plan.fit_run import (
    EXACT_PATH,
    YOUR_RUN,
    check_looks,
    counts_of,
    evaluations,
    in_short,
    proved_profile,
    run_report,
)  # fmt: skip
from ._plan.fit_sampler import Setting, affordable, stopped_profile, tuned_profile, tuning_report
from ._plan.time_left import TimeLeft, duration

LOG = logging.getLogger(__name__)
CATEGORY = "attune/schedules"
NO_CARD = ExecutionBlocker(None)  # what is behind the card does not run, and nothing is said of it
WHOLE = 0.98  # of the model's highest noise level: from here a schedule is a whole one


def _run_inputs():
    """The run to fit to, as in the stock SamplerCustom."""
    return [
        io.Model.Input("model", tooltip="The model, with the LoRAs and model patches that it will run with."),
        io.Conditioning.Input("positive", tooltip="A typical prompt."),
        io.Conditioning.Input("negative", tooltip="The negative prompt that you usually take."),
        io.Float.Input(
            "cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01,
            tooltip="The guidance that you will sample with. A fitted schedule stays good from about half of this "
            "value to twice of it, 'coefficients' from half of it to 1.2 times. Beyond that, they are worse than "
            "plain steps.",
        ),
        io.Sampler.Input(
            "sampler",
            tooltip="The solver that you will sample with. If it adds noise, the fit runs its sibling that adds none.",
        ),
        io.Latent.Input(
            "latent",
            tooltip="An empty latent of the size that you will sample; its content is not used. All pictures of a "
            "batch are fitted at once. That costs as much as sampling them, which is worth it for small pictures.",
        ),
    ]  # fmt: skip


class AttuneFitSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneFitSampler", "Attune Fit Sampler", CATEGORY,
            "Fits a short run to your own long one, or a schedule to your sampler, and proves the gain.",
            search_aliases=["align your steps", "optimize schedule", "sigmas", "timestep aligner", "TTA", "calibrate"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                *_run_inputs(),
                io.Int.Input(
                    "steps", default=8, min=2, max=100,
                    tooltip="The number of steps to fit for. The gain is largest from 5 to 12.",
                ),
                io.Combo.Input(
                    "preset", options=list(TUNER_PRESETS), default="mini",
                    tooltip="How thorough the fit is. At 8 steps, mini, quick and standard take at most about 800, "
                    "1700 and 3400 evaluations of the model. 'coefficients' are fitted to 1, 2 or 4 noises and "
                    "proved on 6, 9 or 12 others, which takes about 480, 1120 or 1970 evaluations for a long run of "
                    "30 steps. The node estimates the time before it starts.",
                ),
                io.Boolean.Input(
                    "levels", default=True,
                    tooltip="Search for better noise levels. Off: those of 'sigmas' stay, or else the best known ones.",
                ),
                *advanced(
                    io.Boolean.Input(
                        "timesteps", default=True,
                        tooltip="Without 'coefficients': fit what the network is told at each level. This works for "
                        "euler (ddim) alone; other samplers keep the true levels.",
                    ),
                    io.Float.Input(
                        "budget_minutes", default=30.0, min=0.0, max=10000.0, step=1.0,
                        tooltip="If the preset would take longer than this, the node takes a smaller one, or "
                        "refuses. 0 means no limit.",
                    ),
                    io.Int.Input(
                        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                        tooltip="The seed of the first noise. The fit learns from some noises and is judged on "
                        "others; their seeds follow this one.",
                    ),
                ),
                io.Boolean.Input(
                    "coefficients", default=False, optional=True,
                    tooltip="Fit the sampler itself: a run of 'steps' evaluations that ends where a long run does. "
                    "Off: fit the schedule of your sampler, and the timesteps.",
                ),
                io.Combo.Input(
                    "to", options=[YOUR_RUN, EXACT_PATH], default=YOUR_RUN, optional=True,
                    tooltip="What 'coefficients' are fitted to. your run: your sampler on the long schedule in "
                    "'sigmas'. exact path: where many small steps lead.",
                ),
                *advanced(
                    io.String.Input(
                        "more_steps", default="", optional=True,
                        tooltip="Further numbers of steps to fit from the same long runs, such as 6, 8, 12.",
                    )
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True,
                    tooltip="With 'coefficients' fitted to your run: its long schedule. Without 'coefficients': a "
                    "schedule of your own with 'steps' steps, which competes first and is kept if 'levels' is off.",
                ),
                *more_prompts(
                    "Another typical prompt. A fit to four prompts holds for other prompts better than a fit to "
                    "one, and costs four times as much."
                ),
            ],
            outputs=[
                Profile.Output(display_name="profile", tooltip="For Attune Apply Profile and Attune Save Profile."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels alone, for any custom sampler."),
                io.Image.Output(
                    display_name="plot",
                    tooltip="The levels before and after the fit. The dashed line is what the network is told.",
                ),
                io.String.Output(display_name="report", tooltip="What was measured, kept and refused."),
                io.Image.Output(
                    display_name="card",
                    tooltip="With 'coefficients': a picture to share, with the model, the machine, the seconds, "
                    "what was proved, and two pictures.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, cfg, sampler, latent, steps, preset="mini", levels=True, timesteps=True,
        budget_minutes=30.0, seed=0, coefficients=False, to=YOUR_RUN, more_steps="", sigmas=None,
        **more_positives,
    ) -> io.NodeOutput:  # fmt: skip
        solver, setting, empty = _setting(model, cfg, sampler, latent, seed)
        positive, prompts = in_turn(positive, more_positives, "Attune Fit Sampler")
        empty = torch.cat([empty] * prompts)
        if coefficients:
            counts = counts_of(steps, more_steps)
            check_looks(len(counts), TUNER_PRESETS[preset].held_out * len(empty), preset)
            task = _task(sigmas if to == YOUR_RUN else None, to, counts, levels, setting.model.sigma_max)
            return _sampler(cls, model, positive, negative, solver, setting, empty, task, preset, budget_minutes)
        _check_switches(solver, levels, timesteps)
        known = _contest(model, steps, sigmas, levels)
        began, what = time.monotonic(), {"levels": levels, "timesteps": timesteps}

        def work(solves: Solves):
            seconds = solves.seconds_per_evaluation(setting.model.sigma_max, *draw_noises(empty, seed, 1))
            aligned = timesteps and solver.first_order
            cost = lambda one: one.evaluations(steps, len(known), solver.calls, aligned)
            needed = {name: cost(one) for name, one in TUNER_PRESETS.items()}
            chosen, plan = affordable(preset, needed, seconds, budget_minutes)
            LOG.info("Attune Fit Sampler: %s", plan)
            about = setting.model
            reference = reference_levels(chosen.reference_steps, setting.space, about.sigma_min, about.sigma_max)
            deadline = began + 60 * budget_minutes
            in_time = lambda: not budget_minutes or time.monotonic() < deadline
            runner = Runner(
                solves.solve, solves.record, solves.denoise if solver.first_order else None, solver.calls,
                about.sigma_max,
            )  # fmt: skip
            draws = draw_noises(empty, seed, chosen.fit + chosen.held_out)
            fit = tune(runner, known, reference, draws, chosen, setting.space, in_time, **what)
            stopped = lambda now, best: _stopped(now, best, known, setting)
            most = chosen.evaluations(steps, len(known), solver.calls, aligned)
            return _watched(fit, _Watch(cls, solves, most, seconds, "reference"), stopped), plan

        whole = torch.tensor([setting.model.sigma_max, 0.0])
        tuned, plan = run_session(model, positive, negative, cfg, solver, whole, empty, seed, setting.space, work)
        took = time.monotonic() - began
        report = tuning_report(tuned, setting, took, plan, **what)
        LOG.info("Attune Fit Sampler:\n%s", report)
        profile, plot = tuned_profile(tuned, setting, preset, took), _plot(tuned, known, setting)
        text_on(cls)(f"{'Fitted' if tuned.changed else 'Nothing better found'}, {duration(took)}.")
        show_live(plot)
        picture = to_image(plot)
        if tuned.changed:
            report = f"{report}\n{keep_fit(profile)}"
        return io.NodeOutput(profile, tuned.sigmas.clone(), picture, report, NO_CARD, ui=shown_on(cls, picture))


def _task(sigmas: torch.Tensor | None, to: str, counts: list[int], levels: bool, highest: float) -> Task:
    """What is fitted to what; ValueError where the long run is not there, or is no longer than the short ones."""
    if to == EXACT_PATH:
        return Task(None, counts, levels)
    if sigmas is None:
        raise ValueError(
            "'coefficients' are fitted to your own long run, but 'sigmas' is not connected. Connect the schedule that "
            f"you sample with, such as BasicScheduler's, set 'to' to '{EXACT_PATH}', or switch 'coefficients' off."
        )
    long = check_sigmas(sigmas.detach().float().cpu().clone())
    if long[0] < WHOLE * highest or long[-1] != 0:
        raise ValueError(
            f"'sigmas' goes from {float(long[0]):.4g} to {float(long[-1]):.4g}, but the known samplers that a fit has "
            f"to beat go from this model's {highest:.4g} to 0. Connect a whole schedule: 'denoise' 1, no SplitSigmas. "
            "For img2img let Attune Fast Sampler learn the run."
        )
    if len(long) - 1 <= max(counts):
        raise ValueError(
            f"'sigmas' has {len(long) - 1} steps, but a fit for {max(counts)} needs a longer run to follow. Give the "
            "long schedule that you sample with, or fewer 'steps'."
        )
    return Task(long, counts, levels)


def _sampler(
    cls, model, positive, negative, solver: Solver, setting: Setting, empty, task: Task, preset: str, minutes: float
) -> io.NodeOutput:  # fmt: skip
    """Fit the sampler itself: profile, levels, plot and report."""
    began, about = time.monotonic(), setting.model
    exact = task.sigmas is None
    steps = TUNER_PRESETS[preset].reference_steps if task.sigmas is None else len(task.sigmas) - 1
    rivals = len(rivals_of(solver)) * len(rival_schedules(model, task.counts[0]))

    def work(solves: Solves):
        seconds = solves.seconds_per_evaluation(about.sigma_max, *draw_noises(empty, setting.seed, 1))
        calls = steps * (1 if exact else solver.calls)
        cost = lambda one: evaluations(one, calls, task.counts, rivals, exact, len(empty))
        needed = {name: cost(one) for name, one in TUNER_PRESETS.items()}
        chosen, plan = affordable(preset, needed, seconds, minutes, "steps in 'sigmas' or 'more_steps',")
        LOG.info("Attune Fit Sampler: %s", plan)
        fit = fit_run(model, solves, setting, solver, task, chosen, empty, minutes)
        pictures, run_setting = chosen.held_out * len(empty), "" if exact else solves.setting
        stopped = lambda proofs: _keep_stopped(proofs, setting, task, pictures, time.monotonic() - began, run_setting)
        watch = _Watch(cls, solves, cost(chosen) - solves.evaluations, seconds, "long runs")
        proofs, path, long_seconds = _followed(fit, watch, stopped)
        return proofs, path, plan, pictures, run_setting, solves.evaluations, (long_seconds, long_seconds / calls)

    whole = torch.tensor([about.sigma_max, 0.0])
    proofs, path, plan, pictures, run_setting, used, (long_seconds, each) = run_session(
        model, positive, negative, setting.cfg, solver, whole, empty, setting.seed, setting.space, work
    )
    took, long = time.monotonic() - began, path.sigmas.tolist()
    followed = replace(setting, solver=REFERENCE, runs=REFERENCE) if exact else setting
    profile = proved_profile(proofs, followed, long, pictures, took, run_setting)
    what = "the exact path" if exact else "your run"
    report = run_report(proofs, followed, len(long) - 1, what, plan, took, used, task.counts)
    LOG.info("Attune Fit Sampler:\n%s", report)
    shown = [one.run for one in (profile.runs if profile else proofs)]
    curves = [Curve(f"{one.steps} steps", one.sigmas) for one in shown[:5]]
    plot = draw_schedules([Curve(f"{len(long) - 1} steps of {followed.runs}", tuple(long)), *curves], "Fitted sampler")
    show_live(plot)
    text_on(cls)(in_short(profile, took))
    picture = to_image(plot)
    if profile is None:
        none = ExecutionBlocker(f"No fitted sampler was proved. {report}")
        return io.NodeOutput(none, none, picture, report, NO_CARD, ui=shown_on(cls, picture))
    best = max((one for one in proofs if one.verdict.accepted), key=lambda one: one.psnr)
    times = long_seconds / len(empty), each * best.run.steps / len(empty)
    card = card_of(model, profile, Shown(times, (path.end, best.end), best.run.steps), draw_card)
    said = f"{report}\n{keep_fit(profile, lambda kept: keep_card(card, kept))}"
    shared = NO_CARD if card is None else to_image(card)
    return io.NodeOutput(profile, torch.tensor(shown[-1].sigmas), picture, said, shared, ui=shown_on(cls, picture))


def _keep_stopped(
    proofs, setting: Setting, task: Task, pictures: int, seconds: float, run_setting: str
) -> None:  # fmt: skip
    """Keep what was proved before the user stopped, to the user's own run."""
    if task.sigmas is None:
        return
    profile = proved_profile(proofs, setting, task.sigmas.tolist(), pictures, seconds, run_setting)
    if profile is not None:
        LOG.warning("Attune Fit Sampler was stopped. %s", keep_fit(profile))


class _Watch:
    """The node's bar, picture and time left while a fit runs; counts from the evaluations made before it.

    most: evaluations of the fit, at most. seconds: that one takes.
    """

    def __init__(self, cls, solves: Solves, most: int, seconds: float, stage: str):
        self._bar, self._left = ProgressBar(most), TimeLeft(text_on(cls), most, seconds)
        self._solves, self._before, self._stage = solves, solves.evaluations, stage
        self._picture = None
        solves.listen(self._evaluated)

    def at(self, stage: str, picture=None) -> None:
        self._stage, self._picture = stage, picture or self._picture
        self._bar.update(self._solves.evaluations - self._before, self._picture)

    def _evaluated(self, calls: int) -> None:
        self._bar.update(calls - self._before)
        self._left.update(calls - self._before, self._stage)


def _followed(fit, watch: _Watch, stopped):
    """The result of `fit_run`, its levels shown meanwhile; `stopped` is told what was proved by then."""
    shown, proofs = None, ()
    while True:
        try:
            now = next(fit)
        except StopIteration as end:
            return end.value
        except BaseException:
            stopped(proofs)
            raise
        proofs, picture = now.proofs or proofs, None
        if now.run is not None and now.run is not shown:
            shown = now.run
            picture = draw_schedules([Curve(f"{shown.steps} steps", shown.sigmas)], now.stage)
        watch.at(now.stage, picture)


def _check_switches(solver: Solver, levels: bool, timesteps: bool) -> None:
    if not (levels or timesteps):
        raise ValueError("There is nothing to fit: switch on 'levels', 'timesteps' or both.")
    if not levels and not solver.first_order:
        raise ValueError(
            f"Timesteps are aligned to 'euler' (or 'ddim'), but the sampler is '{solver.name}': a fit would make it "
            "worse. Connect a KSamplerSelect with 'euler', or switch on 'levels'."
        )


def _contest(model, steps: int, sigmas: torch.Tensor | None, levels: bool) -> dict[str, torch.Tensor]:
    """The schedules to start from by name, the user's first; that alone where it has to stay."""
    own = {} if sigmas is None else {"your sigmas": _own(sigmas, steps)}
    known = own if own and not levels else {**own, **known_schedules(model, steps)}
    check_candidates(known)
    return known


def _plot(tuned: Tuned, known: dict[str, torch.Tensor], setting: Setting):
    a_map = None if tuned.alignment is None else tuned.alignment.through(setting.space)
    told = None if a_map is None else tuple(a_map(tuned.sigmas).tolist())
    curves = [
        Curve(f"start: {tuned.start}", tuple(known[tuned.start].tolist())),
        Curve("fitted" if tuned.changed else "kept", tuple(tuned.sigmas.tolist()), told),
    ]
    return draw_schedules(curves, f"{len(tuned.sigmas) - 1} steps of {setting.solver}")


def _setting(model, cfg: float, sampler, latent: dict, seed: int):
    """Solver, Setting and an empty latent; everything that can be refused is refused here."""
    solver = solver_of(sampler, model)
    empty = empty_latent(model, latent, "latent")
    about = identify(model, weights=True)
    size = pixels(model, {"samples": empty})
    if size is None:
        raise ValueError("'latent' must be a latent of pictures or of one video, but it holds sound.")
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


def _watched(fit, watch: _Watch, stopped):
    """The result of `tune`, its best curve shown meanwhile; `stopped`: told how far it came."""
    shown, best = None, None
    try:
        while True:
            now, picture = next(fit), None
            best = now
            if now.best is not None and now.best is not shown:
                shown = now.best
                title = f"{now.stage}: error {now.error:.4f}"
                picture = draw_schedules([Curve("best so far", tuple(shown.tolist()))], title)
            watch.at(now.stage, picture)
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
    LOG.warning("Attune Fit Sampler stopped while %s. Best levels so far: %s; %s", now.stage, levels, where)


NODES = [AttuneFitSampler]
