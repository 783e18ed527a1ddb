"""Below the native size: what can the noise level that the network is told repair, and what can it not?

python dev.py bench noise_shift [--models sizes flow unet] [--sides 64 80 96 112 128] [--tasks 96] [--sweep 48]
    [--steps 20]

The demo models draw at each side: the UNet and the flow model, trained at 128 px only, and the flow model with the LoRA
"sizes", which saw small pictures, too. Compared are the plain model, the
noise shift as fitted jointly, level by level, and jointly on pictures of the model's own; the best of a sweep of told
levels (an oracle: it is chosen by pictures) that are off by a constant, and by a constant and a slope; the best stock
ModelSamplingSD3 shift; the tuned schedules that come with the pack, alone and with the noise shift; and pictures drawn
at 128 px and made smaller, which show what a model that knew the size would do. A last table injects a wrong told level
at 128 px and takes it back. Sweeps use other seeds than the tables. The Fréchet distance is to training pictures of the
same objects and backgrounds, made smaller to the same side; the judge sees both enlarged or reduced to its own 64 px by
the same filter. ± is a standard error over six groups of seeds, for changes of the paired difference. Cached: run it
again to continue. Writes docs/results/noise_shift.json, docs/results.md, the tables in docs/noise_shift.md, pictures.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

import _pack  # noqa: F401
from comfy_process import ROOT, Host
from harness import CACHE, Cell, Lab, Task, prompt, tasks
from judge import HERE, corner_colours, load_judge, nearest_colour
from looks import GROUPS, data
from metrics import frechet, jackknife
from pack.kernels.space import NoiseSpace
from results import DOCS, Table, fill, markdown, record

NATIVE = 128
RUN = {"unet": ("dpmpp_2m", "karras"), "flow": ("euler", "simple")}  # solver and schedule
LORAS = {"sizes": ROOT / "models" / "loras" / "attune_demo_flow_sizes.safetensors"}  # on the flow model
TITLES = {"unet": "UNet", "flow": "flow", "sizes": "flow, taught small sizes"}
FILES = {"unet": "attune_demo_shift", "flow": "attune_demo_flow_shift", "sizes": "attune_demo_flow_sizes_shift"}
FOLDERS = {
    "joint": ROOT / "models" / "profiles", "per level": HERE / "per_level", "joint, own pictures": HERE / "own_pictures"
}  # fmt: skip
OFFSETS = (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 1.5)  # of the oracle, in ln(sigma / alpha)
FURTHEST = 2.0  # no profile may tell a level more than 8 times too high
SLOPES = (-0.3, 0.3)  # more offset per unit of ln(sigma / alpha)
SHIFTS = (1.0, 1.5, 2.0, 5.0)  # of ModelSamplingSD3; the flow model's own is 3
SWEEP_SEED = 100000
INJECTED = 0.6  # log units, where the told level alone is wrong
KNOTS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)


@dataclass
class Row:
    """One setting at one side. change: of the Fréchet distance against plain, in percent; None for plain itself."""

    model: str
    side: int
    label: str
    frechet: tuple[float, float]
    change: tuple[float, float] | None
    object: tuple[float, float]
    background: tuple[float, float]
    note: str = ""


@lru_cache(maxsize=1)
def small_data() -> dict[str, Tensor]:
    """Side -> the judge's features [tasks placements 256] of training pictures made smaller."""
    return {side: value.double() for side, value in load_file(HERE / "data_sizes.safetensors").items()}


@dataclass(frozen=True)
class Seen:
    """What the judge sees in pictures: features [n 256], right object [n], right background [n]."""

    features: Tensor
    objects: Tensor
    backgrounds: Tensor

    @classmethod
    def of(cls, pictures: Tensor, work: list[Task]) -> Seen:
        features, logits = load_judge()(pictures)
        objects, backgrounds = torch.tensor([[task.obj, task.background] for task in work]).T
        right = nearest_colour(corner_colours(pictures)) == backgrounds
        return cls(features.double(), logits.argmax(1) == objects, right)

    def frechet(self, side: int, kept: Tensor) -> float:
        """To the data at this side, in the principal axes of the data at the native size."""
        axes = data()["axes"]
        return frechet(small_data()[str(side)][kept].flatten(0, 1) @ axes, self.features[kept] @ axes)


