"""The card of a fitted sampler beside its profile: model, machine, seconds, what was proved, two pictures."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import comfy.model_management
import torch
from PIL import Image
from torch import Tensor

from ...models.calibration import Calibration, size_text
from ...models.store import written_whole
from .._plan.fitted_sampler import proved
from .live import coloured

LOG = logging.getLogger(__name__)
Draw: TypeAlias = Callable[[Calibration, Sequence[str], Sequence[tuple[str, Image.Image]]], Image.Image]


@dataclass(frozen=True)
class Shown:
    """What a card shows besides the profile: seconds of the long run and of a short one, their ends [b c … h w] from
    one noise, the long run's first, and the steps of the short one."""

    seconds: tuple[float, float]
    ends: tuple[Tensor, Tensor]
    steps: int


def card_of(patcher: Any, profile: Calibration, shown: Shown, draw: Draw) -> Image.Image | None:
    """The card; None where it cannot be drawn, which costs nothing else. draw: see `draw_card`."""
    long, short = (f"{seconds:.2f} s" for seconds in shown.seconds)
    facts = [
        f"{profile.families[0]}, weights {profile.weights_hash}, {size_text(profile.resolution)}",
        machine(),
        f"{profile.steps} steps of {profile.solver}, cfg {profile.cfg or 0:g}: {long}",
        f"{shown.steps} evaluations: {short}",
        *(f"{proved(one)}" for one in profile.runs),
    ]
    names = (f"{profile.steps} steps", f"{shown.steps} evaluations")
    try:
        pictures = [(name, coloured(patcher, end)) for name, end in zip(names, shown.ends, strict=True)]
        return draw(profile, facts, pictures)
    except (OSError, ValueError, RuntimeError) as error:
        LOG.warning("The card of '%s' could not be drawn: %s", profile.name, error)
        return None


def keep_card(card: Image.Image | None, path: Path) -> str:
    """Write the card beside the profile at `path`, and say where; one that cannot be written costs nothing else."""
    if card is None:
        return ""
    file = path.with_suffix(".png")
    try:
        with written_whole(file) as temporary:
            card.save(temporary, "PNG")
    except (OSError, ValueError) as error:
        LOG.warning("The card of '%s' could not be written: %s", path.name, error)
        return ""
    return f"To share: '{file.name}' beside it."


def machine() -> str:
    """The device that the host computes on; of a processor its name and how many of its threads are used."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    return comfy.model_management.get_torch_device_name(device)


def processor() -> str:
    """The processor as it is sold, where Linux says so; else the kind of its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2] for line in lines if line.startswith(("model name", "Model"))), "")
    return " ".join(named.split()) or platform.processor() or platform.machine()
