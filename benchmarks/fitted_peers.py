"""What else costs as few evaluations: stock solvers on every schedule, forecasts, caches, and published fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from peers import cache_node
from propagation import ENCODER, ONE, REUSES, networks, node
from torch import Tensor

import _pack  # noqa: F401
from fitted_lab import CHUNK, OLSS, PLAN, FitLab, How, Scene, code_of, frozen, is_propagated, keep
from fitted_steps import calls_of
from harness import Task, prompt
from published import fit_olss, search_plan, solve_plan

SOLVERS = (
    "euler", "heun", "dpmpp_2m", "dpmpp_3m", "uni_pc", "res_multistep", "deis", "ipndm", "lms", "er_sde",
)  # fmt: skip
CACHES = {"unet": ("EasyCache", "LazyCache"), "flow": ("LazyCache",)}  # EasyCache has no hook in SD3's network
THRESHOLDS, INTERVALS = (0.02, 0.05), (2, 3)
POINTS = 4  # of a calibration, at most
COSTS = {"unet": "SD1.5 512", "flow": "SD3 medium"}  # the networks whose blocks weigh what a shorter step costs
SEED = 31  # of the search for a plan


@dataclass(frozen=True)
class Seen:
    """Evaluations, and dB of each picture to the long run's, in pixels and in latents."""

    calls: float
    pixels: Tensor
    latents: Tensor

    def head(self, n: int) -> Seen:
        return Seen(self.calls, self.pixels[:n], self.latents[:n])


@dataclass(frozen=True)
class Pair:
    """A stock solver on a stock schedule, and its error where all of them were tried."""

    solver: str
    schedule: str
    error: float

    def __str__(self) -> str:
        return f"{self.solver}, {self.schedule}"


def seen(lab: FitLab, scene: Scene, hows: Sequence[How], goal: How, work: Sequence[Task]) -> Seen:
    """A run beside the long one; of several runs each chunk of pictures has the next one."""
    parts = [work[i : i + CHUNK] for i in range(0, len(work), CHUNK)]
    turns = [(hows[i % len(hows)], part) for i, part in enumerate(parts)]
    pixels = torch.cat([lab.pixels(scene, how, goal, part) for how, part in turns])
    latents = torch.cat([lab.drawn(scene, how, part).latents for how, part in turns])
    return Seen(cost(lab, scene, hows[0], work), pixels, lab.fidelity(latents, lab.drawn(scene, goal, work).latents))


def cost(lab: FitLab, scene: Scene, how: How, work: Sequence[Task]) -> float:
    """Evaluations; of a shorter one by the cost of its blocks on a published network."""
    drawn = lab.drawn(scene, how, work)
    if not is_propagated(how):
        return drawn.whole
    reuse = dict(how.nodes[-1][1])["reuse"]
    return drawn.whole + drawn.part * networks(lab, scene.model)[COSTS[scene.model]].share(reuse)


def deviation(latents: Tensor, goals: Tensor) -> Tensor:
    """Root mean square distance of each picture's latents, in thousandths."""
    found = 1000 * (latents.double() - goals.double()).square().flatten(1).mean(1).sqrt()
    return found.nan_to_num(torch.inf, torch.inf)


# --- stock solvers ---