class Bench:
    """The settings of one model, drawn and judged."""

    def __init__(self, lab: Lab, model: str, steps: int, say: Callable[[str], None]):
        self.lab, self.title, self.steps, self.say = lab, TITLES[model], steps, say
        self.model = "flow" if model in LORAS else model
        self.loaders: tuple[tuple, ...] = (self._lora(LORAS[model]),) if model in LORAS else ()
        self.sampler, self.schedule = RUN[self.model]
        files = {method: folder / f"{FILES[model]}.json" for method, folder in FOLDERS.items()}
        self.names = {method: self._add(file) for method, file in files.items() if file.exists()}
        self.truthful = {method: truthful(files[method]) for method in self.names}
        tuned = ROOT / "models" / "profiles" / f"demo_{self.model}_{self.sampler}_{steps:02}.json"
        self.tuned = self._add(tuned) if tuned.exists() else ""

    def seen(self, cell: Cell, work: list[Task]) -> Seen:
        drawn = self.lab.run(cell, work, lambda text: self.say(f"{self.title} {cell.side} px: {text}"))
        return Seen.of(self.lab.pictures(self.model, drawn.latents), work)

    def cell(self, side: int, *nodes: tuple) -> Cell:
        """`nodes` before the sampler; the levels are those of the model behind the stock nodes among them, or of the
        tuned profile."""
        nodes = (*self.loaders, *nodes)
        stock = tuple(node for node in nodes if not node[0].startswith("Attune"))
        model = self.lab.patched(self.model, stock)
        given = {"model": model, "scheduler": self.schedule, "steps": self.steps, "denoise": 1.0}
        (sigmas,) = self.lab.host.call("BasicScheduler", **given)
        if self.scheduled() in nodes:
            profile = self.lab.given("profile", self.tuned, ())
            _, _, sigmas, _ = self.lab.host.call("AttuneApplyProfile", model=model, profile=profile)
        return Cell(self.model, self.sampler, tuple(sigmas.tolist()), nodes=nodes, side=side)

    def told(self, side: int, offset: float, slope: float = 0.0) -> Cell:
        """The network told `offset` + `slope` ln(sigma / alpha) log units more."""
        return self.cell(side, ("AttuneApplyProfile", (("profile", self._line(offset, slope)), ("strength", 1.0))))

    def fitted(self, side: int, method: str, *before: tuple) -> Cell:
        """Where the fit told the truth, the cell without it: the pictures are the same to the bit."""
        if side in self.truthful[method]:
            return self.cell(side, *before)
        node = ("AttuneApplyProfile", (("profile", self.names[method]), ("strength", 1.0)))
        return self.cell(side, *before, node)

    def scheduled(self) -> tuple:
        """The node that brings the tuned schedule, and the timesteps aligned with it."""
        return ("AttuneApplyProfile", (("profile", self.tuned),))

    def best(self, cells: dict[float, Cell], side: int, work: list[Task]) -> float:
        """The key of the cell of least Fréchet distance."""
        everything = torch.arange(len(work))
        found = {key: self.seen(cell, work).frechet(side, everything) for key, cell in cells.items()}
        return min(found, key=found.__getitem__)

    def made_smaller(self, side: int, work: list[Task]) -> Seen:
        drawn = self.lab.run(self.cell(NATIVE), work, lambda text: self.say(f"{self.title} native: {text}"))
        pictures = self.lab.pictures(self.model, drawn.latents)
        return Seen.of(smaller(pictures, side), work)

    def _add(self, file: Path) -> str:
        """Put a profile where the host finds it; its name there changes with its content."""
        name = f"{file.parent.name} {file.stem} {hash_of(file.read_text('utf-8'))}.json"
        return self._write(name, file.read_text("utf-8"))

    def _line(self, offset: float, slope: float = 0.0) -> str:
        space = "flow" if self.model == "flow" else "ve"
        ends = {"ve": lambda s: math.exp(s), "flow": lambda s: 1 / (1 + math.exp(-s))}[space]
        about = self.lab.models[self.model]
        at = [math.log(s / (1 - s)) for s in KNOTS] if space == "flow" else [-3.0, -1.0, 0.0, 1.0, 2.0]
        moves = [max(-FURTHEST, min(FURTHEST, offset + slope * a)) for a in at]
        curve = {"sigma": [ends(a) for a in at], "sigma_cond": [ends(a + m) for a, m in zip(at, moves, strict=True)]}
        profile = {
            "format": 1, "kind": "noise_shift", "name": f"line {offset:+g} {slope:+g}", "method": "line",
            "space": space, "families": [type(about.model.model_config).__name__], "resolution": [NATIVE, NATIVE],
            "source": "benchmarks/noise_shift.py",
            "alignments": [{"resolution": [side, side], **curve} for side in range(64, 129, 16)],
        }  # fmt: skip
        return self._write(f"line {space} {offset:+g} {slope:+g}.json", json.dumps(profile))

    def _lora(self, file: Path) -> tuple:
        """Put a LoRA where the host finds it; its name there changes with its content."""
        name = f"{file.stem} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}.safetensors"
        folder = self.lab.host.folders / "models" / "loras"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
        return ("LoraLoaderModelOnly", (("lora_name", name), ("strength_model", 1.0)))

    def _write(self, name: str, text: str) -> str:
        folder = self.lab.host.folders / "models" / "attune"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
        return name


