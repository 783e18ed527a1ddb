"""A picture's own noise: exact inversion and replay of a stochastic sampler, edits of its maps, and morphs.

The edit-friendly DDPM noise space (Huberman-Spiegelglas et al. 2023, arXiv 2304.06140): a picture is noised to every
level with *independent* draws, and the noise that leads the sampler from one of these states to the next is solved for.
Replayed, these maps give the picture back exactly, at every guidance; with another prompt they give an edit of it.
With eta = 0 the states are those of DDIM inversion, and what the maps hold is how far each step of its way back misses
(direct inversion: Ju et al. 2023, arXiv 2310.01506). Latents are [b ...] of any number of axes, in the model's scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .redenoise import euler
from .space import NoiseSpace
from .types import Denoiser, Latent, Sigma, Sigmas

CLEAN_LEVEL = 1e-4  # the level at which DDIM inversion asks about the clean picture
GRID = 2.0**14
NEAREST_END = 1e-4  # to both pictures that a morph's factor comes, for the division by its sine
FreshNoise: TypeAlias = Callable[[], Latent]  # fresh unit noise of the picture's shape


@dataclass(frozen=True)
class AncestralStep:
    """x_next = keep * x + pull * denoised + unit * z: one step of an ancestral sampler, its numbers as floats.

    unit: the noise's standard deviation; 1 where the step adds none and z is plainly what is missing.
    """

    keep: float
    pull: float
    unit: float

    def mean(self, x: Latent, denoised: Latent) -> Latent:
        return self.keep * x + self.pull * denoised


def ancestral_step(sigma: float, sigma_next: float, eta: float, space: NoiseSpace) -> AncestralStep:
    """The step of Euler ancestral, in VE or in flow; eta 0 is Euler's own.

    VE: sigma_next^2 = down^2 + up^2 with up = eta * sigma_next * sqrt(1 - (sigma_next / sigma)^2) at most. Flow: a step
    to down = sigma_next * (1 + eta * (sigma_next / sigma - 1)), then scaled to the signal at sigma_next.
    """
    ratio = sigma_next / sigma
    if space.kind == "ve":
        up = min(sigma_next, eta * sigma_next * math.sqrt(1 - ratio**2))
        keep = math.sqrt(sigma_next**2 - up**2) / sigma
        return AncestralStep(keep, 1 - keep, up or 1.0)
    down = sigma_next * (1 + (ratio - 1) * eta)
    scale = (1 - sigma_next) / (1 - down)
    up = math.sqrt(max(sigma_next**2 - (down * scale) ** 2, 0.0))
    return AncestralStep(scale * down / sigma, scale * (1 - down / sigma), space.scale * up or 1.0)


def at_level(picture: Latent, noise: Latent, sigma: Sigma, space: NoiseSpace) -> Latent:
    """The picture with unit noise at a level, of the model's scale: alpha(sigma) * picture + sigma * scale * noise."""
    return space.alpha(sigma) * picture + sigma * space.scale * noise


def as_kept(x: Latent, dtype: torch.dtype) -> Tensor:
    """A state as it is kept and gone on from: in half precision, or in float32 on a grid of 2^-14.

    Coarser than the last bits of what a network says, which differ between runs and grow where guidance is strong.
    """
    return (x * GRID).round().div(GRID).to(dtype) if dtype == torch.float32 else x.to(dtype)


@dataclass(frozen=True)
class NoiseMaps:
    """What leads a sampler of n steps back to a picture, in main memory.

    sigmas [n+1], float64, the last 0. states [n b ...]: x at each level but the last. maps [n-1 b ...]: the z of each
    step but the last. residual [b ...]: what the last step misses. picture [b ...]: x at 0.
    """

    sigmas: Sigmas
    states: Tensor
    maps: Tensor
    residual: Latent
    picture: Latent
    eta: float
    space: NoiseSpace

    @property
    def steps(self) -> int:
        return len(self.states)

    @property
    def bytes(self) -> int:
        parts = (self.states, self.maps, self.residual, self.picture)
        return sum(part.numel() * part.element_size() for part in parts)

    def step(self, i: int) -> AncestralStep:
        sigma, sigma_next = self.sigmas[i : i + 2].tolist()
        return ancestral_step(sigma, sigma_next, self.eta, self.space)

    def added(self, i: int, like: Latent, detail: float = 1.0) -> Latent:
        """What step i adds to its mean; `detail`: how much of what the last one misses."""
        if i == self.steps - 1:
            return detail * self.residual.to(like)
        return self.step(i).unit * self.maps[i].to(like)

    def denoised(self, i: int, like: Latent) -> Latent:
        """What the model said in step i of the inversion: the one thing that its states and maps leave open."""
        step, last = self.step(i), i == self.steps - 1
        after = (self.picture if last else self.states[i + 1]).to(like)
        return (after - self.added(i, like) - step.keep * self.states[i].to(like)) / step.pull

    def each(self, change: Callable[[Tensor], Tensor]) -> NoiseMaps:
        """The same change to states, maps, residual and picture; it sees [n b ...] as well as [b ...]."""
        parts = (self.states, self.maps, self.residual, self.picture)
        states, maps, residual, picture = map(change, parts)
        return replace(self, states=states, maps=maps, residual=residual, picture=picture)


