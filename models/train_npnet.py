"""Train an NPNet on collected pairs: one shard in memory, each sample with its own prompt, the best epoch kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise_pairs import Shard, held_out, load_shard, rows
from .npnet import NPNet, NPNetConfig, prompt_texts
from .training import Training, differences, digest

NPNET_SIZES = {  # of the Swin branch: width, blocks and heads per stage; the last SVD layer; the learning rate it likes
    "published": (96, (2, 2, 6, 2), (3, 6, 12, 24), 1024, 1e-4),
    "small": (16, (2,), (2,), 128, 3e-3),
}


@dataclass(frozen=True)
class Recipe:
    """learning_rate: AdamW's highest, falling to 0 as a cosine; 0 for the size's own. text_mode: "auto" or one of
    NPNetConfig."""

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 0.0
    seed: int = 0
    size: str = "published"
    text_mode: str = "auto"

    @property
    def rate(self) -> float:
        return self.learning_rate or NPNET_SIZES[self.size][-1]


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


@dataclass(frozen=True)
class Pairs:
    """Shards that belong together, looked through once.

    held: the prompts that are kept from training. error: mean square of golden noise less noise over their pairs, what
    a network that changes nothing would have. digest: names all that is in the shards.
    """

    paths: tuple[Path, ...]
    facts: dict[str, Any]
    count: int
    held: frozenset[str]
    error: float
    digest: str

    @classmethod
    def scan(cls, paths: list[Path]) -> Pairs:
        """ValueError for shards of different kinds, for too few prompts, and where there is nothing to learn."""
        first, names, squares = load_shard(paths[0]), [], dict[str, Tensor]()
        for path in paths:
            shard = load_shard(path)
            if other := differences(shard.facts, first.facts) or _other_shapes(shard, first):
                raise ValueError(
                    f"{path.name} and {paths[0].name} are not of one kind: {other}. Move one of them away "
                    f"from {path.parent}."
                )
            tensors = (shard.noise, shard.golden, shard.which, shard.tokens, shard.pooled)
            jobs = "\n".join(f"{job.seed} {job.prompt}" for job in shard.jobs)
            names.append(digest(jobs, *(tensor for tensor in tensors if tensor is not None)))
            errors = (shard.golden - shard.noise).double().square().mean((1, 2, 3))
            for job, error in zip(shard.jobs, errors, strict=True):
                squares[job.prompt] = squares.get(job.prompt, errors.new_zeros(2)) + torch.stack(
                    [error, error.new_ones(())]
                )
        held = held_out(squares)
        total, count = torch.stack([squares[prompt] for prompt in held]).sum(0).tolist()
        if not total > 0:
            raise ValueError("Golden noise and noise are the same in these pairs: there is nothing to learn.")
        pairs = int(sum(float(square[1]) for square in squares.values()))
        return cls(tuple(paths), dict(first.facts), pairs, held, total / count, digest(*names))


def _other_shapes(shard: Shard, first: Shard) -> str:
    sizes = [
        [list(one.noise.shape[1:]), list(one.tokens.shape[1:]), None if one.pooled is None else one.pooled.shape[1]]
        for one in (shard, first)
    ]
    return "" if sizes[0] == sizes[1] else f"latents, tokens and pooled vectors of {sizes[0]} and {sizes[1]}"


def config_for(shard: Shard, recipe: Recipe) -> NPNetConfig:
    """A network for the latents and prompts of a shard. Singular vectors get canonical signs: the same everywhere.

    ValueError for latents that are not square, and for prompts without what `text_mode` reads.
    """
    _, channels, h, w = shard.noise.shape
    if h != w:
        raise ValueError(f"An NPNet needs square latents, but the pairs are {h} x {w}. Collect pairs of square ones.")
    tokens, width = shard.tokens.shape[1:]
    text = recipe.text_mode
    if text == "auto":
        text = "flat" if tokens <= 77 else "pooled" if shard.pooled is not None else "mean"
    if text == "pooled":
        if shard.pooled is None:
            raise ValueError("The pairs hold no pooled embeddings. Set text_mode to 'flat' or 'mean'.")
        width = shard.pooled.shape[1]
    swin_width, depths, heads, hidden, _ = NPNET_SIZES[recipe.size]
    return NPNetConfig(
        channels=channels, side=h, text=text, tokens=tokens, width=width, signs="canonical",  # type: ignore[arg-type]
        swin_width=swin_width, swin_depths=depths, swin_heads=heads, hidden=hidden,
    )  # fmt: skip


def identity_npnet(config: NPNetConfig, seed: int) -> NPNet:
    """A network that returns its noise: training starts from no change, not from a random one."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would move the GPU's random numbers, too
        net = NPNet(config)
        for table in (p for name, p in net.named_parameters() if name.endswith("relative_position_bias_table")):
            torch.nn.init.trunc_normal_(table, std=0.02)
    for parameter in net.unet_svd.mlp4[2].parameters():
        torch.nn.init.zeros_(parameter)
    return net


