"""Draw the pictures of many seeds cheaply: by a profile, or by what the first of them, drawn whole, tell."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...models.calibration import FORECAST, NOISE_SHIFT, SAMPLER, SCHEDULE, Calibration
from .._plan.fitted_sampler import steps_at
from .._plan.latents import refuse_nested
from .._plan.propagation import place_in, said_of
from .apply import Use, put_to_use
from .clock import why_not
from .propagation import key_steps_for
from .propagation.forecast import can_forecast, forecasts_of
from .propagation.forecast_fit import forecasting
from .solvers import adds_noise, run_stock_node

LOG = logging.getLogger(__name__)
WHO = "Attune Draft Seeds"
DRAWN_WHOLE = 2  # seeds that forecasts are fitted to


@dataclass(frozen=True)
class WholeRun:
    """The whole run that drafts stand for, as the stock KSampler has it."""

    positive: list
    negative: list
    latent: dict
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0

    def sigmas(self, model: Any) -> Tensor:
        """The levels of KSampler, which leaves out the last but one for some solvers."""
        device = comfy.model_management.get_torch_device()
        options = model.model_options
        return comfy.samplers.KSampler(
            model, self.steps, device, self.sampler_name, self.scheduler, self.denoise, options
        ).sigmas.cpu()


class _Seeds:
    """A NOISE for a batch of one picture per seed, each as the stock KSampler draws it."""

    def __init__(self, seeds: list[int], batch_index: list[int] | None):
        self.seed, self._seeds, self._inside = seeds[0], seeds, batch_index

    def generate_noise(self, latent: dict) -> Tensor:
        one = latent["samples"][:1]  # as the host has made it fit the model: an empty latent may have other channels
        return torch.cat([comfy.sample.prepare_noise(one, seed, self._inside) for seed in self._seeds])


def draw_drafts(
    model: Any, run: WholeRun, seeds: list[int], speed: float, at_once: int, profile: Calibration | None,
    told: Callable[[Tensor], None] = lambda _: None,
) -> tuple[Tensor, str]:  # fmt: skip
    """Latents [n c ...] of the seeds, and a word on how they were drawn; ValueError for what cannot be drafted.

    told: of the latents that are there so far, in the model's scale, the first seed's first.
    """
    latent = run.latent
    refuse_nested(latent["samples"], "latent_image", "a latent of a picture or of one video")
    if len(latent["samples"]) != 1:
        raise ValueError(
            f"{WHO} draws one picture for each seed, but 'latent_image' holds {len(latent['samples'])}: set its "
            "'batch_size' to 1."
        )
    sigmas = run.sigmas(model)
    solver = comfy.samplers.sampler_object(run.sampler_name)
    each = 1 if adds_noise(solver) else at_once  # the noise that a solver adds is of the first seed of a batch

    def draw(
        patched: Any, some: list[int], by: Any = solver, over: Tensor = sigmas, before: Sequence[Tensor] = ()
    ) -> Tensor:
        (guider,) = run_stock_node(
            "CFGGuider", model=patched, positive=run.positive, negative=run.negative, cfg=run.cfg
        )
        parts = []
        for start in range(0, len(some), each):
            now = some[start : start + each]
            batch = {**latent, "samples": torch.cat([latent["samples"]] * len(now))}
            drawn, _ = run_stock_node(
                "SamplerCustomAdvanced", noise=_Seeds(now, latent.get("batch_index")), guider=guider, sampler=by,
                sigmas=over.clone(), latent_image=batch,
            )  # fmt: skip
            parts.append(drawn["samples"])
            told(model.get_model_object("latent_format").process_in(torch.cat([*before, *parts])))
        return torch.cat(parts)

    if profile is not None:
        (patched, by, over), said = by_profile(model, run, sigmas, profile, speed)
        return draw(patched, seeds, by, over), said
    return by_first(model, run, seeds, min(DRAWN_WHOLE, each), sigmas, speed, draw)


def by_first(
    model: Any, run: WholeRun, seeds: list[int], count: int, sigmas: Tensor, speed: float, draw: Callable[..., Tensor]
) -> tuple[Tensor, str]:  # fmt: skip
    """Forecasts fitted to the first `count` seeds, which are drawn whole; they draw the others."""
    solver = comfy.samplers.sampler_object(run.sampler_name)
    reason = why_not(solver, sigmas)
    if reason is None and not can_forecast(solver):
        reason = f"'{run.sampler_name}' asks the model more than once a step, or for more than its guided answer"
    if reason is not None:
        raise ValueError(
            f"{WHO} cannot forecast this run: {reason}. Connect a 'profile', or change 'sampler_name' or 'steps', "
            "for example to 'euler' and 20 steps."
        )
    first, rest = seeds[:count], seeds[count:]
    whole, faster, kinds = forecasting(model, lambda patched: draw(patched, first), run.sampler_name, sigmas, speed)
    said = (
        f"Whole pictures: the first {len(first)}. The other {len(rest)} were drafted by forecasts fitted to those. "
        f"The forecasts ask the network on {len(kinds.keys)} of {len(sigmas) - 1} steps, on {len(kinds.one_sided)} of "
        f"them for the positive prompt alone: {(len(sigmas) - 1) / kinds.cost():.2f} times less computing."
    )
    return (torch.cat([whole, draw(faster, rest, before=[whole])]) if rest else whole), said


def by_profile(
    model: Any, run: WholeRun, sigmas: Tensor, profile: Calibration, speed: float
) -> tuple[tuple[Any, Any, Tensor], str]:  # fmt: skip
    """MODEL, SAMPLER and levels by which a profile drafts the run; ValueError for one that does not stand for it."""
    solver = comfy.samplers.sampler_object(run.sampler_name)
    if profile.kind in (SCHEDULE, NOISE_SHIFT):
        raise ValueError(
            f"'{profile.name}' is a {profile.kind.replace('_', ' ')}, which makes no run faster: connect a profile of "
            "Attune Fit Propagation or a fitted sampler, or none."
        )
    if profile.kind == SAMPLER:
        ready = put_to_use(model, profile, Use(steps_at(profile, speed)))
        assert ready.short is not None
        if profile.solver != run.sampler_name or place_in(profile.sigmas, sigmas.tolist()) != 0:
            raise ValueError(_stands_for_another(profile, run, len(sigmas) - 1))
        said = f"Drafted by the fitted sampler '{profile.name}' in {ready.short.run.steps} steps."
        return (ready.model, ready.sampler, ready.sigmas), said
    fastest = max(point.speed for point in key_steps_for(model, profile).points)
    ready = put_to_use(model, profile, Use(speed=min(speed, fastest)))
    assert profile.key_steps is not None and ready.point is not None
    if profile.kind == FORECAST and isinstance(
        forecasts_of(profile.key_steps, ready.point, solver, sigmas.tolist()), str
    ):
        raise ValueError(_stands_for_another(profile, run, len(sigmas) - 1))
    return (ready.model, solver, sigmas), f"Drafted by '{profile.name}', {said_of(ready.point, profile.key_steps)}."


def _stands_for_another(profile: Calibration, run: WholeRun, steps: int) -> str:
    return (
        f"'{profile.name}' stands for {len(profile.sigmas) - 1} steps of {profile.solver} on its own levels, but the "
        f"drafts are for {steps} of {run.sampler_name} on {run.scheduler}: set 'sampler_name', 'scheduler' and 'steps' "
        "as it was fitted, or fit again."
    )


def pictures_of(vae: Any, latents: Tensor) -> Tensor:
    """[n h w 3] of latents [n c ...], the middle frame of videos."""
    decoded = [run_stock_node("VAEDecode", samples={"samples": one}, vae=vae)[0] for one in latents.split(1)]
    return torch.stack([frames[len(frames) // 2] for frames in decoded]).cpu()