# --- inversion ---


def ddim_states(denoise: Denoiser, picture: Latent, sigmas: Sigmas) -> Iterator[tuple[Latent, Latent]]:
    """(state, denoised) of DDIM inversion at each level but the last, from the lowest up; one evaluation each."""
    x = picture
    rising = [torch.tensor(min(CLEAN_LEVEL, float(sigmas[-2]) / 2)), *sigmas[:-1].flip(0)]
    for sigma, sigma_next in pairwise(level.to(picture) for level in rising):
        denoised = denoise(x, sigma)
        x = euler(x, denoised, sigma, sigma_next)
        yield x, denoised


def invert(
    denoise: Denoiser, picture: Latent, sigmas: Sigmas, eta: float, space: NoiseSpace, draw: FreshNoise,
    dtype: torch.dtype = torch.float16,
) -> Generator[tuple[int, Latent, Latent], None, NoiseMaps]:  # fmt: skip
    """The maps of a picture; yields (evaluations before, x, denoised) after each evaluation: n, or 2n at eta 0.

    denoise: with the source prompt at its guidance. sigmas end in 0. dtype: of what is kept. Each step goes on from
    what is kept, here and in a replay, so that this is exact in half precision, too.
    """
    n, there = len(sigmas) - 1, picture.detach().to("cpu", copy=True)
    kept = torch.empty(2 * n - 1, *picture.shape, dtype=dtype)
    found = NoiseMaps(sigmas.double().cpu(), kept[:n], kept[n:], torch.zeros_like(there), there, eta, space)
    if eta == 0:
        for i, (x, denoised) in enumerate(ddim_states(denoise, picture, found.sigmas)):
            found.states[n - 1 - i] = x
            yield i, x, denoised

    def aim(i: int) -> Latent:
        """The state that the sampler is led to."""
        if eta == 0:
            return found.states[i].to(picture)
        return at_level(picture, draw(), found.sigmas[i].to(picture), space)

    found.states[0] = as_kept(aim(0), dtype)
    _check_held(found.states[0])
    for i in range(n):
        x = found.states[i].to(picture, copy=True)
        denoised = denoise(x, found.sigmas[i].to(picture))
        yield i + n * (eta == 0), x, denoised
        step = found.step(i)
        mean = step.mean(x, denoised)
        if i == n - 1:
            found.residual.copy_(picture - mean)
        else:
            found.maps[i] = (aim(i + 1) - mean) / step.unit
            found.states[i + 1] = as_kept(mean + step.unit * found.maps[i].to(picture), dtype)
    _check_held(found.states, found.maps, found.residual)
    return found


def _check_held(*parts: Tensor) -> None:
    if not all(bool(part.isfinite().all()) for part in parts):
        kept = str(parts[0].dtype).removeprefix("torch.")
        raise ValueError(
            f"The noise maps hold numbers that are too large for {kept}, or the model gave values that are not "
            "numbers. Keep the maps in float32, and look at what the model draws without them."
        )


# --- replay ---


def sample_replay(
    denoise: Denoiser, maps: NoiseMaps, x: Latent, start: int = 0, detail: float = 1.0,
    mask: Callable[[int, Latent], Tensor] | None = None,
) -> Iterator[tuple[int, Latent, Latent, Latent]]:  # fmt: skip
    """The maps' sampler from step `start` on, where x is its state; yields (step, x, denoised, x after the step).

    detail: the weight of the last residual; 1 gives the picture back, 0 is the paper's. mask: step, denoised -> 1 where
    the picture may become another, 0 where the states of the inversion stay, and with them the picture.
    """
    for i in range(start, maps.steps):
        denoised = denoise(x, maps.sigmas[i].to(x))
        x_next = maps.step(i).mean(x, denoised) + maps.added(i, x, detail)
        last = i + 1 == maps.steps
        if mask is not None:
            free = mask(i, denoised)
            x_next = x_next * free + (maps.picture if last else maps.states[i + 1]).to(x) * (1 - free)
        if not last:
            x_next = as_kept(x_next, maps.states.dtype).to(x)  # as the inversion went on from it
        yield i, x, denoised, x_next
        x = x_next


