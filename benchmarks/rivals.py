"""What others published to ask a network less often, each in its own form, as wrappers on a MODEL; for comparison only.

Spectrum, TaylorSeer and MagCache forecast or hold a network's last features, per condition. Here they do so with its
output, F = (x - D) / sigma, behind the guidance: their forecasts are sums with weights of the step alone, and so are
the guidance and the head but for what the head knows of the noise level. DBCache stands in for a transformer's blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEY = "attune.rival"
DEGREE, RIDGE, CAPTURES = 4, 0.1, 10  # of Spectrum


@dataclass(frozen=True)
class Rival:
    """name: of RIVALS. numbers: its settings, in the order of the function's arguments behind the run's facts."""

    name: str
    numbers: tuple = ()


@dataclass
class Known:
    """What a run has asked: (step, F) of each asked step; sigmas of the run; facts: measured beforehand."""

    sigmas: Sequence[float]
    asked: list[tuple[int, Tensor]]
    states: list[Tensor]
    memory: dict


Decide = Callable[[int, Tensor, Known], Tensor | None]  # step, state -> F in the answer's place, None to ask


# --- Spectrum (CVPR 2026): Chebyshev polynomials over the whole run, mixed with the line through the last answers ---


def spectrum(alpha: float, mix: float) -> Decide:
    """alpha: by how much the window between asked steps grows; mix: 1 is the polynomial alone."""

    def decide(step: int, x: Tensor, known: Known) -> Tensor | None:
        window = known.memory.setdefault("window", 2.0)
        if len(known.asked) < 3 or step - known.asked[-1][0] >= math.floor(window):
            if len(known.asked) >= 3:
                known.memory["window"] = window + alpha
            return None
        steps = len(known.sigmas) - 1
        past = known.asked[-CAPTURES:]
        times = torch.tensor([*(i for i, _ in past), step], dtype=torch.float64)
        angles = torch.acos((2 * times / (steps - 1) - 1).clamp(-1, 1))
        basis = torch.cos(angles[:, None] * torch.arange(DEGREE + 1))
        left = basis[:-1].T @ basis[:-1] + RIDGE * torch.eye(DEGREE + 1, dtype=torch.float64)
        weights = basis[-1] @ torch.linalg.solve(left, basis[:-1].T)
        curve = sum(float(w) * f for w, (_, f) in zip(weights, past, strict=True))
        return mix * curve + (1 - mix) * taylor_at(step, past, 1)

    return decide


# --- TaylorSeer (2503.06923): finite differences over the last asked steps ---


def taylor_at(step: int, past: Sequence[tuple[int, Tensor]], order: int) -> Tensor:
    """Newton's form through the last order + 1 answers."""
    points = [*reversed(past[-order - 1 :])]
    total, product, column = points[0][1].clone(), 1.0, [f for _, f in points]
    for depth in range(1, len(points)):
        gaps = [points[i][0] - points[i + depth][0] for i in range(len(points) - depth)]
        column = [(column[i] - column[i + 1]) / gap for i, gap in enumerate(gaps)]
        product *= step - points[depth - 1][0]
        total += product * column[0]
    return total


def taylorseer(interval: int, order: int) -> Decide:
    def decide(step: int, x: Tensor, known: Known) -> Tensor | None:
        if len(known.asked) < order + 2 or step - known.asked[-1][0] >= interval:
            return None
        return taylor_at(step, known.asked, order)

    return decide


# --- FSampler: a predictor of second or third order, every n-th step in its place ---


def fsampler(order: int, every: int) -> Decide:
    """After `every` asked steps one is extrapolated as if the steps were alike: 2 e1 - e2, or 3 e1 - 3 e2 + e3."""

    def decide(step: int, x: Tensor, known: Known) -> Tensor | None:
        end = len(known.sigmas) - 2
        run = known.memory.get("since", 0)
        if len(known.asked) < max(order, 4) or run < every or step == end:
            known.memory["since"] = run + 1
            return None
        known.memory["since"] = 0
        one, two, *rest = (f for _, f in reversed(known.asked[-3:]))
        return 2 * one - two if order == 2 else 3 * one - 3 * two + rest[0]

    return decide


# --- MagCache (2506.09045): the answer is held while its magnitude, measured once per model, changes little ---


def magcache(ratios: Sequence[float], most_error: float, most_skipped: int, kept: float = 0.2) -> Decide:
    """ratios: |F_j| / |F_j-1| of a run on another prompt; kept: share of the steps at the start that are asked."""

    def decide(step: int, x: Tensor, known: Known) -> Tensor | None:
        m = known.memory
        if step < kept * (len(known.sigmas) - 1) or not known.asked:
            m["product"], m["error"], m["skipped"] = 1.0, 0.0, 0
            return None
        m["product"] *= ratios[step]
        m["error"] += abs(1 - m["product"])
        m["skipped"] += 1
        if m["error"] < most_error and m["skipped"] <= most_skipped:
            return known.asked[-1][1]
        m["product"], m["error"], m["skipped"] = 1.0, 0.0, 0
        return None

    return decide


# --- SeaCache (2602.18993): the distance of states through a filter of the signal's spectrum decides ---


