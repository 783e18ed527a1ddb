"""Another attention function between two noise levels: one that the host has registered, on one MODEL alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import comfy.samplers
from comfy.ldm.modules import attention as host_attention
from comfy.patcher_extension import WrappersMP
from PIL import Image
from torch import Tensor

from ...kernels.attention import best_windows, kept_by_others
from ...kernels.fitted_sampler import fidelity
from ...kernels.propagation import Reuse, step_weights
from ...models.calibration import ATTENTION, SAME_LEVEL, Calibration, KeySteps, Point, fitted
from .._plan.latents import refuse_nested
from .calibrating import calibrating, stands_aside
from .clock import noise_space, why_not
from .identity import identify, pixels
from .live import Interim, last_on_bar
from .session import check_numbers, in_turn, several
from .solvers import known, run_stock_node, sample

LOG = logging.getLogger(__name__)
KEY = "attune.attention"
KERNEL = f"{KEY}.kernel"
RUNNING = f"{KEY}.running"  # of the current run: what it did
OVERRIDE = "optimized_attention_override"
WHO, FIT = "Attune Attention by Sigma", "Attune Fit Attention"


def kernels() -> list[str]:
    """The attention functions that this host has registered, in its order; none on one that registers none."""
    return list(getattr(host_attention, "REGISTERED_ATTENTION_FUNCTIONS", {}))


@dataclass(frozen=True)
class FastBetween:
    """The registered function `kernel` at noise levels from `highest` down to `lowest`, both included."""

    kernel: str
    highest: float
    lowest: float

    def at(self, sigma: float) -> bool:
        return self.lowest * (1 - SAME_LEVEL) <= sigma <= self.highest * (1 + SAME_LEVEL)


class Kernel:
    """The registered function `name` in the host's form of an override, and whether a network has asked for it.

    One for all runs of a MODEL, and never read inside of the network: torch.compile makes a network anew for every
    other function, and for every other value that it reads.
    """

    def __init__(self, name: str):
        self.name, self.asked = name, False
        registered: Callable = host_attention.REGISTERED_ATTENTION_FUNCTIONS[name]

        def override(_, *args, **kwargs):
            self.asked = True
            return registered(*args, **kwargs)

        self._override = override

    def __deepcopy__(self, memo: dict) -> Kernel:
        return self

    def options(self, model_options: dict) -> dict:
        """The options of an evaluation all of whose attention is this function."""
        changed = {**model_options["transformer_options"], OVERRIDE: self._override}
        return {**model_options, "transformer_options": changed}


@dataclass
class _Ran:
    """Of one run: evaluations, and those with the other function."""

    evaluations: int = 0
    fast: int = 0


def with_attention(model: Any, choice: FastBetween) -> Any:
    """A clone of MODEL; ValueError where this host has no function of that name."""
    if choice.kernel not in kernels():
        raise ValueError(
            f"This ComfyUI has no attention '{choice.kernel}'. Choose one of: {', '.join(kernels())}. It offers sage, "
            "flash and xformers where their packages are installed and switched on."
        )
    clone = model.clone()
    clone.model_options["transformer_options"] |= {KEY: choice, KERNEL: Kernel(choice.kernel)}
    for kind, wrapper in ((WrappersMP.SAMPLER_SAMPLE, _run), (WrappersMP.PREDICT_NOISE, _choose)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def _run(executor, guider, sigmas, extra_args, *args, **kwargs):
    """SAMPLER_SAMPLE: one run, and a line on it."""
    options = extra_args["model_options"]["transformer_options"]
    if stands_aside(extra_args["model_options"], KEY):
        return executor(guider, sigmas, extra_args, *args, **kwargs)
    if OVERRIDE in options:
        LOG.warning("%s: another node chooses the attention of this MODEL, so this one stands aside.", WHO)
        return executor(guider, sigmas, extra_args, *args, **kwargs)
    options[RUNNING], kernel = (ran := _Ran()), options[KERNEL]
    kernel.asked = False
    try:
        return executor(guider, sigmas, extra_args, *args, **kwargs)
    finally:
        said = f"{ran.fast} of {ran.evaluations} evaluations with '{kernel.name}'"
        if ran.fast and not kernel.asked:
            LOG.warning("%s: %s, but this network asks for no attention there, so nothing changed.", WHO, said)
        else:
            LOG.info("%s: %s.", WHO, said)


def _choose(executor, x, sigma, model_options, *args, **kwargs):
    """PREDICT_NOISE: one guided evaluation."""
    options = model_options.get("transformer_options", {})
    ran, choice = options.get(RUNNING), options.get(KEY)
    if ran is None or choice is None:
        return executor(x, sigma, model_options, *args, **kwargs)
    ran.evaluations += 1
    if choice.at(float(sigma.flatten()[0])):
        ran.fast += 1
        model_options = options[KERNEL].options(model_options)
    return executor(x, sigma, model_options, *args, **kwargs)


# --- the fit ---


def errors_of(model: Any, run: Callable[[Any], Tensor], kernel: str, sigmas: Tensor) -> tuple[Tensor, list[float]]:
    """Where the run of exact attention ends, and for each step what `kernel` changes in its guided answer, rms."""
    patched, errors = calibrating(model, KEY), [0.0] * (len(sigmas) - 1)
    levels, other = sigmas.tolist(), Kernel(kernel)

    def compare(executor, x, sigma, model_options, *args, **kwargs):
        exact = executor(x, sigma, model_options, *args, **kwargs)
        level = float(sigma.flatten()[0])
        near = [i for i, one in enumerate(levels[:-1]) if abs(one - level) <= SAME_LEVEL * one]
        if near and not errors[near[0]]:
            coarse = executor(x, sigma, other.options(model_options), *args, **kwargs)
            errors[near[0]] = float((coarse - exact).float().square().mean().sqrt())
        return exact

    patched.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, KEY)
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, compare)
    end = run(patched)
    if not other.asked:
        raise ValueError(
            f"This MODEL ({type(model.model).__name__}) asks for no attention that can be replaced, so there is "
            "nothing to fit."
        )
    return end, errors


def fit_attention(
    model: Any, run: Callable[[Any], Tensor], kernel: str, solver: str, sigmas: Tensor, wanted: float, prompts: int = 1
) -> Generator[Interim, None, tuple[KeySteps, list[float]]]:
    """The longest stretch of steps that keeps `wanted` dB to the exact run, by halving: each trial is a run.

    prompts: how many the pictures of `run` have in turn; of two or more, nine in ten others are to keep it. Returns
    one setting for each stretch that was tried and is faithful enough, none where not even a step is, and the errors by
    step.
    """

    def kept(levels: FastBetween) -> float:
        end = run(with_attention(calibrating(model, KEY), levels))
        return kept_by_others([fidelity(end[i::prompts], exact[i::prompts]) for i in range(prompts)])

    yield "the exact run", 0.0, None
    exact, errors = errors_of(model, run, kernel, sigmas)
    check_numbers(exact)
    weights = step_weights(sigmas.tolist(), noise_space(model.get_model_object("model_sampling")))
    windows = best_windows([error * abs(weight) for error, weight in zip(errors, weights, strict=True)])
    steps = len(windows) + 1
    points: list[Point] = []
    low, high = 0, len(windows)
    while low < high:
        count = (low + high + 1) // 2
        found = errors, points[-1].keys if points else None
        yield f"trying {count} of {steps} steps", 0.2 + 0.7 * (1 - (high - low) / len(windows)), found
        tried = {}
        for start in dict.fromkeys((windows[count - 1][1], 1, steps - count)):  # the cheapest, the first, the last
            levels = FastBetween(kernel, float(sigmas[start]), float(sigmas[start + count - 1]))
            tried[start] = kept(levels)
        start, psnr = max(tried.items(), key=lambda one: one[1])
        if psnr >= wanted:
            keys = tuple(i for i in range(steps) if not start <= i < start + count)
            points.append(Point(Reuse(0, 1), keys, 1.0, psnr))
        low, high = (count, high) if psnr >= wanted else (low, count - 1)
    return KeySteps(1, solver, tuple(sigmas.tolist()), tuple(points)), errors


def fit_attention_profile(
    model: Any, positive, negative, latent_image: dict, seed: int, steps: int, cfg: float, sampler_name: str,
    scheduler: str, kernel: str, wanted: float, draw: Callable[[list[float], tuple[int, ...] | None], Image.Image],
    **more_positives,
) -> tuple[Calibration | None, list[float]]:  # fmt: skip
    """The calibration, None where no step tolerates the kernel, and the errors by step; with a progress bar, beside
    which the errors and the steps that stay exact so far are drawn.

    more_positives: further prompts, which the pictures have in turn, by the inputs' names.
    """
    sampler = comfy.samplers.sampler_object(sampler_name)
    known(sampler, FIT)
    refuse_nested(latent_image["samples"], "latent_image")
    (sigmas,) = run_stock_node("BasicScheduler", model=model, scheduler=scheduler, steps=steps, denoise=1.0)
    if (reason := why_not(sampler, sigmas)) is not None:
        raise ValueError(f"There is nothing to fit: {reason}. Change 'sampler_name' or 'steps'.")
    with_attention(model, FastBetween(kernel, 1.0, 0.0))  # refuses a kernel that is not there
    positive, prompts = in_turn(positive, more_positives, FIT)
    latent_image = several(latent_image, prompts)

    def run(patched: Any) -> Tensor:
        return sample(patched, seed, cfg, sampler_name, sigmas, positive, negative, latent_image)["samples"].float()

    work = fit_attention(model, run, kernel, sampler_name, sigmas, wanted, prompts)
    found, errors = last_on_bar(work, FIT, lambda now: draw(*now))
    if not found.points:
        return None, errors
    best = min(found.points, key=lambda point: len(point.keys))
    profile = fitted(
        identify(model, weights=True), ATTENTION, f"attention {kernel}, {sampler_name} {steps} steps",
        kernel, pixels(model, latent_image) or (1, 1),
        {"psnr": best.psnr, "fast_steps": steps - len(best.keys), "prompts": prompts},
        solver=sampler_name, cfg=cfg, sigmas=found.sigmas, key_steps=replace(found, points=(best,)), seed=seed,
        scheduler=scheduler, wanted=wanted,
    )  # fmt: skip
    return profile, errors


def levels_of_profile(profile: Calibration) -> FastBetween:
    """What a calibration of this kind says: its function, from its first other step down to its last."""
    assert profile.key_steps is not None
    keys = set(profile.key_steps.points[0].keys)
    fast = [sigma for i, sigma in enumerate(profile.sigmas[:-1]) if i not in keys]
    return FastBetween(profile.method, max(fast), min(fast))