def truthful(file: Path) -> set[int]:
    """The sides at which a noise shift tells the truth: the native one, and those that its gate refused."""
    curves = json.loads(file.read_text("utf-8"))["alignments"]
    moved = {curve["resolution"][0] for curve in curves if curve["sigma"] != curve["sigma_cond"]}
    return {curve["resolution"][0] for curve in curves} - moved | {NATIVE} - moved


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def smaller(pictures: Tensor, side: int) -> Tensor:
    """[n 3 side side] by the filter of the data."""
    if pictures.shape[-1] == side:
        return pictures
    from comfy.utils import common_upscale

    return common_upscale(pictures, side, side, "lanczos", "disabled")


def measure(bench: Bench, side: int, work: list[Task], sweep: list[Task]) -> list[Row]:
    """All settings at one side."""
    plain = bench.cell(side)
    cells: dict[str, tuple[Cell, str]] = {"plain": (plain, "")}
    cells |= {f"noise shift, {method}": (bench.fitted(side, method), "") for method in bench.names}
    if side < NATIVE:
        offset = bench.best({one: bench.told(side, one) for one in OFFSETS} | {0.0: plain}, side, sweep)
        flat = bench.told(side, offset) if offset else plain
        cells["best constant shift (oracle)"] = flat, f"offset {offset:+g}"
        slope = bench.best({one: bench.told(side, offset, one) for one in SLOPES} | {0.0: flat}, side, sweep)
        tilted = bench.told(side, offset, slope) if slope else flat
        cells["best shift and slope (oracle)"] = tilted, f"{offset:+g}, slope {slope:+g}"
    if bench.tuned:
        tuned = bench.scheduled()
        cells["tuned schedule"] = bench.cell(side, tuned), ""
        for method in ("joint", "per level"):
            if method in bench.names:
                cells[f"tuned schedule + noise shift, {method}"] = bench.fitted(side, method, tuned), ""
    if bench.model == "flow" and side < NATIVE:
        sd3 = {shift: bench.cell(side, ("ModelSamplingSD3", (("shift", shift),))) for shift in SHIFTS} | {3.0: plain}
        chosen = bench.best(sd3, side, sweep)
        cells["ModelSamplingSD3, best shift"] = sd3[chosen], f"shift {chosen:g}"
    found = {label: (bench.seen(cell, work), note) for label, (cell, note) in cells.items()}
    if side < NATIVE:
        found["drawn at 128 px, made smaller"] = bench.made_smaller(side, work), ""
    reference = found["plain"][0]
    return [
        row_of(bench.title, side, label, seen, None if label == "plain" else reference, note)
        for label, (seen, note) in found.items()
    ]


def mistold(model: Any, offset: float) -> Any:
    """A clone of MODEL that tells its network ln(sigma / alpha) + `offset`, as a foreign node might."""
    sampling = copy.copy(model.get_model_object("model_sampling"))
    kind = type(sampling)
    space = NoiseSpace("flow" if "CONST" in [one.__name__ for one in kind.__mro__] else "ve")

    class Mistold(kind):
        def timestep(self, sigma: Tensor) -> Tensor:
            return super().timestep(space.at_log_ratio(space.log_ratio(sigma.double()) + offset).to(sigma))

    sampling.__class__ = Mistold
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    return clone


