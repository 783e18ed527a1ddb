"""One More Step: are darks dark and brights bright, and does variety come back?

python dev.py bench one_more_step [--settings own:1:256 "SD's:3:64"] [--seeds 24] [--steps 8]

Two starts. "own": the demo model's highest noise, 14.6, where 128 x 128 pixels leave little brightness to lose (the
missing trace is N / sigma^2 = 1.2 times the noise of one latent's mean). "SD's": sigma 3.65, where it is 19.2, as in
SD 1.5 at 512 x 512 pixels. Compared from the same noises: the plain sampler, One More Step, the same with the leak of
its module (diversity 1), core's zero-SNR levels and RescaleCFG. Brightness, Wasserstein and Fréchet distance are to
training pictures of the same prompts; recall, too, with three neighbours. Variety within a prompt that names its
background: the share of its training pictures within reach of its drawn ones (as far as each has its nearest
neighbour), and standard deviations of the judge's features and of the mean pixel relative to the data's. Variety of a
prompt that leaves the background open: how bright and which colours its backgrounds are. Errors are standard errors
over four groups of seeds, each of which draws every prompt once. Results are cached. Writes
docs/results/one_more_step.json, docs/results.md, a plot and a grid of pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from scipy.stats import wasserstein_distance
from torch import Tensor

from comfy_process import ROOT, Host
from harness import ANY, BATCH, CACHE, Cell, Lab, Task, prompt, tasks
from judge import BACKGROUNDS, OBJECTS, corner_colours, load_judge, nearest_colour
from looks import brightness_error, data
from metrics import frechet, jackknife, precision_recall
from results import DOCS, Table, markdown, record
from schedules import number, progress

sys.path.append(str(ROOT / "training"))
from autoencoder import decoder

MODULE = "attune_demo.safetensors"
STARTS = {"own": None, "SD's": 3.65}  # sigma to begin at
GREYS = ["black", "dark gray", "gray", "light gray", "white"]
GROUPS = 4  # of seeds
OBJECT = "panda"
EXAMPLES = 2  # pictures per background for the leak of a prompt that names none
ZERO_SNR = (("ModelSamplingDiscrete", (("sampling", "v_prediction"), ("zsnr", True))),)
RESCALE = (("RescaleCFG", (("multiplier", 0.7),)),)
BINS = torch.linspace(0, 255, 33)
Measures = dict[str, tuple[float, float]]  # name -> (value, standard error)


@dataclass
class Seen:
    """Per picture: the judge's features [n 256] and object [n], corner colour [n 3] and mean [n], both in 0..1."""

    features: Tensor
    objects: Tensor
    corners: Tensor
    means: Tensor


