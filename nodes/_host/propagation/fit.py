"""Calibrate propagation on a model: measure what every reuse would have cost, then try the best."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....kernels.propagation import FeatureCache, Reuse, optimal_keys, speedup, step_weights
from ....models.calibration import Calibration, KeySteps, ModelIdentity, Point, fitted
from ..._plan.propagation import (
    AUTOMATIC,
    CALIBRATED,
    ENCODER_REUSED,
    ENDS,
    FIRST,
    ONE,
    TOP_LEVEL,
    TWO,
    Choice,
    ReuseSettings,
    block_reuse_by_name,
    reuse_by_name,
)
from ..calibrating import calibrating
from ..clock import noise_space, why_not
from ..identity import identify, pixels
from ..sampling import run_stock_node, sample
from ..solvers import adds_noise, known
from . import KEY, Propagation, applied, outer_sample, propagation_for, run_of
from .transformer import blocks_of
from .unet import blocks_a_side, top_blocks, unet_of

LOG = logging.getLogger(__name__)
WHO = "Attune Fit Propagation"
SPEED_STEP = 0.25
EQUAL = 200.0  # dB, for a result that is the same


@dataclass
class Measured:
    """What one run with key steps only tells: errors [gaps+1, ages, steps] (kernels' `optimal_keys`), and how much each
    feature changed from step to step, relative to its size."""

    errors: Tensor
    changes: dict[Any, list[Tensor]] = field(default_factory=dict)
    run: Propagation | None = None

    def change_table(self) -> dict[str, list[float]]:
        """Feature name -> its change at each step but the first."""
        return {_name(key): torch.stack(values).tolist() for key, values in self.changes.items()}


def _name(key: Any) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def measuring(kind: type[Propagation], reuse: Reuse, ages: int, steps: int) -> tuple[type[Propagation], Measured]:
    """A run's class that changes nothing and fills a `Measured`: at every step, the error of having reused older
    features instead, of each age up to `ages` and each distance between the two captures."""
    gaps = ages + 1 if reuse.forecast else 0
    measured = Measured(torch.full((gaps + 1, max(ages, 1), steps), torch.inf))

    class Measuring(kind):  # type: ignore[valid-type, misc]
        sources: tuple[int, int | None] | None

        def __init__(self, *args):
            super().__init__(*args)
            self.cache = FeatureCache(ages + gaps + 1)
            self.compared: set[int] = set()
            measured.run = self

        def choose(self, sigmas, shares, fresh_noise):
            return Choice(frozenset(range(len(sigmas) - 1)), reuse, 0, "calibration")

        def records(self, keys):
            return True

        def store(self, keys, signature, features, x):
            before = self.cache.recall(keys, signature, max(self.step - 1, 0), 0.0, next(iter(features.values())))
            if before is not None and self.step and before.keys() == features.keys():
                for name, value in features.items():
                    change = (value - before[name]).float().norm() / value.float().norm()
                    seen = measured.changes.setdefault(name, [])
                    if len(seen) < self.step:
                        seen.append(change)
            super().store(keys, signature, features, x)

        def announce(self):
            pass

        report = announce

        def compare(self, executor, whole: Tensor, arguments: tuple) -> None:
            """Evaluate the model with older features, too."""
            for age in range(1, min(ages, self.step) + 1):
                last = self.step - age
                for gap in range(gaps + 1):
                    if gap > last:
                        continue
                    missing = self.counts["missing"]
                    part = self.reusing(last, last - gap if gap else None, executor, arguments)
                    if self.counts["missing"] == missing:  # else the features do not fit: a run would have a key step
                        measured.errors[gap, age - 1, self.step] = (part - whole).float().square().mean().sqrt()

        def reusing(self, last: int, before: int | None, executor, arguments: tuple) -> Tensor:
            self.sources = (last, before)
            self.seen.clear()
            try:
                return executor(*arguments)
            finally:
                self.sources = None

    return Measuring, measured


def _compare(executor, x, sigma, model_options, *args, **kwargs):
    """PREDICT_NOISE of a run that measures."""
    run = run_of(model_options)
    if run is None:
        return executor(x, sigma, model_options, *args, **kwargs)
    run.begin(sigma)
    whole = executor(x, sigma, model_options, *args, **kwargs)
    if run.clock.on_grid and run.step not in run.compared:
        run.compared.add(run.step)
        run.compare(executor, whole, (x, sigma, model_options, *args))
    return whole


@dataclass(frozen=True)
class Task:
    """One picture to calibrate on, as the stock sampler takes it."""

    model: Any
    seed: int
    cfg: float
    sampler_name: str
    sigmas: Tensor
    positive: Any
    negative: Any
    latent: dict

    def run(self, model: Any) -> Tensor:
        out = sample(
            model, self.seed, self.cfg, self.sampler_name, self.sigmas, self.positive, self.negative, self.latent
        )
        return out["samples"].float()


def fit(
    task: Task, kind: type[Propagation], reuses: list[Reuse], fastest: float, longest: int
) -> Generator[tuple[str, float], None, tuple[KeySteps, dict[str, list[float]]]]:
    """Measure each of `reuses`, choose key steps for speeds up to `fastest`, run them; yields what it does and how far.

    Returns the calibration (settings that no other beats in speed and fidelity) and how much each feature changes.
    """
    sigmas = task.sigmas.tolist()
    steps = len(sigmas) - 1
    weights = step_weights(sigmas, noise_space(task.model.get_model_object("model_sampling")))
    candidates: dict[tuple[Reuse, frozenset[int]], float] = {}
    changes: dict[str, list[float]] = {}
    for number, reuse in enumerate(reuses):
        yield f"measuring {number + 1} of {len(reuses)} parts", 0.5 * number / len(reuses)
        measuring_kind, measured = measuring(kind, reuse, longest - 1, steps)
        replaced = {WrappersMP.OUTER_SAMPLE: outer_sample(measuring_kind), WrappersMP.PREDICT_NOISE: _compare}
        reference = task.run(applied(task.model, kind, ReuseSettings(), replaced))
        changes = {**measured.change_table(), **changes}
        share = measured.run.costs.of_step(reuse)  # type: ignore[union-attr]
        best = optimal_keys(measured.errors.cpu(), weights)
        for n in range(1, round((fastest - 1) / SPEED_STEP) + 1):
            counts = [count for count in best if speedup(steps, count, share) >= 1 + n * SPEED_STEP]
            if counts:
                candidates[reuse, best[max(counts)][1]] = speedup(steps, max(counts), share)
    if not candidates:
        raise ValueError(
            f"No setting is {1 + SPEED_STEP:g} times faster: set 'reuse' to a part that costs less, or raise 'longest'."
        )
    found = KeySteps(kind.blocks_in(task.model), task.sampler_name, tuple(sigmas), ())
    points = []
    for number, ((reuse, keys), speed) in enumerate(candidates.items()):
        yield f"trying {number + 1} of {len(candidates)} settings", 0.5 + 0.5 * number / len(candidates)
        trial = Point(reuse, tuple(sorted(keys)), speed, EQUAL)
        settings = ReuseSettings(CALIBRATED, calibration=replace(found, points=(trial,)))
        points.append(replace(trial, psnr=_psnr(task.run(applied(task.model, kind, settings)), reference)))
    kept = sorted((p for p in points if not any(_beats(q, p) for q in points)), key=lambda p: p.speed)
    return replace(found, points=tuple(kept)), changes


def fit_profile(
    model: Any, positive, negative, latent_image: dict, seed: int, steps: int, cfg: float, sampler_name: str,
    scheduler: str, reuse: str = AUTOMATIC, fastest: float = 2.5, longest: int = 4,
) -> tuple[Calibration, KeySteps, dict[str, list[float]]]:  # fmt: skip
    """Calibrate a MODEL for one kind of run, with the host's progress bar: profile, calibration, feature changes."""
    sampler = comfy.samplers.sampler_object(sampler_name)
    known(sampler, WHO)
    (sigmas,) = run_stock_node("BasicScheduler", model=model, scheduler=scheduler, steps=steps, denoise=1.0)
    reason = why_not(sampler, sigmas)
    if reason is not None:
        raise ValueError(f"There is nothing to calibrate: {reason}. Change 'sampler_name' or 'steps'.")
    kind = propagation_for(model)
    reuses = _reuses(model, kind, reuse, adds_noise(sampler))
    task = Task(calibrating(model, KEY), seed, cfg, sampler_name, sigmas, positive, negative, latent_image)
    bar = comfy.utils.ProgressBar(1000)
    work = fit(task, kind, reuses, fastest, longest)
    while True:
        try:
            said, done = next(work)
            LOG.info("%s: %s", WHO, said)
            bar.update_absolute(round(1000 * done), 1000)
        except StopIteration as finished:
            calibration, changes = finished.value
            break
    made = {"seed": seed, "scheduler": scheduler, "longest": longest, "pictures": len(latent_image["samples"])}
    size = pixels(model, latent_image) or (1, 1)
    return _fitted(identify(model, weights=True), kind.profile_kind, calibration, cfg, size, made), calibration, changes


def _fitted(
    model: ModelIdentity, kind: str, calibration: KeySteps, cfg: float, size: tuple[int, int], made: dict[str, Any]
) -> Calibration:
    """The profile of what was measured, with all that tells whether it is for a model."""
    solver, steps = calibration.solver, len(calibration.sigmas) - 1
    evidence = {"psnr": [point.psnr for point in calibration.points], "speed": [p.speed for p in calibration.points]}
    return fitted(
        model, kind, f"propagation, {solver} {steps} steps", "measured errors, dynamic programming", size, evidence,
        solver=solver, cfg=cfg, sigmas=calibration.sigmas, key_steps=calibration, **made,
    )  # fmt: skip


def measures_too_few(sampler_name: str, latent_image: dict) -> bool:
    """Whether one picture is measured with a solver that adds noise, so that the next one has other errors."""
    return latent_image["samples"].shape[0] == 1 and adds_noise(comfy.samplers.sampler_object(sampler_name))


def _reuses(model: Any, kind: type[Propagation], name: str, fresh_noise: bool) -> list[Reuse]:
    """What to measure on this kind of network; "automatic" is the parts that cost little."""
    part, network = kind.part(name), unet_of(model)
    if network is not None:
        if fresh_noise and part == ENCODER_REUSED:
            raise ValueError(
                f"This solver adds noise, which '{ENCODER_REUSED}' would not see: set 'reuse' to '{TOP_LEVEL}'."
            )
        names = [TOP_LEVEL, TWO, ONE] if name == AUTOMATIC else [part]
        n, top = blocks_a_side(network), top_blocks(network)
        return list(dict.fromkeys(reuse_by_name(one, True, n, top) for one in names))
    n = len(blocks_of(model.get_model_object("diffusion_model")))
    names = [FIRST, ENDS] if name == AUTOMATIC and n > 2 else [part]
    return [block_reuse_by_name(one, True, n) for one in names]


def _psnr(latents: Tensor, references: Tensor) -> float:
    """dB, with the range of each reference as its peak; the mean of the pictures."""
    return statistics.fmean(map(_psnr_of_one, latents, references))


def _psnr_of_one(latent: Tensor, reference: Tensor) -> float:
    peak = float(reference.max() - reference.min())
    error = float((latent - reference).square().mean())
    return EQUAL if error == 0 else min(EQUAL, 10 * math.log10(peak**2 / error))


def _beats(a: Point, b: Point) -> bool:
    return a.speed >= b.speed and a.psnr >= b.psnr and (a.speed, a.psnr) != (b.speed, b.psnr)