def focus_mask(denoised: Latent, before: Latent, focus: float) -> Tensor:
    """1 where a prompt wants another picture than before, 0 where it wants about the same, [b 1 ...]; free of calls.

    From the size of the difference over the channels, a little smoothed, in parts of its largest value: 0 below half of
    `focus`, 1 above it. As DiffEdit finds its mask (Couairon et al. 2022, arXiv 2210.11427), but anew in every step.
    """
    size = (denoised - before).square().sum(1, keepdim=True).sqrt()
    if size.ndim >= 4:
        flat = size.reshape(-1, 1, *size.shape[-2:])
        size = F.avg_pool2d(flat, 3, 1, 1, count_include_pad=False).reshape(size.shape)
    most = size.flatten(1).amax(1).reshape(-1, *[1] * (size.ndim - 1)).clamp(min=1e-12)
    return (2 * size / (focus * most) - 1).clamp(0, 1)


# --- edits of the maps ---


def repeated(maps: NoiseMaps, count: int) -> NoiseMaps:
    """The maps of one picture for a batch of `count`; views, so that they take no memory."""

    def batch(part: Tensor) -> Tensor:
        at = part.ndim - maps.picture.ndim
        return part.expand(*part.shape[:at], count, *part.shape[at + 1 :])

    return maps.each(batch)


def varied(maps: NoiseMaps, amount: float, start: int, draw: FreshNoise) -> NoiseMaps:
    """The maps from step `start` on mixed with fresh noise, z' = sqrt(1 - p^2) z + p eps: other details, the more the
    earlier it starts.

    The fresh noise is of the sampler's own size, and not of the maps', which is larger because two neighbours share a
    draw and cancel: at amount 1 the rest is a plain ancestral run. ValueError at eta 0, whose maps are no noise.
    """
    if amount == 0:
        return maps
    if maps.eta == 0:
        raise ValueError(
            "Maps of eta 0 hold no noise to vary: they only correct DDIM inversion. Invert with 'eta' above 0, best 1."
        )
    mixed = maps.maps.clone()
    for i in range(start, len(mixed)):
        mixed[i] = math.sqrt(1 - amount**2) * mixed[i].to(maps.picture) + amount * draw()
    return replace(maps, maps=mixed)


def shifted(maps: NoiseMaps, down: int = 0, right: int = 0, flip: Sequence[int] = ()) -> NoiseMaps:
    """The maps, and with them the picture, moved by whole latent pixels around the edges, or flipped along axes."""
    if flip:
        maps = maps.each(lambda part: part.flip(tuple(flip)))
    if down or right:
        maps = maps.each(lambda part: part.roll((down, right), (-2, -1)))
    return maps


def blended(maps: NoiseMaps, other: NoiseMaps, share: Tensor) -> NoiseMaps:
    """Two pictures in one: that of `other` where `share` [b or 1, 1, ...] is 1; ValueError unless both fit together.

    Pictures mix by the shares, noise by their square roots, so that it keeps its size along the seam.
    """
    check_alike(maps, other)
    mine, theirs = 1 - share, share
    picture = mine * maps.picture + theirs * other.picture
    states, added = torch.empty_like(maps.states), torch.empty_like(maps.maps)

    def of_noise(one: Tensor, two: Tensor) -> Tensor:
        return mine.sqrt() * one + theirs.sqrt() * two

    for i, sigma in enumerate(maps.sigmas[:-1].to(picture)):
        alpha = maps.space.alpha(sigma)
        noises = (one.states[i].to(picture) - alpha * one.picture for one in (maps, other))
        states[i] = alpha * picture + of_noise(*noises)
    for i in range(len(added)):
        pair = maps.maps[i].to(picture), other.maps[i].to(picture)
        added[i] = of_noise(*pair) if maps.eta else mine * pair[0] + theirs * pair[1]
    residual = mine * maps.residual + theirs * other.residual
    return replace(maps, states=states, maps=added, residual=residual, picture=picture)


def check_alike(one: NoiseMaps, other: NoiseMaps) -> None:
    """ValueError unless two maps have the same size, levels and eta."""
    if one.picture.shape[1:] != other.picture.shape[1:]:
        raise ValueError(
            f"One set of noise maps is for latents of {list(one.picture.shape[1:])}, the other of "
            f"{list(other.picture.shape[1:])}. Invert pictures of the same size."
        )
    if one.space != other.space or one.steps != other.steps or not torch.allclose(one.sigmas, other.sigmas, rtol=1e-4):
        raise ValueError(
            f"Two sets of noise maps were made on different noise levels ({one.steps} steps from "
            f"{float(one.sigmas[0]):.4g}, and {other.steps} from {float(other.sigmas[0]):.4g}). Give both of Attune "
            "Invert the same SIGMAS."
        )
    if one.eta != other.eta:
        raise ValueError(f"Noise maps of 'eta' {one.eta:g} and {other.eta:g} do not mix. Invert both with the same.")


