"""Pictures that an inpainting model edits badly: a small change of what it is shown, found by its own gradients.

DiffusionGuard (Choi et al. 2025, arXiv 2410.05694): the first call of the network decides what is painted, so the
change makes the prediction of that call as large as it can, for masks whose contours move and for any noise.
Pictures are [1 3 h w] in 0..1; masks [n h w], 1 where a picture is painted anew.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

GREY_LEVELS = 255  # of a channel of a picture, above black
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # masked picture, mask [1 h w] -> what shall fall, []


@dataclass(frozen=True)
class Protection:
    """budget: the largest change of a channel, of 0..1; step: of one iteration; reach: of the contours, in pixels."""

    budget: float
    step: float
    steps: int
    reach: int


def shown(picture: Tensor, mask: Tensor) -> Tensor:
    """What an inpainting model is shown of a picture: grey where the mask [1 h w] is."""
    return (picture - 0.5) * (1 - mask[:, None]) + 0.5


def own_prediction(x: Tensor, denoised: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """What the network itself said of x = x0 + sigma * eps: the noise, or for `kind` "v" the velocity in VP form."""
    if kind == "v":
        alpha = 1 / (1 + sigma**2).sqrt()  # v = alpha * eps - alpha * sigma * x0
        return (alpha**2 * x - denoised) / (alpha * sigma)
    return (x - denoised) / sigma


def objective(prediction: Tensor) -> Tensor:
    """Less the larger a prediction is, []: minus its Euclidean length, the mean over a batch."""
    return -prediction.flatten(1).norm(dim=1).mean()


def signed_distance(masks: Tensor, reach: int) -> Tensor:
    """Pixels from the contour, 1, 2, ... inside and -1, -2, ... outside, at most `reach`: [n h w].

    Octagons stand for circles: crosses and squares of 3 x 3 take turns. The picture's border is no contour.
    """

    def depth(inside: Tensor) -> Tensor:
        found = inside.clone()
        for i in range(1, reach):
            outside = 1 - inside
            rows, columns = F.max_pool2d(outside, (3, 1), 1, (1, 0)), F.max_pool2d(outside, (1, 3), 1, (0, 1))
            grown = torch.maximum(rows, columns) if i % 2 else F.max_pool2d(rows, (1, 3), 1, (0, 1))
            inside = 1 - grown
            found = found + inside
        return found

    inside = (masks > 0.5).float()[:, None]
    return (depth(inside) - depth(1 - inside))[:, 0]


def move_contour(distance: Tensor, reach: int, draws: torch.Generator) -> Tensor:
    """A mask [1 h w] whose contour lies up to `reach` pixels from that of a signed distance [1 h w], unevenly.

    Half of the way is the same all along, the other half changes slowly. A mask that would vanish, or cover everything,
    stays as it is.
    """
    coarse = torch.rand(1, 1, 5, 5, generator=draws).to(distance)
    slowly = F.interpolate(coarse, distance.shape[1:], mode="bilinear")[0]
    offset = torch.rand((), generator=draws).to(distance) + slowly - 1
    moved = distance + reach * offset > 0
    return (moved if moved.any() and not moved.all() else distance > 0).to(distance.dtype)


def protect(
    picture: Tensor, masks: Tensor, loss: Loss, settings: Protection, draws: torch.Generator
) -> Generator[Tensor, None, None]:
    """Projected sign-gradient descent; yields the picture after each iteration.

    Every iteration moves the contour of one of the masks, drawn at random. What all of them hide is not changed: its
    gradient is zero, and so is that one's sign.
    """
    lowest, highest = (picture - settings.budget).clamp(min=0), (picture + settings.budget).clamp(max=1)
    distances = signed_distance(masks, settings.reach + 1)
    for _ in range(settings.steps):
        one = int(torch.randint(len(distances), (), generator=draws))
        mask = move_contour(distances[one : one + 1], settings.reach, draws)
        asked = picture.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(shown(asked, mask), mask), asked)
        picture = torch.minimum(torch.maximum(picture - settings.step * gradient.sign(), lowest), highest)
        yield picture


def in_levels(picture: Tensor, changed: Tensor) -> Tensor:
    """`changed` with its difference to `picture` cut to whole grey levels, which a saved file keeps."""
    difference = (changed - picture) * GREY_LEVELS
    return (picture + (difference + 1e-3 * difference.sign()).trunc() / GREY_LEVELS).clamp(0, 1)
