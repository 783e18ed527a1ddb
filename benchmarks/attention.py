"""Which steps tolerate a coarser attention, and does a fit find them?

python dev.py bench attention [--models unet flow] [--steps 10] [--tasks 8]

Where no faster attention runs, as on a CPU, a coarse one is registered with the host as a pack would register it: every
second key and value alone. On one picture the cost of every stretch of steps is measured; then a quarter, half and
three quarters of the steps use the coarse one: the cheapest stretch, the first and the last, in dB of the final latents
to the exact run on other pictures. Then Attune Fit Attention on one prompt and on four, and what its levels give on
prompts that it did not see: the mean, the least, and how many keep what was wanted. Writes docs/results/attention.json
and docs/results.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import _pack  # noqa: F401
from comfy_process import Host
from harness import CACHE, WEIGHTS, Cell, Lab, Task, prompt, tasks
from pack.kernels.attention import best_windows
from pack.kernels.fitted_sampler import fidelity
from pack.kernels.propagation import step_weights
from pack.kernels.space import NoiseSpace
from results import DOCS, Table, markdown, record

COARSE = "attune_every_second_key"
SOLVER, SCHEDULER, CFG = "euler", "normal", 3.0
SHARES = (0.25, 0.5, 0.75)
WANTED = (45.0, 35.0)
FITTED = [Task(100, 3, 987654321), Task(17, 0, 1), Task(58, 5, 2), Task(81, 1, 3)]  # no tasks that are drawn


def every_second_key(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
    """Half of the keys, [b n c] or [b heads n c]; prompts and pictures alike."""
    from comfy.ldm.modules.attention import attention_basic

    thin = (slice(None), slice(None), slice(None, None, 2)) if skip_reshape else (slice(None), slice(None, None, 2))
    return attention_basic(q, k[thin], v[thin], heads, skip_reshape=skip_reshape, _inside_attn_wrapper=True)


class Bench:
    """One demo model with the levels of its run."""

    def __init__(self, host: Host, lab: Lab, name: str, steps: int, work: list[Task]):
        self.host, self.lab, self.name, self.work = host, lab, name, work
        self.sigmas = lab.sigmas(name, SCHEDULER, steps)
        self.steps, self.exact = steps, self.drawn(())

    def drawn(self, nodes: tuple) -> Tensor:
        return self.lab._draw(Cell(self.name, SOLVER, self.sigmas, CFG, nodes), self.work).latents

    def fast(self, start: int, count: int) -> float:
        """dB where `count` steps from `start` on are coarse."""
        levels = (("highest_sigma", self.sigmas[start]), ("lowest_sigma", self.sigmas[start + count - 1]))
        return statistics.fmean(self.each(levels))

    def each(self, levels: tuple) -> list[float]:
        """dB of each picture."""
        drawn = self.drawn((("AttuneAttentionBySigma", (("kernel", COARSE), *levels)),))
        return [fidelity(one[None], exact[None]) for one, exact in zip(drawn, self.exact, strict=True)]

    def fit(self, wanted: float, prompts: int) -> list[str | float | None]:
        """How many steps the node finds at `wanted` dB, what it says of them, and what they give on other prompts."""
        channels = self.lab.models[self.name].get_model_object("latent_format").latent_channels
        names = ["positive", "positive_2", "positive_3", "positive_4"][:prompts]
        given = {
            name: self.lab.conditioning([prompt(one.obj, one.background)])
            for name, one in zip(names, FITTED, strict=False)
        }
        profile, *_ = self.host.call(
            "AttuneFitAttention", model=self.lab.models[self.name], kernel=COARSE, wanted=wanted, steps=self.steps,
            cfg=CFG, seed=FITTED[0].seed, negative=self.lab.conditioning([""]),
            latent_image={"samples": torch.zeros(1, channels, 16, 16)}, **given,
        )  # fmt: skip
        if getattr(profile, "key_steps", None) is None:
            return [wanted, prompts, f"0 of {self.steps}", None, None, None, None]
        (point,) = profile.key_steps.points
        fast = [i for i in range(self.steps) if i not in point.keys]
        levels = (("highest_sigma", self.sigmas[fast[0]]), ("lowest_sigma", self.sigmas[fast[-1]]))
        others, found = self.each(levels), f"{len(fast)} of {self.steps}, from step {fast[0]}"
        keep = f"{sum(one >= wanted for one in others)} of {len(others)}"
        return [wanted, prompts, found, point.psnr, statistics.fmean(others), min(others), keep]

    def windows(self) -> list[tuple[float, int]]:
        """The best stretch of each length, by the errors that the fit measures on its picture."""
        module = self.host.module("nodes._host.attention")
        model = self.lab.models[self.name]
        run = lambda patched: self._of_fitted(patched)
        _, errors = module.errors_of(model, run, COARSE, torch.tensor(self.sigmas))
        weights = step_weights(self.sigmas, NoiseSpace("flow" if self.name == "flow" else "ve"))
        return best_windows([error * abs(weight) for error, weight in zip(errors, weights, strict=True)])

    def _of_fitted(self, patched) -> Tensor:
        kept, self.lab.models[self.name] = self.lab.models[self.name], patched
        try:
            return self.lab._draw(Cell(self.name, SOLVER, self.sigmas, CFG), FITTED[:1]).latents
        finally:
            self.lab.models[self.name] = kept


def measure(host: Host, lab: Lab, names: list[str], steps: int, work: list[Task], say: Callable) -> list[Table]:
    tables = []
    for name in names:
        bench = Bench(host, lab, name, steps, work)
        windows, rows = bench.windows(), []
        for share in SHARES:
            count = round(share * steps)
            places = {"cheapest": windows[count - 1][1], "first": 1, "last": steps - count}
            found = {label: bench.fast(start, count) for label, start in places.items()}
            rows.append([f"{count} of {steps}", f"from step {places['cheapest']}", *found.values()])
            say(f"{name}, {rows[-1]}")
        rows.append([f"{steps} of {steps}", "all", *3 * [bench.fast(0, steps)]])
        columns = ["coarse steps", "the cheapest", "dB of these", "dB behind the first step", "dB at the end"]
        tables.append(Table(f"{name}: error against the share of coarse steps", columns, rows))
        fits = []
        for wanted in WANTED:
            for prompts in (1, len(FITTED)):
                fits.append(bench.fit(wanted, prompts))
                say(f"{name}, {fits[-1]}")
        columns = [
            "wanted dB", "prompts fitted", "coarse steps that the fit finds", "dB that it tells", "mean dB of others",
            "least dB", "others that keep it",
        ]  # fmt: skip
        tables.append(Table(f"{name}: Attune Fit Attention", columns, fits))
    return tables


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cache", type=Path, default=CACHE, help="not used: nothing is kept")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        from comfy.ldm.modules import attention

        attention.register_attention_function(COARSE, every_second_key)
        lab = Lab(host, args.cache)
        say = lambda text: print(text, flush=True)
        tables = measure(host, lab, args.models, args.steps, tasks(args.tasks), say)
    print("\n" + "\n".join(map(markdown, tables)))
    notes = [f"{args.tasks} pictures, {args.steps} steps of {SOLVER} over '{SCHEDULER}', cfg {CFG:g}."]
    record("attention", "A coarser attention on some steps", tables, began, (), notes, args.out)


if __name__ == "__main__":
    main()