def measure_injected(bench: Bench, work: list[Task], sweep: list[Task]) -> list[Row]:
    """The native size with every level told wrong on purpose: here the told level is all that is to be repaired.

    The fit gets eight latents that the right model drew of other tasks; two thirds of a minute on one core.
    """
    wrong = ("AttuneApplyProfile", (("profile", bench._line(INJECTED)), ("strength", 1.0)))
    pictures = sweep[:8]
    clean = bench.lab.run(bench.cell(NATIVE), pictures).latents
    prompts = bench.lab.conditioning([prompt(t.obj, t.background) for t in pictures])
    given = {"native_width": NATIVE, "native_height": NATIVE, "preset": "quick", "seed": 0, "save_as": "", "sizes": ""}
    right = bench.seen(bench.cell(NATIVE), work)
    settings = {"told right": right, "told wrong": bench.seen(bench.cell(NATIVE, wrong), work)}
    model = mistold(bench.lab.patched(bench.model, bench.loaders), INJECTED)  # to our own nodes a fit is deaf
    profile, _, report = bench.lab.host.call(
        "AttuneFitNoiseShift", model=model, latent={"samples": clean}, positive=prompts, **given
    )
    print(f"\n{report}")
    _, path = bench.lab.host.call("AttuneSaveProfile", profile=profile, name=profile.id)
    mend = ("AttuneApplyProfile", (("profile", Path(path).name), ("strength", 1.0)))
    settings["told wrong + noise shift, joint"] = bench.seen(bench.cell(NATIVE, wrong, mend), work)
    return [
        row_of(bench.title, NATIVE, label, seen, None if seen is right else right, "")
        for label, seen in settings.items()
    ]


def repaired(rows: list[Row], model: str) -> Table:
    """What the fit takes back of an injected error."""
    body: list[list] = [[r.label, text_of(r), f"{r.object[0]:.0f} / {r.background[0]:.0f}"] for r in rows]
    columns = ["setting", "Fréchet distance", "object / background right, %"]
    note = "In brackets the change against the model that is told right, in percent."
    title = f"{model}, {NATIVE} px: every level told {INJECTED:g} log units too high, on purpose"
    return Table(title, columns, body, note)


def row_of(model: str, side: int, label: str, seen: Seen, plain: Seen | None, note: str) -> Row:
    count = len(seen.features)
    spread = lambda measure: jackknife(measure, count, GROUPS)
    change = None
    if plain is not None:
        change = spread(lambda kept: 100 * (seen.frechet(side, kept) / plain.frechet(side, kept) - 1))
    share = lambda right: spread(lambda kept: 100 * float(right[kept].double().mean()))
    distance = spread(lambda kept: seen.frechet(side, kept))
    return Row(model, side, label, distance, change, share(seen.objects), share(seen.backgrounds), note)


def distances(rows: list[Row], model: str, steps: int) -> Table:
    """Settings down, sides across: the Fréchet distance, its change against plain, and what the sweep chose."""
    sides = sorted({row.side for row in rows})
    body: list[list] = []
    for label in dict.fromkeys(row.label for row in rows):
        line: list = [label]
        for side in sides:
            found = next((row for row in rows if (row.label, row.side) == (label, side)), None)
            line.append(None if found is None else text_of(found))
        low = [row.change[0] for row in rows if row.label == label and row.change and row.side < NATIVE]
        line.append(f"{sum(low) / len(low):+.1f} %" if low else None)
        body.append(line)
    columns = ["setting", *(f"{side} px" for side in sides), "mean change below 128 px"]
    sampler, schedule = RUN["unet" if model == TITLES["unet"] else "flow"]
    note = f"{steps} steps of {sampler} on {schedule}, cfg 3. In brackets the change against plain in percent."
    return Table(f"{model}: Fréchet distance to the data at the same size", columns, body, note)


def text_of(row: Row) -> str:
    text = f"{row.frechet[0]:.2f} ± {row.frechet[1]:.2f}"
    if row.change is not None:
        text += f" ({row.change[0]:+.0f} ± {row.change[1]:.0f})"
    return f"{text}, {row.note}" if row.note else text


def shown(rows: list[Row], model: str) -> Table:
    """Settings down, sides across: how many pictures show what the prompt says."""
    sides = sorted({row.side for row in rows})
    body: list[list] = []
    for label in dict.fromkeys(row.label for row in rows):
        found = {row.side: row for row in rows if row.label == label}
        cells = [f"{found[s].object[0]:.0f} / {found[s].background[0]:.0f}" if s in found else None for s in sides]
        body.append([label, *cells])
    return Table(f"{model}: object / background right, %", ["setting", *(f"{side} px" for side in sides)], body)