class OneMoreStepLab(Lab):
    """A lab whose cells may name the module, the prompts of a batch and a leak from examples."""

    def __init__(self, *args):
        super().__init__(*args)
        self.module = self.host.call("AttuneLoadOneMoreStep", oms_name=MODULE)[0]
        self.leaks: dict[str, object] = {}
        digest = hashlib.sha256((ROOT / "models" / "one_more_step" / MODULE).read_bytes()).hexdigest()
        self.name, self.judge = f"module {digest[:16]}", load_judge()
        self.decode = slim(self.vaes["unet"])

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

    def see(self, cell: Cell, work: list[Task], label: str) -> Seen:
        """Draw a cell and look at its pictures, what nobody has done yet."""
        latents, parts = self.run(cell, work, progress(label)).latents, []
        for start in range(0, len(work), BATCH):
            drawn = self.path(cell, work[start : start + BATCH])
            path = drawn.with_name(f"seen-{drawn.name}")
            if not path.exists():
                pictures = self.decode(latents[start : start + BATCH])
                features, logits = self.judge(pictures)
                found = Seen(features, logits.argmax(1), corner_colours(pictures), pictures.flatten(1).mean(1))
                temporary = path.with_suffix(f".{os.getpid()}.tmp")
                save_file({name: value.contiguous() for name, value in vars(found).items()}, temporary)
                temporary.replace(path)
            parts.append(load_file(path))
        return Seen(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def slim(vae) -> Callable[[Tensor], Tensor]:
    """What VAEDecode does with the demo UNet's latents, without the channels that the stock layout only pads."""
    stock, net = vae.first_stage_model, decoder(4)
    wide = {name: value.float().cpu() for name, value in stock.taesd_decoder.state_dict().items()}
    net.load_state_dict({n: wide[n][tuple(map(slice, value.shape))] for n, value in net.state_dict().items()})
    net.requires_grad_(False)
    scale, shift = stock.vae_scale.item(), stock.vae_shift.item()
    probe = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def decode(latents: Tensor) -> Tensor:
        return net((latents - shift) * scale).clamp(0, 1)

    with torch.no_grad():
        torch.testing.assert_close(decode(probe), vae.decode(probe).movedim(-1, 1).float(), rtol=0, atol=2e-3)
    return decode


def jobs(prompts: int) -> list[Task]:
    """Every prompt once for each group of seeds: index // GROUPS is the prompt, index % GROUPS the group."""
    return [Task(t.obj, t.background, t.seed + 10_000 * g) for t in tasks(prompts) for g in range(GROUPS)]


@dataclass(frozen=True)
class Setting:
    """Where to begin, with which guidance, and how many prompts to draw: "SD's:3:64" on the command line."""

    start: str
    cfg: float
    prompts: int

    @classmethod
    def read(cls, text: str) -> Setting:
        start, cfg, prompts = text.split(":")
        return cls(start, float(cfg), int(prompts))

    @property
    def sigma(self) -> str:
        return f"{STARTS[self.start] or 14.6:g}"


@dataclass
class Row:
    """One way to begin."""

    setting: Setting
    label: str
    summary: Measures
    greys: Measures  # brightness by background word, 0..255
    histogram: list[float]  # share of pictures by their mean, over BINS


def levels(lab: Lab, start: str, steps: int, nodes: tuple = ()) -> tuple[float, ...]:
    """The stock `normal` levels of the model, or Karras' from the sigma of the start."""
    if STARTS[start] is None:
        model = lab.patched("unet", nodes)
        return tuple(
            lab.host.call("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)[0].tolist()
        )
    inputs = {"steps": steps, "sigma_max": STARTS[start], "sigma_min": 0.03, "rho": 7.0}
    return tuple(lab.host.call("KarrasScheduler", **inputs)[0].tolist())


def arms(lab: OneMoreStepLab, setting: Setting) -> dict[str, tuple]:
    found = {"plain": (), "One More Step": lab.nodes(), "with its leak": lab.nodes(1.0)}
    if setting.start == "own":
        found["zero-SNR levels"] = ZERO_SNR
    return found | ({"RescaleCFG 0.7": RESCALE} if setting.cfg != 1 else {})


def cell(lab: OneMoreStepLab, setting: Setting, nodes: tuple, steps: int) -> Cell:
    sigmas = levels(lab, setting.start, steps, nodes if nodes == ZERO_SNR else ())
    return Cell("unet", "euler", sigmas, setting.cfg, nodes)


def measure(lab: OneMoreStepLab, setting: Setting, steps: int) -> list[Row]:
    rows, work = [], jobs(setting.prompts)
    for label, nodes in arms(lab, setting).items():
        seen = lab.see(cell(lab, setting, nodes, steps), work, f"{setting} {label}")
        shares = torch.histogram(255 * seen.means, BINS).hist / len(work)
        rows.append(Row(setting, label, summary(seen, work), words(seen, work), shares.tolist()))
    return rows


def summary(seen: Seen, work: list[Task]) -> Measures:
    """Everything that the tables say about `jobs`; spreads are within a prompt and relative to the data."""
    objects, backgrounds = torch.tensor([[task.obj, task.background] for task in work]).T
    right, on = seen.objects == objects, nearest_colour(seen.corners) == backgrounds
    prompts = len(work) // GROUPS
    axes, means = data()["axes"], data()["means"][:prompts]
    real, fake = data()["features"][:prompts] @ axes, seen.features.double() @ axes
    by_prompt = lambda values, kept: values[kept].unflatten(0, (prompts, -1))
    measures: dict[str, Callable[[Tensor], float]] = {
        "brightness": lambda kept: brightness_error(seen.corners[kept], backgrounds[kept]),
        "wasserstein": lambda kept: 255 * wasserstein_distance(means.flatten(), seen.means[kept]),
        "frechet": lambda kept: frechet(real.flatten(0, 1), fake[kept]),
        "recall": lambda kept: precision_recall(real.flatten(0, 1), fake[kept])[1],
        "within": lambda kept: recall_within(real, by_prompt(fake, kept)),
        "spread": lambda kept: spread_within(by_prompt(fake, kept)) / spread_within(real),
        "light": lambda kept: spread_within(by_prompt(seen.means, kept)[..., None]) / spread_within(means[..., None]),
        "object": lambda kept: 100 * float(right[kept].double().mean()),
        "background": lambda kept: 100 * float(on[kept].double().mean()),
    }
    return {name: jackknife(measure, len(work), GROUPS) for name, measure in measures.items()}


def recall_within(real: Tensor, fake: Tensor) -> float:
    """Share of reals [prompts m d] that some fake of their prompt [prompts n d] has no farther than its nearest other
    fake: recall (Kynkäänniemi et al. 2019) with one neighbour and a manifold for each prompt."""
    to_others = torch.cdist(fake, fake) + torch.diag(torch.full(fake.shape[1:2], torch.inf, dtype=fake.dtype))
    radius = to_others.min(2).values
    return float((torch.cdist(real, fake) <= radius[:, None]).any(2).double().mean())


def spread_within(values: Tensor) -> float:
    """Of values [prompts n d] within a prompt: root of the variance, in the mean over prompts and summed over d."""
    return float(values.double().var(1).sum(1).mean().sqrt())


def words(seen: Seen, work: list[Task]) -> Measures:
    """Brightness of the corners by background word."""
    background, light = torch.tensor([task.background for task in work]), 255 * seen.corners.double().mean(1)
    indices = {name: list(BACKGROUNDS).index(name) for name in GREYS}

    def of(index: int) -> tuple[float, float]:
        return jackknife(lambda kept: float(light[kept][background[kept] == index].mean()), len(work), GROUPS)

    return {name: of(index) for name, index in indices.items() if bool((background == index).any())}


COLUMNS = {
    "frechet": "Fréchet", "recall": "recall", "within": "recall within", "spread": "spread within",
    "light": "spread of brightness within",
    "object": "object %", "background": "background %",
}  # fmt: skip


def quality(rows: list[Row]) -> Table:
    plain = rows[0].summary
    body: list[list] = []
    for row in rows:
        cells: list = [row.label]
        for key in ("brightness", "wasserstein"):
            cells += [number(row.summary[key]), f"{plain[key][0] / row.summary[key][0]:.1f}"]
        body.append([*cells, *(number(row.summary[key]) for key in COLUMNS)])
    columns = ["start", "brightness error", "times smaller", "Wasserstein", "times smaller", *COLUMNS.values()]
    setting = rows[0].setting
    title = f"From sigma {setting.sigma} ({setting.start} start), cfg {setting.cfg:g}"
    note = f"{GROUPS * setting.prompts} pictures per row: {setting.prompts} prompts, {GROUPS} seeds each."
    return Table(title, columns, body, note)


def greys(blocks: list[list[Row]], through: Tensor) -> Table:
    """Brightness by word: of the data, of plain pictures through the autoencoder alone [words], of every row."""
    wanted = {name: sum(BACKGROUNDS[name]) / 3 for name in GREYS}
    body: list[list] = [["data", None, None, *(f"{value:.0f}" for value in wanted.values())]]
    body.append(["autoencoder alone", None, None, *(f"{through[list(BACKGROUNDS).index(n)]:.1f}" for n in GREYS)])
    body += [
        [row.label, row.setting.sigma, f"{row.setting.cfg:g}",
         *(number(row.greys[name]) if name in row.greys else None for name in GREYS)]
        for rows in blocks for row in rows
    ]  # fmt: skip
    palette = torch.tensor(list(BACKGROUNDS.values())).double().mean(1)
    note = f"The autoencoder alone errs by {float((through - palette).abs().mean()):.2f} in the mean over all words."
    return Table("Brightness of the background by word, 0..255", ["start", "sigma", "cfg", *GREYS], body, note)


def autoencoded(lab: OneMoreStepLab) -> Tensor:
    """Brightness 0..255 of the plain colours after the autoencoder, [backgrounds]."""
    palette = torch.tensor(list(BACKGROUNDS.values())) / 255
    pictures = palette[:, None, None].expand(-1, 128, 128, -1).contiguous()
    latents = lab.host.call("VAEEncode", pixels=pictures, vae=lab.vaes["unet"])[0]["samples"]
    return 255 * corner_colours(lab.decode(latents)).double().mean(1)


def open_prompt(lab: OneMoreStepLab, setting: Setting, seeds: int, steps: int) -> list[list]:
    """The backgrounds of a prompt that leaves them open, for every way to begin."""
    obj = OBJECTS.index(OBJECT)
    told = [Task(obj, b, 5000 + EXAMPLES * b + k) for b in range(len(BACKGROUNDS)) for k in range(EXAMPLES)]
    leak = lab.learn_leak(cell(lab, Setting("own", setting.cfg, 0), (), steps), told)
    work = [Task(obj, ANY, 6000 + seed) for seed in range(GROUPS * seeds)]
    body = []
    for label, nodes in (arms(lab, setting) | {"with a leak of examples": lab.nodes(1.0, leak)}).items():
        seen = lab.see(cell(lab, setting, nodes, steps), work, f"open {setting} {label}")
        found = [number(jackknife(of, len(work), GROUPS)) for of in background_measures(seen.corners)]
        body.append([label, setting.sigma, f"{setting.cfg:g}", *found])
    return body


def background_measures(corners: Tensor) -> list[Callable[[Tensor], float]]:
    """Of the background of pictures [n 3]: mean and standard deviation of its brightness, Wasserstein distance of it to
    the palette's (0..255), recall of the palette's colours (three neighbours), how many are nearest to some picture."""
    palette, light = torch.tensor(list(BACKGROUNDS.values())).double(), 255 * corners.double().mean(1)
    near = nearest_colour(corners)
    return [
        lambda kept: float(light[kept].mean()),
        lambda kept: float(light[kept].std()),
        lambda kept: wasserstein_distance(palette.mean(1), light[kept]),
        lambda kept: precision_recall(palette, 255 * corners[kept].double())[1],
        lambda kept: float(len(near[kept].unique())),
    ]


def plot(blocks: list[list[Row]], path: Path) -> None:
    """Histograms of the mean pixel, one panel per start and guidance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(2, len(blocks))
    lines = -(-len(blocks) // columns)
    size = (5 * columns, 2.8 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, rows in zip(panels.flat, blocks, strict=False):
        setting = rows[0].setting
        wanted = torch.histogram(255 * data()["means"][: setting.prompts].float().flatten(), BINS).hist
        axis.stairs((wanted / wanted.sum()).tolist(), BINS.tolist(), fill=True, alpha=0.25, color="k", label="data")
        for row, colour in zip(rows[:3], ("C1", "C0", "C2"), strict=True):
            dashes = "--" if colour == "C2" else "-"
            axis.stairs(row.histogram, BINS.tolist(), color=colour, label=row.label, lw=1.5, ls=dashes)
        axis.set(title=f"sigma {setting.sigma}, cfg {setting.cfg:g}", yticks=[])
        axis.set(xlabel="mean of a picture's pixels")
    for axis in panels.flat[len(blocks) :]:
        axis.axis("off")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def picture_grid(
    lab: OneMoreStepLab, setting: Setting, steps: int, path: Path, side: int = 112, left: int = 110
) -> None:
    """Ways to begin down, the first task of each grey background across, from the same noise."""
    work, rows = jobs(setting.prompts), list(arms(lab, setting).items())
    names = list(BACKGROUNDS)
    first = {name: next((i for i, t in enumerate(work) if names[t.background] == name), None) for name in GREYS}
    chosen = [i for i in first.values() if i is not None]
    canvas = Image.new("RGB", (left + side * len(chosen), 18 + side * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (label, nodes) in enumerate(rows):
        pen.text((4, 12 + side * row + side // 2), label, "black")
        pictures = lab.decode(lab.run(cell(lab, setting, nodes, steps), work).latents[chosen])
        for column, picture in enumerate((pictures * 255).round().byte().movedim(1, -1)):
            pen.text((left + side * column + 4, 3), names[work[chosen[column]].background], "black")
            shown = Image.fromarray(picture.numpy()).resize((side, side), Image.Resampling.LANCZOS)
            canvas.paste(shown, (left + side * column, 18 + side * row))
    canvas.save(path, quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = ["SD's:1:256", "own:1:256", "SD's:3:256", "own:3:256"]
    help_settings = f"start ({', '.join(STARTS)}), cfg and number of prompts, each drawn with {GROUPS} seeds"
    parser.add_argument("--settings", type=Setting.read, nargs="+", default=list(map(Setting.read, settings)),
                        help=help_settings)  # fmt: skip
    parser.add_argument("--seeds", type=int, default=24, help="of the prompt without a background, in each group")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lab = OneMoreStepLab(Host(Path(folder)), args.cache)
        blocks = [measure(lab, setting, args.steps) for setting in args.settings]
        wide = [row for setting in args.settings for row in open_prompt(lab, setting, args.seeds, args.steps)]
        through = autoencoded(lab)
        picture_grid(lab, args.settings[0], args.steps, args.out / "one_more_step_grid.jpg")
    plot(blocks, args.out / "one_more_step.png")
    light = torch.tensor(list(BACKGROUNDS.values())).double().mean(1)
    wide.insert(
        0, ["data: every background once", None, None, f"{light.mean():.1f}", f"{light.std():.1f}", "0", "1", "20"]
    )
    columns = ["start", "sigma", "cfg", "mean", "standard deviation"]
    columns += ["Wasserstein", "recall of colours", "colours of 20"]
    note = f"The leak is fitted to {EXAMPLES * len(BACKGROUNDS)} pictures of the model itself, on named backgrounds."
    title = f"The background of 'a {OBJECT}', which leaves it open"
    tables = [*map(quality, blocks), greys(blocks, through), Table(title, columns, wide, note)]
    notes = [" ".join(__doc__.split("\n\n")[2].split())]
    notes.append(f"{args.steps} Euler steps; {GROUPS * args.seeds} pictures of the open prompt.")
    facts = [vars(row) | {"setting": asdict(row.setting)} for rows in blocks for row in rows]
    record(
        "one_more_step",
        "One More Step",
        tables,
        began,
        ["one_more_step.png", "one_more_step_grid.jpg"],
        notes,
        args.out,
        facts,
    )
    print("\r" + "\n".join(map(markdown, tables)))


if __name__ == "__main__":
    main()
