"""A fit inside a run of the host: how it gets there, and how our wrappers on a MODEL learn of it and stand aside."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

T = TypeVar("T")
CACHES = ("EasyCache", "LazyCache")  # nodes of the host, whose wrappers lie under their names
CACHED = (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH, WrappersMP.DIFFUSION_MODEL)
CALIBRATING = "attune.calibrating"  # of a MODEL's options: which of our wrappers acts while a fit measures, "" for none


def calibrating(model, key: str = ""):
    """A clone of MODEL on which every wrapper of ours stands aside, but for the one under `key`, and without the host's
    caches, which take each evaluation for the next step of one run."""
    clone = model.clone()
    for kind, name in itertools.product(CACHED, CACHES):
        clone.remove_wrappers_with_key(kind, name.lower())
    clone.model_options["transformer_options"][CALIBRATING] = key
    return clone


def stands_aside(model_options: dict, key: str) -> bool:
    """Whether the wrapper under `key` must leave a run alone, because a fit measures in it."""
    acts = model_options.get("transformer_options", {}).get(CALIBRATING)
    return acts is not None and acts != key


class _Inside(comfy.samplers.Sampler):
    """A sampler in the eyes of the host, which does other work and samples nothing."""

    def __init__(self, work: Callable[[Any, Tensor, dict, Tensor, Tensor], Any]):
        self.work = work

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        self.result = self.work(model_wrap, sigmas, extra_args, noise, latent_image)
        return latent_image


def inside_run(
    guider, noise: Tensor, latent: Tensor, sigmas: Tensor, seed: int,
    work: Callable[[Any, Tensor, dict, Tensor, Tensor], T],
) -> T:  # fmt: skip
    """What `work` returns, called where a run samples, the MODEL loaded and its conditions prepared; its arguments are
    a sampler's: the guided model, sigmas, extra_args, noise and latent."""
    sampler = _Inside(work)
    guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed)
    return sampler.result
