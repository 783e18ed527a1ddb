"""Which steps tolerate a coarser attention, and does a fit find them?

python dev.py bench attention [--models unet flow] [--parts places kernels] [--steps 10] [--tasks 8]

Where no faster attention runs, as on a CPU, coarse ones are registered with the host as a pack would register them.
`places`: of every second key and value alone. On one picture the cost of every stretch of steps is measured; then a
quarter, half and three quarters of the steps use it: the cheapest stretch, the first and the last, in dB of the final
latents to the exact run on other pictures. Then Attune Fit Attention on one prompt and on four, and what its levels
give on prompts that it did not see: the mean, the least, and how many keep what was wanted. `kernels`: the same for
the cheapest stretch and four prompts with better functions beside it: three of four keys, and queries and keys in whole
numbers of 4 and 8 bits with one scale a token and the keys' mean taken off, as SageAttention has them (Zhang et al.
2024, arXiv 2410.02367). Writes docs/results/attention.json, where the tables of other models and parts stay,
docs/results.md and docs/attention_kernels.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
from results import DOCS, Table, beside_last, markdown, record

COARSE = "attune_every_second_key"
BETTER = ("attune_three_of_four_keys", "attune_4_bit_keys", "attune_8_bit_keys")
KERNELS = {"every second key": COARSE, **dict(zip(("three of four keys", "4 bits", "8 bits"), BETTER, strict=True))}
SOLVER, SCHEDULER, CFG = "euler", "normal", 3.0
SHARES = (0.25, 0.5, 0.75)
STEPPED = (0.2, 0.5, 0.8, 0.9)  # shares of the comparison of kernels; the first step is never coarse there
WANTED = (45.0, 35.0)
FITTED = [Task(100, 3, 987654321), Task(17, 0, 1), Task(58, 5, 2), Task(81, 1, 3)]  # no tasks that are drawn


def every_second_key(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
    """Half of the keys, [b n c] or [b heads n c]; prompts and pictures alike."""
    from comfy.ldm.modules.attention import attention_basic

    thin = (slice(None), slice(None), slice(None, None, 2)) if skip_reshape else (slice(None), slice(None, None, 2))
    return attention_basic(q, k[thin], v[thin], heads, skip_reshape=skip_reshape, _inside_attn_wrapper=True)


def three_of_four_keys(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
    """The keys but the last of every four."""
    from comfy.ldm.modules.attention import attention_basic

    tokens = 2 if skip_reshape else 1  # values may come as [b n heads c] where keys are [b n c]
    kept = torch.tensor([i for i in range(k.shape[tokens]) if i % 4 != 3])
    k, v = (one.index_select(tokens, kept) for one in (k, v))
    return attention_basic(q, k, v, heads, skip_reshape=skip_reshape, _inside_attn_wrapper=True)


def whole_numbers(bits: int, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
    """Queries and keys in `bits` bits, one scale for each token of each head; softmax and values are exact."""
    from comfy.ldm.modules.attention import attention_basic

    def rounded(x: Tensor) -> Tensor:
        parts = x if skip_reshape else x.reshape(*x.shape[:2], heads, -1)
        scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        return ((parts / scale).round() * scale).reshape(x.shape)

    k = k - k.mean(2 if skip_reshape else 1, keepdim=True)  # all scores of a query fall alike: no weight changes
    return attention_basic(rounded(q), rounded(k), v, heads, mask, skip_reshape=skip_reshape, _inside_attn_wrapper=True)


FUNCTIONS = (every_second_key, three_of_four_keys, partial(whole_numbers, 4), partial(whole_numbers, 8))


class Bench:
    """One demo model with the levels of its run, and a kernel."""

    def __init__(self, host: Host, lab: Lab, name: str, steps: int, work: list[Task], kernel: str = COARSE):
        self.host, self.lab, self.name, self.work, self.kernel = host, lab, name, work, kernel
        self.sigmas = lab.sigmas(name, SCHEDULER, steps)
        self.steps, self.exact = steps, self.drawn(())

    def drawn(self, nodes: tuple) -> Tensor:
        return self.lab.run(Cell(self.name, SOLVER, self.sigmas, CFG, nodes), self.work).latents

    def fast(self, start: int, count: int) -> float:
        """dB where `count` steps from `start` on are coarse."""
        levels = (("highest_sigma", self.sigmas[start]), ("lowest_sigma", self.sigmas[start + count - 1]))
        return statistics.fmean(self.each(levels))

    def each(self, levels: tuple) -> list[float]:
        """dB of each picture."""
        drawn = self.drawn((("AttuneAttentionBySigma", (("kernel", self.kernel), *levels)),))
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
            "AttuneFitAttention", model=self.lab.models[self.name], kernel=self.kernel, wanted=wanted, steps=self.steps,
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

    def windows(self) -> tuple[list[tuple[float, int]], list[float]]:
        """The best stretch of each length, by the errors that the fit measures on its picture; and these, by step."""
        module = self.host.module("nodes._host.attention")
        model = self.lab.models[self.name]
        run = lambda patched: self._of_fitted(patched)
        _, errors = module.errors_of(model, run, self.kernel, torch.tensor(self.sigmas))
        weights = step_weights(self.sigmas, NoiseSpace("flow" if self.name == "flow" else "ve"))
        return best_windows([error * abs(weight) for error, weight in zip(errors, weights, strict=True)]), errors

    def _of_fitted(self, patched) -> Tensor:
        kept, self.lab.models[self.name] = self.lab.models[self.name], patched
        try:
            return self.lab._draw(Cell(self.name, SOLVER, self.sigmas, CFG), FITTED[:1]).latents
        finally:
            self.lab.models[self.name] = kept


def places(bench: Bench, say: Callable) -> list[Table]:
    """Of every second key: where a stretch of steps does least, and what the fit finds."""
    name, steps, (windows, _), rows = bench.name, bench.steps, bench.windows(), []
    for share in SHARES:
        count = round(share * steps)
        starts = {"cheapest": windows[count - 1][1], "first": 1, "last": steps - count}
        found = {label: bench.fast(start, count) for label, start in starts.items()}
        rows.append([f"{count} of {steps}", f"from step {starts['cheapest']}", *found.values()])
        say(f"{name}, {rows[-1]}")
    rows.append([f"{steps} of {steps}", "all", *3 * [bench.fast(0, steps)]])
    columns = ["coarse steps", "the cheapest", "dB of these", "dB behind the first step", "dB at the end"]
    tables, fits = [Table(f"{name}: error against the share of coarse steps", columns, rows)], []
    for wanted in WANTED:
        for prompts in (1, len(FITTED)):
            fits.append(bench.fit(wanted, prompts))
            say(f"{name}, {fits[-1]}")
    columns = [
        "wanted dB", "prompts fitted", "coarse steps that the fit finds", "dB that it tells", "mean dB of others",
        "least dB", "others that keep it",
    ]  # fmt: skip
    return [*tables, Table(f"{name}: Attune Fit Attention", columns, fits)]


def kernels(of: Callable[[str], Bench], say: Callable) -> tuple[list[Table], dict]:
    """Of one model, every kernel: its error at each step, dB by the share of steps, and the fit at the first of
    WANTED."""
    rows, erring, kept = [], [], {}
    for label, kernel in KERNELS.items():
        bench = of(kernel)
        windows, errors = bench.windows()
        counts = [round(share * bench.steps) for share in STEPPED]
        found = [bench.fast(windows[count - 1][1], count) for count in counts]
        _, _, *fit = bench.fit(WANTED[0], len(FITTED))
        rows.append([label, *found, *fit])
        erring.append([label, *errors])
        kept[label] = {"errors": errors, "dB": dict(zip(counts, found, strict=True))}
        say(f"{bench.name}, {rows[-1]}")
    columns = ["attention", *(f"dB, {count} of {bench.steps}" for count in counts)]
    columns += ["the fit at 45 dB finds", "dB that it tells", "mean dB of others", "least dB", "others that keep it"]
    note = f"The cheapest stretches by the costs of one picture; fits of {len(FITTED)} prompts."
    levels = [f"at {sigma:.3g}" for sigma in bench.sigmas[:-1]]
    return [
        Table(f"{bench.name}: better kernels", columns, rows, note),
        Table(f"{bench.name}: error of the guided latent by the step's sigma, rms", ["attention", *levels], erring),
    ], {"sigmas": bench.sigmas[:-1], "kernels": kept}


def plot(data: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(data), figsize=(5.2 * len(data), 7), squeeze=False)
    for (above, below), (name, known) in zip(axes.T, data.items(), strict=True):
        for label, kernel in known["kernels"].items():
            steps = len(known["sigmas"])
            above.plot([100 * int(n) / steps for n in kernel["dB"]], kernel["dB"].values(), "o-", label=label)
            below.loglog(known["sigmas"], kernel["errors"], "o-", label=label)
        above.axhline(WANTED[0], color="grey", linestyle=":")
        above.set(title=name, xlabel="share of steps with this attention, %", ylabel="dB to the exact run")
        below.set(xlabel="sigma of the step", ylabel="rms change of the guided latent")
        below.invert_xaxis()
    axes[1, 0].legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def measure(host: Host, lab: Lab, args: argparse.Namespace, say: Callable) -> tuple[list[Table], dict]:
    tables, data = [], {}
    for name in args.models:
        of = partial(Bench, host, lab, name, args.steps, tasks(args.tasks))
        if "places" in args.parts:
            tables += places(of(), say)
        if "kernels" in args.parts:
            found, data[name] = kernels(of, say)
            tables += found
    return tables, data


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--parts", nargs="+", choices=["places", "kernels"], default=["places", "kernels"])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        from comfy.ldm.modules import attention

        for kernel, function in zip(KERNELS.values(), FUNCTIONS, strict=True):
            attention.register_attention_function(kernel, function)
        tables, data = measure(host, Lab(host, args.cache), args, lambda text: print(text, flush=True))
    print("\n" + "\n".join(map(markdown, tables)))
    notes = [f"{args.tasks} pictures, {args.steps} steps of {SOLVER} over '{SCHEDULER}', cfg {CFG:g}."]
    tables, path = beside_last("attention", tables, args.out), args.out / "results" / "attention.json"
    data = {**(json.loads(path.read_text("utf-8"))["data"] or {} if path.exists() else {}), **data}
    if data:
        plot(data, args.out / "attention_kernels.png")
    shown = ["attention_kernels.png"] if data else []
    record("attention", "A coarser attention on some steps", tables, began, shown, notes, args.out, data)


if __name__ == "__main__":
    main()
