"""Schedules and timesteps that were fitted, against everything that comes for free, on both demo models.

python dev.py bench aligned [--models unet flow] [--samplers euler dpmpp_2m uni_pc] [--steps 5 6 8 10 20] [--tasks 48]

Stock schedules and published tables; the bound of Align Your Steps (KLUB), minimised from its closed form on Gaussian
data, and stopped early on the way from `normal`, at 10 steps and stretched to the others as its authors do; the
published loss of the timestep aligner, sequential and parallel, and ours, all on the levels of `beta`; the pack's own
tuned profiles. Fitted on four prompts and seeds that no row draws. Measured as in `schedules`, over six disjoint groups
of seeds; results are cached. What no schedule can win is measured, too: the converged pictures' own Fréchet distance,
and a long search for levels and told timesteps by the deviation of the very pictures that are then measured. Writes
docs/results/aligned.json, docs/results.md, the tables in docs/schedules.md and two pictures. Hours, once: in parts with
--draw-only, then --drawn for a page of what is there, by the last record where the cache has lost it, with dashes for
the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import _pack  # noqa: F401
import published
from comfy_process import ROOT, Host
from harness import BATCH, CACHE, Cell, Lab, Noise, Task, last, prompt, tasks
from looks import CONVERGED, GROUPS, Look, converged, data, look, to_data
from metrics import frechet, jackknife
from results import DOCS, Table, fill, markdown, record
from schedules import CORE, STOCK, progress

sys.path.append(str(ROOT / "training"))
import tune_profiles as shipped

FREE = {model: [*STOCK, *CORE[model], "KL-optimal", "KL-optimal, c = 1.4"] for model in CORE}
BASE = "beta"  # whose timesteps are aligned: with few Euler steps the best stock schedule on both models
KLUB_STEPS, KLUB_SWEEPS, KLUB_BATCH = 10, 3, 8
ALIGNERS = {  # row -> loss
    f"{BASE}, published aligner, sequential": "sequential",
    f"{BASE}, published aligner, parallel": "parallel",
    f"{BASE}, aligned": "ours",
}
GROUPS_OF_ROWS = ["free", "tuned", "aligned", "klub", "limit"]
PLOTTED = ["normal", "KLUB minimised", f"{BASE}, published aligner, sequential", f"{BASE}, aligned", "tuned"]
LIMIT_STEPS = 10  # of the search for what no schedule can win, or the nearest number measured
TASKS = 48
FORMAT = 1  # raise it when the way of fitting changes


@dataclass
class Row:
    model: str
    sampler: str
    steps: int
    schedule: str
    deviation: tuple[float, float]  # of the latents from the converged ones, rms, mean over pictures, in thousandths
    frechet: tuple[float, float]
    objects: float  # percentage of pictures that show theirs
    errors: torch.Tensor | None = None  # mean squares per picture; None for a row of an earlier record


class NotDrawn(Exception):
    """Raised in place of computing, where only what is cached is wanted."""


class FittedLab(Lab):
    """A Lab whose cells can be told other levels than the true ones, and which fits what it compares."""

    drawn_only = False

    def patched(self, model: str, nodes: tuple[tuple[str, tuple], ...], part: Sequence[Task] = ()):
        patched = self.models[model]
        for name, inputs in nodes:
            facts = dict(inputs)
            conditioning, host = self.module("kernels.conditioning"), self.module("nodes._host.conditioning")
            a_map = conditioning.ConditioningMap.through(self.space(model), facts["sigma"], facts["sigma_cond"])
            patched = host.with_conditioning(patched, host.Remap(name, a_map))
        return patched

    def module(self, name: str) -> Any:
        """A module of the pack as the host has loaded it."""
        node = self.host.nodes.NODE_CLASS_MAPPINGS["AttuneFitSampler"]
        return sys.modules[f"{node.__module__.removesuffix('.nodes.fit_sampler')}.{name}"]

    def space(self, model: str) -> Any:
        return self.module("kernels.space").NoiseSpace("ve" if model == "unet" else "flow")

    def told(self, sigma: Sequence[float], sigma_cond: Sequence[float]) -> tuple[tuple[str, tuple], ...]:
        """The node of a Cell that tells its network sigma_cond; the code that does so is part of it."""
        files = [ROOT / "kernels" / "conditioning.py", ROOT / "nodes" / "_host" / "conditioning.py"]
        code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        return (("told", (("sigma", tuple(sigma)), ("sigma_cond", tuple(sigma_cond)), ("code", code))),)

    def fitted(self, key: list, fit: Callable[[], dict]) -> dict:
        """fit(), kept in the cache under everything in `key`."""
        text = json.dumps([key, FORMAT, shipped.PROMPTS, shipped.SEED, self.digests])
        path = self.cache / f"fit-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        if not path.exists():
            if self.drawn_only:
                raise NotDrawn
            found = json.dumps(fit())
            path.write_text(found, "utf-8")
        return json.loads(path.read_text("utf-8"))

    def is_drawn(self, cell: Cell, work: list[Task]) -> bool:
        return all(self.path(cell, work[i : i + BATCH]).exists() for i in range(0, len(work), BATCH))

    def session(
        self, model: str, sampler: str, batch: int, work: Callable[[Any, list, Any], dict], of: Sequence[Task] = ()
    ) -> dict:
        """work(solves, noises, reference levels) inside one run of the host's sampling, `batch` pictures at once.

        The pictures are of the prompts to fit on, or of the tasks `of`, whose one noise is then given.
        """
        session, tuner = self.module("nodes._host.session"), self.module("kernels.tuner")
        patcher = self.models[model]
        (chosen,) = self.host.call("KSamplerSelect", sampler_name=sampler)
        texts = [prompt(task.obj, task.background) for task in of]
        texts = texts or [shipped.PROMPTS[i % len(shipped.PROMPTS)] for i in range(batch)]
        positive, negative = self.conditioning(texts), self.conditioning([""])
        empty = session.empty_latent(patcher, {"samples": torch.zeros(batch, 4, 16, 16)})
        sampling = patcher.get_model_object("model_sampling")
        low, high = float(sampling.sigma_min), float(sampling.sigma_max)
        space = self.space(model)
        reference = tuner.reference_levels(48, space, low, high).float()
        given = [Noise([task.seed for task in of]).generate_noise({"samples": empty})] if of else None
        with torch.inference_mode():
            return session.run_session(
                patcher, positive, negative, shipped.CFG, session.solver_of(chosen, patcher),
                torch.tensor([high, 0.0]), empty, shipped.SEED, space,
                lambda solves: work(solves, given or session.draw_noises(empty, shipped.SEED, 2), reference),
            )  # fmt: skip


# --- what is fitted here ----------------------------------------------------------------------------------------------


def aligned(lab: FittedLab, model: str, steps: int, loss: str) -> dict:
    """{"sigma", "sigma_cond", "gain"} for Euler on the levels of BASE; loss: "sequential", "parallel" or "ours"."""
    levels = torch.tensor(lab.sigmas(model, BASE, steps))
    kernel, space = lab.module("kernels.timestep_aligner"), lab.space(model)

    def work(solves, noises, reference) -> dict:
        path = solves.record(reference, noises[0])
        high = float(reference[0])
        if loss == "ours":
            fit = kernel.align(solves.denoise, levels, [path], space, high)
        else:
            data, draws = path.end, torch.Generator().manual_seed(0)

            def noised(sigma: float) -> list[torch.Tensor]:
                alpha = float(space.alpha(torch.tensor(sigma)))
                return [alpha * data + sigma * torch.randn(data.shape, generator=draws)]

            anew = noised if loss == "parallel" else None
            fit = published.align_published(solves.denoise, levels, [path.states[0]], space, high, anew)
        found = last(fit)
        sigma, sigma_cond = found.knots(space)
        return {"sigma": sigma, "sigma_cond": sigma_cond, "gain": found.gain}

    key = ["aligned", model, levels.tolist(), {"ours": False, "sequential": True}.get(loss, loss)]
    return lab.fitted(key, lambda: lab.session(model, "euler", len(shipped.PROMPTS), work))


def at_levels(solves):
    """x [n ...], sigma [n] -> denoised: the guided model at a level of its own for each picture."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(KLUB_BATCH), sigma.split(KLUB_BATCH), strict=True)
        over = lambda levels: solves.denoise_over(torch.stack([levels.max(), torch.zeros_like(levels[0])]))
        return torch.cat([over(levels)(part, levels) for part, levels in parts])

    return denoise


