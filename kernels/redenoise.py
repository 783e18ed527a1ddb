"""Golden noise without a network: one strongly guided step down, one weakly guided step back up.

Re-denoise sampling is how the Golden Noise data are made (Zhou et al. 2024, arXiv 2411.09502); the same zigzag at every
step is Z-Sampling (Bai et al. 2025, arXiv 2412.10891). The path that comes back has taken up the difference between
strong and weak guidance. `strong` and `weak` are denoisers x, sigma -> denoised; sigma is [].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

from .types import Denoiser, Latent, Sigma, Sigmas

Mode = Literal["two-step", "direct"]
Evaluate = Literal["next level", "first level"]


def euler(x: Latent, denoised: Latent, sigma: Sigma, sigma_next: Sigma) -> Latent:
    """One step of the probability-flow ODE dx/dsigma = (x - denoised) / sigma."""
    return x + (x - denoised) / sigma * (sigma_next - sigma)


def zigzag(
    strong: Denoiser, weak: Denoiser, x: Latent, sigma: Sigma, sigma_next: Sigma, evaluate: Evaluate = "next level"
) -> Latent:
    """x at `sigma` after a strong step to `sigma_next` and a weak step back; two evaluations.

    evaluate: where the way back asks the model. "next level" is DDIM inversion. "first level", for x = x0 + sigma * eps
    only, is the published arithmetic: the state at `sigma_next`, scaled to the size of one at `sigma`, with the latter
    as its level.
    """
    x_next = euler(x, strong(x, sigma), sigma, sigma_next)
    if evaluate == "next level":
        return euler(x_next, weak(x_next, sigma_next), sigma_next, sigma)
    scaled = x_next * ((1 + sigma**2) / (1 + sigma_next**2)).sqrt()
    eps = (scaled - weak(scaled, sigma)) / sigma
    return x_next + eps * (sigma - sigma_next)


def direct(strong: Denoiser, weak: Denoiser, x: Latent, sigma: Sigma, sigma_next: Sigma) -> Latent:
    """The zigzag to first order in its length, all of it evaluated at x: linear in strong - weak."""
    return x + (1 - sigma_next / sigma) * (strong(x, sigma) - weak(x, sigma))


def redenoise(
    strong: Denoiser, weak: Denoiser, noise: Latent, to_state: Callable[[Latent], Latent], unit: float, sigma: Sigma,
    sigma_next: Sigma, rounds: int = 1, mode: Mode = "two-step", evaluate: Evaluate = "next level",
) -> Latent:  # fmt: skip
    """Noise from which `to_state` makes the state that `rounds` zigzags lead to.

    to_state: noise -> x at `sigma`, affine; unit: what it multiplies noise with.
    """
    for _ in range(rounds):
        x = to_state(noise)
        if mode == "direct":
            moved = direct(strong, weak, x, sigma, sigma_next)
        else:
            moved = zigzag(strong, weak, x, sigma, sigma_next, evaluate)
        noise = noise + (moved - x) / unit
    return noise


def turning_level(sigmas: Sigmas, depth: float, unit: float, sigma_min: float) -> Sigma:
    """Where the zigzag turns, []: `depth` units below the first level, or for depth 0 the run's own second level.

    Not below `sigma_min`. A depth of its own makes the effect independent of the schedule: x' - x is then depth * unit
    times the difference of the two noise estimates.
    """
    turn = sigmas[1] if depth == 0 else sigmas[0] - depth * unit
    return turn.clamp(min=min(sigma_min, 0.99 * float(sigmas[0])))


def keep_norm(noise: Latent, changed: Latent) -> Latent:
    """`changed` with each sample as long as it was in `noise`."""
    axes = tuple(range(1, noise.ndim))
    return changed * (noise.square().sum(axes, keepdim=True) / changed.square().sum(axes, keepdim=True)).sqrt()


def sample_zigzag(
    strong: Denoiser, weak: Denoiser, x: Latent, sigmas: Sigmas, zigzag_steps: int, rounds: int = 1
) -> Iterator[tuple[int, Latent, Latent, Latent]]:
    """Euler's method whose first `zigzag_steps` steps are preceded by zigzags; 2 more evaluations each and round.

    Yields (step, x, denoised, x after the step). A step to 0 has no way back and stays plain.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if i < zigzag_steps and sigma_next > 0:
            for _ in range(rounds):
                x = zigzag(strong, weak, x, sigma, sigma_next)
        denoised = strong(x, sigma)
        x_next = euler(x, denoised, sigma, sigma_next)
        yield i, x, denoised, x_next
        x = x_next