class NPNetTraining(Training):
    """A step is an epoch, its loss the mean square error on the held-out prompts; the best epoch is kept.

    Processes that share a training see the same batches, each computes its rows, and all take the same steps. pause is
    called between batches, and may raise to stop.
    """

    network: NPNet

    def __init__(
        self, pairs: Pairs, recipe: Recipe, device: torch.device | None = None, share: Share = ALONE,
        pause: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.pairs, self.recipe, self.share, self.pause = pairs, recipe, share, pause
        self.device = device or torch.device("cpu")
        net = identity_npnet(config_for(load_shard(pairs.paths[0]), recipe), recipe.seed).to(self.device)
        made = {**asdict(recipe), "learning_rate": recipe.rate, "pairs": pairs.digest}
        super().__init__(net, made, recipe.epochs, recipe.rate)

    @property
    def best_epoch(self) -> int:
        """0 for the network that changes nothing."""
        errors = [self.pairs.error, *self.losses]
        return errors.index(min(errors))

    @property
    def best_error(self) -> float:
        return min([self.pairs.error, *self.losses])

    @property
    def explained(self) -> float:
        """The part of the held-out golden noise that the kept network predicts: 0 for the plain noise, 1 for all."""
        return 1 - self.best_error / self.pairs.error

    def result(self) -> NPNet:
        super().result()
        return self.network

    def learn(self) -> float:
        self._train()
        error = self._measure()
        if error < self.best_error:
            self.kept = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        return error

    def _train(self) -> None:
        self.network.train()
        generator = torch.Generator().manual_seed((self.recipe.seed + 1 + self.step) % 2**64)
        order = torch.randperm(len(self.pairs.paths), generator=generator).tolist()
        for n, i in enumerate(order):
            shard = load_shard(self.pairs.paths[i])
            self.set_rate(0.5 * (1 + math.cos(math.pi * (self.step + n / len(order)) / self.steps)))
            train = rows(shard, self.pairs.held, validation=False)
            for batch in self._batches(train[torch.randperm(len(train), generator=generator)]):
                self._update(shard, batch)

    def _update(self, shard: Shard, batch: Tensor) -> None:
        """One step of the optimiser with the gradient of the whole batch."""
        self.optimizer.zero_grad(set_to_none=True)
        own = self.share.of(batch)
        if len(own):
            loss = F.mse_loss(self._golden(shard, own), shard.golden[own].to(self.device))
            (loss * (len(own) / len(batch))).backward()
        if self.share.count > 1:
            parameters = [p for p in self.network.parameters() if p.requires_grad]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            whole = self.share.total(torch.cat([grad.flatten() for grad in grads]))
            for p, grad in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
                p.grad = grad.view_as(p)
        self.optimizer.step()

    def _golden(self, shard: Shard, batch: Tensor) -> Tensor:
        which = shard.which[batch]
        pooled = None if shard.pooled is None else shard.pooled[which]
        (text,) = prompt_texts(self.network.config, shard.tokens[which], pooled, "first part")
        return self.network(shard.noise[batch].to(self.device), text.to(self.device))

    @torch.no_grad()
    def _measure(self) -> float:
        """The mean square error on the held-out prompts."""
        self.network.train(False)
        found = torch.zeros(2, dtype=torch.float64)
        for path in self.pairs.paths:
            shard = load_shard(path)
            for batch in self._batches(self.share.of(rows(shard, self.pairs.held, validation=True))):
                target = shard.golden[batch].to(self.device)
                found[0] += float(F.mse_loss(self._golden(shard, batch), target)) * len(batch)
                found[1] += len(batch)
        if self.share.count > 1:
            found = self.share.total(found.to(self.device))
        error, count = found.tolist()
        return error / count

    def _batches(self, of: Tensor) -> Iterator[Tensor]:
        """Rows in parts of the batch size, with a pause before each."""
        for batch in of.split(self.recipe.batch_size) if len(of) else ():
            self.pause()
            yield batch

    def report(self) -> dict[str, Any]:
        """The best epoch's numbers, for the file and for people; ValueError if the network is of no use."""
        if self.explained <= 0:
            raise ValueError(
                "No epoch explains any of the golden noise of unseen prompts: the network would only do harm, and is "
                "not saved. Collect more pairs and prompts, or train longer, under another 'name'."
            )
        return {
            "pairs": self.pairs.count, "epochs": self.step, "best_epoch": self.best_epoch,
            "val_explained": f"{self.explained:.4f}", "val_error": f"{self.best_error:.6f}",
            "val_error_identity": f"{self.pairs.error:.6f}",
        }  # fmt: skip