def klub(lab: FittedLab, model: str, start: str) -> dict:
    """{"sweeps": positive sigma / alpha at the start and after each sweep, "moved": ln in the last one}, 10 steps."""
    space = lab.space(model)

    def work(solves, noises, reference) -> dict:
        data = solves.record(reference, noises[0]).end
        low = float(lab.models[model].get_model_object("model_sampling").sigma_min)
        levels = torch.tensor(lab.sigmas(model, "normal", KLUB_STEPS)).double()
        levels[-1] = min(low, float(levels[-2]) / 2)
        ratio = (levels / space.alpha(levels)).clamp(max=published.TOP_OF_FLOW)
        if start != "normal":
            ratio = published.klub_optimal_gaussian(KLUB_STEPS, float(ratio[-1]), float(ratio[0]), float(data.std()))
        denoise, generator = published.ve_denoiser(at_levels(solves), space), torch.Generator().manual_seed(0)
        search = published.minimise_klub(denoise, data, ratio, generator, sweeps=KLUB_SWEEPS)
        sweeps = [sweep for sweep in search if sweep is not None]
        return {"sweeps": [ratio.tolist(), *(one.sigmas.tolist() for one in sweeps)], "moved": sweeps[-1].moved}

    key = ["klub", model, start, KLUB_STEPS, KLUB_SWEEPS]
    return lab.fitted(key, lambda: lab.session(model, "euler", KLUB_BATCH, work))


