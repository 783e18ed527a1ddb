"""One loop for every training: it can stop and go on, and goes on only with the same data, seed and settings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .store import file_stem, is_finite, load_tensors, numbered, save_tensors, shortened

WEIGHTS_SUFFIX = ".safetensors"
UNFINISHED = ".unfinished"  # the state of a training that was stopped, beside the place of its result
MADE = "made"  # the key of a file's metadata
CLOSE = 1e-4  # of numbers that outline a tensor: far above what devices differ by, far below what encoders do


class Training:
    """A network that learns step by step, and the weights that are `kept` of it: an average of it, or its best.

    made: what tells this training from every other one, in values of JSON: a digest of its data, its seed, its
    settings. A step may be an epoch; `losses` has one number for each that was taken. A subclass says in `learn` what
    a step is, and draws whatever is random from its seed and the number of the step: a continued training is the one
    that never stopped.
    """

    def __init__(self, network: nn.Module, made: Mapping[str, Any], steps: int, learning_rate: float):
        self.network, self.made, self.steps, self.learning_rate = network, made, steps, learning_rate
        self.kept = {name: value.detach().clone() for name, value in network.state_dict().items()}
        self.losses: list[float] = []
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)

    def learn(self) -> float:
        """Take one step, bring `kept` up to date, and say the loss."""
        raise NotImplementedError

    def set_rate(self, share: float) -> None:
        """Make the learning rate a share of the highest."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * share

    def run(self, state: Path, every: int = 1, writes: bool = True) -> Generator[int, None, None]:
        """Go on from the file `state`, if it is there, to the last step; yields the steps taken after each.

        The file is written every so many steps, at the end, and when the generator is closed in between: use
        contextlib.closing. writes: no file is written, for processes that share a training with another one. ValueError
        for the file of another training, for a damaged one, and when the loss is no number any more.
        """
        if state.exists():
            self.resume(state)
        saved, whole = self.step, True
        try:
            while self.step < self.steps:
                whole, loss = False, self.learn()
                if not math.isfinite(loss):
                    raise ValueError(
                        f"The loss is no number after step {self.step + 1}: the training does not converge. Lower "
                        "'learning_rate' and train under another 'name'."
                    )
                self.losses.append(loss)
                whole = True
                if writes and (self.step % every == 0 or self.step == self.steps):
                    self.save(state)
                    saved = self.step
                yield self.step
        finally:
            if writes and whole and saved < self.step:
                self.save(state)

    def result(self) -> nn.Module:
        """The network with the kept weights, for inference: its training ends here."""
        self.network.load_state_dict(self.kept)
        return self.network.train(False).requires_grad_(False)

    def save(self, path: Path) -> None:
        """Everything that `resume` needs, as safetensors; whole or not at all."""
        moments = {name: self.optimizer.state.get(p, {}) for name, p in self.network.named_parameters()}
        updates = max((int(moment["step"]) for moment in moments.values() if moment), default=0)
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64), "updates": torch.tensor(updates)}
        tensors |= {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"kept.{name}": value for name, value in self.kept.items()}
        for name, p in self.network.named_parameters():
            tensors[f"first.{name}"] = moments[name].get("exp_avg", torch.zeros_like(p))
            tensors[f"second.{name}"] = moments[name].get("exp_avg_sq", torch.zeros_like(p))
        save_tensors(path, tensors, {MADE: spelled(self.made)})

    def resume(self, path: Path) -> None:
        """Go on from a file of `save`. ValueError, and nothing is changed, for another training's and damaged ones."""
        try:
            tensors, facts = load_tensors(path)
            found = json.loads(facts[MADE])
            if not isinstance(found, dict):
                raise ValueError(f"{MADE} is no list of settings")
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path.name} holds no unfinished training ({shortened(error)}). Delete it to begin anew."
            ) from error
        if other := differences(found, self.made):
            raise ValueError(
                f"{path.name} is an unfinished training with {other}. Set that back to go on with it, choose another "
                f"'name', or delete {path} to begin anew."
            )
        if not self._fits(tensors):
            raise ValueError(f"{path.name} is damaged: its numbers do not fit the network. Delete it to begin anew.")
        self._restore(tensors)

    def _fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether tensors are the weights, moments and losses of this network, all of them numbers."""
        shapes = {f"{part}.{name}": v.shape for part in ("network", "kept") for name, v in self.kept.items()}
        for name, p in self.network.named_parameters():
            shapes |= {f"{part}.{name}": p.shape for part in ("first", "second")}
        losses, updates = tensors.get("losses"), tensors.get("updates")
        if losses is None or updates is None or losses.ndim != 1 or updates.shape != () or is_finite(updates):
            return False
        counted = len(losses) <= self.steps and len(losses) <= int(updates) < 1 << 53
        shapes |= {"losses": losses.shape, "updates": updates.shape}
        return (
            counted
            and {name: value.shape for name, value in tensors.items()} == shapes
            and all(is_finite(value) for name, value in tensors.items() if name != "updates")
        )

    @torch.no_grad()
    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.losses = tensors["losses"].tolist()
        for name, value in self.network.state_dict().items():
            value.copy_(tensors[f"network.{name}"])
            self.kept[name].copy_(tensors[f"kept.{name}"])
        for name, p in self.network.named_parameters():
            self.optimizer.state[p] = {
                "step": torch.tensor(float(tensors["updates"])),
                "exp_avg": tensors[f"first.{name}"].to(p, copy=True),
                "exp_avg_sq": tensors[f"second.{name}"].to(p, copy=True),
            }


# --- what a training is made of ---


def spelled(made: Mapping[str, Any]) -> str:
    """As text, for the metadata of a file."""
    return json.dumps(dict(made), sort_keys=True)


def differences(found: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """How what a file was made of differs from what it should be: "seed 0 (now 1), …"; "" where it does not."""
    now = json.loads(spelled(made))
    names = [name for name in sorted({*found, *now}) if not _alike(found.get(name), now.get(name))]
    return ", ".join(
        f"{shortened(name, 40)} {shortened(found.get(name), 60)} (now {shortened(now.get(name), 60)})"
        for name in names[:5]
    )


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return all(type(x) in (int, float) and abs(x - y) < CLOSE for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def digest(*parts: Tensor | str) -> str:
    """Names tensors and texts by all that is in them."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            content = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found.update(f"{part.dtype} {tuple(part.shape)} ".encode())
        else:
            content = part.encode("utf-8", "surrogatepass")
            found.update(f"text {len(content)} ".encode())
        found.update(content)
    return found.hexdigest()[:16]


