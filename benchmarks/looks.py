"""What the pictures of a cell show, measured once and cached, and the summary of it that every table quotes.

Summaries compare with two things: the *data* (training pictures of the same objects on the same backgrounds, by the
judge's features) says how good the pictures are; the *converged* pictures (the same noise taken to the end with many
steps) say how well few steps follow the model's own path.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import wasserstein_distance
from torch import Tensor

from harness import BATCH, Cell, Lab, Task
from judge import BACKGROUNDS, HERE, corner_colours, load_judge, nearest_colour
from metrics import coverage, frechet, jackknife, kernel_distance, perceptual_distance, precision_recall, psnr

CONVERGED = {"unet": ("dpmpp_2m", "karras"), "flow": ("dpmpp_2m", "simple")}
DATA = HERE / "data.safetensors"
AXES = 32  # principal axes of the data's features in which the Frechet distance is taken: few samples suffice
GROUPS = 6  # disjoint groups of seeds, for the spread
FORMAT = 1


@dataclass
class Look:
    """Per picture: the judge's features [n 256] and object [n], corner colour [n 3], mean [n], and the distances to the
    goal, another picture of the same noise: latent mean squared error, PSNR in dB, perceptual distance, each [n]."""

    features: Tensor
    objects: Tensor
    corners: Tensor
    means: Tensor
    errors: Tensor
    psnr: Tensor
    perceptual: Tensor


def converged(lab: Lab, model: str, cfg: float = 3.0) -> Cell:
    """The cell whose pictures count as converged."""
    sampler, schedule = CONVERGED[model]
    return Cell(model, sampler, lab.sigmas(model, schedule, lab.converged_steps), cfg)


def look(lab: Lab, cell: Cell, work: list[Task], say=lambda _: None, goal: Cell | None = None) -> Look:
    """Draw a cell if need be, and look at its pictures if nobody has yet; the goal is the converged picture."""
    drawn, goal = lab.run(cell, work, say), goal or converged(lab, cell.model, cell.cfg)
    parts = []
    for start in range(0, len(work), BATCH):
        part = work[start : start + BATCH]
        of, to = lab.path(cell, part), lab.path(goal, part)
        key = f"{of.stem} {to.stem} {_digest(HERE / 'judge.safetensors')} {FORMAT}"
        path = lab.cache / f"look-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if not path.exists():
            latents, (goals, goal_pictures) = drawn.latents[start : start + BATCH], _goal(lab, goal, tuple(part))
            seen = measured(lab.pictures(cell.model, latents), goal_pictures)
            seen["errors"] = (latents - goals).square().flatten(1).mean(1)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({name: value.float().contiguous() for name, value in seen.items()}, temporary)
            temporary.replace(path)
        parts.append(load_file(path))
    return Look(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


@lru_cache(maxsize=32)
def _goal(lab: Lab, goal: Cell, part: tuple[Task, ...]) -> tuple[Tensor, Tensor]:
    latents = lab.run(goal, list(part)).latents
    return latents, lab.pictures(goal.model, latents)


def measured(pictures: Tensor, goals: Tensor) -> dict[str, Tensor]:
    judge = load_judge()
    features, logits = judge(pictures)
    return {
        "features": features, "objects": logits.argmax(1), "corners": corner_colours(pictures),
        "means": pictures.flatten(1).mean(1), "psnr": psnr(pictures, goals).clamp(max=100),
        "perceptual": perceptual_distance(judge, pictures, goals),
    }  # fmt: skip


@lru_cache(maxsize=8)
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=1)
def data() -> dict[str, Tensor]:
    """Training pictures of the first tasks: features [n placements 256] and means [n placements].

    Also the features [n 256] of pictures that only went through an autoencoder ("unet", "flow"): no sampler is better;
    and "axes" [256 AXES], in which the data's mean variance is 1.
    """
    stored = {name: value.double() for name, value in load_file(DATA).items()}
    variances, vectors = torch.linalg.eigh(torch.cov(stored["features"].flatten(0, 1).T))
    return stored | {"axes": vectors.flip(1)[:, :AXES] / variances[-AXES:].mean().sqrt()}


def to_data(metric: Callable[[Tensor, Tensor], float], features: Tensor, kept: Tensor) -> float:
    """metric(training pictures, these) for the tasks `kept`, in the principal axes of the data's features."""
    axes = data()["axes"]
    return metric(data()["features"][kept].flatten(0, 1) @ axes, features[kept].double() @ axes)


def brightness(corners: Tensor, backgrounds: Tensor) -> dict[int, tuple[float, float]]:
    """Background word by index -> mean corner brightness (wanted, found), in 0..255."""
    palette = torch.tensor(list(BACKGROUNDS.values())).double().mean(1)
    found = 255 * corners.double().mean(1)
    return {int(b): (float(palette[b]), float(found[backgrounds == b].mean())) for b in backgrounds.unique()}


def brightness_error(corners: Tensor, backgrounds: Tensor) -> float:
    """Mean over the background words of |found - wanted|, in 0..255."""
    errors = [abs(found - wanted) for wanted, found in brightness(corners, backgrounds).values()]
    return sum(errors) / len(errors)


def summary(seen: Look, work: list[Task], groups: int = GROUPS) -> dict[str, tuple[float, float]]:
    """Name -> (value, standard error), the latter by the jackknife over disjoint groups of tasks and seeds.

    frechet, kernel (unbiased, times 1000), precision, recall, coverage: to the data, in the judge's features.
    wasserstein: between the means of pictures and data, in 0..255. object, background: percentage that shows what the
    prompt says. brightness: see `brightness_error`. error (latent mean squared, times 1000), psnr (dB), perceptual
    (times 1000): to the goal, mostly the converged pictures.
    """
    count = len(data()["features"])
    if len(work) > count:
        raise ValueError(f"The data holds the pictures of {count} tasks, but {len(work)} were asked for.")
    objects, backgrounds = torch.tensor([[task.obj, task.background] for task in work]).T
    object_right, background_right = seen.objects == objects, nearest_colour(seen.corners) == backgrounds
    means = data()["means"]
    measures: dict[str, Callable[[Tensor], float]] = {
        "frechet": lambda kept: to_data(frechet, seen.features, kept),
        "kernel": lambda kept: 1000 * to_data(kernel_distance, seen.features, kept),
        "precision": lambda kept: to_data(precision_recall, seen.features, kept)[0],
        "recall": lambda kept: to_data(precision_recall, seen.features, kept)[1],
        "coverage": lambda kept: to_data(coverage, seen.features, kept),
        "wasserstein": lambda kept: 255 * wasserstein_distance(means[kept].flatten(), seen.means[kept]),
        "object": lambda kept: 100 * float(object_right[kept].double().mean()),
        "background": lambda kept: 100 * float(background_right[kept].double().mean()),
        "brightness": lambda kept: brightness_error(seen.corners[kept], backgrounds[kept]),
        "error": lambda kept: 1000 * float(seen.errors[kept].double().mean()),
        "psnr": lambda kept: float(seen.psnr[kept].double().mean()),
        "perceptual": lambda kept: 1000 * float(seen.perceptual[kept].double().mean()),
    }
    return {name: jackknife(measure, len(work), groups) for name, measure in measures.items()}