def stopped_early(lab: FittedLab, model: str, sampler: str) -> list[float]:
    """The sweep from `normal` with the least error of the sampler on noise that the bound has not seen."""
    sweeps = klub(lab, model, "normal")["sweeps"]
    block_norm = lab.module("kernels.timestep_aligner").block_norm

    def work(solves, noises, reference) -> dict:
        exact = solves.record(reference, noises[1]).end
        schedules = [torch.tensor(klub_schedule(lab, model, one, KLUB_STEPS)) for one in sweeps]
        return {"errors": [block_norm(solves.solve(one, noises[1]) - exact) / block_norm(exact) for one in schedules]}

    key = ["stopped early", model, sampler, sweeps]
    errors = lab.fitted(key, lambda: lab.session(model, sampler, KLUB_BATCH, work))["errors"]
    return sweeps[errors.index(min(errors))]


def klub_schedule(lab: FittedLab, model: str, ratio: Sequence[float] | torch.Tensor, steps: int) -> tuple[float, ...]:
    """Levels of the bound (sigma / alpha, positive) at any number of steps, log-linearly, the last replaced by 0."""
    kernel = lab.module("kernels.schedules")
    levels = kernel.resample_loglinear(torch.as_tensor(ratio, dtype=torch.float64), steps)
    sigmas = lab.space(model).at_log_ratio(levels.log())
    first = lab.sigmas(model, "normal", steps)[0]
    return (first, *sigmas[1:-1].tolist(), 0.0)


