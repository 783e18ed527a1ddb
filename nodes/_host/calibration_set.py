"""What a network is asked in runs of the host, kept for quantisers: x, sigma, and the conditioning where wanted."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.calibration_set import normal_steps, uniform_steps
from ...models.calibration import SAME_LEVEL
from ...models.calibration_set import sample_path, samples_in, save_samples
from ...models.store import file_stem
from .calibrating import stands_aside
from .clock import step_times
from .identity import identify

LOG = logging.getLogger(__name__)
KEY = "attune.calibration_set"
COLLECTING = f"{KEY}.collecting"  # of the current run: what it gathers
WHO = "Attune Calibration Set"
UNIFORMLY, NORMALLY = "uniform", "normal"
NO_CONDITIONING, EMBEDDINGS = "none", "embeddings"


@dataclass(frozen=True)
class Wanted:
    """`samples` in all, of `per_run` steps of each run; see the inputs of the node."""

    folder: Path
    made: Mapping[str, Any]
    samples: int
    per_run: int
    spacing: str
    centre: float
    spread: float
    conditioning: str
    say: Callable[[str], None]

    def steps(self, sampling: Any, sigmas: Tensor) -> list[int]:
        """Of a run over `sigmas`, those to keep."""
        if self.spacing == UNIFORMLY:
            return uniform_steps(len(sigmas) - 1, self.per_run)
        times, top = step_times(sampling, sigmas)
        return normal_steps([time / top for time in times], self.per_run, self.centre, self.spread)


def set_folder(name: str) -> Path:
    """Where the samples of that name are, in the host's output folder."""
    return Path(folder_paths.get_output_directory()) / "attune_calibration" / file_stem(name)


def made_of(model: Any, spacing: str, conditioning: str) -> dict[str, Any]:
    """What the samples of one folder have in common."""
    about = identify(model, weights=True)
    return {
        "family": about.family, "config_hash": about.config_hash, "weights": about.weights_hash,
        "patches": about.patches, "spacing": spacing, "conditioning": conditioning,
    }  # fmt: skip


def collecting(model: Any, wanted: Wanted) -> Any:
    """A clone of MODEL whose runs add to the set until it is full; they give what they give without it."""
    clone = model.clone()
    clone.model_options["transformer_options"][KEY] = wanted
    for kind, wrapper in ((WrappersMP.SAMPLER_SAMPLE, _run), (WrappersMP.APPLY_MODEL, _note)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


class _Collected:
    """Of one run."""

    def __init__(self, levels: list[float], room: int, conditioning: str):
        self.levels, self.room, self.conditioning = levels, room, conditioning
        self.step = -1  # whose level is being asked
        self.seen: set[int] = set()
        self.rows: dict[tuple[int, ...], dict[str, list[Tensor]]] = {}  # by the size of what is asked

    def __deepcopy__(self, memo: dict) -> _Collected:
        return self

    def note(self, x: Tensor, sigma: Tensor, told: Mapping[str, Any]) -> None:
        """One call of the network, where its level is wanted and was not passed before."""
        if not len(x):  # a batch of no picture, which the host refuses in its own words
            return
        level = float(sigma.flatten()[0])
        near = [i for i, one in enumerate(self.levels) if abs(one - level) <= SAME_LEVEL * one]
        step = near[0] if near else -1
        if step != self.step:
            self.seen.add(self.step)
            self.step = step
        if step < 0 or step in self.seen or self.room <= 0:
            return
        count = min(len(x), self.room)
        self.room -= count
        rows = self.rows.setdefault(tuple(x.shape[1:]), {"x": [], "sigma": []})
        rows["x"].append(x[:count].half().cpu())
        rows["sigma"].append(sigma.float().cpu().expand(len(x))[:count].clone())
        if self.conditioning == EMBEDDINGS:
            for name in ("c_crossattn", "y"):
                if isinstance(told.get(name), Tensor) and len(told[name]) == len(x):
                    rows.setdefault(name, []).append(told[name][:count].half().cpu())

    def tensors(self) -> dict[str, Tensor]:
        """[n ...] each, of the size that most of them have: areas of a prompt are asked in smaller ones. Tokens of
        unequal counts are filled up with zeros behind."""
        most = max(self.rows.values(), key=lambda rows: sum(map(len, rows["sigma"])))
        return {name: _joined(rows) for name, rows in most.items()}


def _joined(rows: list[Tensor]) -> Tensor:
    if rows[0].ndim == 3:
        most = max(one.shape[1] for one in rows)
        rows = [torch.nn.functional.pad(one, (0, 0, 0, most - one.shape[1])) for one in rows]
    return torch.cat(rows)


def _run(executor, guider, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
    """SAMPLER_SAMPLE: collect one run, unless the set is full or has this run."""
    options = extra_args["model_options"]["transformer_options"]
    wanted: Wanted = options[KEY]

    def run():
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)

    if stands_aside(extra_args["model_options"], KEY):
        return run()
    path = sample_path(wanted.folder, _name(guider, sigmas, noise, latent_image))
    have = samples_in(wanted.folder, wanted.made)
    if path.exists() or have >= wanted.samples:
        full = f"{have} of {wanted.samples} samples in {wanted.folder}"
        LOG.info("%s: %s; this run adds none.", WHO, f"{full}, this run among them" if path.exists() else full)
        return run()
    steps = wanted.steps(guider.inner_model.model_sampling, sigmas)
    levels = [float(sigmas[i]) for i in steps]
    size = 2 * noise.numel() * 2 * len(levels) / 1e6
    said = (
        f"{have} of {wanted.samples} samples in {wanted.folder}; this run adds up to {2 * len(noise) * len(levels)}, "
        f"about {size:.1f} MB without conditioning."
    )
    LOG.info("%s: %s", WHO, said)
    wanted.say(said)
    options[COLLECTING] = found = _Collected(levels, wanted.samples - have, wanted.conditioning)
    out = run()
    if found.rows:
        wanted.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process made the same run at that moment
            save_samples(path, found.tensors(), wanted.made)
    return out


def _name(guider, sigmas: Tensor, noise: Tensor, latent: Tensor | None) -> str:
    """16 hex digits: the same for the same run."""
    digest = hashlib.sha256()
    conds = [one.get("cross_attn") for side in getattr(guider, "conds", {}).values() for one in side]
    for one in (sigmas, noise, latent, *conds):
        if isinstance(one, Tensor) and not getattr(one, "is_nested", False):
            digest.update(one.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(str(getattr(guider, "cfg", "")).encode())
    return digest.hexdigest()[:16]


def _note(executor, x, sigma, c_concat=None, c_crossattn=None, *args, **kwargs):
    """APPLY_MODEL: one call of the network."""
    options = kwargs.get("transformer_options") or next((a for a in reversed(args) if isinstance(a, dict)), {})
    found = options.get(COLLECTING)
    if found is not None:
        found.note(x, sigma, {"c_crossattn": c_crossattn, "y": kwargs.get("y")})
    return executor(x, sigma, c_concat, c_crossattn, *args, **kwargs)