def plot(rows: list[Row], path: Path) -> None:
    """Fréchet distance over the side, a panel per model, a line per setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models, labels = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("model", "label"))
    figure, axes = plt.subplots(
        1, len(models), figsize=(5 * len(models) + 2.5, 3.6), layout="constrained", squeeze=False
    )
    lines = {}
    for axis, model in zip(axes[0], models, strict=True):
        for i, label in enumerate(labels):
            if line := sorted((r for r in rows if (r.model, r.label) == (model, label)), key=lambda r: r.side):
                values, spread = zip(*(r.frechet for r in line), strict=True)
                sides = [r.side for r in line]
                lines[label] = axis.errorbar(sides, values, spread, marker=".", lw=1.2, color=f"C{i}")
        axis.set(title=model, xlabel="side in pixels", yscale="log")
        axis.set_xticks(sorted({r.side for r in rows}), [str(s) for s in sorted({r.side for r in rows})])
    axes[0][0].set_ylabel("Fréchet distance")
    figure.legend(lines.values(), lines, fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def grid(bench: Bench, sides: list[int], work: list[Task], path: Path, tile: int = 112) -> None:
    """A few prompts: for every side plain, noise shift, and drawn large and made smaller."""
    work, left = work[:16], 150
    rows: list[tuple[str, Tensor]] = []
    for side in sides:
        settings = {"plain": bench.cell(side)}
        if "joint" in bench.names:
            settings["noise shift"] = bench.fitted(side, "joint")
        for label, cell in settings.items():
            drawn = bench.lab.run(cell, work).latents[:8]
            rows.append((f"{side} px, {label}", bench.lab.pictures(bench.model, drawn)))
        if side < NATIVE:
            drawn = bench.lab.run(bench.cell(NATIVE), work).latents[:8]
            rows.append((f"{side} px of 128", smaller(bench.lab.pictures(bench.model, drawn), side)))
    canvas = Image.new("RGB", (left + 8 * tile, 20 + tile * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((4, 4), f"{bench.title}: " + ", ".join(prompt(t.obj, t.background) for t in work[:3]) + " …", "black")
    for i, (label, pictures) in enumerate(rows):
        pen.text((4, 20 + tile * i + tile // 2 - 6), label, "black")
        enlarged = F.interpolate(pictures, (tile, tile), mode="nearest")
        strip = (torch.cat(list(enlarged), 2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        canvas.paste(Image.fromarray(strip), (left, 20 + tile * i))
    canvas.save(path, quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(TITLES), default=["sizes", "flow", "unet"])
    parser.add_argument("--sides", nargs="+", type=int, default=[64, 80, 96, 112, 128])
    parser.add_argument("--tasks", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sweep", type=int, default=48, help="pictures by which the sweeps choose")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    most = len(next(iter(small_data().values())))
    if not 2 * GROUPS <= args.tasks <= most:
        parser.error(f"--tasks must be {2 * GROUPS} to {most}: the data holds so many")
    if set(map(str, args.sides)) - set(small_data()):
        parser.error(f"--sides must be among {', '.join(small_data())}")
    began, tables, rows, mended = time.perf_counter(), [], [], []
    say = lambda text: print(f"\r{text}   ", end="", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Host(Path(folder)), args.cache)
        work, sweep = tasks(args.tasks), tasks(args.sweep, SWEEP_SEED)
        benches = {model: Bench(lab, model, args.steps, say) for model in args.models}
        for model, bench in benches.items():
            mine = [row for side in args.sides for row in measure(bench, side, work, sweep)]
            tables += [distances(mine, bench.title, args.steps), shown(mine, bench.title)]
            rows += mine
            if model not in LORAS:
                injected = measure_injected(bench, work, sweep)
                tables.append(repaired(injected, bench.title))
                mended += injected
            grid(
                bench,
                sorted({min(args.sides), *(s for s in args.sides if s == 96)}),
                work,
                args.out / f"noise_shift_{model}.jpg",
            )
    print("\r" + " " * 70)
    plot(rows, args.out / "noise_shift.png")
    fill(args.out / "noise_shift.md", "noise_shift", tables)
    notes = [" ".join(__doc__.split("\n\n")[2].split())]
    notes.append(f"{args.tasks} pictures per setting, {args.sweep} others for the sweeps; {GROUPS} groups of seeds.")
    facts = [
        {"model": r.model, "side": r.side, "setting": r.label, "frechet": r.frechet, "change": r.change,
         "object": r.object, "background": r.background, "note": r.note}
        for r in [*rows, *mended]
    ]  # fmt: skip
    pictures = ["noise_shift.png", *(f"noise_shift_{model}.jpg" for model in args.models)]
    result = record("noise_shift", "Noise shift below the native size", tables, began, pictures, notes, args.out, facts)
    print("\n".join(markdown(Table(**table)) for table in result["tables"]))


if __name__ == "__main__":
    main()