def searched(lab: FittedLab, model: str, steps: int, part: list[Task], most: int) -> dict:
    """{"sigmas", "sigma", "sigma_cond", "trials"}: levels and told levels for Euler, moved one at a time from the tuned
    ones, `most` times or till nothing helps, by the deviation of `part` from its own converged pictures, which no user
    has."""
    fitted, space = shipped_profile(lab, model, "euler", steps), lab.space(model)
    goal = lab.run(converged(lab, model), part).latents
    tuner, conditioning = lab.module("kernels.tuner"), lab.module("kernels.conditioning")
    start = torch.tensor(fitted.sigmas)
    inner = [i for i in range(steps) if 0 < float(start[i]) < (1 if space.kind == "flow" else math.inf)]

    def told(sigmas: torch.Tensor, offsets: dict[int, float]) -> tuple[list[float], list[float]]:
        knots = sigmas[inner[::-1]].double()
        moved = space.at_log_ratio(space.log_ratio(knots) + torch.tensor([offsets[i] for i in inner[::-1]]).double())
        return knots.tolist(), moved.tolist()

    def search(solves, noises, reference) -> dict:
        patcher = lab.models[model]

        def error(sigmas: torch.Tensor, offsets: dict[int, float]) -> float:
            a_map = (
                conditioning.ConditioningMap.through(space, *told(sigmas, offsets)) if any(offsets.values()) else None
            )
            end = patcher.model.process_latent_out(solves.solve(sigmas, noises[0], a_map))
            return float((end - goal).square().flatten(1).mean(1).sqrt().mean())

        best, offsets = start, dict.fromkeys(inner, 0.0)
        for one in fitted.alignments[:1]:
            heard = conditioning.ConditioningMap.through(space, one.sigma, one.sigma_cond)(start.double())
            moves = space.log_ratio(heard) - space.log_ratio(start.double())
            offsets = {i: float(moves[i]) for i in inner}
        begin = least = error(best, offsets)
        trials, move, towards, gained = 0, 0.35, {}, True
        while trials < most and move > 0.02:
            move, gained = (move if gained else move / 2), False
            for what, i in [("level", i) for i in range(1, steps)] + [("told", i) for i in inner]:
                first = towards.get((what, i), 1)
                for sign in (first, -first) if trials < most else ():
                    if what == "level":
                        moved, heard = tuner.moved_level(best, i, sign * move, space), offsets
                    else:
                        moved, heard = best, {**offsets, i: offsets[i] + sign * move / 2}
                    try:
                        found = error(moved, heard)
                    except ValueError:  # told levels that no map may hold
                        found = math.inf
                    trials += 1
                    if found < 0.999 * least:
                        best, offsets, least, gained = moved, heard, found, True
                        towards[what, i] = sign
                        break
        sigma, sigma_cond = told(best, offsets)
        ends = {"before": begin, "after": least, "trials": trials}
        return {"sigmas": best.tolist(), "sigma": sigma, "sigma_cond": sigma_cond, **ends}

    key = ["searched", model, fitted.sigmas, [astuple(task) for task in part], most, lab.converged_steps]
    return lab.fitted(key, lambda: lab.session(model, "euler", len(part), search, part))


# --- rows -------------------------------------------------------------------------------------------------------------


def cells(lab: FittedLab, model: str, sampler: str, steps: int, groups: list[str]) -> dict[str, Cell]:
    """Name -> Cell of everything that is compared in one block."""
    plain = lambda sigmas: Cell(model, sampler, tuple(sigmas))
    found: dict[str, Cell] = {}
    if "free" in groups:
        found |= {name: plain(lab.sigmas(model, name, steps)) for name in FREE[model]}
    profile = shipped_profile(lab, model, sampler, steps)
    if "tuned" in groups and profile is not None:
        found["tuned"] = plain(profile.sigmas)
        if profile.alignments:
            one = profile.alignments[0]
            found["tuned, levels alone"] = found["tuned"]
            found["tuned"] = replace(found["tuned"], nodes=lab.told(one.sigma, one.sigma_cond))
    if "klub" in groups:
        with suppress(NotDrawn):
            ratio = klub(lab, model, "closed form")["sweeps"][-1]
            found["KLUB minimised"] = plain(klub_schedule(lab, model, ratio, steps))
        with suppress(NotDrawn):
            found["KLUB stopped early"] = plain(klub_schedule(lab, model, stopped_early(lab, model, sampler), steps))
    if "aligned" in groups and sampler == "euler":
        for name, loss in ALIGNERS.items():
            with suppress(NotDrawn):
                fit, base = aligned(lab, model, steps, loss), plain(lab.sigmas(model, BASE, steps))
                changed = fit["sigma"] != fit["sigma_cond"]
                found[name] = replace(base, nodes=lab.told(fit["sigma"], fit["sigma_cond"])) if changed else base
    return found


