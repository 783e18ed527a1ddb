"""Where the runs of a MODEL begin: one wrapper for all that puts another start in the place of plain noise.

A method is a `Start`. A MODEL has one for each place of PLACES; they act in that order, whatever the order of their
nodes: the network that reads the prompt runs before the MODEL is loaded, so that it fits even where the MODEL fills the
memory; what needs the latent in the model's scale or the MODEL itself runs where the host calls the sampler.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import comfy.model_patcher
import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .._plan.latents import refuse_nested
from .calibrating import calibrating, stands_aside

LOG = logging.getLogger(__name__)
KEY = "attune.start"
PLACES = ("golden noise", "first state", "re-denoise")
BEFORE_LOADING = "golden noise"
ALMOST_ALL = 0.98  # of the highest noise level: from here a run starts from noise alone
BEGUN = "attune_begun"  # marks a noise that holds its start already


@dataclass(frozen=True)
class StartingRun:
    """A run that is about to begin.

    noise, latent: [b c h w], the latent in the model's scale once the MODEL is loaded. mask: like noise, or None. top:
    whether the host takes the run for one from noise alone. extra_args: what its sampler gets.
    """

    guider: Any
    sampling: Any
    sigmas: Tensor
    noise: Tensor
    latent: Tensor
    mask: Tensor | None
    top: bool
    extra_args: dict


class Start:
    """One way in which the runs of a MODEL begin otherwise; immutable, for copies of the MODEL's options share it.

    strength: 0 is plain noise. partial: also where a run starts from a picture.
    """

    place: ClassVar[str]
    partial: bool = False

    def __deepcopy__(self, memo: dict) -> Start:
        return self

    @property
    def strength(self) -> float:
        raise NotImplementedError

    @property
    def who(self) -> str:
        """The node, for messages."""
        raise NotImplementedError

    @property
    def patchers(self) -> list[comfy.model_patcher.ModelPatcher]:
        """What the host has to load beside the MODEL."""
        return []

    def check(self, positive: list | None) -> None:
        """ValueError for a prompt that it cannot begin from."""

    def objection(self, run: StartingRun) -> str | None:
        """Why it leaves this run alone, beyond `not_from_noise`; ValueError where there must be no such run."""
        return None

    def begin(self, run: StartingRun) -> tuple[Tensor, str]:
        """The noise in place of the run's, and what was done, in words for the log."""
        raise NotImplementedError


def with_start(model: Any, start: Start) -> Any:
    """A clone of MODEL whose runs begin as `start` says, in place of an earlier one; MODEL itself at strength 0."""
    if start.strength == 0:
        return model
    clone = model.clone()
    starts = [*(one for one in starts_of(model) if one.place != start.place), start]
    starts.sort(key=lambda one: PLACES.index(one.place))
    clone.model_options["transformer_options"][KEY] = tuple(starts)
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, _outer_sample), (WrappersMP.SAMPLER_SAMPLE, _sampler_sample)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    clone.set_additional_models(KEY, [patcher for one in starts for patcher in one.patchers])
    return clone


def starts_of(model: Any) -> tuple[Start, ...]:
    return model.model_options.get("transformer_options", {}).get(KEY, ())


def not_from_noise(run: StartingRun, partial: bool) -> str | None:
    """Why a run does not begin from noise alone, in the user's words; None when it does or `partial` allows it."""
    if len(run.sigmas) < 2 or float(run.sigmas[0]) <= float(run.sigmas[-1]):
        return "the noise levels do not fall"
    if not bool(run.noise.any()):
        return "no noise is added"
    first, highest = float(run.sigmas[0]), float(run.sampling.sigma_max)
    if partial or run.top or first >= ALMOST_ALL * highest or not bool(run.latent.any()):
        return None
    return f"the run starts from a picture, at noise level {first:.3g} of {highest:.3g}"


def from_the_top(sampling: Any, sigmas: Tensor) -> bool:
    """Whether the host takes a run for one from noise alone, by the host's own rule."""
    first, highest = float(sigmas[0]), float(sampling.sigma_max)
    return first > highest or math.isclose(first, highest, rel_tol=1e-5)


def _outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    """OUTER_SAMPLE: what acts before the MODEL is loaded; nothing at all for a noise that holds its start already."""
    guider = executor.class_obj
    kept = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(kept)
    try:
        options = guider.model_options["transformer_options"]
        if getattr(noise, BEGUN, False) and options.pop(KEY, ()):
            LOG.warning("Attune Noise: its noise holds the MODEL's start already, so the MODEL adds none.")
        sampling = guider.model_patcher.get_model_object("model_sampling")
        top = from_the_top(sampling, sigmas)
        run = StartingRun(
            guider, sampling, sigmas, noise, latent_image, None, top, {"model_options": guider.model_options}
        )
        noise = _begun(run, before_loading=True)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        guider.model_options = kept


def _sampler_sample(
    executor, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs
):  # fmt: skip
    """SAMPLER_SAMPLE: another noise, all else as it came."""
    sampling, sampler = guider.inner_model.model_sampling, executor.class_obj
    of_host = hasattr(sampler, "max_denoise")
    top = bool(sampler.max_denoise(guider, sigmas)) if of_host else from_the_top(sampling, sigmas)
    run = StartingRun(guider, sampling, sigmas, noise, latent_image, denoise_mask, top, extra_args)
    noise = _begun(run, before_loading=False)
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)


def _begun(run: StartingRun, before_loading: bool) -> Tensor:
    """The noise after all starts of this moment."""
    options = run.extra_args["model_options"]
    if stands_aside(options, KEY):
        return run.noise
    for start in options["transformer_options"].get(KEY, ()):
        if (start.place == BEFORE_LOADING) is not before_loading:
            continue
        reason = start.objection(run) or not_from_noise(run, start.partial)
        if reason:
            LOG.info("%s: stands aside, %s.", start.who, reason)
            continue
        noise, done = start.begin(run)
        LOG.info("%s: %s.", start.who, done)
        run = replace(run, noise=noise)
    return run.noise


class StartNoise:
    """A NOISE: what the runs of a MODEL begin from, for guiders that leave the MODEL's options out."""

    def __init__(
        self, noise: Any, model: Any, sigmas: Tensor, positive: list | None, negative: list | None, cfg: float
    ):
        for start in starts_of(model):
            start.check(positive)
        self.seed = getattr(noise, "seed", 0)
        self._noise, self._model, self._sigmas = noise, model, sigmas
        self._conds = {"positive": positive or []} | ({"negative": negative} if negative else {})
        self._cfg = cfg if negative else 1.0

    def generate_noise(self, latent: dict) -> Tensor:
        noise, samples = self._noise.generate_noise(latent), latent["samples"]
        if not starts_of(self._model) or len(self._sigmas) < 2:
            return noise
        refuse_nested(samples, "latent_image", "a latent of pictures for Attune Noise")
        guider, caught = comfy.samplers.CFGGuider(calibrating(self._model, KEY)), _Caught()
        guider.inner_set_conds(self._conds)
        guider.set_cfg(self._cfg)
        guider.sample(noise, samples, caught, self._sigmas, latent.get("noise_mask"), disable_pbar=True, seed=self.seed)
        begun = caught.noise.to("cpu", copy=True)
        setattr(begun, BEGUN, True)
        return begun


class _Caught(comfy.samplers.KSAMPLER):
    """Euler in the eyes of the host; keeps the noise that reaches it, and samples nothing."""

    def __init__(self):
        super().__init__(comfy.samplers.ksampler("euler").sampler_function)

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        self.noise: Tensor = noise
        return latent_image