# --- morph ---


def morph_state(
    states: tuple[Latent, Latent], pictures: tuple[Latent, Latent], factor: float, sigma: Sigma, space: NoiseSpace,
    boost: float = 1.4, fresh: Latent | None = None, amount: float = 0.0, clip: float = 2.0,
) -> Latent:  # fmt: skip
    """A state between two at a level by NoiseDiffusion's rule (Zheng et al. 2024, arXiv 2403.08840, equation 7).

    In units of the state's expected size n (VE sqrt(1 + sigma^2), flow sqrt((1 - sigma)^2 + (scale sigma)^2)), both
    states are clipped at `clip`, which removes what no noise holds, and mixed like noise; the missing signal of the
    pictures comes back by `boost`, and `amount` of the noise is fresh. Two guards of ours: the ends are the states
    themselves, which the authors' arithmetic neither reaches (it divides by zero) nor keeps (the boost); and the boost
    is of what differs from the means of the channels, so that it raises contrast and not brightness.
    """
    if factor <= 0 or factor >= 1:
        return states[0] if factor <= 0 else states[1]
    angle = min(max(factor, NEAREST_END), 1 - NEAREST_END) * math.pi / 2
    left = math.sqrt(1 - amount**2)
    a, b = left * math.cos(angle), left * math.sin(angle)
    mu, nu = a / (a + b), b / (a + b)
    alpha = space.alpha(sigma)
    size = (alpha**2 + (space.scale * sigma) ** 2).sqrt()
    y = a * (states[0] / size).clamp(-clip, clip) + b * (states[1] / size).clamp(-clip, clip)
    picture = mu * pictures[0] + nu * pictures[1]
    mean = picture.mean(tuple(range(min(2, picture.ndim - 1), picture.ndim)), keepdim=True)
    y = y + alpha / size * (torch.lerp(mean, picture, boost) - a * pictures[0] - b * pictures[1])
    if fresh is not None:
        y = y + amount * space.scale * sigma / size * fresh
    return y.clamp(-clip, clip) * size


def morphed(
    one: NoiseMaps, other: NoiseMaps, factors: Sequence[float], start: int = 0, boost: float = 1.4,
    amount: float = 0.0, fresh: Latent | None = None,
) -> NoiseMaps:  # fmt: skip
    """The maps of the pictures between two, one for each factor, from step `start` on; the ends are the two's own.

    one, other: of one picture each. States by NoiseDiffusion's rule, maps mixed like noise (at eta 0 on a line), what
    the last step misses on a line. ValueError unless both fit together.
    """
    check_alike(one, other)
    if len(one.picture) != 1 or len(other.picture) != 1:
        raise ValueError(
            f"A morph goes between two pictures, but the noise maps hold {len(one.picture)} and {len(other.picture)}. "
            "Invert one picture in each."
        )
    line = [(1 - f, f) for f in factors]
    arc = [(math.cos(f * math.pi / 2), math.sin(f * math.pi / 2)) for f in factors] if one.eta else line
    pictures = one.picture, other.picture

    def mixed(weights: Sequence[tuple[float, float]], a: Tensor, b: Tensor) -> Tensor:
        """[... b=1 ...] -> one for each pair of weights; 0 and 1 give one of the two to the bit."""
        a, b = a.to(pictures[0]), b.to(pictures[0])
        pairs = zip(factors, weights, strict=True)
        return torch.cat([a if f == 0 else b if f == 1 else wa * a + wb * b for f, (wa, wb) in pairs])

    def state(i: int) -> Tensor:
        pair = one.states[i].to(pictures[0]), other.states[i].to(pictures[0])
        sigma = one.sigmas[i].to(pictures[0])
        parts = [morph_state(pair, pictures, f, sigma, one.space, boost, fresh, amount) for f in factors]
        return torch.cat(parts).to(one.states.dtype)

    maps = torch.empty(one.steps - 1 - start, len(factors), *one.picture.shape[1:], dtype=one.maps.dtype)
    for i in range(start, one.steps - 1):
        maps[i - start] = mixed(arc, one.maps[i], other.maps[i])
    return replace(
        one, sigmas=one.sigmas[start:], states=torch.stack([state(i) for i in range(start, one.steps)]), maps=maps,
        residual=mixed(line, one.residual, other.residual), picture=mixed(line, *pictures),
    )  # fmt: skip