def shipped_profile(lab: FittedLab, model: str, sampler: str, steps: int) -> Any:
    profiles = lab.module("models.store")
    path = profiles.SHIPPED / f"demo_{model}_{sampler}_{steps:02}{profiles.SUFFIX}"
    return profiles.load_profile(path) if path.exists() else None


def measure(
    lab: FittedLab, work: list[Task], model: str, sampler: str, steps: int, groups: list[str], known: dict
) -> list[Row]:
    """The rows of one block; what must not be drawn now is taken from an earlier record, by (…, schedule).

    None while a free schedule is missing.
    """
    rows = []
    drawn = cells(lab, model, sampler, steps, groups)
    for name in dict.fromkeys([*drawn, *(key[3] for key in known if key[:3] == (model, sampler, steps))]):
        if name in drawn and (lab.is_drawn(drawn[name], work) or not lab.drawn_only):
            seen = look(lab, drawn[name], work, progress(f"{model} {sampler} {steps} {name}"))
            rows.append(seen_row(model, sampler, steps, name, seen, work))
        elif (row := known.get((model, sampler, steps, name))) is not None:
            rows.append(row)
    whole = {row.schedule for row in rows} >= set(FREE[model]) or "free" not in groups
    return rows if whole else []  # half of the free schedules have no best one


def seen_row(model: str, sampler: str, steps: int, name: str, seen: Look, work: list[Task]) -> Row:
    roots = seen.errors.double().sqrt()
    deviation = jackknife(lambda kept: 1000 * float(roots[kept].mean()), len(work), GROUPS)
    distance = jackknife(lambda kept: to_data(frechet, seen.features, kept), len(work), GROUPS)
    right = seen.objects == torch.tensor([task.obj for task in work])
    return Row(model, sampler, steps, name, deviation, distance, 100 * float(right.double().mean()), seen.errors)


def recorded(out: Path, tasks_drawn: int) -> dict[tuple, Row]:
    """The rows of the last record that no fit of ours has changed since, by (model, sampler, steps, schedule)."""
    path = out / "results" / "aligned.json"
    if not path.exists() or tasks_drawn != TASKS:
        return {}
    rows = [
        Row(r["model"], r["sampler"], r["steps"], r["schedule"], (*r["deviation"],), (*r["frechet"],), r["objects"])
        for r in json.loads(path.read_text("utf-8"))["data"] if not r["schedule"].startswith("tuned")
    ]  # fmt: skip
    return {(row.model, row.sampler, row.steps, row.schedule): row for row in rows}


def text(measured: tuple[float, float]) -> str:
    digits = 3 if abs(measured[0]) < 1 else 2 if abs(measured[0]) < 10 else 1
    return f"{measured[0]:.{digits}f} ± {measured[1]:.{digits}f}"


def matrix(rows: list[Row], title: str, value: Callable[[Row], tuple[float, float]], note: str = "") -> Table:
    """Schedules down, steps across, less is better; the best of a column is bold."""
    steps = sorted({row.steps for row in rows})
    found = {(row.schedule, row.steps): value(row) for row in rows}
    best = {n: min((v[0], name) for (name, m), v in found.items() if m == n)[1] for n in steps}
    body: list[list] = []
    for name in dict.fromkeys(row.schedule for row in rows):
        shown = [found.get((name, n)) for n in steps]
        words = [None if v is None else text(v) for v in shown]
        body.append([name, *(f"**{w}**" if best[n] == name else w for n, w in zip(steps, words, strict=True))])
    return Table(title, ["schedule", *(f"{n} steps" for n in steps)], body, note)


def pick(rows: list[Row], sampler: str, steps: int, names: Sequence[str], model: str = "") -> Row | None:
    """The row of least deviation among some schedules; of one model, where the rows are of several."""
    mine = [r for r in rows if (r.sampler, r.steps) == (sampler, steps) and r.schedule in names]
    mine = [r for r in mine if model in ("", r.model)]
    return min(mine, key=lambda row: row.deviation[0], default=None)