def short_how(lab: FitLab, model: str, solver: str, schedule: str, n: int) -> How:
    """A stock solver with at most n evaluations."""
    return How(solver, lab.levels(model, schedule, (n + 1) // 2 if solver == "heun" else n))


def screen(
    lab: FitLab, scene: Scene, goal: How, n: int, work: Sequence[Task], pictures: int, solvers: Sequence[str]
) -> list[Pair]:
    """Every stock solver on every stock schedule with n evaluations, by the deviation on a few pictures."""
    at = [*range(0, len(work), CHUNK)][:pictures]
    goals, few = lab.drawn(scene, goal, work).latents[at], [work[i] for i in at]
    found = []
    for solver in solvers:
        for schedule in lab.stock_schedules(scene.model):
            latents = lab.drawn(scene, short_how(lab, scene.model, solver, schedule, n), few).latents
            found.append(Pair(solver, schedule, float(deviation(latents, goals).mean())))
    return sorted(found, key=lambda pair: pair.error)


def best_of_each(pairs: Sequence[Pair]) -> list[Pair]:
    """Every solver on its best schedule, least error first."""
    best = {pair.solver: pair for pair in sorted(pairs, key=lambda pair: -pair.error)}
    return sorted(best.values(), key=lambda pair: pair.error)


# --- forecasts between full calls ---


def forecast_how(goal: How, kind: str, chosen: tuple[str, str], n: int) -> How:
    of, place = chosen
    return replace(goal, solver=kind, given=(kind, of, calls_of(place, n, len(goal.sigmas) - 1)))


def best_forecast(
    lab: FitLab, scene: Scene, goal: How, kind: str, n: int, work: Sequence[Task], pictures: int
) -> tuple[str, str]:
    """What is forecast and where the full calls lie, as comes nearest on a few pictures."""
    at = [*range(0, len(work), CHUNK)][:pictures]
    goals, few = lab.drawn(scene, goal, work).latents[at], [work[i] for i in at]
    kinds = [(of, place) for of in ("denoised", "slope") for place in ("every k-th", "ends full")]
    n = min(n, (len(goal.sigmas) - 1) // 2)
    far = lambda one: float(
        deviation(lab.drawn(scene, forecast_how(goal, kind, one, n), few).latents, goals).mean()
    )  # fmt: skip
    return min(kinds, key=far)


# --- caches ---


def cached_hows(lab: FitLab, scene: Scene, goal: How, schedule: str) -> dict[str, list[How]]:
    """The long run with features or answers reused, by method, each in several strengths."""
    model = scene.model
    found = {
        name: [replace(goal, nodes=cache_node(name, threshold)) for threshold in THRESHOLDS] for name in CACHES[model]
    }
    if model == "unet":
        deep = {"reuse": ONE, "forecast": False, "keep_last": 0}
        found["DeepCache"] = [replace(goal, nodes=node(interval=n, **deep)) for n in INTERVALS]
    held = ENCODER if model == "unet" else REUSES[model][0]
    found[f"our propagation, {held}"] = [replace(goal, nodes=node(interval=n, reuse=held)) for n in INTERVALS]
    found["our propagation, calibrated"] = [
        replace(goal, nodes=nodes) for nodes in calibrated(lab, scene, schedule, len(goal.sigmas) - 1)
    ]
    return found


def calibrated(lab: FitLab, scene: Scene, schedule: str, steps: int) -> list[tuple]:
    """The nodes of the pack's own calibration for Euler on a stock schedule, made on a prompt that no task has."""
    code = code_of("nodes/_host/propagation/*", "kernels/propagation", "nodes/propagation")
    text = f"{astuple(scene)} {schedule} {steps} {code} {lab.digests}"
    stem = f"propagation-short-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    path, store = next(lab.cache.glob(f"{stem}.*"), None), lab.host.module("models.store")
    if path is None:
        lab.must_be_drawn()
        (latent,) = lab.host.call("EmptyLatentImage", width=scene.side, height=scene.side, batch_size=1)
        profile, *_ = lab.host.call(
            "AttuneFitPropagation", model=lab.model(scene), positive=lab.conditioning([prompt(100, 3)]),
            negative=lab.conditioning([""]), latent_image=latent, seed=987654321, steps=steps, cfg=scene.cfg,
            sampler_name="euler", scheduler=schedule, reuse=REUSES[scene.model][-1], fastest=4.0, longest=5,
        )  # fmt: skip
        path = store.save_profile(profile, lab.cache, stem)
    parts = networks(lab, scene.model)["demo"].reuses
    found = []
    points = store.load_profile(path).key_steps.points
    for point in points[:: -(-len(points) // POINTS)]:
        same = lambda name, point=point: (parts[name].fresh, parts[name].cut) == (point.reuse.fresh, point.reuse.cut)
        reuse = next(name for name in parts if same(name))
        found.append(node(mode="speed target", reuse=reuse, speed=point.speed, profile=path.name))
    return found


# --- published fits ---


def olss_how(lab: FitLab, scene: Scene, goal: How, part: Sequence[Task], levels: Sequence[float]) -> How:
    """Least squares over all earlier answers on given levels, fitted to these pictures of the long run."""

    def work(run: Any, path: Any, space: Any) -> Any:
        sigmas = torch.tensor(levels, dtype=torch.float64)
        return fit_olss(run._denoise_over(sigmas), sigmas, path).weights

    weights = kept_fit(lab, "olss", scene, goal, part, list(levels), work)
    return How(OLSS, tuple(levels), (weights,))


def plan_how(
    lab: FitLab, scene: Scene, goal: How, part: Sequence[Task], schedules: Sequence[str], n: int, trials: int
) -> How:
    """The plan of least error on these pictures of the long run, on any of the schedules."""
    levels = [lab.levels(scene.model, name, n) for name in schedules]
    kind = lab.space(scene.model).kind

    def work(run: Any, path: Any, space: Any) -> Any:
        sigmas = [torch.tensor(one, dtype=torch.float64) for one in levels]

        def error(plan: Any) -> float:
            at, steps = plan
            end = solve_plan(run._denoise_over(sigmas[at]), path.states[0], sigmas[at], steps, space)
            return float(deviation(end, path.end).mean())

        at, steps = search_plan(error, n, len(levels), trials, torch.Generator().manual_seed(SEED))
        return at, [astuple(one) for one in steps]

    at, steps = kept_fit(lab, "plan", scene, goal, part, [levels, trials], work)
    return How(PLAN, levels[at], (kind, steps))


def kept_fit(
    lab: FitLab, what: str, scene: Scene, goal: How, part: Sequence[Task], facts: Any, work: Callable[..., Any]
) -> Any:
    path = lab.kept(what, [astuple(scene), astuple(goal), facts], part, ".json")
    if not path.exists():
        lab.must_be_drawn()
        keep(path, lab.taught(scene, goal, part, work))
    return frozen(json.loads(path.read_text("utf-8")))
