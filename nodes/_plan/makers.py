"""A maker's schedule for the picture at hand, and the sentence that gives its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ...kernels.makers import (
    LCM_TIMESTEPS,
    dimension_factor,
    equal_odds,
    karras,
    lcm_timesteps,
    linear_mu,
    logit_normal,
    quadratic,
    sd_sigmas,
    stretch,
    time_shift,
    trailing_timesteps,
    twice,
    uniform,
)
from ...kernels.schedules import for_denoise, resample_theta
from ...kernels.space import NoiseSpace
from ...kernels.types import Sigmas
from ...models.calibration import Calibration, ModelIdentity, Size, size_text
from ...models.makers import (
    LOGIT_NORMAL,
    QUADRATIC,
    TRAILING,
    TWICE,
    BySize,
    Constant,
    Linear,
    Published,
    Root,
    StepsToo,
    shipped_makers,
)

BY_DIMENSIONS = "by latent dimensions"
BASE_DIMENSIONS = 4096  # of 32 x 32 x 4 latents, where the rule has no shift
SD_HIGHEST = 14.6146  # the noise of Stable Diffusion's first timestep
SAME_SHIFT = 0.005  # shifts that differ by less, relative, are the same
FAR_MU, MOST_MU = 4.0, 16.0  # half of the steps end within 2 % of pure noise; float32 has no levels farther in


@dataclass(frozen=True)
class Sampled:
    """What a LATENT tells of what is sampled: the picture's size in pixels, None where it is none or is not known; its
    latent frames; how many numbers it has; how many pixels one of the latent is wide."""

    size: Size | None = None
    frames: int = 1
    dimensions: int = 0
    cell: int = 8

    @property
    def side(self) -> int | None:
        """Of the latent, were it a square."""
        return None if self.size is None else max(round(math.sqrt(math.prod(self.size)) / self.cell), 2)


@dataclass(frozen=True)
class Moved:
    """A shift as a factor of sigma / (1 - sigma), in its maker's unit ("mu" or "shift"), and what it was taken for."""

    factor: float
    unit: str
    taken_for: str = ""

    def of(self, own: float | None) -> str:
        """The shift beside the MODEL's own, as in "mu 1.15 -> 1.31 for 2048x2048, 16384 tokens"."""
        new = self._number(self.factor)
        if own is None:
            change = f"{self.unit} {new}"
        elif abs(own - self.factor) <= SAME_SHIFT * self.factor:
            change = f"{self.unit} {new} as the MODEL has it"
        else:
            change = f"{self.unit} {self._number(own)} -> {new}"
        return change + (f" for {self.taken_for}" if self.taken_for else "")

    def _number(self, factor: float) -> str:
        return f"{math.log(factor) if self.unit == 'mu' else factor:.3g}"


def named_makers() -> list[str]:
    """The schedules to be chosen by name: those of relatives that a MODEL's class does not tell apart."""
    return [name for name, one in shipped_makers().items() if not one.auto]


def makers_schedule(
    one: Published,
    model: ModelIdentity,
    steps: int,
    denoise: float = 1.0,
    sampled: Sampled = Sampled(),  # noqa: B008
) -> tuple[Sigmas, str]:
    """The levels of a maker's schedule, float64 [steps+1] ending in 0, and a sentence with its numbers.

    ValueError, in the names on screen, for a MODEL of another family.
    """
    refuse_others(one, model)
    said = []
    sigmas = for_denoise(lambda n: _levels(one, n, sampled), steps, denoise)
    if one.shift is not None:
        shift = moved(one, int(steps / denoise) if 0 < denoise < 1 else steps, sampled)
        said.append(shift.of(model.factor))
        if one.terminal is None and not bool((sigmas.float().diff() < 0).all()):
            raise ValueError(
                f"'{one.name}' finds no {len(sigmas) - 1} noise levels for {shift.taken_for}: its maker's rule moves "
                f"them all to pure noise. Choose '{BY_DIMENSIONS}' in 'schedule', or sample a smaller latent, in tiles."
            )
        if one.terminal is None and math.log(shift.factor) > FAR_MU:
            said.append(f"which is almost all noise, so large is this latent: '{BY_DIMENSIONS}' moves it less")
        said += _of_the_node(model)
    if one.terminal is not None:
        said.append(f"the last step starts at {one.terminal:g}")
    if one.counts and steps not in one.counts:
        between = "; other counts get levels between its own" if one.levels or one.timesteps else ""
        said.append(f"made for {' or '.join(map(str, one.counts))} steps, not for {steps}{between}")
    if one.switch is not None and len(sigmas):
        first = int((sigmas[:-1] >= one.switch).sum())
        said.append(
            f"of two experts the one for high noise runs {first} of {len(sigmas) - 1} steps, down to sigma "
            f"{one.switch:g}"
        )
    return sigmas, f"{one.name} by {one.maker}" + (f": {'; '.join(said)}" if said else "")


def refuse_others(one: Published, model: ModelIdentity) -> None:
    """ValueError unless the MODEL is of a family that the schedule is for, or of its children."""
    if one.space != model.space or not set(one.families) & set(model.families):
        raise ValueError(
            f"'{one.name}' is for models of the family {' or '.join(one.families)}, but this MODEL is {model.family}. "
            "Choose 'auto' in 'schedule'."
        )
    highest = one.karras.high if one.karras else SD_HIGHEST
    if one.space == "ve" and not 0.9 < highest / model.sigma_max < 1.1:
        raise ValueError(
            f"'{one.name}' is for noise up to {highest:.4g}, but this MODEL ({model.family}) has up to "
            f"{model.sigma_max:.4g}. "
            "Take away the ModelSampling node before it, or choose 'auto' in 'schedule'."
        )


