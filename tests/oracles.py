"""Problems whose answers are known exactly."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from analytic import Gaussian, Mixture
from pack.kernels.ays import kl_optimal
from pack.kernels.schedules import end_at_zero, resample_loglinear
from pack.kernels.space import NoiseSpace
from pack.kernels.timestep_aligner import Trajectory


def gaussian(std: float, space: NoiseSpace) -> Gaussian:
    """Clean latents ~ N(0, std^2), one element, float64."""
    return Gaussian(torch.zeros(1, dtype=torch.float64), torch.tensor([std], dtype=torch.float64), space)


def euler(denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """The plainest probability-flow sampler, d = (x - denoised) / sigma."""
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (sigma_next - sigma) * (x - denoise(x, sigma)) / sigma
    return x


def end_std(target: Gaussian, sigmas: Tensor) -> float:
    """Standard deviation of Euler's output, exactly: the map is linear, so one unit of start is enough."""
    first = sigmas[0]
    start = torch.sqrt(target.space.alpha(first) ** 2 * target.std**2 + first**2)
    return float(euler(target.denoise, start, sigmas))


def mixture_1d(space: NoiseSpace) -> Mixture:
    """Three modes on a line, unit scale."""
    weights, means = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([[-1.4], [0.3], [1.5]])
    return Mixture(weights.double(), means.double(), torch.tensor([0.1, 0.2, 0.05]).double(), space)


def mixture_2d(space: NoiseSpace) -> Mixture:
    """A 6 x 6 grid of narrow modes in the plane, unit scale."""
    side = torch.linspace(-1.6, 1.6, 6, dtype=torch.float64)
    means = torch.cartesian_prod(side, side)
    return Mixture(torch.full((36,), 1 / 36).double(), means, torch.full((36,), 0.1).double(), space)