def gain(rows: list[Row], model: str) -> Table:
    """The tuned profile against the best free schedule and against `normal`, paired over groups of seeds."""
    body: list[list] = []
    mine = [row for row in rows if row.model == model]
    for sampler, steps in dict.fromkeys((row.sampler, row.steps) for row in mine):
        tuned = pick(mine, sampler, steps, ["tuned"])
        best, normal = pick(mine, sampler, steps, FREE[model]), pick(mine, sampler, steps, ["normal"])
        if any(row is None or row.errors is None for row in (tuned, best, normal)):
            continue
        at_20 = [pick(mine, sampler, 20, names) for names in (["normal"], FREE[model])]
        body.append(
            [sampler, steps, best.schedule, text(ratio(tuned, best)), text(ratio(tuned, normal)),
             *(None if one is None or one.errors is None or steps >= 20 else text(ratio(tuned, one)) for one in at_20),
             f"{100 * (tuned.frechet[0] / normal.frechet[0] - 1):+.0f} %"]
        )  # fmt: skip
    columns = ["solver", "steps", "best free", "tuned / best free", "tuned / normal", "tuned / normal at 20"]
    columns += ["tuned / best free at 20", "Fréchet to normal"]
    note = (
        "Ratios of the deviations below; the best free schedule is chosen with the measured pictures in hand, the "
        "tuned one was not. Below 1 the tuned run is nearer to the converged picture."
    )
    return Table(f"{model}: what tuning gains", columns, body, note)


def ratio(one: Row, other: Row) -> tuple[float, float]:
    assert one.errors is not None and other.errors is not None
    a, b = one.errors.double().sqrt(), other.errors.double().sqrt()
    return jackknife(lambda kept: float(a[kept].mean() / b[kept].mean()), len(a), GROUPS)


def held_out(lab: FittedLab, models: list[str], samplers: list[str], steps: list[int]) -> Table:
    """What the shipped profiles say of themselves."""
    body: list[list] = []
    for model in models:
        for sampler in samplers:
            for n in steps:
                if (profile := shipped_profile(lab, model, sampler, n)) is None:
                    continue
                facts, found = profile.provenance, profile.metrics["held_out"]
                refused = "; ".join(
                    line.split(" not kept")[0].removeprefix("The ") for line in profile.metrics["refused"]
                )
                body.append(
                    [model, sampler, n, profile.metrics["start"], found["start"], found.get("refined"),
                     found.get("aligned"), refused or None, facts["preset"], facts["evaluations"], facts["seconds"]]
                )  # fmt: skip
    columns = ["model", "solver", "steps", "start", "error", "refined", "aligned", "refused", "preset", "calls", "s"]
    note = "Errors on held-out noises by the tuner's own measure. A call is of four pictures; seconds on a busy core."
    return Table("The shipped profiles, as tuned", columns, body, note)


def mended(lab: FittedLab, models: list[str], steps: list[int]) -> Table:
    """How much of a step's deviation another timestep can remove, mean over the steps."""
    body: list[list] = []
    for model in models:
        body.append([model])
        for n in steps:
            shown = None
            with suppress(NotDrawn):
                shown = f"{100 * mean(aligned(lab, model, n, 'ours')['gain']):.0f} %"
            body[-1].append(shown)
    note = (
        f"Euler on the levels of {BASE}, on the pictures that were fitted. With the exact denoiser of a Gaussian every "
        "step gains more than half (tests/test_timestep_aligner.py): a trained network also reads the noise level from "
        "the picture, and follows what it is told less."
    )
    return Table(
        "Share of a step's deviation that an aligned timestep removes", ["model", *map(str, steps)], body, note
    )


