"""Distributions whose denoiser is known exactly: oracles for tests, benchmarks without a network, self-checks.

Every class answers `denoise(x, sigma)` = E[x0 | x] for x = alpha(sigma) x0 + sigma eps in the given noise space, with x
[b ...] and sigma [] or [b], and draws clean latents with `sample(n, generator)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pack.kernels.space import NoiseSpace
from pack.kernels.types import Latent, Sigma, Sigmas


def _as_column(value: Tensor, x: Tensor) -> Tensor:
    """[] or [b] -> broadcastable against x [b ...], in its dtype."""
    return value.to(x).reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value.to(x)


@dataclass(frozen=True)
class Gaussian:
    """Clean latents ~ N(mean, std^2), independently per element; mean and std broadcast over the latent's shape."""

    mean: Tensor
    std: Tensor
    space: NoiseSpace

    def sample(self, n: int, generator: torch.Generator) -> Latent:
        shape = torch.broadcast_shapes(self.mean.shape, self.std.shape)
        return self.mean + self.std * torch.randn(n, *shape, generator=generator, dtype=self.std.dtype)

    def denoise(self, x: Latent, sigma: Sigma) -> Latent:
        alpha, sigma = _as_column(self.space.alpha(sigma), x), _as_column(sigma, x)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    def flow(self, x: Latent, sigma: Sigma, sigma_next: Sigma) -> Latent:
        """Where the exact probability-flow ODE takes x: its deviation scales with the marginal's spread."""

        def marginal(s: Sigma) -> tuple[Tensor, Tensor]:
            alpha, s = _as_column(self.space.alpha(s), x), _as_column(s, x)
            return alpha * self.mean, (alpha**2 * self.std**2 + s**2).sqrt()

        (mean, spread), (mean_next, spread_next) = marginal(sigma), marginal(sigma_next)
        return mean_next + (x - mean) * spread_next / spread


@dataclass(frozen=True)
class Mixture:
    """Clean latents from k isotropic Gaussians in d dimensions: weights [k], means [k d], stds [k]."""

    weights: Tensor
    means: Tensor
    stds: Tensor
    space: NoiseSpace

    def sample(self, n: int, generator: torch.Generator) -> Latent:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * noise

    def log_density(self, x: Latent, sigma: Sigma) -> Tensor:
        """ln p(x; sigma), [b]: each component is a Gaussian around alpha * mean."""
        return torch.logsumexp(self._log_parts(x, sigma), dim=1)

    def denoise(self, x: Latent, sigma: Sigma) -> Latent:
        alpha, variance = self._alpha_and_variance(x, sigma)
        gain = alpha * self.stds**2 / variance  # [b k]
        share = self._log_parts(x, sigma).softmax(dim=1)  # of means + gain * (x - alpha * means); no [b k d] is made
        return (share * (1 - alpha * gain)) @ self.means.to(share) + (share * gain).sum(dim=1, keepdim=True) * x

    def _alpha_and_variance(self, x: Latent, sigma: Sigma) -> tuple[Tensor, Tensor]:
        s = sigma.to(x).expand(len(x))[:, None]
        alpha = self.space.alpha(s)
        return alpha, alpha**2 * self.stds**2 + s**2

    def _log_parts(self, x: Latent, sigma: Sigma) -> Tensor:
        alpha, variance = self._alpha_and_variance(x, sigma)
        x64, means = x.double(), self.means.double()  # differences of squares cancel
        between = x64.square().sum(dim=1, keepdim=True) - 2 * alpha * (x64 @ means.T) + (alpha * means.norm(dim=1)) ** 2
        far = between.clamp(min=0).to(variance)  # [b k], |x - alpha mean|^2
        d = x.shape[1]
        return self.weights.log() - far / (2 * variance) - d / 2 * (2 * torch.pi * variance).log()


