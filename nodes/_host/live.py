"""What a node shows of itself while it works: the host's bar, with a picture beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import comfy.utils
import torch
from comfy_execution.progress import get_progress_state
from PIL import Image
from torch import Tensor

LOG = logging.getLogger(__name__)
T = TypeVar("T")
Interim = tuple[str, float, Any]  # what is done now, the share done, and what was found by then to be drawn, or None


class ProgressBar:
    """The bar of the running node, or of the node `node_id`, with a picture beside it."""

    def __init__(self, total: int, node_id: str = ""):
        self._bar, self._node_id = comfy.utils.ProgressBar(total, node_id or None), node_id

    def end(self) -> None:
        """Of another node than the running one, whose bar the host ends."""
        if self._node_id:
            get_progress_state().finish_progress(self._node_id)

    def update(self, done: int, picture: Image.Image | None = None) -> None:
        preview = None if picture is None else ("JPEG", picture, max(picture.size))
        self._bar.update_absolute(done, preview=preview)


def show_live(picture: Image.Image) -> None:
    """Show a picture on the node that is running: where there were live ones, the page keeps the last of them."""
    ProgressBar(1).update(1, picture)


def coloured(model: Any, latent: Tensor) -> Image.Image:
    """The first picture of latents, as the host's quick previews show it: a linear map to colours."""
    space = model.get_model_object("latent_format")
    one = latent[0].detach().float().cpu()
    one = one if one.ndim == 3 else one[:, 0]
    factors = torch.tensor(space.latent_rgb_factors or [[1.0, 1.0, 1.0]] * len(one)).float()
    bias = getattr(space, "latent_rgb_factors_bias", None)
    colours = torch.einsum("chw,cr->hwr", one[: len(factors)], factors[: len(one)])
    colours = colours + torch.tensor(bias or [0.0, 0.0, 0.0])
    return Image.fromarray(((colours + 1) / 2).clamp(0, 1).mul(255).byte().numpy())


def last_on_bar(work: Generator[Interim, None, T], who: str, draw: Callable[[Any], Image.Image]) -> T:
    """What a generator returns in the end; each sentence goes to the log, each share done moves the host's bar, and
    what is found by then is drawn beside it."""
    bar = ProgressBar(1000)
    while True:
        try:
            said, done, found = next(work)
            LOG.info("%s: %s", who, said)
            bar.update(round(1000 * done), None if found is None else draw(found))
        except StopIteration as end:
            return end.value