def outline(values: Tensor) -> list[float]:
    """Names a tensor by the means of its eighths over its size, which hardly differ between devices."""
    flat = values.detach().double().cpu().flatten()
    size = float(flat.square().mean().sqrt()) or 1.0
    return [round(float(part.mean()) / size, 6) for part in flat.tensor_split(8) if len(part)]


# --- where its result goes ---


def find_place(folder: Path, name: str, made: Mapping[str, Any]) -> tuple[Path, bool]:
    """The first of name, name (2), … that is the finished file of this very training, True, or is not there, False.

    ValueError for a name that cannot be a file's, and for a folder in which nothing can be written.
    """
    check_writable(folder)
    for path in numbered(folder, file_stem(name.removesuffix(WEIGHTS_SUFFIX)), WEIGHTS_SUFFIX):
        if not path.exists():
            return path, False
        if not differences(_made_of(path), made):
            return path, True
    raise AssertionError


def keep_result(folder: Path, name: str, save: Callable[[Path], Any]) -> Path:
    """Save under the first of name, name (2), … that nobody has taken; `save` raises FileExistsError where one has."""
    for path in numbered(folder, file_stem(name.removesuffix(WEIGHTS_SUFFIX)), WEIGHTS_SUFFIX):
        with contextlib.suppress(FileExistsError):
            save(path)
            return path
    raise AssertionError


def check_writable(folder: Path) -> None:
    """ValueError now, and not after hours, where no file can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"Nothing can be written in {folder}: {error.strerror}. Allow it, then run again.") from error


def _made_of(path: Path) -> dict[str, Any]:
    """What a finished file was made of, from its header; nothing where it does not say."""
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})[MADE])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
