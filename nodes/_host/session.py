"""Many solves inside one run of the host's sampling: the model is loaded and the conditions are prepared once."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...kernels.conditioning import ConditioningMap
from ...kernels.space import NoiseSpace
from ...kernels.timestep_aligner import Trajectory
from ...kernels.types import Denoiser
from .._plan.latents import refuse_nested
from .._plan.solvers import SOLVERS, SolverFacts
from .calibrating import calibrating, inside_run
from .conditioning import options_for_solve, told_at, with_choice_per_solve
from .identity import SPACIAL, TEMPORAL, as_sampled, is_distilled, takes_latents_unscaled
from .recorder import Recorder
from .setting import setting_of, without_ours
from .solvers import adds_noise, known, solver_name

LOG = logging.getLogger(__name__)
REFERENCE = "dpmpp_2m"
WITHOUT_NOISE = " without noise"
ODE = {"s_noise": 0.0, "noise_scaler": lambda noise: noise}  # as the host's SamplerER_SDE sets it


@dataclass(frozen=True)
class Solver:
    """The sampler to fit for: `name` as the user chose it, `runs` the one without added noise, that one's `facts`."""

    name: str
    runs: str
    sampler: Any
    facts: SolverFacts

    @property
    def calls(self) -> int:
        """Of the model in one step."""
        return self.facts.calls

    @property
    def first_order(self) -> bool:
        """Whether its timesteps can be aligned: plain Euler, with no noise added by the user's sampler either."""
        return self.name == self.runs and self.facts.told


def solver_of(sampler, model) -> Solver:
    """What to run for a SAMPLER; ValueError where nothing can be fitted to it, or to a model like this."""
    name, sampling = solver_name(sampler), model.get_model_object("model_sampling")
    if takes_latents_unscaled(sampling):
        raise ValueError(
            f"This MODEL ({type(model.model).__name__}) runs with the sampler that was made for it alone (VOID "
            "Sampler), and nothing can be fitted to that sampler. Take its levels from Attune Scheduler."
        )
    if name == "lcm" or is_distilled(sampling):
        raise ValueError(
            "LCM, Turbo and Lightning models jump straight to the picture. There is no path that more steps would "
            "follow more closely, so there is nothing to fit. Use the steps and the scheduler that their makers give."
        )
    name, facts = known(sampler, "A fit")
    if facts.own_levels:
        raise ValueError(
            f"The sampler '{name}' chooses its own noise levels and ignores those of a schedule between its ends. "
            "Choose another one in 'sampler', such as 'dpmpp_2m' or 'euler'."
        )
    if not adds_noise(sampler):
        return Solver(name, name, sampler, facts)
    runs = facts.sibling or name  # plain Euler with s_churn is its own sibling, without the churn
    return Solver(f"{name} with s_churn" if runs == name else name, runs, named_sampler(runs), SOLVERS[runs])


def named_sampler(name: str) -> Any:
    """A SAMPLER of the table's solver, or of er_sde for an ordinary differential equation; one that this host lacks
    gives way to the nearest that it has."""
    plain = name.removesuffix(WITHOUT_NOISE)
    if plain not in comfy.samplers.KSampler.SAMPLERS:
        return comfy.samplers.sampler_object("dpmpp_2m")
    return comfy.samplers.ksampler(plain, ODE) if plain != name else comfy.samplers.sampler_object(plain)


