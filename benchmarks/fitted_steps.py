"""Solvers that no host has, in the host's form: forecasts of the answer between full calls, and published fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import _pack  # noqa: F401
from pack.kernels.space import NoiseSpace
from published import OlssRun, PlanStep, solve_olss, solve_plan

TAYLOR, CHEBYSHEV = "Taylor forecast", "Chebyshev forecast"
DEGREE, RIDGE = 3, 0.1  # of the Chebyshev polynomials


@torch.no_grad()
def sample_forecast(
    kind: str, of: str, calls: Sequence[int], model, x, sigmas, extra_args=None, callback=None, disable=None
):
    """Euler over all levels that asks the network in the steps `calls` alone, and forecasts its answer in the others
    from its last answers over the number of the step: along the line through the last two, or with Chebyshev
    polynomials through all. of: "denoised" or "slope", which is forecast."""
    known: list[tuple[int, Tensor]] = []
    steps = len(sigmas) - 1
    for i in range(steps):
        if i in calls:
            denoised = model(x, sigmas[i] * x.new_ones(len(x)), **(extra_args or {}))
            known.append((i, denoised if of == "denoised" else (x - denoised) / sigmas[i]))
            answer = known[-1][1]
        else:
            weights = weights_of(kind, [at for at, _ in known], i, steps)
            answer = sum(weight * one for weight, (_, one) in zip(weights, known, strict=True))
        slope = (x - answer) / sigmas[i] if of == "denoised" else answer
        x = x + (sigmas[i + 1] - sigmas[i]) * slope
    return x


def weights_of(kind: str, known: Sequence[int], i: int, steps: int) -> list[float]:
    """Of the answers of the steps `known` in the forecast for step i."""
    if len(known) == 1:
        return [1.0]
    if kind == TAYLOR:
        share = (i - known[-1]) / (known[-1] - known[-2])
        return [*[0.0] * (len(known) - 2), -share, 1 + share]
    degree = min(DEGREE, len(known) - 1)
    angle = torch.acos((2 * torch.tensor([*known, i], dtype=torch.float64) / (steps - 1) - 1).clamp(-1, 1))
    values = torch.cos(angle[:, None] * torch.arange(degree + 1))
    past, here = values[:-1], values[-1]
    ridge = RIDGE * torch.diag(torch.arange(degree + 1) > 0).double()  # not on the mean
    return (here @ torch.linalg.solve(past.T @ past + ridge, past.T)).tolist()


def calls_of(place: str, n: int, steps: int) -> tuple[int, ...]:
    """n of the steps: every k-th, or the first three, the last and between them every k-th."""
    if place == "every k-th":
        return tuple(i * steps // n for i in range(n))
    return (0, 1, *(2 + round(i * (steps - 3) / (n - 3)) for i in range(n - 2)))


def sample_olss(weights: tuple, model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A run of `published.fit_olss`."""
    run = OlssRun(tuple(sigmas.tolist()), weights)
    return solve_olss(asked(model, x, extra_args), x, run)


def sample_plan(kind: str, steps: tuple, model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A plan of `published.search_plan`; steps: the fields of its steps."""
    plan = [PlanStep(*one) for one in steps]
    return solve_plan(asked(model, x, extra_args), x, sigmas, plan, NoiseSpace(kind))


def asked(model, x: Tensor, extra_args: dict | None) -> Callable[[Tensor, Tensor], Tensor]:
    @torch.no_grad()
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return model(x, sigma.to(x) * x.new_ones(len(x)), **(extra_args or {}))

    return denoise
