"""Train an NPNet on collected pairs: one shard in memory, each sample with its own prompt, the best epoch kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise_pairs import Shard, load_shard, rows
from .npnet import NPNet, NPNetConfig, prompt_texts
from .store import is_finite, load_tensors, save_tensors

SIZES = {  # of the Swin branch: width, blocks and heads per stage; and the last SVD layer
    "published": (96, (2, 2, 6, 2), (3, 6, 12, 24), 1024),
    "small": (16, (2,), (2,), 128),
}


@dataclass(frozen=True)
class Recipe:
    """epochs and batch; lr: AdamW's highest, falling to 0 as a cosine; text: "auto" or a mode of NPNetConfig."""

    epochs: int = 30
    batch: int = 64
    lr: float = 1e-4
    seed: int = 0
    size: str = "published"
    text: str = "auto"


@dataclass(frozen=True)
class Share:
    """The part of one process, the `rank`-th of `count`, in a training that several share.

    total: the sum of a tensor over all processes, the same in each; what `accelerate` calls reduce.
    """

    rank: int = 0
    count: int = 1
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def of(self, batch: Tensor) -> Tensor:
        return batch[self.rank :: self.count]


ALONE = Share()


@dataclass
class Epoch:
    """After `number` epochs: the mean squared errors on held-out prompts, of the network and of the noise as it is."""

    number: int
    error: float
    error_identity: float
    best: bool

    @property
    def explained(self) -> float:
        """The part of the target that the network predicts: 0 for the plain noise, 1 for all."""
        return 1 - self.error / self.error_identity


def config_for(shard: Shard, recipe: Recipe) -> NPNetConfig:
    """A network for the latents and prompts of a shard. Singular vectors get canonical signs: the same everywhere."""
    _, channels, h, w = shard.noise.shape
    if h != w:
        raise ValueError(f"An NPNet is square, but the pairs are {h} x {w} latents. Collect square ones.")
    tokens, width = shard.tokens.shape[1:]
    text = recipe.text
    if text == "auto":
        text = "flat" if tokens <= 77 else "pooled" if shard.pooled is not None else "mean"
    if text == "pooled":
        if shard.pooled is None:
            raise ValueError("The pairs hold no pooled embeddings. Set text_mode to 'flat' or 'mean'.")
        width = shard.pooled.shape[1]
    swin_width, depths, heads, hidden = SIZES[recipe.size]
    return NPNetConfig(
        channels=channels, side=h, text=text, tokens=tokens, width=width, signs="canonical",  # type: ignore[arg-type]
        swin_width=swin_width, swin_depths=depths, swin_heads=heads, hidden=hidden,
    )  # fmt: skip


