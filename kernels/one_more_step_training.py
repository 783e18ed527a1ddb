"""Train the network of One More Step: what is learnt after each step, and how to stop and go on."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .one_more_step import v_loss


class Training:
    """AdamW on `v_loss`, with a running average of the weights, `average`, which is the result.

    The learning rate rises over `warm_up` steps and falls to 0 over the last third of `steps`. Everything random is
    drawn from (seed, step), so that a run that is continued from its `state` equals one that never stopped.
    """

    def __init__(
        self, network: nn.Module, steps: int, learning_rate: float = 1e-4, warm_up: int = 100, seed: int = 0
    ):  # fmt: skip
        self.network, self.average = network, copy.deepcopy(network).requires_grad_(False)
        self.steps, self.learning_rate, self.warm_up, self.seed = steps, learning_rate, warm_up, seed
        self.step = 0
        self.losses: list[float] = []
        self._parameters = dict(network.named_parameters())
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=learning_rate, weight_decay=0.01)

    def generator(self) -> torch.Generator:
        """What the coming step may draw its batch from, on the CPU."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)

    def learn(self, x0: Tensor, cond: Tensor) -> float:
        """One step on clean latents [b c h w] and their conditions [b tokens width]; the loss."""
        noise = torch.randn(x0.shape, generator=self.generator()).to(x0)
        fall = min(1.0, 3 * (self.steps - self.step) / self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (self.step + 1) / self.warm_up) * fall
        loss = v_loss(self.network, x0, cond, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(0.999, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self._parameters.values()), 1 - decay)
        self.losses.append(loss.item())
        return self.losses[-1]

    def state(self) -> dict[str, Tensor]:
        """Everything a continued run needs, as named tensors."""
        found = {"step": torch.tensor(self.step), "losses": torch.tensor(self.losses)}
        average = dict(self.average.named_parameters())
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state[parameter]
            found[f"network.{name}"], found[f"average.{name}"] = parameter.detach(), average[name]
            found[f"first.{name}"], found[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        return found

    def go_on(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state` of a training of the same network; ValueError when it is of another one."""
        expected = {"step", "losses"} | {
            f"{part}.{name}" for part in ("network", "average", "first", "second") for name in self._parameters
        }
        if set(state) != expected or any(
            state[f"{part}.{name}"].shape != parameter.shape
            for part in ("network", "average", "first", "second")
            for name, parameter in self._parameters.items()
        ):
            raise ValueError(
                "The unfinished training is of a network of another size: finish it with the settings it was started "
                "with, or train under another name"
            )
        step, losses = state["step"], state["losses"]
        numbers = [value for name, value in state.items() if name != "step"]
        whole = step.shape == () and not step.is_floating_point() and losses.shape == (int(step),)
        if not whole or not all(n.is_floating_point() and bool(n.float().isfinite().all()) for n in numbers):
            raise ValueError("The unfinished training is damaged")
        if int(step) > self.steps:
            raise ValueError(f"The unfinished training is at step {int(step)} of only {self.steps}: set more steps")
        average = dict(self.average.named_parameters())
        self.step, self.losses = int(state["step"]), state["losses"].tolist()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[f"network.{name}"])
                average[name].copy_(state[f"average.{name}"])
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": state[f"first.{name}"].to(parameter, copy=True),
                    "exp_avg_sq": state[f"second.{name}"].to(parameter, copy=True),
                }