def by_dimensions(model: ModelIdentity, steps: int, denoise: float, sampled: Sampled) -> tuple[Sigmas, str]:
    """Equal steps under the shift of the dimension rule, for flow models whose maker states none."""
    if model.space != "flow":
        raise ValueError(
            f"'{BY_DIMENSIONS}' is for flow models (SD3, Flux …), but this MODEL is {model.family}. Choose 'auto' in "
            "'schedule'."
        )
    if not sampled.dimensions:
        raise ValueError(f"'{BY_DIMENSIONS}' needs the size of what is sampled: connect 'latent'.")
    shift = dimension_shift(sampled.dimensions)
    sigmas = for_denoise(lambda n: uniform(n, shift.factor), steps, denoise)
    return sigmas, "; ".join([f"{BY_DIMENSIONS}: {shift.of(model.factor)}", *_of_the_node(model)])


def dimension_shift(dimensions: int) -> Moved:
    return Moved(
        dimension_factor(dimensions, BASE_DIMENSIONS),
        "shift",
        f"{dimensions} latent dimensions, {BASE_DIMENSIONS} have 1",
    )


def beside_noise_shift(profile: Calibration, sampled: Sampled) -> list[str]:
    """How a noise shift relates to levels that move with the size, for a flow model whose size is known."""
    if profile.space != "flow" or not sampled.dimensions:
        return []
    factor = dimension_shift(sampled.dimensions).factor
    return [
        "It changes what the network is told and leaves the levels. Attune Scheduler moves those with the size: 'auto' "
        f"as the maker runs them, '{BY_DIMENSIONS}' by a shift of {factor:.3g} here. A noise shift belongs to the "
        "levels it was fitted beside."
    ]


def moved(one: Published, steps: int, sampled: Sampled) -> Moved:
    """The shift of a schedule at a number of steps."""
    shift = one.shift
    assert shift is not None
    if isinstance(shift, Constant):
        return Moved(math.exp(shift.value), "mu") if shift.as_mu else Moved(shift.value, "shift")
    size = sampled.size or one.size
    assert size is not None
    unknown = "" if sampled.size else " (no latent tells the size: its maker's)"
    if isinstance(shift, Root):
        return Moved(math.exp(shift.mu) * math.sqrt(math.prod(size)) / shift.side, "shift", size_text(size) + unknown)
    if isinstance(shift, BySize):
        near = min(range(len(shift.sizes)), key=lambda i: abs(math.log(math.prod(shift.sizes[i]) / math.prod(size))))
        told = size_text(shift.sizes[near])
        nearest = (
            ""
            if tuple(sorted(size)) == tuple(sorted(shift.sizes[near]))
            else f", the nearest known to {size_text(size)}"
        )
        return Moved(shift.factors[near], "shift", told + (unknown or nearest))
    tokens = math.prod(max(side // one.token, 1) for side in size)
    if one.frames:
        tokens *= sampled.frames if sampled.size else one.frames
    mu = linear_mu(tokens, shift.tokens, shift.mu) if isinstance(shift, Linear) else _mu_by_steps(shift, tokens, steps)
    return Moved(math.exp(min(mu, MOST_MU)), "mu", f"{size_text(size)}{unknown}, {tokens} tokens")


def _mu_by_steps(shift: StepsToo, tokens: int, steps: int) -> float:
    """More steps than `many` are taken for so many: the line would go on to where there is no noise."""
    few, many = shift.few[1] * tokens + shift.few[2], shift.many[1] * tokens + shift.many[2]
    return (
        many
        if tokens > shift.beyond
        else linear_mu(min(steps, shift.many[0]), (shift.few[0], shift.many[0]), (few, many))
    )


def _levels(one: Published, steps: int, sampled: Sampled) -> Sigmas:
    if one.levels:
        levels = _resampled(torch.tensor(one.levels, dtype=torch.float64), steps, "flow")
        return levels if one.shift is None else time_shift(levels, moved(one, steps, sampled).factor)
    if isinstance(one.timesteps, str):
        pick = trailing_timesteps if one.timesteps == TRAILING else lcm_timesteps
        return _resampled(sd_sigmas(pick(min(steps, LCM_TIMESTEPS))), steps, "ve")
    if one.timesteps:
        return _resampled(sd_sigmas(one.timesteps), steps, "ve")
    if one.karras is not None:
        return karras(steps, one.karras.high, one.karras.low, one.karras.rho)
    if one.odds is not None:
        return equal_odds(steps, one.odds.low, one.odds.high)
    if one.grid == QUADRATIC:
        return quadratic(steps, one.threshold)
    factor = moved(one, steps, sampled).factor
    if one.grid == LOGIT_NORMAL:
        return logit_normal(steps, factor, one.spread)
    sigmas = twice(steps, factor) if one.grid == TWICE else uniform(steps, factor)
    return sigmas if one.terminal is None else stretch(sigmas, one.terminal)


def _resampled(levels: Sigmas, steps: int, space: Literal["ve", "flow"]) -> Sigmas:
    return levels if len(levels) == steps + 1 else resample_theta(levels, steps, NoiseSpace(space))


def _of_the_node(model: ModelIdentity) -> list[str]:
    """What becomes of the shift of a ModelSampling node: on flow models the levels alone are shifted, once."""
    return ["the ModelSampling node's shift has no part in it"] if model.reshifted else []
