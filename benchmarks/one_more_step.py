"""One More Step: are darks dark and brights bright, and does variety come back?

python dev.py bench one_more_step [--tasks 120] [--seeds 48] [--steps 8] [--cfg 1 3]

Two starts. "own": the demo model's highest noise, 14.6, where 128 x 128 pixels leave little brightness to lose (the
missing trace is N / sigma^2 = 1.2 times the noise of one latent's mean). "SD's": sigma 3.65, where it is 19.2, as in
SD 1.5 at 512 x 512 pixels. Compared from the same noises: the plain sampler, One More Step, the same with the leak of
its module (diversity 1), core's zero-SNR levels and RescaleCFG. Fréchet and Wasserstein distance and brightness are to
the training data, as in `schedules`; the spread is of the background's brightness over seeds of a prompt that names
none. Results are cached. Writes docs/results/one_more_step.json, docs/results.md and a plot.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from comfy_process import ROOT, Host
from harness import ANY, CACHE, Cell, Lab, Task, prompt, tasks
from judge import BACKGROUNDS, OBJECTS
from looks import GROUPS, Look, brightness, data, look, summary
from metrics import jackknife
from results import DOCS, Table, markdown, record
from schedules import number, progress

MODULE = "attune_demo.safetensors"
STARTS = {"own": None, "SD's": 3.65}  # sigma to begin at
GREYS = ["black", "dark gray", "gray", "light gray", "white"]
OBJECT = "panda"
EXAMPLES = 2  # pictures per background for the leak of a prompt that names none
ZERO_SNR = (("ModelSamplingDiscrete", (("sampling", "v_prediction"), ("zsnr", True))),)
RESCALE = (("RescaleCFG", (("multiplier", 0.7),)),)


class OneMoreStepLab(Lab):
    """A lab whose cells may name the module, the prompts of a batch and a leak from examples."""

    def __init__(self, *args):
        super().__init__(*args)
        self.module = self.host.call("AttuneLoadOneMoreStep", oms_name=MODULE)[0]
        self.leaks: dict[str, object] = {}
        digest = hashlib.sha256((ROOT / "models" / "one_more_step" / MODULE).read_bytes()).hexdigest()
        self.name = f"module {digest[:16]}"

    def given(self, name: str, value, part: Sequence[Task]):
        if value == "prompts":
            return self.conditioning([prompt(task.obj, task.background) for task in part])
        return self.module if value == self.name else self.leaks.get(value, value) if isinstance(value, str) else value

    def nodes(self, diversity: float = 0.0, leak: str = "") -> tuple:
        inputs = (("oms_model", self.name), ("positive", "prompts"), ("diversity", diversity))
        return (("AttuneOneMoreStep", inputs + ((("signal_leak", leak),) if leak else ())),)

    def learn_leak(self, cell: Cell, work: list[Task]) -> str:
        """Fit a leak to the pictures of a cell; the name under which cells may ask for it."""
        examples = {"samples": self.run(cell, work).latents}
        _, leak = self.host.call("AttuneSignalLeak", model=self.models[cell.model], examples=examples)
        name = f"leak of {self.path(cell, work[:1]).stem}, {len(work)}"
        self.leaks[name] = leak
        return name


@dataclass
class Row:
    """One way to begin."""

    start: str
    cfg: float
    label: str
    summary: dict[str, tuple[float, float]]
    greys: dict[str, float]  # background word -> brightness, 0..255
    means: list[float]  # of each picture, 0..255


def levels(lab: Lab, start: str, steps: int, nodes: tuple = ()) -> tuple[float, ...]:
    """The stock `normal` levels of the model, or Karras' from the sigma of the start."""
    if STARTS[start] is None:
        model = lab.patched("unet", nodes)
        return tuple(
            lab.host.call("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)[0].tolist()
        )
    inputs = {"steps": steps, "sigma_max": STARTS[start], "sigma_min": 0.03, "rho": 7.0}
    return tuple(lab.host.call("KarrasScheduler", **inputs)[0].tolist())


def arms(lab: OneMoreStepLab, start: str, cfg: float) -> dict[str, tuple]:
    found = {"plain": (), "One More Step": lab.nodes(), "with its leak": lab.nodes(1.0)}
    if start == "own":
        found["zero-SNR levels"] = ZERO_SNR
    return found | ({"RescaleCFG 0.7": RESCALE} if cfg != 1 else {})


def measure(lab: OneMoreStepLab, work: list[Task], start: str, cfg: float, steps: int) -> list[Row]:
    rows, backgrounds = [], torch.tensor([task.background for task in work])
    goal = Cell("unet", "euler", levels(lab, start, steps), cfg)
    for label, nodes in arms(lab, start, cfg).items():
        zero_snr = nodes if nodes == ZERO_SNR else ()
        cell = Cell("unet", "euler", levels(lab, start, steps, zero_snr), cfg, nodes)
        seen = look(lab, cell, work, progress(f"{start} {cfg} {label}"), goal)
        found = brightness(seen.corners, backgrounds)
        greys = {name: found[i][1] for i, name in enumerate(BACKGROUNDS) if name in GREYS and i in found}
        rows.append(Row(start, cfg, label, summary(seen, work), greys, (255 * seen.means).tolist()))
    return rows


def quality(rows: list[Row]) -> Table:
    keys = ["brightness", "wasserstein", "frechet", "recall", "object", "background"]
    plain = rows[0].summary
    body = []
    for row in rows:
        gains = [plain[key][0] / row.summary[key][0] for key in keys[:2]]
        cells = [number(row.summary[key]) for key in keys]
        body.append([row.label, cells[0], f"{gains[0]:.1f}", cells[1], f"{gains[1]:.1f}", *cells[2:]])
    title = f"{STARTS[rows[0].start] or 14.6:g} ({rows[0].start} start), cfg {rows[0].cfg:g}"
    columns = ["start", "brightness error", "times smaller", "Wasserstein", "times smaller", "Fréchet", "recall"]
    return Table(f"From sigma {title}", [*columns, "object %", "background %"], body)


def greys(blocks: list[list[Row]]) -> Table:
    wanted = {name: sum(BACKGROUNDS[name]) / 3 for name in GREYS}
    body: list[list] = [["data", None, None, *(f"{value:.0f}" for value in wanted.values())]]
    body += [
        [row.label, f"{STARTS[row.start] or 14.6:g}", f"{row.cfg:g}",
         *(f"{row.greys[name]:.1f}" if name in row.greys else None for name in GREYS)]
        for rows in blocks for row in rows
    ]  # fmt: skip
    return Table("Brightness of the background by word, 0..255", ["start", "sigma", "cfg", *GREYS], body)


def spread(lab: OneMoreStepLab, seeds: int, start: str, cfg: float, steps: int) -> list[list]:
    """How the background's brightness varies over seeds of a prompt that leaves it open: mean and std, 0..255."""
    sigmas, obj = levels(lab, start, steps), OBJECTS.index(OBJECT)
    told = [Task(obj, b, 5000 + EXAMPLES * b + k) for b in range(len(BACKGROUNDS)) for k in range(EXAMPLES)]
    leak = lab.learn_leak(Cell("unet", "euler", levels(lab, "own", steps), cfg), told)
    work = [Task(obj, ANY, 6000 + seed) for seed in range(seeds)]
    goal = Cell("unet", "euler", sigmas, cfg)
    body = []
    for label, nodes in {
        "plain": (), "One More Step": lab.nodes(), "with a leak of examples": lab.nodes(1.0, leak)
    }.items():  # fmt: skip
        cell = Cell("unet", "euler", sigmas, cfg, nodes)
        seen: Look = look(lab, cell, work, progress(f"spread {start} {cfg} {label}"), goal)
        corner = 255 * seen.corners.double().mean(1)
        measures = [lambda kept, c=corner: float(c[kept].mean()), lambda kept, c=corner: float(c[kept].std())]
        found = [number(jackknife(measure, seeds, GROUPS)) for measure in measures]
        body.append([label, f"{STARTS[start] or 14.6:g}", f"{cfg:g}", *found])
    return body


def plot(blocks: list[list[Row]], path: Path) -> None:
    """Histograms of the mean pixel, one panel per start and guidance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(blocks), figsize=(3.6 * len(blocks), 3), layout="constrained", squeeze=False)
    bins = torch.linspace(0, 255, 33).tolist()
    for axis, rows in zip(panels[0], blocks, strict=True):
        wanted = 255 * data()["means"][: len(rows[0].means)].flatten()
        axis.hist(wanted.tolist(), bins, density=True, alpha=0.25, color="k", label="data")
        for row, colour in zip(rows[:3], ("C1", "C0", "C2"), strict=True):
            axis.hist(row.means, bins, density=True, histtype="step", color=colour, label=row.label, lw=1.5)
        axis.set(title=f"sigma {STARTS[rows[0].start] or 14.6:g}, cfg {rows[0].cfg:g}", yticks=[])
        axis.set(xlabel="mean of a picture's pixels")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=48, help="of the prompt without a background")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began, settings = time.perf_counter(), [(start, cfg) for start in args.starts for cfg in args.cfg]
    with tempfile.TemporaryDirectory() as folder:
        lab, work = OneMoreStepLab(Host(Path(folder)), args.cache), tasks(args.tasks)
        blocks = [measure(lab, work, start, cfg, args.steps) for start, cfg in settings]
        wide = [row for start, cfg in settings for row in spread(lab, args.seeds, start, cfg, args.steps)]
    plot(blocks, args.out / "one_more_step.png")
    palette = torch.tensor(list(BACKGROUNDS.values())).double().mean(1)
    wide.insert(0, ["data: every background once", None, None, f"{palette.mean():.1f}", f"{palette.std():.1f}"])
    columns = ["start", "sigma", "cfg", "mean", "standard deviation"]
    note = f"The leak is fitted to {EXAMPLES * len(BACKGROUNDS)} pictures of the model itself, on named backgrounds."
    title = f"Brightness of the background over seeds of 'a {OBJECT}'"
    tables = [*map(quality, blocks), greys(blocks), Table(title, columns, wide, note)]
    notes = [" ".join(__doc__.split("\n\n")[2].split())]
    notes.append(f"{args.tasks} pictures per row, {args.seeds} for the spread; {args.steps} Euler steps.")
    facts = [vars(row) | {"summary": {k: list(v) for k, v in row.summary.items()}} for rows in blocks for row in rows]
    record("one_more_step", "One More Step", tables, began, ["one_more_step.png"], notes, args.out, facts)
    print("\r" + "\n".join(map(markdown, tables)))


if __name__ == "__main__":
    main()