def limit(lab: FittedLab, rows: list[Row], models: list[str], work: list[Task], steps: int, trials: int) -> Table:
    """What a schedule could win at most: the deviation of the long search, on its own pictures and on the others."""
    body: list[list] = []
    third = len(work) // 3
    own, others = slice(0, third), slice(third, None)
    for model in models:
        best, tuned = (pick(rows, "euler", steps, names, model) for names in (FREE[model], ["tuned"]))
        if any(row is None or row.errors is None for row in (best, tuned)):
            continue
        try:
            fit = searched(lab, model, steps, work[own], trials)
        except NotDrawn:
            continue
        cell = Cell(model, "euler", tuple(fit["sigmas"]), nodes=lab.told(fit["sigma"], fit["sigma_cond"]))
        seen = look(lab, cell, work, progress(f"{model} searched"))
        share = lambda one, part, best=best: mean_root(one.errors[part]) / mean_root(best.errors[part])
        body.append(
            [model, best.schedule, share(tuned, own), share(seen, own), share(tuned, others),
             share(seen, others), fit["trials"]]
        )  # fmt: skip
    columns = ["model", "best free", "tuned, first pictures", "searched for them", "tuned, the others"]
    columns += ["searched, the others", "trials"]
    note = (
        f"Euler, {steps} steps; deviation as a share of the best free schedule's. The search moves every level "
        f"and every told timestep of the tuned profile by the deviation of the first {third} pictures from "
        "their own converged ones: better than any fit on other noises can know."
    )
    return Table("How near a schedule can come", columns, body, note)


def mean_root(errors: torch.Tensor) -> float:
    return float(errors.double().sqrt().mean())


def ideal(lab: FittedLab, rows: list[Row], models: list[str], work: list[Task]) -> Table:
    """The Fréchet distance of pictures without any error of schedule or solver, beside those with one."""
    body: list[list] = []
    for model in models:
        seen = look(lab, converged(lab, model), work)
        for name, features in (("converged", seen.features), ("training pictures, autoencoded", data()[model])):
            distance = lambda kept, features=features: to_data(frechet, features, kept)
            body.append([model, name, text(jackknife(distance, len(work), GROUPS))])
        for steps in sorted({row.steps for row in rows}):
            normal = pick(rows, "euler", steps, ["normal"], model)
            if normal is not None:
                body.append([model, f"normal, {steps} steps of euler", text(normal.frechet)])
    note = (
        "A schedule that follows the model's own path ever more closely ends at the converged pictures. Fewer steps "
        "can be nearer to the data only by drawing something else than the model would."
    )
    return Table("Fréchet distance without any error of the schedule", ["model", "pictures", "Fréchet"], body, note)