class Solves:
    """The solves of one session. Every noise is [b ...] on the CPU, b of the latent, and so is every answer.

    evaluations: calls of the guided model so far.
    """

    def __init__(self, solver: Solver, guider, extra_args: dict, latent: Tensor, space: NoiseSpace):
        self._solver, self._guider, self._extra_args = solver, _Counted(guider), extra_args
        self._model_options, self._latent, self._space = extra_args["model_options"], latent, space
        self._reference = comfy.samplers.ksampler(REFERENCE)

    @property
    def evaluations(self) -> int:
        return self._guider.calls

    def listen(self, told: Callable[[int], None]) -> None:
        """Have `told` called with the number of evaluations after each."""
        self._guider.told = told

    @property
    def setting(self) -> str:
        """That of the user's own run, as `setting_of` finds it when the run is made without any fit."""
        options = without_ours(self._extra_args["model_options"])
        return setting_of(self._guider.guider, self._solver.sampler, options)

    def solve(self, sigmas: Tensor, noise: Tensor, a_map: ConditioningMap | None = None) -> Tensor:
        """Where the solver ends from `noise`, told the map; a copy of `sigmas`, for some samplers write into theirs."""
        return self._run(self._solver.sampler, sigmas, noise, a_map, None)

    def record(self, sigmas: Tensor, noise: Tensor) -> Trajectory:
        """The whole path of the reference solver."""
        states, denoised = [], []

        def note(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
            states.append(x.float().cpu())
            denoised.append(x0.float().cpu())

        end = self._run(self._reference, sigmas, noise, None, note)
        return Trajectory.recorded(sigmas, [*states, end], denoised)

    def record_own(self, sigmas: Tensor, noise: Tensor) -> Trajectory:
        """The whole path of the solver itself; ValueError where it passes a level by."""
        recorder = Recorder(self._guider, sigmas)
        path = recorder.path(self._run(self._solver.sampler, sigmas, noise, None, None, recorder))
        if path is None:
            raise ValueError(
                f"The sampler '{self._solver.name}' does not ask the model at every level of 'sigmas', or its run is "
                "too large to be recorded. Choose 'euler' or 'dpmpp_2m' in 'sampler', or a smaller latent."
            )
        return path

    def solve_by(self, name: str, sigmas: Tensor, noise: Tensor) -> Tensor:
        """Where a solver of the host ends."""
        return self._run(named_sampler(name), sigmas, noise, None, None)

    def denoise_over(self, sigmas: Tensor) -> Denoiser:
        """The guided model for latents in main memory, any number of them, as a run over `sigmas` asks it."""
        options = options_for_solve(self._model_options, None, sigmas.float().to(self._latent.device))
        ask = denoiser(self._guider, options, self._latent, self._extra_args.get("seed"))
        return lambda x, sigma: torch.cat([ask(part, sigma) for part in x.split(len(self._latent))])

    def denoise(self, x: Tensor, sigma: Tensor, told: Tensor) -> Tensor:
        """One call of the guided model that is told a level of its own; x [b ...]; sigma and told [b], all equal."""
        here, seed = self._latent.device, self._extra_args.get("seed")
        levels = torch.stack([sigma[0], torch.zeros_like(sigma[0])]).to(here)
        options = options_for_solve(self._model_options, told_at(self._space, sigma, told), levels)
        with torch.no_grad():
            answer = self._guider(x.to(here), sigma.to(here), model_options=options, seed=seed)
        return answer.float().cpu()

    def seconds_per_evaluation(self, sigma: float, noise: Tensor) -> float:
        """How long the guided model takes, by the second of two calls: the first one warms up."""
        x, level = noise * sigma, torch.full((len(noise),), sigma)
        self.denoise(x, level, level)
        began = time.perf_counter()
        self.denoise(x, level, level)
        return time.perf_counter() - began

    def _run(
        self, sampler, sigmas: Tensor, noise: Tensor, a_map: ConditioningMap | None, callback, guider=None
    ) -> Tensor:
        here = self._latent.device
        levels = sigmas.float().to(here, copy=True)
        arguments = {**self._extra_args, "model_options": options_for_solve(self._model_options, a_map, levels)}
        end = sampler.sample(
            guider or self._guider, levels.clone(), arguments, callback, noise.to(here), self._latent, None, True
        )
        return end.float().cpu()


def denoiser(guider: Any, options: dict, like: Tensor, seed: int | None) -> Denoiser:
    """A guider for latents in main memory; `like` a run's own on its device, which it is asked with."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.to(like.device, like.dtype).expand(len(x))  # rounded as a solver's, for latents of half precision
        with torch.no_grad():
            return guider(x.to(like), level, model_options=options, seed=seed).float().cpu()

    return denoise


class _Counted:
    """A guider that counts its calls, tells of them, and stops between them when the user asks."""

    def __init__(self, guider):
        self.guider, self.calls = guider, 0
        self.told: Callable[[int], None] = lambda _: None

    def __call__(self, *args, **kwargs):
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.calls += 1
        answer = self.guider(*args, **kwargs)
        self.told(self.calls)
        return answer

    def __getattr__(self, name):
        return getattr(self.guider, name)


T = TypeVar("T")


def run_session(
    model, positive, negative, cfg: float, solver: Solver, sigmas: Tensor, latent: Tensor, seed: int, space: NoiseSpace,
    work: Callable[[Solves], T],
) -> T:  # fmt: skip
    """What `work` returns, run once on the loaded MODEL; `latent` [b ...] is empty and gives the size alone."""
    guider = comfy.samplers.CFGGuider(with_choice_per_solve(calibrating(model)))
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)

    def solves(guided, sigmas: Tensor, extra_args: dict, noise: Tensor, latent: Tensor) -> T:
        extra_args["denoise_mask"] = None
        return work(Solves(solver, guided, extra_args, latent, space))

    return inside_run(guider, torch.zeros_like(latent), latent, sigmas.clone(), seed, solves)


def in_turn(positive: list, more: dict[str, list | None], who: str) -> tuple[list, int]:
    """Prompts as one CONDITIONING whose pictures have them in turn, and how many; ValueError for one that cannot be put
    so.

    more: by the names of their inputs, None for those that are not connected.
    """
    others = {name: one for name, one in more.items() if one is not None}
    if not others:
        return positive, 1
    (_, facts), *_ = positive
    for name, other in others.items():
        alike = len(positive) == len(other) == 1 and other[0][0].shape[2:] == positive[0][0].shape[2:]
        if not alike or (facts.keys() ^ other[0][1].keys()) - {"attention_mask"}:
            raise ValueError(
                f"{who} needs in 'positive' and '{name}' one plain prompt each, of the same text encoder and without "
                f"areas: connect 'CLIP Text Encode' directly, or leave '{name}' out."
            )
    each = [positive[0], *(other[0] for other in others.values())]
    tokens = math.lcm(*(text.shape[1] for text, _ in each))  # the host repeats them so, too, which no attention feels
    texts = torch.cat([text.repeat(1, tokens // text.shape[1], 1) for text, _ in each])
    kept = {key: value for key, value in facts.items() if key != "attention_mask"}
    joined = {
        key: torch.cat([own[key] for _, own in each])
        for key, value in kept.items()
        if isinstance(value, Tensor) and all(own[key].shape == value.shape for _, own in each)
    }
    return [[texts, {**kept, **joined}]], len(each)


def check_numbers(found: Tensor) -> None:
    """ValueError where what a run made is not finite."""
    if not bool(found.isfinite().all()):
        raise ValueError(
            "This MODEL answers with values that are not numbers, so there is no run to learn from. Draw the same "
            "picture with KSampler, and mend first what makes it black there."
        )


def several(latent: dict, times: int) -> dict:
    """A LATENT so many times, of which every picture gets a noise of its own, wherever the first one came from."""
    kept = {key: value for key, value in latent.items() if key != "batch_index"}
    return {**kept, "samples": torch.cat([latent["samples"]] * times)}


def empty_latent(model, latent: dict, name: str = "latent_image") -> Tensor:
    """Empty latents of the size of a LATENT, [b c h w] or with frames; ValueError, by its `name`, for pictures with
    sound."""
    samples = latent["samples"]
    refuse_nested(samples, name, "a latent of pictures or of one video")
    ratios = {} if samples.any() else {key: latent.get(key) for key in (SPACIAL, TEMPORAL)}
    return torch.zeros_like(as_sampled(model, {**ratios, "samples": torch.zeros_like(samples).float()}))


def draw_noises(latent: Tensor, seed: int, n: int) -> list[Tensor]:
    """The host's own noise of the seeds `seed`, `seed` + 1, …; each of the latent's shape."""
    return [comfy.sample.prepare_noise(latent, (seed + i) % 2**64) for i in range(n)]


def last(work: Generator[Any, None, Any], told: Callable[[], None] = lambda: None) -> Any:
    """What a generator returns in the end; `told` is called after each part, and the user can stop it there."""
    while True:
        try:
            next(work)
            stop_if_asked()
            told()
        except StopIteration as end:
            return end.value


def stop_if_asked() -> None:
    """Raise the host's interruption if the user pressed stop."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def training_device() -> torch.device:
    return comfy.model_management.get_torch_device()
