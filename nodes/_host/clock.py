"""Which step of a run an evaluation belongs to, known on the host without asking the device where the solver allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

from ...kernels.propagation import ReusePlan
from ...kernels.space import NoiseSpace
from .identity import noise_scale
from .setting import around
from .solvers import facts_of, on_grid, solver_name

FEWEST_STEPS = 8
PATCH_LEVELS = ("sigma_start", "sigma_end", "start_sigma", "end_sigma")


def why_not(sampler: Any, sigmas: Tensor) -> str | None:
    """Why a run cannot skip anything, in the user's words; None when it can."""
    facts = facts_of(sampler)
    if facts is not None and facts.own_levels:
        return f"{solver_name(sampler)} chooses its own noise levels"
    if len(sigmas) - 1 < FEWEST_STEPS:
        return f"a run of {len(sigmas) - 1} steps is too short, it takes {FEWEST_STEPS}"
    if not bool((sigmas[:-1] > sigmas[1:]).all()):
        return "the noise levels do not fall throughout"
    if getattr(sampler, "extra_options", {}).get("s_churn", 0) and not on_grid(sampler):
        return "s_churn moves the noise levels of this solver"
    return None


def step_times(model_sampling: Any, sigmas: Tensor) -> tuple[list[float], float]:
    """The network's timestep for each step, and the one of the highest noise level."""
    top = model_sampling.timestep(torch.as_tensor(model_sampling.sigma_max).cpu().reshape(1))
    return model_sampling.timestep(sigmas[:-1].cpu()).tolist(), float(top)


def matching_denoise(model: Any, sigma: Tensor) -> float:
    """The 'denoise' of the stock 'simple' that starts at this level: the share of the model's own levels below it."""
    levels = model.get_model_object("model_sampling").sigmas.cpu()
    return int(torch.searchsorted(levels, sigma.to(levels).reshape(1))) / len(levels)


def noise_space(model_sampling: Any) -> NoiseSpace:
    flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    return NoiseSpace("flow", noise_scale(model_sampling)) if flow else NoiseSpace("ve")


def conditioning_changes(model_sampling: Any, conds: dict[str, list[dict]]) -> list[float]:
    """The noise levels at which a prompt, a ControlNet or a hook begins, ends or changes."""
    percents: set[float] = set()
    for cond in (cond for side in conds.values() for cond in side):
        percents |= {cond.get("start_percent", 0.0), cond.get("end_percent", 1.0)}
        control = cond.get("control")
        while control is not None:
            percents |= set(getattr(control, "timestep_percent_range", ()))
            control = getattr(control, "previous_controlnet", None)
        for hook in getattr(cond.get("hooks"), "hooks", ()):
            percents |= {keyframe.start_percent for keyframe in getattr(hook.hook_keyframe, "keyframes", ())}
    return [float(model_sampling.percent_to_sigma(p)) for p in sorted(percents) if 0 < p < 1]


def patch_changes(model_options: dict) -> list[float]:
    """The noise levels at which another node's function on the MODEL begins or ends, as the stock Skip Layer Guidance
    and Deep Shrink: what the functions keep under the names that ComfyUI's own nodes give to such levels."""
    kept = (level for function in _functions(model_options) for level in _window(function))
    levels = (
        float(one) for one in kept if isinstance(one, (int, float)) or (isinstance(one, Tensor) and one.numel() == 1)
    )
    return [level for level in levels if level > 0]


def _functions(options: Any) -> Iterator[Any]:
    """The functions in a dict of options, in its lists and in its dicts."""
    if isinstance(options, dict):
        options = list(options.values())
    if isinstance(options, (list, tuple)):
        for one in options:
            yield from _functions(one)
    elif callable(options):
        yield options


def _window(function: Any) -> list[Any]:
    """What a function keeps from where it was made under the names of PATCH_LEVELS, or an object in its attributes."""
    own = getattr(getattr(function, "__self__", function), "__dict__", {})
    kept = around(function) if isinstance(function, FunctionType) else own
    return [kept[name] for name in PATCH_LEVELS if name in kept]


class Clock:
    """Follows a run through its evaluations: `step` and `sigma` of the one in progress."""

    def __init__(self, plan: ReusePlan, sampler: Any):
        self.plan = plan
        self.counts = on_grid(sampler)
        self.next_step = 0
        self.step: int | None = None
        self.sigma = plan.sigmas[0]

    def begin(self, sigma: Tensor) -> int:
        """An evaluation at `sigma` [b] begins; its step."""
        if self.counts:
            self.step = min(self.next_step, self.plan.steps - 1)
            self.sigma = self.plan.sigmas[self.step]
        else:
            self.sigma = float(sigma.flatten()[0])
            self.step = self.plan.step(self.sigma)
        return self.step

    def listen(self, callback: Callable | None) -> Callable:
        """The sampler's callback, which reports each finished step, passed on to the caller's."""

        def finished(step, *args, **kwargs):
            self.next_step = step + 1
            if callback is not None:
                callback(step, *args, **kwargs)

        return finished

    @property
    def on_grid(self) -> bool:
        return self.step is not None and self.plan.on_grid(self.step, self.sigma)
