"""A noise level for each frame, or region, of one sample: tables of such levels, and the solver that follows them.

Noise of different frames is independent, so the probability flow moves each frame by its own level alone,
dx_f = (x_f - denoised_f) / sigma_f dsigma_f, whatever path the levels take together: vectorised timesteps (FVDM, Liu et
al. 2024, arXiv 2410.03160), diffusion forcing (Chen et al. 2024, arXiv 2407.01392). What differs is what the network
must have learned: to be told a level for each frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .space import NoiseSpace
from .types import Latent, Sigmas

FLOW = NoiseSpace("flow")
FieldDenoiser = Callable[[Latent, Tensor, slice], Latent]  # x [b c w h w] at levels [w ...], frames of the film it is


@dataclass(frozen=True)
class Timetable:
    """levels [n+1 f h w], h and w may be 1: of every frame, never rising; windows: the frames that the network sees in
    each of the n steps, first and behind the last."""

    levels: Tensor
    windows: tuple[tuple[int, int], ...]

    @property
    def steps(self) -> int:
        return len(self.windows)


def given_shares(frames: int, first: int, last: int = 0) -> Tensor:
    """Shares [f 1 1] of the run's level: 0 for the `first` and the `last` so many frames, 1 for those between."""
    if min(first, last) < 0 or first + last >= frames:
        raise ValueError(
            f"Of {frames} frames {first} at the start and {last} at the end are given: that leaves none to sample. "
            "Give fewer frames, or make the film longer."
        )
    shares = torch.ones(frames, 1, 1)
    shares[:first], shares[frames - last :] = 0, 0
    return shares


def stretched(shares: list[float], frames: int) -> Tensor:
    """Shares [f 1 1] in 0..1 from a list of any length, linear between its values."""
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"Shares of the noise level are numbers from 0 to 1, but the list is {shares}.")
    values = torch.tensor(shares, dtype=torch.float64)
    at = torch.linspace(0, len(shares) - 1, frames, dtype=torch.float64)
    low = at.floor().long().clamp(max=max(len(shares) - 2, 0))
    return torch.lerp(values[low], values[(low + 1).clamp(max=len(shares) - 1)], at - low).float()[:, None, None]


def together(sigmas: Sigmas, shares: Tensor) -> Timetable:
    """All frames in all steps, each at its share [f h w] of the run's level."""
    return Timetable(sigmas[:, None, None, None] * shares.to(sigmas), ((0, len(shares)),) * (len(sigmas) - 1))


def stride_for(steps: int, window: int, overlap: int, block: int) -> int:
    """The fewest steps between two blocks with which those in work fit a window beside `overlap` finished frames."""
    room = (window - overlap) // block
    if room < 1:
        raise ValueError(
            f"A window of {window} frames with {overlap} finished ones in it has no room for a block of {block}."
        )
    return math.ceil(steps / room)


def staircase(sigmas: Sigmas, frames: int, given: int, window: int, block: int, overlap: int) -> Timetable:
    """The `given` first frames are finished; each block of the next ones begins some steps after the one before it.

    The timetable of SkyReels-V2 (arXiv 2504.13074): at step k block j has taken clamp(k - stride j, 0, n) of the run's
    n steps. The window ends behind the last block in work; n + stride (blocks - 1) steps.
    """
    n, window = len(sigmas) - 1, min(window, frames)
    if not 0 <= given < frames:
        raise ValueError(f"Of {frames} frames {given} are given: that leaves none to sample.")
    blocks = math.ceil((frames - given) / block)
    alone = blocks == 1 and window == frames
    stride = 0 if alone else stride_for(n, window, min(overlap, window - 1), block)
    owner = torch.div(torch.arange(frames) - given, block, rounding_mode="floor")  # below 0: given
    taken = (torch.arange(n + stride * (blocks - 1) + 1)[:, None] - stride * owner).clamp(0, n)
    taken = torch.where(owner < 0, n, taken)  # [steps+1 f]
    in_work = taken.diff(dim=0) > 0
    ends = [max(window, 1 + int(row.nonzero().max())) for row in in_work]
    return Timetable(sigmas[taken][..., None, None], tuple((end - window, end) for end in ends))


def sample_field(
    denoise: FieldDenoiser, x: Latent, table: Timetable, order: int = 1, shown: float = 0.0,
    noise: Latent | None = None, space: NoiseSpace = FLOW,
) -> Iterator[tuple[int, Latent, Latent, Latent]]:  # fmt: skip
    """Euler's method, or Adams-Bashforth of order 2 with each frame's own last slope; one evaluation a step.

    Yields (step, x, denoised, x after the step) of whole films; `denoised` outside of the window is x. A frame without
    noise never changes, but is shown to the network at the level `shown`, with its part of `noise`.
    """
    levels = table.levels.to(x)
    slope, length = torch.zeros_like(x), torch.zeros_like(levels[0])
    for i, (first, behind) in enumerate(table.windows):
        frames = slice(first, behind)
        part, level, step = x[:, :, frames], levels[i, frames], (levels[i + 1] - levels[i])[frames]
        seen, told = part, level
        if shown > 0 and noise is not None:
            told = torch.where(level > 0, level, shown)
            veiled = space.alpha(told) * part + told * space.scale * noise[:, :, frames]
            seen = torch.where(level > 0, part, veiled)
        answer = torch.where(level > 0, denoise(seen, told, frames), part)
        moves = step < 0
        new = torch.where(moves, (part - answer) / torch.where(level > 0, level, 1.0), 0.0)
        before = length[frames]
        ratio = torch.where(moves & (before < 0), step / (2 * before).clamp(max=-1e-30), 0.0) if order > 1 else 0.0
        x_next, denoised = x.clone(), x.clone()
        x_next[:, :, frames] = part + step * (new + ratio * (new - slope[:, :, frames]))
        denoised[:, :, frames] = answer
        slope[:, :, frames] = torch.where(moves, new, slope[:, :, frames])
        length[frames] = torch.where(moves, step, before)
        yield i, x, denoised, x_next
        x = x_next