def sea_filtered(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """Wiener's gain a S / (a^2 S + b^2) of a spectrum S = f^-2, of mean 1."""
    fy, fx = torch.fft.fftfreq(x.shape[-2]), torch.fft.rfftfreq(x.shape[-1])
    alpha = max(alpha, 1e-3)
    power = 1 / (fy[:, None] ** 2 + fx[None] ** 2).clamp(min=(1 / x.shape[-1]) ** 2)
    gain = alpha * power / (alpha**2 * power + sigma**2)
    return torch.fft.irfft2(torch.fft.rfft2(x.float()) * (gain / gain.mean()).to(x.device), s=x.shape[-2:])


def seacache(delta: float, flow: bool) -> Decide:
    """The last answer is held until the summed relative changes of the filtered state pass delta."""

    def decide(step: int, x: Tensor, known: Known) -> Tensor | None:
        sigma = known.sigmas[step]
        scale = 1.0 if flow else 1 / math.sqrt(1 + sigma**2)
        seen = sea_filtered(x * scale, 1 - sigma if flow else scale, sigma if flow else sigma * scale)
        before, known.memory["seen"] = known.memory.get("seen"), seen
        if before is None:
            return None
        known.memory["sum"] = known.memory.get("sum", 0.0) + float((seen - before).abs().mean() / before.abs().mean())
        if known.memory["sum"] < delta and step < len(known.sigmas) - 2:
            return known.asked[-1][1]
        known.memory["sum"] = 0.0
        return None

    return decide


# --- DBCache of Cache-DiT, as F1B0: the first block decides whether what the others added last time is added again ---


class DBCache:
    """Of one run of a transformer, whose blocks the host offers to patches. asked: the steps whose blocks all ran.

    Of the last such step it keeps what the first block added to the picture's tokens, and what the others added to
    both streams. Where the former has changed by less than `threshold`, of means of absolute values over all that is
    evaluated at once, the latter is added again. Of the steps at the start, `warmup` always run.
    """

    def __init__(self, threshold: float, warmup: int = 8):
        self._threshold, self._warmup = threshold, warmup
        self.step, self.asked = -1, list[int]()
        self._first: Tensor | None = None
        self._entered: dict[str, Tensor] = {}
        self._added: dict[str, Tensor] = {}

    def patches(self, blocks: int) -> list[Callable]:
        """For each of so many blocks, in order."""
        return [self._decide, *[self._passed] * (blocks - 2), self._last]

    def _decide(self, args: dict, extra: dict) -> dict:
        out = extra["original_block"](args)
        self.step, first = self.step + 1, out["img"] - args["img"]
        if self._holds(first):
            return out
        self.asked.append(self.step)
        self._first, self._entered = first, {name: out[name].clone() for name in ("img", "txt")}
        return out

    def _holds(self, first: Tensor) -> bool:
        if self._first is None or self.step < self._warmup:
            return False
        return float((self._first - first).abs().mean() / self._first.abs().mean()) < self._threshold

    def _passed(self, args: dict, extra: dict) -> dict:
        if self.asked[-1] == self.step:
            return extra["original_block"](args)
        return {name: args[name] for name in ("img", "txt")}

    def _last(self, args: dict, extra: dict) -> dict:
        if self.asked[-1] != self.step:
            return {"txt": None} | {name: args[name] + added for name, added in self._added.items()}
        out = extra["original_block"](args)  # of SD3's last block the prompt does not come out
        self._added = {name: one - self._entered[name] for name, one in out.items() if one is not None}
        return out


RIVALS: dict[str, Callable[..., Decide]] = {
    "Spectrum": spectrum, "TaylorSeer": taylorseer, "FSampler": fsampler, "MagCache": magcache, "SeaCache": seacache,
}  # fmt: skip


def with_rival(model, rival: Rival, sigmas: Sequence[float]):
    """A clone of a MODEL for one run over `sigmas`, of a solver that asks once a step."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    if rival.name == "Adaptive Guidance":
        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _cosine(*rival.numbers))
        return clone
    if rival.name == "DBCache":
        blocks = len(clone.model.diffusion_model.joint_blocks)
        for i, patch in enumerate(DBCache(*rival.numbers).patches(blocks)):
            clone.set_model_patch_replace(patch, "dit", "double_block", i)
        return clone
    decide, known, at = RIVALS[rival.name](*rival.numbers), Known(sigmas, [], [], {}), [0]

    def predict(executor, x, sigma, *args, **kwargs):
        step, level = at[0], float(sigma[0])
        at[0] += 1
        slope = decide(step, x, known)
        if slope is not None:
            return x - level * slope
        answer = executor(x, sigma, *args, **kwargs)
        known.asked.append((step, (x - answer) / level))
        return answer

    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict)
    return clone


def _cosine(gamma: float) -> Callable:
    """Adaptive Guidance (2312.12487): once both answers point the same way the negative is asked no more."""
    stopped: list[bool] = []

    def ask(executor, model, conds, x, sigma, *args, **kwargs):
        if stopped and len(conds) == 2:
            positive = executor(model, [conds[0], None], x, sigma, *args, **kwargs)[0]
            return [positive, positive]
        positive, negative = executor(model, conds, x, sigma, *args, **kwargs)
        a, b = ((x - one).flatten(1).float() for one in (positive, negative))
        if float(torch.cosine_similarity(a, b).mean()) > gamma:
            stopped.append(True)
        return [positive, negative]

    return ask
