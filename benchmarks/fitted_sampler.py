"""How near does a short run come to the user's own long one that it was fitted to, and what else costs as little?

python dev.py bench fitted_sampler [--models unet flow] [--tasks 24] [--peers 6] [--parts fitted carries short …]

The user's run is 50 steps of Euler (UNet: karras, flow: beta), or 20 of DPM++ 2M. Attune Fast Sampler learns it from
one picture, by the node's own code; the short run then draws other prompts from other seeds. Beside it, against the
same long runs: stock solvers with fewer steps, on the long run's own schedule and on the best of the stock ones;
forecasts of the answers between fewer full calls; core's caches. dB are peak signal-to-noise ratios to the long run of
the same noise, in pixels unless latents are named. Every measurement is kept: in parts with --draw-only, then --drawn
for a page of what is there, with dashes for the rest. Writes docs/results/fitted_sampler.json, docs/results.md and the
tables in docs/fitted_sampler.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_process import ROOT, Host
from harness import ANY, CACHE, Lab, Noise, Task, counting, prompt, tasks
from looks import GROUPS
from metrics import jackknife, psnr
from results import DOCS, Table, markdown, record
from schedules import STOCK, progress

COUNTS = (6, 8, 9, 10, 12, 15)  # evaluations of the short run
MORE = (20, 30)  # further ones of what does not reach FAITHFUL with COUNTS
SHORT_COUNTS = (8, 10, 12)
FAITHFUL = 45.0  # dB of the pictures, from which they look the same
CFGS = {"unet": (3.0, 7.0), "flow": (3.0, 5.0)}
SCHEDULE = {"unet": "karras", "flow": "beta"}
OF_2M = {"unet": "karras", "flow": "simple"}
SOLVERS = ("euler", "dpmpp_2m", "dpmpp_3m", "uni_pc", "res_multistep", "deis", "ipndm", "lms", "heun")
CACHES = {"unet": ("EasyCache", "LazyCache"), "flow": ("LazyCache",)}  # EasyCache has no hook in SD3's network
THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.8)
TAYLOR, CHEBYSHEV = "Taylor forecast", "Chebyshev forecast"
DEGREE, RIDGE = 3, 0.1  # of the Chebyshev polynomials
LORA = {"flow": ROOT / "models" / "loras" / "attune_demo_flow_sizes.safetensors"}
PARTS = ("fitted", "carries", "short", "seconds", "peers")
GOALS = {("euler", 0): 5.5, ("euler", 1): 3.8, ("dpmpp_2m", 0): 2.2}  # times fewer evaluations, by solver and cfg
SESSION = "A session of two pictures"
USED = 10  # evaluations, where one count must do
CHUNK = 4  # pictures at once
CHOSEN_ON, CHOSEN_AT = 2, 10  # pictures and evaluations by which a schedule and a kind of forecast are chosen
FRESH, LEARNED = 0, 100  # the first task that is drawn, and that is learned from: no prompt or seed is shared
BEGIN, END = "<!-- measured: python dev.py bench fitted_sampler -->", "<!-- end -->"
FORMAT = 1  # raise it when the way of measuring changes


@dataclass(frozen=True)
class Own:
    """A user's own long run. words: "plain", "object alone" or "negative"."""

    model: str
    cfg: float
    steps: int
    solver: str = "euler"
    schedule: str = ""
    side: int = 128
    lora: bool = False
    words: str = "plain"


@dataclass(frozen=True)
class How:
    """Another run from the same noise: a solver by name or what it is made of, its levels, a cache node with its
    threshold."""

    solver: str
    sigmas: tuple[float, ...]
    given: tuple = ()
    cache: tuple = ()


@dataclass(frozen=True)
class Seen:
    """Evaluations, and dB of each picture to the long run's."""

    calls: int
    pixels: Tensor
    latents: Tensor


@dataclass(frozen=True)
class Fit:
    """What the node found for one number of evaluations. proved: dB of latents on the half it was not fitted to."""

    sigmas: tuple[float, ...]
    numbers: tuple[tuple[float, ...], ...]
    proved: float

    @property
    def how(self) -> How:
        return How("fitted", self.sigmas, self.numbers)


