"""A short training: AdamW, a warm-up and a fall of the rate, averaged weights, a checkpoint to go on from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import DEVICE, load_checkpoint, save_checkpoint
from torch import Tensor, nn


class Finetuning:
    """`module`, on its device, as its checkpoint left it. draws: the generator of all random numbers of a training."""

    def __init__(self, module: nn.Module, path: Path, draws: torch.Generator, lr: float):
        self.module, self.path, self.draws, self.lr = module.to(DEVICE), path, draws, lr
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.log = 0, []
        if path.exists():
            state = load_checkpoint(path)
            module.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            draws.set_state(state["generator"])
            self.average, self.step, self.log = state["average"], state["step"], state["log"]

    def save(self) -> None:
        save_checkpoint(
            self.path, net=self.module.state_dict(), average=self.average, optimizer=self.optimizer.state_dict(),
            generator=self.draws.get_state(), step=self.step, log=self.log,
        )  # fmt: skip

    def go(
        self, feed: Iterator[tuple], loss_of: Callable[..., Tensor], steps: int, minutes: float,
        warm_up: int, longest: float, every: int,
    ) -> None:  # fmt: skip
        """Until `steps` are done or `minutes` over. longest: the share of itself that the average keeps in a step, at
        most. every: after how many steps the loss is said and the state kept."""
        began, losses = time.monotonic(), []
        while self.step < steps and time.monotonic() - began < 60 * minutes:
            fall = min(1.0, (steps - self.step) / (0.25 * steps))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, (self.step + 1) / warm_up) * fall
            loss = loss_of(*next(feed))
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            decay = min(longest, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.average.values()), list(self.module.state_dict().values()), 1 - decay)
            losses.append(loss.item())
            if self.step % every == 0 or self.step == steps:
                self.log.append({"step": self.step, "loss": round(sum(losses[-every:]) / len(losses[-every:]), 4)})
                print(json.dumps(self.log[-1]), f"{time.monotonic() - began:.0f} s", flush=True)
                self.save()
        self.save()