def rest(lab: FittedLab, model: str) -> str:
    """How far the minimised bound is from its minimum."""
    moved = klub(lab, model, "closed form")["moved"]
    return (
        f"KLUB minimised, {model}: {KLUB_SWEEPS} sweeps from the optimum for Gaussian data; in the last one no level "
        f"moved by more than {moved:.2f} in ln(sigma / alpha)."
    )


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def deviation_plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models, solvers = (list(dict.fromkeys(getattr(r, a) for r in rows)) for a in ("model", "sampler"))
    size = (3.2 * len(solvers) + 2, 2.8 * len(models))
    figure, axes = plt.subplots(len(models), len(solvers), figsize=size, layout="constrained", squeeze=False)
    for panels, model in zip(axes, models, strict=True):
        for axis, solver in zip(panels, solvers, strict=True):
            mine = [r for r in rows if (r.model, r.sampler) == (model, solver)]
            steps = sorted({r.steps for r in mine})
            best = [r for n in steps if (r := pick(mine, solver, n, FREE[model])) is not None]
            lines = {"best free": best} | {name: [r for r in mine if r.schedule == name] for name in PLOTTED}
            for i, (name, line) in enumerate(lines.items()):
                if line:
                    values, spread = zip(*(r.deviation for r in line), strict=True)
                    axis.errorbar(
                        [r.steps for r in line], values, spread, label=name, marker=".", lw=1.2, color=f"C{i}"
                    )
            axis.set(title=f"{model}, {solver}", xscale="log", yscale="log", xlabel="steps")
            axis.set_xticks(steps, steps)
            axis.minorticks_off()
        panels[0].set_ylabel("deviation, thousandths")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def picture(lab: FittedLab, work: list[Task], models: list[str], steps: int, path: Path) -> None:
    """Euler, a row each: `normal`, the tuned profile, converged. The same prompts and seeds; unet left, flow right."""
    rows: list[list[torch.Tensor]] = [[], [], []]
    for model in models:
        found = cells(lab, model, "euler", steps, ["tuned"])
        drawn = [Cell(model, "euler", lab.sigmas(model, "normal", steps)), found.get("tuned"), converged(lab, model)]
        for row, cell in zip(rows, drawn, strict=True):
            if cell is not None:
                row += lab.pictures(model, lab.run(cell, work[:16]).latents[:5])
    sheet = torch.cat([torch.cat(row, dim=2) for row in rows if row], dim=1)
    Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy()).save(path, quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CORE), default=list(CORE))
    parser.add_argument("--samplers", nargs="+", default=shipped.SOLVERS)
    parser.add_argument("--steps", nargs="+", type=int, default=shipped.STEPS)
    parser.add_argument("--rows", nargs="+", choices=GROUPS_OF_ROWS, default=GROUPS_OF_ROWS)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--converged", type=int, default=200, help="steps of the pictures that count as converged")
    parser.add_argument("--trials", type=int, default=150, help="of the search for what no schedule can win")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    parser.add_argument("--draw-only", action="store_true", help="fill the cache, write nothing")
    parser.add_argument("--drawn", action="store_true", help="draw nothing: what is cached, else as last recorded")
    args = parser.parse_args()
    if args.tasks < 2 * GROUPS:
        parser.error(f"--tasks must be at least {2 * GROUPS}: the spread is over {GROUPS} groups of seeds")
    began, blocks = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        lab, work = FittedLab(Host(Path(folder)), args.cache, args.converged), tasks(args.tasks)
        lab.drawn_only = args.drawn
        known = recorded(args.out, args.tasks) if args.drawn else {}
        for steps in args.steps:
            for model in args.models:
                lab.run(converged(lab, model), work, progress(f"{model} converged"))
                blocks += [measure(lab, work, model, sampler, steps, args.rows, known) for sampler in args.samplers]
        print("\r" + " " * 70)
        rows = [row for block in blocks for row in block]
        tables = [gain([row for row in rows if row.model == model], model) for model in args.models]
        if "limit" in args.rows and "euler" in args.samplers:
            near_10 = min(args.steps, key=lambda n: abs(n - LIMIT_STEPS))
            bounds = [
                ideal(lab, rows, args.models, work), limit(lab, rows, args.models, work, near_10, args.trials),
            ]  # fmt: skip
            tables += [table for table in bounds if table.rows]
        if args.draw_only:
            return
        short = list(tables)
        tables.append(held_out(lab, args.models, args.samplers, shipped.STEPS))
        if "aligned" in args.rows and "euler" in args.samplers:
            tables.append(mended(lab, args.models, args.steps))
        bound = []
        for model in args.models if "klub" in args.rows else []:
            with suppress(NotDrawn):
                bound.append(rest(lab, model))
        near_8 = min(args.steps, key=lambda n: abs(n - 8))
        picture(lab, work, args.models, near_8, args.out / "tuned_pictures.jpg")
    for model in args.models:
        for sampler in args.samplers:
            mine = [row for row in rows if (row.model, row.sampler) == (model, sampler)]
            note = f"{args.converged} steps of {' on '.join(CONVERGED[model])} are the converged picture."
            title = f"{model}, {sampler}: deviation from the converged picture, thousandths"
            tables.append(matrix(mine, title, lambda row: row.deviation, note))
            short += [tables[-1]] if sampler == "euler" else []
            title = f"{model}, {sampler}: Fréchet distance to the data"
            tables.append(matrix(mine, title, lambda row: row.frechet))
    deviation_plot(rows, args.out / "tuned_deviation.png")
    fill(args.out / "schedules.md", "aligned", short)
    data = [
        {"model": r.model, "sampler": r.sampler, "steps": r.steps, "schedule": r.schedule, "deviation": r.deviation,
         "frechet": r.frechet, "objects": r.objects} for r in rows
    ]  # fmt: skip
    record(
        "aligned", "Fitted schedules and timesteps", tables, began,
        ["tuned_deviation.png", "tuned_pictures.jpg"], out=args.out, data=data,
        notes=["Pictures: `normal` above, tuned between, converged below; Euler, 8 steps.", *bound],
    )  # fmt: skip
    print("\n".join(map(markdown, tables)))


if __name__ == "__main__":
    main()
