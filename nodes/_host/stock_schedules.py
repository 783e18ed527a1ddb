"""The schedules that this host already has for a MODEL, at one number of steps."""

from __future__ import annotations

import comfy.samplers
import torch
from torch import Tensor

from .._plan.named_schedules import AUTO, CLOSED_FORMS, published_profiles, schedule
from .identity import identify
from .solvers import run_stock_node

VE_FIRST = ("karras", "exponential", "beta", "normal")
FLOW_FIRST = ("simple", "beta", "normal", "sgm_uniform")
OTHERS = ("kl_optimal", "sgm_uniform", "simple", "exponential", "karras", "linear_quadratic", "ddim_uniform")
DROPPED = ("karras", "exponential", "normal", "kl_optimal")
MOST_STEPS_DROPPED = 10  # beyond, dropping the last positive level costs more than it gains
GITS_RANGE = (14.5, 14.7)  # the tables are for Stable Diffusion's noise


def known_schedules(model, steps: int) -> dict[str, Tensor]:
    """Name -> float32 [steps+1] that falls to 0, the most promising first, none twice.

    The host's schedulers, Align Your Steps and GITS where they fit, the KL-optimal closed forms; for few steps also
    schedulers of one step more without the last positive level, as the host itself runs some samplers.
    """
    about = identify(model)
    sampling = model.get_model_object("model_sampling")
    names = [name for name in comfy.samplers.SCHEDULER_NAMES if name in {*VE_FIRST, *FLOW_FIRST, *OTHERS}]
    first = VE_FIRST if about.space == "ve" else FLOW_FIRST
    stock = {name: comfy.samplers.calculate_sigmas(sampling, name, steps) for name in names}
    found = {name: stock[name] for name in first if name in stock}
    for name in (AUTO, *published_profiles(), *CLOSED_FORMS):
        try:
            found[f"Attune {name}"], _ = schedule(name, about, steps)
        except ValueError:  # made for other noise than this model's
            continue
    if steps <= MOST_STEPS_DROPPED and about.space == "ve":
        for name in DROPPED:
            longer = comfy.samplers.calculate_sigmas(sampling, name, steps + 1)
            found[f"{name}, penultimate level dropped"] = torch.cat([longer[:-2], longer[-1:]])
    if about.space == "ve" and GITS_RANGE[0] < about.sigma_max < GITS_RANGE[1] and steps >= 2:
        (found["GITS"],) = run_stock_node("GITSScheduler", coeff=1.2, steps=steps, denoise=1.0)
    found |= {name: stock[name] for name in OTHERS if name in stock and name not in found}
    return _without_repeats(found, steps)


def _without_repeats(found: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Those that run: of the right length, falling, to 0, and not within 0.1 % of one before."""
    kept: dict[str, Tensor] = {}
    for name, levels in found.items():
        sigmas = levels.detach().float().cpu()
        runs = len(sigmas) == steps + 1 and bool((sigmas.diff() < 0).all()) and float(sigmas[-1]) == 0
        if runs and not any(torch.allclose(sigmas, other, rtol=1e-3, atol=0) for other in kept.values()):
            kept[name] = sigmas
    return kept
