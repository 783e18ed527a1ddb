"""Calibrate propagation on a model: measure what every reuse would have cost, then try the best."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from PIL import Image
from torch import Tensor

from ....kernels.fitted_sampler import EQUAL, fidelity
from ....kernels.propagation import FeatureCache, Reuse, optimal_keys, speedup, step_weights, uniform_keys
from ....models.calibration import Calibration, KeySteps, Point, fitted
from ..._plan import propagation as plan
from ..._plan.latents import is_nested
from ..calibrating import calibrating
from ..clock import noise_space, why_not
from ..identity import identify, network_of, pixels
from ..live import Interim, last_on_bar
from ..session import check_numbers, in_turn, several
from ..solvers import adds_noise, known, run_stock_node, sample
from . import KEY, Propagation, WholeSteps, applied, outer_sample, propagation_for, run_of
from .forecast import can_forecast
from .forecast_fit import best_of, fit_forecasts
from .transformer import blocks_of
from .unet import blocks_a_side, levels_above, lies_deep, measure_unet, unet_of

LOG = logging.getLogger(__name__)
WHO = "Attune Fit Propagation"
SPEED_STEP, FEWEST_SPEEDS = 0.25, 12  # speeds are tried by this step, by less where a part has not so many
BY_HAND = (2, 3)  # intervals of even key steps that are tried, too
FEWEST_PICTURES = 2  # that forecasts are fitted to, and tried on


def measuring(kind: type[Propagation], reuse: Reuse, ages: int, steps: int) -> tuple[type[Propagation], list]:
    """A run's class that changes nothing and notes what key steps tell, and the list that its runs are added to.

    errors [gaps+1, ages, steps] (kernels' `optimal_keys`): of having reused older features at every step, of each age
    up to `ages` and each distance between the two captures. changes: by how much each feature changed at each step but
    the first, relative to its size.
    """
    gaps = ages + 1 if reuse.forecast else 0
    runs: list[Any] = []

    class Measuring(kind):  # type: ignore[valid-type, misc]
        sources: tuple[int, int | None] | None

        def __init__(self, *args):
            super().__init__(*args)
            self.cache = FeatureCache(ages + gaps + 1, reach=self.reach())
            self.compared: set[int] = set()
            self.errors = torch.full((gaps + 1, max(ages, 1), steps), torch.inf)
            self.changes: dict[str, list[Tensor]] = {}
            runs.append(self)

        def choose(self, sigmas, shares, fresh_noise):
            return plan.Choice(frozenset(range(len(sigmas) - 1)), reuse, 0, "calibration")

        def records(self, keys):
            return True

        def store(self, keys, signature, features, x):
            before = self.cache.recall(keys, signature, max(self.step - 1, 0), 0.0, next(iter(features.values())))
            if before is not None and self.step and before.keys() == features.keys():
                for name, value in features.items():
                    change = (value - before[name]).float().norm() / value.float().norm()
                    seen = self.changes.setdefault(" ".join(map(str, name)) if isinstance(name, tuple) else name, [])
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
                for gap in range(min(gaps, last) + 1):
                    missing = self.counts["missing"]
                    part = self.reusing(last, last - gap if gap else None, executor, arguments)
                    if self.counts["missing"] == missing:  # else the features do not fit: a run would have a key step
                        self.errors[gap, age - 1, self.step] = (part - whole).float().square().mean().sqrt()

        def reusing(self, last: int, before: int | None, executor, arguments: tuple) -> Tensor:
            self.sources = (last, before)
            self.seen.clear()
            try:
                return executor(*arguments)
            finally:
                self.sources = None

    return Measuring, runs


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


def fit(
    model: Any, run: Callable[[Any], Tensor], solver: str, levels: Tensor, kind: type[Propagation],
    reuses: list[Reuse], fastest: float, longest: int,
) -> Generator[Interim, None, tuple[KeySteps, dict[str, list[float]]]]:  # fmt: skip
    """Measure each of `reuses`, choose key steps for speeds up to `fastest`, run them; yields what it does, how far,
    and what it would return by then.

    Each error is measured with all other steps whole, so their sum does not see what several shorter steps in a row do
    together, which is most where a solver adds noise: even key steps are run, too, and the pictures decide.

    run: a MODEL to the latents that it samples over `levels`. Returns the calibration (settings that no other beats in
    speed and fidelity) and how much each feature changes.
    """
    sigmas = levels.tolist()
    steps = len(sigmas) - 1
    weights = step_weights(sigmas, noise_space(model.get_model_object("model_sampling")))
    candidates: dict[tuple[Reuse, frozenset[int]], float] = {}
    changes: dict[str, list[float]] = {}
    found = KeySteps(kind.blocks_in(model), solver, tuple(sigmas), ())
    for number, reuse in enumerate(reuses):
        known_by_now = (found, changes) if changes else None
        yield f"measuring {number + 1} of {len(reuses)} parts", 0.5 * number / len(reuses), known_by_now
        measuring_kind, runs = measuring(kind, reuse, longest - 1, steps)
        replaced = {WrappersMP.OUTER_SAMPLE: outer_sample(measuring_kind), WrappersMP.PREDICT_NOISE: _compare}
        reference = run(applied(model, kind, plan.ReuseSettings(), replaced))
        check_numbers(reference)
        (measured,) = runs
        changes = {**{name: torch.stack(seen).tolist() for name, seen in measured.changes.items()}, **changes}
        share = measured.costs.of_step(reuse)
        best = optimal_keys(measured.errors.cpu(), weights)
        step = min(SPEED_STEP, (1 / share - 1) / FEWEST_SPEEDS)
        for n in range(1, math.floor((fastest - 1) / step + 1e-9) + 1):
            counts = [count for count in best if speedup(steps, count, share) >= 1 + n * step]
            if counts:
                candidates[reuse, best[max(counts)][1]] = speedup(steps, max(counts), share)
        last = frozenset(range(steps - plan.ReuseSettings.keep_last, steps))
        for keys in (uniform_keys(steps, interval) | last for interval in BY_HAND if interval <= longest):
            if 1 + step <= speedup(steps, len(keys), share) <= fastest:
                candidates[reuse, keys] = speedup(steps, len(keys), share)
    if not candidates:
        raise ValueError(
            "With this 'reuse' nearly all of the network runs on every step: set 'reuse' to a part that costs less, or "
            "raise 'longest'."
        )
    points: list[Point] = []
    for number, ((reuse, keys), speed) in enumerate(candidates.items()):
        share = 0.5 + 0.5 * number / len(candidates)
        yield f"trying {number + 1} of {len(candidates)} settings", share, (best_of(found, points), changes)
        trial = Point(reuse, tuple(sorted(keys)), speed, EQUAL)
        settings = plan.ReuseSettings(plan.CALIBRATED, calibration=replace(found, points=(trial,)))
        points.append(replace(trial, psnr=fidelity(run(applied(model, kind, settings)), reference)))
    return best_of(found, points), changes


def fit_profile(
    model: Any, positive, negative, latent_image: dict, seed: int, steps: int, cfg: float, sampler_name: str,
    scheduler: str, draw: Callable[[KeySteps, dict[str, list[float]]], Image.Image], reuse: str = plan.AUTOMATIC,
    fastest: float = 2.5, longest: int = 4, search: int = 0, **more_positives,
) -> tuple[Calibration, KeySteps, dict[str, list[float]]]:  # fmt: skip
    """Calibrate a MODEL for one kind of run, with the host's progress bar: profile, calibration, feature changes, of
    which the last two are drawn meanwhile.

    search: of forecasts, see `fit_forecasts`. more_positives: of forecasts, further prompts, which its pictures have in
    turn, by the inputs' names.
    """
    sampler = comfy.samplers.sampler_object(sampler_name)
    known(sampler, WHO)
    (sigmas,) = run_stock_node("BasicScheduler", model=model, scheduler=scheduler, steps=steps, denoise=1.0)
    reason = why_not(sampler, sigmas)
    if reason is not None:
        raise ValueError(f"There is nothing to calibrate: {reason}. Change 'sampler_name' or 'steps'.")
    if reuse == plan.NOTHING and not can_forecast(sampler):
        raise ValueError(
            f"The sampler '{sampler_name}' asks the model more than once a step, or for more than its guided answer. "
            "Nothing can be forecast: set 'reuse' to 'automatic', or 'sampler_name' to one such as 'dpmpp_2m'."
        )
    fresh_noise = adds_noise(sampler)
    sees_more = fresh_noise and lies_deep(model, latent_image["samples"])  # two levels see new noise, and cost little
    asks_nothing = reuse == plan.NOTHING or (reuse == plan.AUTOMATIC and can_forecast(sampler) and not sees_more)
    kind = WholeSteps if asks_nothing else propagation_for(model)
    positive, prompts = in_turn(positive, more_positives, WHO)
    latent_image = _enough(latent_image, prompts, FEWEST_PICTURES if kind is WholeSteps else 1)

    def run(patched: Any, noise: int = seed) -> Tensor:
        noise %= 2**64
        drawn = sample(patched, noise, cfg, sampler_name, sigmas, positive, negative, latent_image)["samples"]
        packed = torch.cat([one.flatten(1) for one in drawn.unbind()], 1)[:, None] if is_nested(drawn) else drawn
        return packed.float()

    if kind is WholeSteps:
        work = fit_forecasts(calibrating(model, KEY), run, sampler_name, sigmas, fastest, seed, search)
    else:
        part = _reuses(model, kind, reuse, fresh_noise, latent_image["samples"])
        work = fit(calibrating(model, KEY), run, sampler_name, sigmas, kind, part, fastest, longest)
    calibration, changes = last_on_bar(work, WHO, lambda now: draw(*now))
    evidence = {name: [getattr(point, name) for point in calibration.points] for name in ("psnr", "speed")}
    what, how = ("forecasts", "recorded run") if kind is WholeSteps else ("propagation", "measured errors")
    profile = fitted(
        identify(model, weights=True), kind.profile_kind, f"{what}, {sampler_name} {len(sigmas) - 1} steps",
        f"{how}, dynamic programming", pixels(model, latent_image) or (1, 1), evidence, solver=sampler_name,
        cfg=cfg, sigmas=calibration.sigmas, key_steps=calibration, seed=seed, scheduler=scheduler, longest=longest,
        pictures=latent_image["samples"].shape[0], setting=calibration.setting,
    )  # fmt: skip
    return profile, calibration, changes


def _enough(latent_image: dict, prompts: int, fewest: int) -> dict:
    """A LATENT of `fewest` pictures at least, as many for every prompt; noises of their own come by themselves."""
    samples = latent_image["samples"]
    if is_nested(samples):
        return latent_image
    times = prompts if prompts > 1 or len(samples) >= fewest else fewest
    return latent_image if times == 1 else several(latent_image, times)


def measures_too_few(sampler_name: str, latent_image: dict) -> bool:
    """Whether one picture is measured with a solver that adds noise, so that the next one has other errors."""
    return latent_image["samples"].shape[0] == 1 and adds_noise(comfy.samplers.sampler_object(sampler_name))


def _reuses(model: Any, kind: type[Propagation], name: str, fresh_noise: bool, samples: Tensor) -> list[Reuse]:
    """What to measure on this kind of network for latents like `samples`; "automatic" is the parts that cost little."""
    part, network = kind.part(name), unet_of(model)
    if network is not None:
        if fresh_noise and part == plan.ENCODER_REUSED:
            raise ValueError(
                f"This solver adds noise, which '{part}' would not see: set 'reuse' to '{plan.TOP_LEVEL}'."
            )
        n, levels = blocks_a_side(network), levels_above(network)
        reuses = [plan.reuse_by_name(one, True, n, levels) for one in plan.MEASURED_PARTS]
        if name != plan.AUTOMATIC:
            return [plan.reuse_by_name(part, True, n, levels)]
        costs = measure_unet(network, *samples.shape[-2:]).costs
        return [reuse for reuse in dict.fromkeys(reuses) if costs.of_step(reuse) <= plan.FAR_BELOW]
    n = len(blocks_of(network_of(model)))
    names = [plan.FIRST, plan.ENDS] if name == plan.AUTOMATIC and n > 2 else [part]
    return [plan.block_reuse_by_name(one, True, n) for one in names]
