"""What benchmarks measure, each a few lines that a test holds against a known answer.

Features are [n d]; pictures are [n 3 h w] in 0..1. Everything is computed in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (Heusel et al. 2017).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2). Biased upwards for few samples: compare equal numbers only.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()  # the trace of the root, also of a singular one
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def _root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the cubic kernel (x.y / d + 1)^3 (Binkowski et al. 2018): may be compared at any n."""
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal_mean(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return float(off_diagonal_mean(kernel(a, a)) + off_diagonal_mean(kernel(b, b)) - 2 * kernel(a, b).mean())


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in 0..1, [n]; infinite for equal ones."""
    from kornia.metrics import psnr  # slow to import

    return torch.stack([psnr(x, y, 1.0) for x, y in zip(a.double(), b.double(), strict=True)])


def perceptual_distance(judge: torch.nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of the judge's channel-normalised feature maps, averaged over its stages, [n].

    The construction of LPIPS (Zhang et al. 2018) on our own network, without its fitted weights.
    """
    total = torch.zeros(len(a), dtype=torch.float64)
    maps = [(x * 2 - 1) for x in (judge.fit(a), judge.fit(b))]
    stages = 0
    for layer in judge.body:
        maps = [layer(x) for x in maps]
        if isinstance(layer, torch.nn.Sequential):
            unit_a, unit_b = (torch.nn.functional.normalize(x.double(), dim=1) for x in maps)
            total += (unit_a - unit_b).square().sum(1).flatten(1).mean(1)
            stages += 1
    return total / stages


def restoration_distance(a: Tensor, b: Tensor, damage: Callable[[Tensor], Tensor], window: int = 17) -> Tensor:
    """How far a restored picture is from the clean one, in parts of the range, [n]: what the damage leaves must agree,
    what it takes away must be as strong around each place, but need not be the same to the pixel.

    The root of two mean squares: the difference of damage(a) and damage(b), which super-resolution calls consistency,
    and the difference of the local deviation, over `window` pixels, of a - damage(a) and b - damage(b).
    """
    left = [damage(x) for x in (a.double(), b.double())]
    strengths = []
    for x, kept in zip((a, b), left, strict=True):
        energy = (x - kept).square().mean(1, keepdim=True)
        around = torch.nn.functional.avg_pool2d(energy, window, 1, window // 2, count_include_pad=False)
        strengths.append(around.sqrt())
    parts = [(one - other).square().mean((1, 2, 3)) for one, other in (left, strengths)]
    return (parts[0] + parts[1]).sqrt()


def structural_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - SSIM (Wang et al. 2004) of pictures in 0..1, over Gaussian windows of 11 pixels, [n]."""
    from kornia.metrics import ssim

    return 1 - ssim(a.double(), b.double(), 11).mean((1, 2, 3))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of fakes inside the real manifold and of reals inside the fake one (Kynkaanniemi et al. 2019).

    A manifold is the union of balls that reach each point's k-th neighbour. Precision falls when pictures are wrong,
    recall when there is too little variety.
    """
    across = torch.cdist(real.double(), fake.double())  # [real fake]
    return (
        float((across <= _radius(real, k)[:, None]).any(0).double().mean()),
        float((across <= _radius(fake, k)[None]).any(1).double().mean()),
    )


def coverage(real: Tensor, fake: Tensor, k: int = 3) -> float:
    """Share of reals with a fake within their k-th real neighbour (Naeem et al. 2020): robust to outlying fakes."""
    return float((torch.cdist(real.double(), fake.double()).min(1).values <= _radius(real, k)).double().mean())


def _radius(points: Tensor, k: int) -> Tensor:
    """Distance to the k-th other point, [n]."""
    return torch.cdist(points.double(), points.double()).kthvalue(k + 1, dim=1).values


def jackknife(measure: Callable[[Tensor], float], n: int, groups: int) -> tuple[float, float]:
    """A measure of samples 0..n-1 (given their indices) and its standard error from leaving out one group at a time.

    For a mean over equal groups this is the standard error of the groups' means (Tukey 1958).
    """
    everything = torch.arange(n)
    without = [measure(everything[everything % groups != g]) for g in range(groups)]
    spread = torch.tensor(without, dtype=torch.float64).var(correction=0)
    return measure(everything), float(((groups - 1) * spread).sqrt())


def rank_stability(
    measure: Callable[[Tensor], Tensor], samples: int, n: int, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """How well n samples reproduce the ranking by all: (mean Kendall tau, share of draws with the same winner).

    `measure` gives every setting's score, lower is better, for some samples by index: [n] -> [settings]. The samples
    are paired (the same prompt and seed in every setting) and drawn with replacement, together for all settings.
    """
    generator = torch.Generator().manual_seed(seed)
    full = measure(torch.arange(samples))
    upper = torch.triu_indices(len(full), len(full), offset=1)

    def order(scores: Tensor) -> Tensor:
        return (scores[upper[0]] - scores[upper[1]]).sign()

    some = [measure(torch.randint(samples, (n,), generator=generator)) for _ in range(draws)]
    tau = torch.stack([(order(scores) * order(full)).mean() for scores in some]).mean()
    return float(tau), sum(int(scores.argmin() == full.argmin()) for scores in some) / draws