class FitLab(Lab):
    """A Lab that measures runs against a long one, and learns short runs from it; all of it is kept."""

    drawn_only = False

    def end(self, own: Own, part: Sequence[Task]) -> tuple[Tensor, Tensor]:
        """Latents and pictures of the long run."""
        path = self._path("end", astuple(own), part, ".safetensors")
        if not path.exists():
            latents, _ = self._sampled(own, self.own_how(own), part)
            made = {"latents": latents, "pictures": self.pictures(own.model, latents)}
            save_file({name: one.clone().contiguous() for name, one in made.items()}, path)
        kept = load_file(path)
        return kept["latents"], kept["pictures"]

    def own_how(self, own: Own) -> How:
        return How(own.solver, self.sigmas(own.model, own.schedule or SCHEDULE[own.model], own.steps))

    def seen(self, own: Own, how: How, work: Sequence[Task], at_once: int = CHUNK) -> Seen | None:
        """A run beside the long one; None where it must not be drawn and is not there."""
        found = []
        for start in range(0, len(work), at_once):
            part = work[start : start + at_once]
            path = self._path("seen", [astuple(own), astuple(how), code_of_fits() * (how.solver == "fitted")], part)
            if not path.exists():
                if self.drawn_only:
                    return None
                latents, calls = self._sampled(own, how, part)
                goal, goal_pictures = self.end(own, part)
                keep(path, {
                    "calls": calls, "pixels": psnr(self.pictures(own.model, latents), goal_pictures).tolist(),
                    "latents": [fidelity(self, a, b) for a, b in zip(latents, goal, strict=True)],
                })  # fmt: skip
            found.append(json.loads(path.read_text("utf-8")))
        join = lambda name: torch.tensor([v for one in found for v in one[name]], dtype=torch.float64)
        return Seen(found[0]["calls"], join("pixels"), join("latents"))

    def near(self, own: Own, how: How, part: Sequence[Task]) -> float | None:
        """The latents' dB alone, in the mean, where a choice is made among many."""
        path = self._path("near", [astuple(own), astuple(how)], part)
        if not path.exists():
            if self.drawn_only:
                return None
            latents, _ = self._sampled(own, how, part)
            goal = torch.cat([self.end(own, [task])[0] for task in part])
            keep(path, [fidelity(self, a, b) for a, b in zip(latents, goal, strict=True)])
        return mean(json.loads(path.read_text("utf-8")))

    def learned(self, own: Own, part: Sequence[Task], counts: Sequence[int]) -> dict[int, Fit]:
        """What the node learns from these pictures, drawn as one batch, for each number of evaluations."""
        facts = [astuple(own), code_of_fits()]
        paths = {n: self._path(f"learned {n}", facts, part) for n in counts}
        missing = [n for n, path in paths.items() if not path.exists()]
        if missing and not self.drawn_only:
            for n, fit in self._learn(own, part, missing).items():
                keep(paths[n], astuple(fit))
        there = {n: json.loads(path.read_text("utf-8")) for n, path in paths.items() if path.exists()}
        return {n: Fit(tuple(a), tuple(map(tuple, b)), c) for n, (a, b, c) in there.items()}

    def model(self, own: Own, how: How | None = None) -> Any:
        """The MODEL of a run, with its LoRA and its cache."""
        model = self.models[own.model]
        if own.lora:
            folder = self.host.folders / "models" / "loras"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(LORA[own.model], folder / LORA[own.model].name)
            named = {"lora_name": LORA[own.model].name, "strength_model": 1.0}
            (model,) = self.host.call("LoraLoaderModelOnly", model=model, **named)
        if how and how.cache:
            node, threshold = how.cache
            given = {"reuse_threshold": threshold, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
            (model,) = self.host.call(node, model=model, **given)
        return model

    def solver(self, how: How) -> Any:
        """The SAMPLER of a run."""
        import comfy.samplers

        if how.solver == "fitted":
            fast = self.host.module("nodes._host.fitted_sampler")
            return fast.fitted_sampler_of(fast.FittedRun(how.sigmas, how.given))
        if how.solver in (TAYLOR, CHEBYSHEV):
            return comfy.samplers.KSAMPLER(partial(sample_forecast, how.solver, *how.given))
        if how.solver == "dpmpp_3m":
            given = {"eta": 0.0, "s_noise": 1.0, "noise_device": "cpu"}
            return self.host.call("SamplerDPMPP_3M_SDE", **given)[0]
        return self.host.call("KSamplerSelect", sampler_name=how.solver)[0]

    def run_with(self, own: Own, model: Any, sampler: Any, sigmas: Sequence[float], part: Sequence[Task]) -> Tensor:
        """The latents that the host draws with a SAMPLER."""
        what = [prompt(t.obj, ANY if own.words == "object alone" else t.background) for t in part]
        without = ["a white background" if own.words == "negative" else ""] * len(part)
        positive, negative = self.conditioning(what), self.conditioning(without)
        (guider,) = self.host.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=own.cfg)
        channels = model.get_model_object("latent_format").latent_channels
        latent = {"samples": torch.zeros(len(part), channels, own.side // 8, own.side // 8)}
        given = {"noise": Noise([t.seed for t in part]), "sigmas": torch.tensor(sigmas), "latent_image": latent}
        return self.host.call("SamplerCustomAdvanced", guider=guider, sampler=sampler, **given)[0]["samples"]

    def _sampled(self, own: Own, how: How, part: Sequence[Task]) -> tuple[Tensor, int]:
        model = self.model(own, how)
        with counting(model) as calls:
            latents = self.run_with(own, model, self.solver(how), how.sigmas, part)
        return latents, calls[0]

    def _learn(self, own: Own, part: Sequence[Task], counts: Sequence[int]) -> dict[int, Fit]:
        """The node's own recording and fitting: one long run, from which every count is learned."""
        import comfy.samplers

        fast, plan = (self.host.module(f"nodes.{name}.fitted_sampler") for name in ("_host", "_plan"))
        how, found = self.own_how(own), {}
        inner = self.solver(how)

        class Teacher(comfy.samplers.Sampler):
            def sample(self, guider, sigmas, *given):
                recorder = fast.Recorder(guider, sigmas.clone())
                end = inner.sample(recorder, sigmas, *given)
                path, space = recorder.path(end), fast.NoiseSpace(fast.identify(guider.model_patcher).space)
                for n in counts:
                    wish = plan.Wish(evaluations=n, fidelity=0.0)
                    ((short,), _) = fast._Run(fast.FastSampler(inner, wish), guider, sigmas, *given)._learned(
                        path, space
                    )
                    found[n] = Fit(short.run.sigmas, short.run.numbers, short.psnr)
                return end

        self.run_with(own, self.model(own), Teacher(), how.sigmas, part)
        return found

    def _path(self, what: str, facts: Any, part: Sequence[Task], suffix: str = ".json") -> Path:
        import comfyui_version

        versions = [comfyui_version.__version__, torch.__version__, FORMAT, self.digests]
        text = json.dumps([what, facts, [astuple(task) for task in part], versions])
        return self.cache / f"short-{hashlib.sha256(text.encode()).hexdigest()[:32]}{suffix}"


@lru_cache(maxsize=1)
def code_of_fits() -> str:
    """Changes with the code that a fit and a fitted run go through."""
    names = ("kernels/fitted_sampler", "kernels/timestep_aligner", "kernels/schedules", "nodes/_host/fitted_sampler")
    return hashlib.sha256(b"".join((ROOT / f"{name}.py").read_bytes() for name in names)).hexdigest()


def keep(path: Path, what: Any) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(what), "utf-8")
    temporary.replace(path)


def fidelity(lab: FitLab, x: Tensor, goal: Tensor) -> float:
    """dB of one picture's latents, as the node proves them."""
    return lab.host.module("kernels.fitted_sampler").fidelity(x[None], goal[None])


# --- forecasts between full calls ---


@torch.no_grad()
def sample_forecast(
    kind: str, of: str, calls: Sequence[int], model, x, sigmas, extra_args=None, callback=None, disable=None
):
    """Euler over all levels that asks the network in the steps `calls` alone, and forecasts its answer in the others
    from its last answers over the number of the step: along the line through the last two, or with Chebyshev
    polynomials through all. of: "denoised" or "slope", which is forecast."""
    known: list[tuple[int, Tensor]] = []
    steps = len(sigmas) - 1
    for i in range(steps):
        if i in calls:
            denoised = model(x, sigmas[i] * x.new_ones(len(x)), **(extra_args or {}))
            known.append((i, denoised if of == "denoised" else (x - denoised) / sigmas[i]))
            answer = known[-1][1]
        else:
            weights = weights_of(kind, [at for at, _ in known], i, steps)
            answer = sum(weight * one for weight, (_, one) in zip(weights, known, strict=True))
        slope = (x - answer) / sigmas[i] if of == "denoised" else answer
        x = x + (sigmas[i + 1] - sigmas[i]) * slope
    return x


def weights_of(kind: str, known: Sequence[int], i: int, steps: int) -> list[float]:
    """Of the answers of the steps `known` in the forecast for step i."""
    if len(known) == 1:
        return [1.0]
    if kind == TAYLOR:
        share = (i - known[-1]) / (known[-1] - known[-2])
        return [*[0.0] * (len(known) - 2), -share, 1 + share]
    degree = min(DEGREE, len(known) - 1)
    angle = torch.acos((2 * torch.tensor([*known, i], dtype=torch.float64) / (steps - 1) - 1).clamp(-1, 1))
    values = torch.cos(angle[:, None] * torch.arange(degree + 1))
    past, here = values[:-1], values[-1]
    ridge = RIDGE * torch.diag(torch.arange(degree + 1) > 0).double()  # not on the mean
    return (here @ torch.linalg.solve(past.T @ past + ridge, past.T)).tolist()


def calls_of(place: str, n: int, steps: int) -> tuple[int, ...]:
    """n of the steps: every k-th, or the first three, the last and between them every k-th."""
    if place == "every k-th":
        return tuple(i * steps // n for i in range(n))
    return (0, 1, *(2 + round(i * (steps - 3) / (n - 3)) for i in range(n - 2)))


# --- what is compared ---


def short_how(lab: FitLab, own: Own, solver: str, schedule: str, n: int) -> How:
    """A stock solver with at most n evaluations."""
    return How(solver, lab.sigmas(own.model, schedule, (n + 1) // 2 if solver == "heun" else n))


def best_schedule(lab: FitLab, own: Own, solver: str, work: Sequence[Task]) -> str | None:
    """The stock schedule on which a solver comes nearest."""
    near = {one: lab.near(own, short_how(lab, own, solver, one, CHOSEN_AT), work[:CHOSEN_ON]) for one in STOCK}
    found = {one: dB for one, dB in near.items() if dB is not None and math.isfinite(dB)}
    return max(found, key=lambda one: found[one], default=None) if len(found) == len(near) else None


def best_forecast(lab: FitLab, own: Own, kind: str, work: Sequence[Task]) -> tuple[str, str] | None:
    """What is forecast and where the full calls lie, as comes nearest."""
    kinds = [(of, place) for of in ("denoised", "slope") for place in ("every k-th", "ends full")]
    n = min(CHOSEN_AT, own.steps // 2)
    near = {one: lab.near(own, forecast_how(lab, own, kind, one, n), work[:CHOSEN_ON]) for one in kinds}
    found = {one: dB for one, dB in near.items() if dB is not None and math.isfinite(dB)}
    return max(found, key=lambda one: found[one], default=None)


def forecast_how(lab: FitLab, own: Own, kind: str, chosen: tuple[str, str], n: int) -> How:
    of, place = chosen
    return replace(lab.own_how(own), solver=kind, given=(of, calls_of(place, n, own.steps)))


Line = dict[int, Seen | None]  # by the evaluations that were asked for


def peer_lines(lab: FitLab, own: Own, work: Sequence[Task], args: argparse.Namespace) -> Iterator[tuple[str, Line]]:
    """Names and measurements."""
    chosen_for = replace(own, cfg=CFGS[own.model][0])
    stock = own.schedule or SCHEDULE[own.model]
    for solver in args.solvers:
        best = best_schedule(lab, chosen_for, solver, work)
        lines = {}
        for schedule in dict.fromkeys([stock, best]):
            if schedule is not None:
                lines[schedule] = {
                    n: lab.seen(own, short_how(lab, own, solver, schedule, n), work) for n in args.counts
                }
        for schedule, line in lines.items():
            if schedule == (best or stock):
                further(line, args, lambda n, s=solver, at=schedule: lab.seen(own, short_how(lab, own, s, at, n), work))
            said = f"{solver}, {schedule}" + (" (best stock schedule)" if schedule == best else "")
            yield said, line
    for kind in (TAYLOR, CHEBYSHEV):
        chosen = best_forecast(lab, chosen_for, kind, work)
        if chosen is not None:
            draw = lambda n, kind=kind, chosen=chosen: lab.seen(own, forecast_how(lab, own, kind, chosen, n), work)
            line = {n: draw(n) for n in args.counts}
            further(line, args, draw)
            yield f"{kind} of the {chosen[0]}, {chosen[1]}", line
    for node in CACHES[own.model] if args.caches else ():
        found = [lab.seen(own, replace(lab.own_how(own), cache=(node, t)), work) for t in THRESHOLDS]
        yield node, {one.calls: one for one in found if one is not None}


def further(line: Line, args: argparse.Namespace, draw: Callable[[int], Seen | None]) -> None:
    """More evaluations, until they are enough."""
    for n in args.more:
        last = list(line.values())[-1]
        if last is not None and float(last.pixels.mean()) < FAITHFUL:
            line[n] = draw(n)


# --- tables ---


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def spread(values: Tensor) -> tuple[float, float]:
    """Mean and standard error over disjoint groups of seeds."""
    groups = min(GROUPS, len(values))
    return jackknife(lambda kept: float(values[kept].mean()), len(values), groups) if groups > 1 else (
        float(values.mean()), math.nan
    )  # fmt: skip


def text(values: Tensor | None, calls: str = "") -> str | None:
    """Mean ± standard error (least)."""
    if values is None:
        return None
    middle, error = spread(values)
    around = "" if math.isnan(error) else f" ± {error:.1f}"
    return f"{middle:.1f}{around} ({float(values.min()):.1f}){calls}"


def times_fewer(steps: int, line: Line) -> str | None:
    """How many times fewer evaluations reach FAITHFUL, with the standard error over groups of seeds."""
    points = sorted({one.calls: one for one in line.values() if one is not None}.items())
    if not points:
        return None
    first, last = points[0][0], points[-1][0]

    def needed(kept: Tensor) -> float:
        dB = [(calls, float(one.pixels[kept].mean())) for calls, one in points]
        if dB[0][1] >= FAITHFUL:
            return float(first)
        for (a, low), (b, high) in pairwise(dB):
            if low < FAITHFUL <= high:
                return a + (b - a) * (FAITHFUL - low) / (high - low)
        return math.inf

    n = len(points[0][1].pixels)
    found = needed(torch.arange(n))
    if found == math.inf:
        return f"< {steps / last:.2f}"
    if found == first:
        return f"> {steps / first:.2f}"
    groups = min(GROUPS, n)
    _, error = jackknife(lambda kept: steps / min(needed(kept), last), n, groups) if groups > 1 else (0, math.nan)
    return f"{steps / found:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def order(row: list) -> float:
    """Rows of times fewer evaluations by what they say; what was not reached comes first."""
    said = row[1] or "< 0"
    return 0.0 if said.startswith("<") else float(said.removeprefix("> ").split()[0])


def joined(found: Sequence[Seen | None]) -> Seen | None:
    """The mean over fits, picture by picture."""
    there = [one for one in found if one is not None]
    if len(there) < len(found) or not there:
        return None
    return Seen(
        there[0].calls, torch.stack([one.pixels for one in there]).mean(0),
        torch.stack([one.latents for one in there]).mean(0),
    )  # fmt: skip


def head(seen: Seen | None, n: int) -> Seen | None:
    return seen and Seen(seen.calls, seen.pixels[:n], seen.latents[:n])


@dataclass
class Block:
    """One long run: the table of its short ones, and the rows of times fewer evaluations."""

    own: Own
    table: Table
    fewer: list[list]


def title(own: Own) -> str:
    return f"{own.model}, {own.steps} steps of {own.solver} ({own.schedule or SCHEDULE[own.model]}), cfg {own.cfg:g}"


def measure(lab: FitLab, own: Own, counts: Sequence[int], args: argparse.Namespace, peers: bool) -> Block:
    """The fits, and what else there is, against one long run."""
    fresh, single = work_of(args)
    at = CFGS[own.model].index(own.cfg)
    many, few = (fresh[: per_cfg[min(at, len(per_cfg) - 1)]] for per_cfg in (args.tasks, args.peers))
    say = progress(title(own))
    fits = [lab.learned(own, [task], counts) for task in single[: args.fits]]
    lines: list[Line] = []
    for fit in fits:
        lines.append({n: lab.seen(own, fit[n].how, many) if n in fit else None for n in counts})
        say(f"fit {len(lines)}")
    every = {n: joined([line[n] for line in lines]) for n in counts}
    same = {n: head(every[n], len(few)) for n in counts}
    row = lambda name, cell: [name, *map(cell, counts)]
    body = [
        row("**fitted**, pixels", lambda n: text(every[n] and every[n].pixels)),
        row("fitted, latents", lambda n: text(every[n] and every[n].latents)),
        row("proved by each fit, latents", lambda n: listed([fit[n].proved for fit in fits if n in fit])),
        row("each fit, pixels", lambda n: listed([float(s.pixels.mean()) for one in lines if (s := one[n])])),
        row("fitted, on the pictures of the rows below", lambda n: text(same[n] and same[n].pixels)),
    ]
    fewer = [["fitted on one picture", times_fewer(own.steps, every), len(many)]]
    fewer += [[f"the same, fit {i + 1}", times_fewer(own.steps, line), len(many)] for i, line in enumerate(lines)]
    fewer += [["the same, on the pictures of the rows below", times_fewer(own.steps, same), len(few)]]
    others = peer_lines(lab, own, few, args) if peers else plain_lines(lab, own, few, counts)
    best: dict[str, list] = {}
    for name, line in others:
        body.append(row(name, lambda n, line=line: cell_at(line, n, counts)))
        found, kind = [name, times_fewer(own.steps, line), len(few)], name.partition(",")[0]
        if order(found) >= order(best.get(kind, found)):
            best[kind] = found
        say(name)
    fewer += best.values()
    note = (
        f"dB: mean ± standard error over groups of seeds (least). Fitted: mean over {args.fits} fits, each to one "
        f"picture, on {len(many)} pictures of other prompts and seeds; the others on the first {len(few)} of these."
    )
    return Block(own, Table(f"dB to {title(own)}, by evaluations", ["run", *map(str, counts)], body, note), fewer)


def plain_lines(lab: FitLab, own: Own, work: Sequence[Task], counts: Sequence[int]) -> Iterator[tuple[str, Line]]:
    """Euler and the user's own solver, on the user's own schedule."""
    schedule = own.schedule or SCHEDULE[own.model]
    for solver in dict.fromkeys(["euler", own.solver]):
        draw = lambda n, solver=solver: lab.seen(own, short_how(lab, own, solver, schedule, n), work)
        line = {n: draw(n) for n in counts}
        if own.steps == 20 and solver == own.solver:
            line |= {n: draw(n) for n in (15, 18)}
        yield f"{solver}, {schedule}", line


def cell_at(line: Line, n: int, counts: Sequence[int]) -> str | None:
    """The measurement nearest to n evaluations, which are named where they are others; what never takes as few stands
    in the last column."""
    there = [one for one in line.values() if one is not None]
    if not there:
        return None
    near = line.get(n) or min(there, key=lambda one: abs(one.calls - n))
    if abs(near.calls - n) > 2 and n not in line and n < max(counts):
        return None
    return text(near.pixels, "" if near.calls == n else f", {near.calls} calls")


def listed(values: Sequence[float]) -> str | None:
    return " / ".join(f"{one:.1f}" for one in values) or None


def work_of(args: argparse.Namespace) -> tuple[list[Task], list[Task]]:
    """The pictures that are drawn, and those that are learned from."""
    return tasks(max(*args.tasks, *args.peers)), tasks(LEARNED + 8, 900_000)[LEARNED:]


def fewer_table(blocks: Sequence[Block], most: int) -> Table:
    body = [
        [title(b.own), *row, goal_of(b.own) if row[0].startswith("fitted") else None] for b in blocks for row in b.fewer
    ]
    columns = ["long run", "run", f"times fewer at {FAITHFUL:g} dB", "pictures", "goal"]
    note = (
        f"Evaluations of the long run over those that reach {FAITHFUL:g} dB of the pictures in the mean, between the "
        f"counts that were measured by a straight line; solvers on the better of two schedules, with up to {most} "
        "evaluations. '<': not reached with the most evaluations measured; '>': by the fewest already. The goals were "
        "set before any of this was built."
    )
    return Table("Times fewer evaluations", columns, body, note)


def goal_of(own: Own) -> float | None:
    return GOALS.get((own.solver, CFGS[own.model].index(own.cfg)))


def carries(lab: FitLab, model: str, args: argparse.Namespace) -> Table:
    """A fit to one picture, where something else than the seed and the prompt's words is other."""
    fresh, single = work_of(args)
    own, few, n = Own(model, CFGS[model][0], args.steps), fresh[: args.peers[0]], min(USED, args.steps - 2)
    one = lab.learned(own, single[:1], [n]).get(n)
    places = {"as fitted": own}
    places |= {f"cfg {x:g} times": replace(own, cfg=x * own.cfg) for x in args.cfgs}
    places |= {"the object alone": replace(own, words="object alone")}
    places |= {"a negative prompt": replace(own, words="negative")}
    places |= {f"{side} px": replace(own, side=side) for side in args.sides}
    places |= {"a LoRA added": replace(own, lora=True)} if model in LORA else {}
    body = []
    for name, there in places.items():
        euler = lab.seen(there, short_how(lab, own, "euler", SCHEDULE[model], n), few)
        found = one and lab.seen(there, one.how, few)
        body.append([name, *both(found), *both(euler)])
        progress(f"{model} carries")(name)
    bare = places["the object alone"]
    its_own = lab.learned(bare, single[:1], [n]).get(n)
    body.append(["the object alone, fitted so, too", *both(its_own and lab.seen(bare, its_own.how, few)), None, None])
    alone = one and lab.seen(own, one.how, few, 1)
    body.append(["one at a time", *both(alone), None, None])
    for pictures in args.pictures:
        fit = lab.learned(own, single[:pictures], [n]).get(n)
        body.append([f"fitted on {pictures} pictures", *both(fit and lab.seen(own, fit.how, few)), None, None])
    columns = ["used", "fitted, pixels", "fitted, latents", "Euler, pixels", "Euler, latents"]
    note = (
        f"dB to the long run made in the same way: mean ± standard error over groups of seeds (least), {args.peers[0]} "
        f"pictures in batches of {CHUNK}. Fitted to one picture where nothing else is said; Euler: as many steps of "
        f"{SCHEDULE[model]}."
    )
    return Table(f"What carries over: {title(own)}, {n} evaluations", columns, body, note)


def both(seen: Seen | None) -> list[str | None]:
    return [text(seen and seen.pixels), text(seen and seen.latents)]


def seconds(lab: FitLab, models: Sequence[str], args: argparse.Namespace) -> Table:
    """A session of two pictures through SamplerCustom: with the node, and without."""
    fresh, single = work_of(args)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    body = []
    for model in models:
        own, n = Own(model, CFGS[model][0], args.steps), min(USED, args.steps - 2)
        stock = lab.solver(lab.own_how(own))
        least = [math.inf] * 4
        calls = [0] * 4
        said: list[str] = []
        session = [("", single[0]), ("", fresh[0]), ("learn again", single[0]), ("auto", fresh[0])]
        for _ in range(args.rounds):
            for i, (use, task) in enumerate(session):
                sampler = stock
                if use:
                    wish = {"use": use, "evaluations": n, "fidelity": 0.0, "check_every": 0}
                    (sampler,) = lab.host.call("AttuneFastSampler", sampler=stock, **wish)
                    sampler._say = said.append
                with counting(lab.models[model]) as counted:
                    began = clock()
                    custom(lab, own, sampler, task)
                    least[i] = min(least[i], clock() - began)
                calls[i] = counted[0]
        plain, ours = least[0] + least[1], least[2] + least[3]
        body.append(
            [model, *(f"{s:.2f} ({c})" for s, c in zip(least, calls, strict=True)), f"{ours / plain:.2f}",
             f"{(calls[2] + calls[3]) / (calls[0] + calls[1]):.2f}", f"{least[1] / least[3]:.2f}",
             f"{least[2] - least[0]:.2f}"]
        )  # fmt: skip
        assert "Learned" in said[0] and said[1].startswith("The short run"), said
    columns = ["model", "plain, first", "plain, second", "node, first", "node, second", "both, node / plain"]
    columns += ["the same in evaluations", "second, times faster", "learning, s"]
    note = (
        f"Seconds of SamplerCustom on one picture (evaluations): {args.steps} steps of Euler, {n} evaluations in the "
        f"short run; the least of {args.rounds} rounds in one process, the processor's where there is no GPU."
    )
    return Table(SESSION, columns, body, note)


def custom(lab: FitLab, own: Own, sampler: Any, task: Task) -> Tensor:
    model = lab.models[own.model]
    channels = model.get_model_object("latent_format").latent_channels
    return lab.host.call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=task.seed, cfg=own.cfg,
        positive=lab.conditioning([prompt(task.obj, task.background)]), negative=lab.conditioning([""]),
        sampler=sampler, sigmas=torch.tensor(lab.own_how(own).sigmas),
        latent_image={"samples": torch.zeros(1, channels, own.side // 8, own.side // 8)},
    )[0]["samples"]  # fmt: skip


def fill_page(tables: Sequence[Table], path: Path) -> None:
    """Put tables between the two marks of the method's page, where it is there."""
    if path.exists():
        head, found, tail = path.read_text("utf-8").partition(BEGIN)
        if found:
            body = "\n".join(map(markdown, tables))
            path.write_text(f"{head}{BEGIN}\n\n{body}\n{END}{tail.partition(END)[2]}", "utf-8")


def last_seconds(out: Path) -> list[Table]:
    """The table of seconds of the last record, where nothing must be drawn."""
    path = out / "results" / "fitted_sampler.json"
    known = json.loads(path.read_text("utf-8"))["tables"] if path.exists() else []
    return [Table(**one) for one in known if one["title"] == SESSION]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CFGS), default=list(CFGS))
    parser.add_argument("--tasks", nargs="+", type=int, default=[24], help="pictures of the fitted runs, by cfg")
    parser.add_argument("--peers", nargs="+", type=int, default=[6], help="pictures of everything else, by cfg")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--fits", type=int, default=3, help="single pictures that are learned from")
    parser.add_argument("--steps", type=int, default=50, help="of the long run")
    parser.add_argument("--short-steps", type=int, default=20, help="of the long run of DPM++ 2M")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="evaluations")
    parser.add_argument("--more", nargs="*", type=int, default=list(MORE))
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    parser.add_argument("--caches", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only-cfg", type=int, choices=(0, 1), help="the first or the second cfg of each model")
    parser.add_argument("--cfgs", nargs="*", type=float, default=[0.5, 0.75, 1.2, 1.5, 2.0])
    parser.add_argument("--sides", nargs="*", type=int, default=[96, 160])
    parser.add_argument("--pictures", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    parser.add_argument("--draw-only", action="store_true", help="fill the cache, write nothing")
    parser.add_argument("--drawn", action="store_true", help="draw nothing: what is cached, dashes for the rest")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lab = FitLab(Host(Path(folder)), args.cache)
        lab.drawn_only = args.drawn
        blocks, others, timed = [], [], []
        for i in (0, 1) if args.only_cfg is None else (args.only_cfg,):
            for model in args.models:
                if "fitted" in args.parts or "peers" in args.parts:
                    own = Own(model, CFGS[model][i], args.steps)
                    blocks.append(measure(lab, own, args.counts, args, "peers" in args.parts))
        if "short" in args.parts:
            counts = [n for n in SHORT_COUNTS if n < args.short_steps] or [args.short_steps // 2]
            for model in args.models:
                own = Own(model, CFGS[model][0], args.short_steps, "dpmpp_2m", OF_2M[model])
                blocks.append(measure(lab, own, counts, args, False))
        if "carries" in args.parts:
            others += [carries(lab, model, args) for model in args.models]
        if "seconds" in args.parts:
            timed = last_seconds(args.out) if args.drawn else [seconds(lab, args.models, args)]
    print("\r" + " " * 90)
    tables = [fewer_table(blocks, max([*args.counts, *args.more])), *(block.table for block in blocks), *others, *timed]
    print("\n".join(map(markdown, tables)))
    if args.draw_only:
        return
    notes = [" ".join(__doc__.split("\n\n")[2].split())]
    record("fitted_sampler", "A short run fitted to the user's own", tables, began, (), notes, args.out)
    fill_page(tables, args.out / "fitted_sampler.md")


if __name__ == "__main__":
    main()
