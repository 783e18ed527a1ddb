"""Tell a MODEL's network another noise level than the true one, and nobody else.

The network's timestep is replaced inside `apply_model`, between the host's own conversion and the network. Input
scaling, `calculate_denoised`, the solver and ControlNets keep the true sigma. Nothing is written that outlives a call:
the maps travel in the MODEL clone's transformer_options, the choice for a run in that run's copy of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.conditioning import ConditioningMap, compose
from ...kernels.space import NoiseSpace
from .calibrating import stands_aside
from .identity import pixels_of
from .solvers import solver_name

LOG = logging.getLogger(__name__)
KEY = "attune.conditioning"
CHOSEN = f"{KEY}.chosen"  # of the current run
UNHEARD = f"{KEY}.unheard"  # whether that run was warned that its MODEL does not ask


@dataclass(frozen=True)
class Remap:
    """A map on a MODEL: `name` for messages, `solver` ("" for every sampler) and `cfg` (or None) it was fitted with."""

    name: str
    conditioning: ConditioningMap
    solver: str = ""
    cfg: float | None = None

    def at(self, size: tuple[int, int] | None) -> tuple[ConditioningMap, str]:
        """The map for pictures of `size` pixels, None where the latent is no picture; and what a run has to know of the
        choice, for the log, "" where there is none."""
        return self.conditioning, ""


class _Once:
    """Something that is said once in a run; copies of the run's options share it."""

    said = False

    def __deepcopy__(self, memo: dict) -> _Once:
        return self

    def first(self) -> bool:
        said, self.said = self.said, True
        return not said


def with_conditioning(model, remap: Remap):
    """A clone of MODEL whose network is told `remap`, on top of the maps it already has; MODEL itself for the identity.

    A map bound to a solver stands aside, with a line in the log, when another sampler runs.
    """
    if remap.conditioning.is_identity:
        return model
    if not hasattr(model.model, "process_timestep"):
        raise ValueError(
            "This ComfyUI is too old to change what a model is told: update it to 0.3.64 or newer, or set 'strength' "
            "to 0."
        )
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    options[KEY] = (*options.get(KEY, ()), remap)
    for kind, wrapper in ((WrappersMP.SAMPLER_SAMPLE, _choose), (WrappersMP.APPLY_MODEL, _tell)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def network_timestep(sampling, sigma: Tensor) -> Tensor:
    """The model's timestep of any sigma; models of whole timesteps get fractions, which their embeddings know.

    The host rounds to the nearest of 1000 levels, up to 2 % in sigma: more than many a correction.
    """
    if type(sampling).timestep is not comfy.model_sampling.ModelSamplingDiscrete.timestep:
        return sampling.timestep(sigma).float()
    levels = sampling.log_sigmas.to(sigma.device)  # [T], ascending
    log_sigma = sigma.float().clamp(min=1e-10).log()
    high = torch.searchsorted(levels, log_sigma.contiguous()).clamp(1, len(levels) - 1)
    share = (log_sigma - levels[high - 1]) / (levels[high] - levels[high - 1])
    return high - 1 + share.clamp(0, 1)


def _choose(executor, guider, sigmas, extra_args, *args, **kwargs):
    """SAMPLER_SAMPLE: compose the maps that suit the sampler of this run."""
    options = extra_args["model_options"]["transformer_options"]
    running, cfg = solver_name(executor.class_obj), getattr(guider, "cfg", None)
    size = _size(guider.inner_model, args[1] if len(args) > 1 else kwargs["noise"])
    fitting = []
    for remap in _own(options):
        if remap.solver in ("", running):
            a_map, said = remap.at(size)
            fitting.append(a_map)
            if said:
                LOG.info("%s: %s", remap.name, said)
            if remap.cfg and cfg and not 0.5 <= cfg / remap.cfg <= 2:
                LOG.warning(
                    "%s: fitted at cfg %g, but this run has %g: its gain is unknown there.", remap.name, remap.cfg, cfg
                )
        else:
            LOG.warning(
                "%s: timestep alignment skipped: made for %s, but this run uses %s. The schedule still applies.",
                remap.name, remap.solver, running,
            )  # fmt: skip
    options[CHOSEN], options[UNHEARD] = compose(fitting) if fitting else None, _Once()
    return executor(guider, sigmas, extra_args, *args, **kwargs)


def _tell(executor, x, sigma, *args, **kwargs):
    """APPLY_MODEL: one call of the network with its timestep replaced where the map changes sigma."""
    options = kwargs.get("transformer_options") or next((a for a in reversed(args) if isinstance(a, dict)), {})
    base_model = executor.class_obj
    if CHOSEN in options:
        conditioning = options[CHOSEN]
    else:  # a call outside of any sampler: the maps that hold for all of them
        fitting = [remap.at(_size(base_model, x))[0] for remap in _own(options) if not remap.solver]
        conditioning = compose(fitting) if fitting else None
    if conditioning is None:
        return executor(x, sigma, *args, **kwargs)
    told = conditioning(sigma)
    timestep_told = network_timestep(base_model.model_sampling, told)
    shadowed = base_model.__dict__.get("process_timestep")
    process_timestep = base_model.process_timestep
    asked: list[bool] = []

    def process_told(timestep, **more):
        asked.append(True)
        # Where nothing changes the host's own rounding stays, to the bit.
        return process_timestep(torch.where(told == sigma, timestep, timestep_told.to(timestep)), **more)

    base_model.process_timestep = process_told
    try:
        answer = executor(x, sigma, *args, **kwargs)
        if not asked and UNHEARD in options and options[UNHEARD].first():
            LOG.warning(
                "This MODEL (%s) runs in its own way: it does not ask for its timestep, so it is not told another one.",
                type(base_model).__name__,
            )
        return answer
    finally:
        if shadowed is None:
            del base_model.process_timestep
        else:
            base_model.process_timestep = shadowed


def _size(base_model, x: Tensor) -> tuple[int, int] | None:
    return pixels_of(base_model.latent_format, x.shape)


def _own(options: dict) -> tuple[Remap, ...]:
    """The MODEL's own maps; none while a fit measures."""
    return () if stands_aside({"transformer_options": options}, KEY) else options.get(KEY, ())


def with_choice_per_solve(model):
    """A clone of MODEL whose network can be told another map for each solve of a session, by `options_for_solve`."""
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _tell)
    return clone


def options_for_solve(model_options: dict, a_map: ConditioningMap | None, sigmas: Tensor) -> dict:
    """A session's model_options as a solve over `sigmas` must see them: told `a_map`, and none of the MODEL's own."""
    return options_over(model_options, sigmas, **{CHOSEN: a_map})


def options_over(model_options: dict, sigmas: Tensor, **more: Any) -> dict:
    """A run's model_options as a run over other levels must see them, with `more` for the network."""
    told = {**model_options.get("transformer_options", {}), **more, "sample_sigmas": sigmas}
    return {**model_options, "transformer_options": told}


def told_at(space: NoiseSpace, sigma: Tensor, told: Tensor) -> ConditioningMap | None:
    """The map that takes one level to another, both [b] and all equal; None where they are the same."""
    level, heard = float(sigma[0]), float(told[0])
    return None if level == heard else ConditioningMap.through(space, [level], [heard])