@dataclass(frozen=True)
class PowerLawField:
    """Gaussian pictures with a 1/f spectrum, the statistics of natural images: std of frequency f is (1 + f)^-decay.

    Latents are [b c side side]; the orthonormal Fourier transform makes the elements independent, and white noise stays
    white in it, so denoising is one gain per frequency. `scale` sets the mean square of a latent to 1.
    """

    channels: int
    side: int
    space: NoiseSpace
    decay: float = 1.0

    def stds(self) -> Tensor:
        """Standard deviation per frequency, float64 [side side]."""
        return _power_law(self.side, self.decay)

    def sample(self, n: int, generator: torch.Generator) -> Latent:
        white = torch.randn(n, self.channels, self.side, self.side, generator=generator, dtype=torch.float64)
        return self._filter(white, self.stds())

    def denoise(self, x: Latent, sigma: Sigma) -> Latent:
        alpha, sigma = _as_column(self.space.alpha(sigma), x), _as_column(sigma, x)
        variance = self.stds().to(x) ** 2
        return self._filter(x, alpha * variance / (alpha**2 * variance + sigma**2))

    @staticmethod
    def _filter(x: Latent, gain: Tensor) -> Latent:
        """The gain of a frequency is that of its negative, so half of them are enough."""
        half = torch.fft.rfft2(x)
        return torch.fft.irfft2(half * gain[..., : half.shape[-1]], s=x.shape[-2:])


@lru_cache
def _power_law(side: int, decay: float) -> Tensor:
    f = torch.fft.fftfreq(side, dtype=torch.float64) * side
    std = (1 + torch.hypot(f[:, None], f[None])) ** -decay
    return std / std.square().mean().sqrt()


@dataclass(frozen=True)
class SharedLevel:
    """Latents [b c h w] on VE whose pixels are independent but for one level that all pixels of a channel share.

    x0 ~ N(mean, std^2 I + spread^2 11^T): `spread` is that of the level, a picture's brightness. mean: [c 1 1].
    """

    mean: Tensor
    std: float
    spread: float

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Latent:
        level = torch.randn(*shape[:2], 1, 1, generator=generator, dtype=self.mean.dtype)
        return (
            self.mean + self.spread * level + self.std * torch.randn(*shape, generator=generator, dtype=self.mean.dtype)
        )

    def variances(self, pixels: int) -> tuple[float, float]:
        """Along the shared level, a direction of unit length among `pixels`, and across it."""
        return self.std**2 + pixels * self.spread**2, self.std**2

    def denoise(self, x: Latent, sigma: Sigma) -> Latent:
        level, pixel = self.variances(x.shape[-2] * x.shape[-1])
        sigma, away = _as_column(sigma, x), x - self.mean.to(x)
        shared = away.mean((-2, -1), keepdim=True)
        return self.mean.to(x) + level / (level + sigma**2) * shared + pixel / (pixel + sigma**2) * (away - shared)


def euler_gain(variance: float, sigmas: Sigmas) -> Tensor:
    """By what Euler's method multiplies a deviation of this variance at sigmas[0]; exactly, the map is linear."""
    ratio = sigmas[1:] / sigmas[:-1]
    return (ratio + (1 - ratio) * variance / (variance + sigmas[:-1] ** 2)).prod()


def gaussian_kl(std_out: Tensor, std: Tensor) -> Tensor:
    """KL(N(0, std^2) || N(0, std_out^2)) in nats, summed over the elements: a sampler's spread against the data's."""
    ratio = (std / std_out) ** 2
    return 0.5 * (ratio - 1 - ratio.log()).sum()


def gaussian_alignment(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The exact tau for data ~ N(0, 1) and a network that predicts the noise: tan(asin(sin((a+b)/2) / cos((a-b)/2))).

    a and b are the angles atan(sigma) at both ends of the step; so aligned, Euler keeps the variance at any step count.
    """
    a, b = sigma.atan(), sigma_next.atan()
    return (((a + b) / 2).sin() / ((a - b) / 2).cos()).asin().tan()