def mixture_latent(space: NoiseSpace) -> Mixture:
    """24 contents in 32 dimensions whose size falls as 1/f, as in latents of natural images; unit scale."""
    fall = 1 / (1 + torch.arange(32, dtype=torch.float64) / 2)
    means = torch.randn(24, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * fall
    means = means / means.square().mean().sqrt()
    return Mixture(torch.full((24,), 1 / 24).double(), means, torch.full((24,), 0.3).double(), space)


def network(target, prediction: str):
    """What a network trained on `target` says when it is told a level other than the true one; x, sigma [b], told [b].

    Its input is scaled for the true level and its output is read at the true level, as the host does both.
    """

    def denoise(x: Tensor, sigma: Tensor, told: Tensor) -> Tensor:
        sigma, told = (level.to(x).reshape(-1, *[1] * (x.ndim - 1)) for level in (sigma, told))
        if prediction == "flow":
            return x - sigma * (x - target.denoise(x, told.flatten())) / told
        if prediction == "edm":  # Karras et al. 2022, table 1, sigma_data 0.5
            seen = x * ((0.25 + told**2) / (0.25 + sigma**2)).sqrt()
            raw = (
                (target.denoise(seen, told.flatten()) - 0.25 / (0.25 + told**2) * seen) * (0.25 + told**2).sqrt() / told
            )
            return 0.25 / (0.25 + sigma**2) * x + sigma / (0.25 + sigma**2).sqrt() * raw
        seen = x * ((1 + told**2) / (1 + sigma**2)).sqrt()  # the same network input, as a state at `told`
        denoised = target.denoise(seen, told.flatten())
        if prediction == "eps":
            return x - sigma * (seen - denoised) / told
        v = (seen / (1 + told**2) - denoised) * (1 + told**2).sqrt() / told
        return x / (1 + sigma**2) - v * sigma / (1 + sigma**2).sqrt()

    return denoise


def path(target, x: Tensor, sigmas: Tensor | None = None) -> Trajectory:
    """The exact path of x from the first of `sigmas`: Heun's method on many substeps, recorded at every level."""
    if sigmas is None:
        sigmas = fine_levels(target.space, 64)
    states, denoised = [x], []
    for sigma, sigma_next in pairwise(sigmas):
        denoised.append(target.denoise(x, sigma))
        last = torch.linspace(1, 0, 5, dtype=sigmas.dtype) * (sigma - sigma_next) + sigma_next
        for s, s_next in pairwise(last):
            d = (x - target.denoise(x, s)) / s
            x_next = x + (s_next - s) * d
            if s_next > 0:
                x_next = x + (s_next - s) * (d + (x_next - target.denoise(x_next, s_next)) / s_next) / 2
            x = x_next
        states.append(x)
    return Trajectory.recorded(sigmas, states, denoised)


def fine_levels(space: NoiseSpace, steps: int) -> Tensor:
    """A fine run down to 0: Karras' levels, and an even angle, denser at the end, for a flow."""
    if space.kind == "flow":
        return torch.sin(torch.linspace(torch.pi / 2, 0, steps + 1, dtype=torch.float64)) ** 1.5
    rho = torch.linspace(14.6146 ** (1 / 7), 0.01 ** (1 / 7), steps, dtype=torch.float64) ** 7
    return torch.cat([rho, torch.zeros(1, dtype=torch.float64)])


def dpmpp_2m(denoise, x: Tensor, sigmas: Tensor, space: NoiseSpace) -> Trajectory:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) with every state recorded."""
    states, found = [x], []
    log_ratio = space.log_ratio(sigmas)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        found.append(denoise(x, sigma))
        estimate = found[-1]
        if i and sigma_next > 0:
            h, h_last = log_ratio[i] - log_ratio[i + 1], log_ratio[i - 1] - log_ratio[i]
            if torch.isfinite(h_last):
                r = h_last / h
                estimate = (1 + 1 / (2 * r)) * found[-1] - found[-2] / (2 * r)
        shrink = sigma_next / sigma
        x = shrink * x + (space.alpha(sigma_next) - space.alpha(sigma) * shrink) * estimate
        states.append(x)
    return Trajectory.recorded(sigmas, states, found)


def stock_schedules(steps: int) -> dict[str, Tensor]:
    """ComfyUI's schedules for Stable Diffusion's noise as their papers define them, float64, and variants.

    "…, penultimate dropped": one step more, without the last positive level.
    """
    log_sigma = 0.5 * torch.log(
        1 / torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0) - 1
    )
    low, high = log_sigma[0].exp(), log_sigma[-1].exp()

    def at(t: Tensor) -> Tensor:
        index = t.clamp(0, 999)
        i = index.floor().long().clamp(max=998)
        return torch.lerp(log_sigma[i], log_sigma[i + 1], index - i).exp()

    def levels(name: str, n: int) -> Tensor:
        u = torch.linspace(0, 1, n, dtype=torch.float64)
        if name == "karras":
            return (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        if name == "exponential":
            return torch.exp(high.log() + u * (low.log() - high.log()))
        if name == "normal":
            return at(999 * (1 - u))
        if name == "sgm_uniform":
            return at(torch.linspace(999, 0, n + 1, dtype=torch.float64)[:-1])
        return torch.tan(u * low.atan() + (1 - u) * high.atan())

    names = ["karras", "exponential", "normal", "kl_optimal"]
    found = {name: torch.cat([levels(name, steps), torch.zeros(1)]) for name in [*names, "sgm_uniform"]}
    if steps <= 10:
        found |= {f"{name}, penultimate dropped": end_at_zero(levels(name, steps + 1)) for name in names}
    ays = torch.tensor([14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]).double()
    found["AYS"] = end_at_zero(resample_loglinear(ays, steps))
    found["KL-optimal"] = kl_optimal(steps, 14.615, NoiseSpace("ve"))
    return found


def finish(generator):
    """The result of a generator and everything it yielded."""
    said = []
    while True:
        try:
            said.append(next(generator))
        except StopIteration as end:
            return end.value, said