def identity_npnet(config: NPNetConfig, seed: int) -> NPNet:
    """A network that returns its noise: training starts from no change, not from a random one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = NPNet(config)
        for table in (p for name, p in net.named_parameters() if name.endswith("relative_position_bias_table")):
            torch.nn.init.trunc_normal_(table, std=0.02)
    for parameter in net.unet_svd.mlp4[2].parameters():
        torch.nn.init.zeros_(parameter)
    return net


class Trainer:
    """The state of a training: network, optimiser, best weights. Resumed from a file it continues bit for bit.

    Processes that share a training see the same batches, each computes its rows, and all take the same steps.
    """

    def __init__(self, paths: list[Path], recipe: Recipe, device: torch.device | None = None, share: Share = ALONE):
        self.paths, self.recipe, self.device, self.share = paths, recipe, device or torch.device("cpu"), share
        first = load_shard(paths[0])
        self.net = identity_npnet(config_for(first, recipe), recipe.seed).to(self.device)
        self.facts = dict(first.facts)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=recipe.lr)
        self.best = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        self.epoch, self.best_epoch, self.best_error, self.pairs = 0, 0, float("inf"), 0

    def run(self) -> Iterator[Epoch]:
        """Yields the network as it is, untouched as epoch 0 or resumed, then every epoch."""
        yield self._measure()
        while self.epoch < self.recipe.epochs:
            self._train()
            self.epoch += 1
            yield self._measure()

    def result(self) -> NPNet:
        """The network of the best epoch, for inference."""
        net = NPNet(self.net.config)
        net.load_state_dict(self.best)
        return net.to(self.device).eval().requires_grad_(False)

    def _train(self) -> None:
        self.net.train()
        generator = torch.Generator().manual_seed(self.recipe.seed + 1 + self.epoch)
        order = torch.randperm(len(self.paths), generator=generator).tolist()
        for n, i in enumerate(order):
            shard = load_shard(self.paths[i])
            self._set_lr(self.epoch + n / len(order))
            train = rows(shard, validation=False)
            for batch in _batches(train[torch.randperm(len(train), generator=generator)], self.recipe.batch):
                self._step(shard, batch)

    def _step(self, shard: Shard, batch: Tensor) -> None:
        """One step of the optimiser with the gradient of the whole batch."""
        self.optimizer.zero_grad(set_to_none=True)
        own = self.share.of(batch)
        if len(own):
            loss = F.mse_loss(self._golden(shard, own), shard.golden[own].to(self.device))
            (loss * (len(own) / len(batch))).backward()
        if self.share.count > 1:
            parameters = [p for p in self.net.parameters() if p.requires_grad]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            whole = self.share.total(torch.cat([grad.flatten() for grad in grads]))
            for p, grad in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
                p.grad = grad.view_as(p)
        self.optimizer.step()

    def _set_lr(self, epoch: float) -> None:
        share = torch.tensor(torch.pi * epoch / self.recipe.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * 0.5 * (1 + float(share.cos()))

    def _golden(self, shard: Shard, batch: Tensor) -> Tensor:
        which = shard.which[batch]
        pooled = None if shard.pooled is None else shard.pooled[which]
        (text,) = prompt_texts(self.net.config, shard.tokens[which], pooled, "first part")
        return self.net(shard.noise[batch].to(self.device), text.to(self.device))

    @torch.no_grad()
    def _measure(self) -> Epoch:
        self.net.eval()
        errors, count, self.pairs = torch.zeros(2, dtype=torch.float64), 0, 0
        for path in self.paths:
            shard = load_shard(path)
            held_out = rows(shard, validation=True)
            self.pairs += len(shard.jobs)
            count += len(held_out)
            for batch in _batches(self.share.of(held_out), self.recipe.batch):
                target = shard.golden[batch].to(self.device)
                errors[0] += float(F.mse_loss(self._golden(shard, batch), target)) * len(batch)
                errors[1] += float(F.mse_loss(shard.noise[batch].to(self.device), target)) * len(batch)
        error, identity = self.share.total(errors.to(self.device)).tolist()
        if not 0 < count < self.pairs:
            raise ValueError(
                f"The pairs have too few different prompts ({self.pairs} pairs, {count} of them held out): a tenth of "
                "the prompts is kept from training. Collect pairs for 20 prompts or more."
            )
        if not identity > 0:
            raise ValueError("Golden noise and noise are the same in these pairs: there is nothing to learn.")
        best = error / count < self.best_error
        if best:
            self.best_error, self.best_epoch = error / count, self.epoch
            self.best = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        return Epoch(self.epoch, error / count, identity / count, best)

    def save(self, path: Path) -> None:
        """Everything that `resume` needs, as safetensors; whole or not at all."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
        metadata = {
            "epoch": str(self.epoch), "best_epoch": str(self.best_epoch), "best_error": self.best_error.hex(),
            "made": self._made(),
        }  # fmt: skip
        save_tensors(path, tensors, metadata)

    def resume(self, path: Path) -> bool:
        """Continue from `path` if it is the state of this very training, whole; else start anew."""
        try:
            tensors, facts = load_tensors(path)
            epoch, best_epoch = int(facts["epoch"]), int(facts["best_epoch"])
            best_error = float.fromhex(facts["best_error"])
        except (ValueError, KeyError, OverflowError):
            return False
        counted = 0 <= best_epoch <= epoch <= self.recipe.epochs and 0 <= best_error < math.inf
        if facts.get("made") != self._made() or not counted or not self._fits(tensors, epoch):
            return False
        parts: dict[str, dict[str, Any]] = {"net": {}, "best": {}, "adam": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.net.load_state_dict(parts["net"])
        self.best = {name: value.to(self.device) for name, value in parts["best"].items()}
        adam: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["adam"].items():
            i, _, key = name.partition(".")
            adam.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({"state": adam, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.epoch, self.best_epoch, self.best_error = epoch, best_epoch, best_error
        return True

    def _fits(self, tensors: dict[str, Tensor], epoch: int) -> bool:
        """Whether tensors are the weights and, after an epoch, the moments of this network, all of them numbers."""
        shapes = {f"{part}.{name}": v.shape for part in ("net", "best") for name, v in self.net.state_dict().items()}
        for i, weight in enumerate(self.net.parameters() if epoch else ()):
            shapes |= {f"adam.{i}.step": torch.Size(), f"adam.{i}.exp_avg": weight.shape}
            shapes |= {f"adam.{i}.exp_avg_sq": weight.shape}
        return {name: value.shape for name, value in tensors.items()} == shapes and all(
            map(is_finite, tensors.values())
        )

    def _made(self) -> str:
        """What a training is, for `resume`."""
        return json.dumps([asdict(self.recipe), [path.name for path in self.paths], self.facts], sort_keys=True)


def _batches(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    return rows.split(size) if len(rows) else ()


def report(trainer: Trainer, last: Epoch) -> dict[str, Any]:
    """The best epoch's numbers, for the file's metadata and for people; ValueError if the network is of no use."""
    explained = 1 - trainer.best_error / last.error_identity
    if explained <= 0:
        raise ValueError(
            f"The network explains {100 * explained:.1f} % of the golden noise of unseen prompts: it would only do "
            "harm, and is not saved. Collect more pairs and prompts, or train longer."
        )
    return {
        "pairs": trainer.pairs, "epochs": last.number, "best_epoch": trainer.best_epoch,
        "val_explained": f"{explained:.4f}", "val_error": f"{trainer.best_error:.6f}",
        "val_error_identity": f"{last.error_identity:.6f}",
    }  # fmt: skip
