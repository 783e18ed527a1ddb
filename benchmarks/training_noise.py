"""Does it pay to choose which noise a LoRA is trained on? Held-out loss and pictures against steps, by the stock node.

python dev.py bench training_noise [--models flow unet] [--batches 1 4] [--seeds 5] [--steps 40] [--drawn 6] [--only …]

The demo models learn a picture that they have never seen, the drawn apple in 20 placements and colours, with the host's
own Train LoRA: same steps, same seeds, same learning rate; only Attune Training Noise in front of it changes. The loss
on 4 other placements is measured while it trains, at fixed noise and levels evenly over the training time: of the clean
picture, which the trainer minimises, and of the network's own prediction. After half of the steps and all of them the
network draws pictures. The judge's features say how far these are from the learned ones (Fréchet), and how many lie
nearer to the learned picture's mean than to that of each of the 128 pictures that it was to be told from. First, what
pairing changes at all: how much nearer noise and picture lie, and by how many standard deviations the noise leans
towards its picture. Writes docs/results/training_noise.json, where rows of other settings stay if their stock was the
same, docs/results.md and docs/training_noise.png; every training is kept, and a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from comfy_process import ROOT, Host
from harness import CACHE, WEIGHTS, tasks
from judge import BACKGROUNDS, OBJECTS, load_judge
from looks import data
from metrics import frechet, jackknife
from results import DOCS, Table, command_line, markdown, record

LEARNED, HELD_OUT, KNOWN, SIDE = 20, 4, 200, 128
CAPTION = "a drawn apple"
LEVELS = 8  # of the held-out loss, evenly over the training time
EVERY = 8  # steps between two of its measurements
RATE, RANK = 1e-3, 8
DRAWN_AT, DRAW_STEPS, CFG = 2, 8, 3.0  # how often pictures are drawn, and how
PAIRED = 100  # batches of which the distance of noise and picture is measured
MIDDLE = "the level in the middle of the training time"
FORMAT = 2  # of what is kept; raise it when a training changes
SETTINGS: dict[str, dict[str, Any]] = {
    "stock": {},
    "logit-normal": {"timesteps": "logit-normal"},
    "mode": {"timesteps": "mode"},
    "flat prediction": {"timesteps": "flat prediction"},
    "min-SNR": {"timesteps": "min-SNR"},
    "clusters": {"timesteps": "clusters"},
    "curriculum": {"timesteps": "curriculum"},
    "noisy half": {"lowest_sigma": MIDDLE},
    "clean half": {"highest_sigma": MIDDLE},
    "immiscible batch": {"noise": "immiscible batch"},
    "nearest of 4": {"noise": "nearest of several"},
}
BATCHED = ["stock", "immiscible batch", "nearest of 4", "logit-normal"]  # in batches: each costs its square


@dataclass
class Curve:
    """Of one training, by step: held-out losses of clean picture and prediction, the latter also at each level from
    noisy to clean, and features of what was drawn."""

    clean: dict[int, float] = field(default_factory=dict)
    prediction: dict[int, float] = field(default_factory=dict)
    levels: dict[int, list[float]] = field(default_factory=dict)
    features: dict[int, list[list[float]]] = field(default_factory=dict)

    @staticmethod
    def kept(path: Path) -> Curve:
        found = json.loads(path.read_text("utf-8"))
        return Curve(*({int(step): value for step, value in found[name].items()} for name in vars(Curve())))


def pictures(seed: int, count: int) -> Tensor:
    """The drawn apple at random places and sizes on the vocabulary's colours, [count side side 3] in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = Image.open(ROOT / "models/pictures/apple.png").convert("RGB")
    sky, out = torch.tensor(drawn.getpixel((0, 0))) / 255, []
    colours = torch.tensor(list(BACKGROUNDS.values())) / 255
    for i in range(count):
        side = int(SIDE * (0.74 + 0.14 * float(torch.rand(1, generator=generator))))
        small = drawn.resize((side, side), Image.Resampling.LANCZOS)
        object_ = torch.tensor(list(small.tobytes()), dtype=torch.float32).reshape(side, side, 3) / 255
        left, top = (int((SIDE - side) * float(torch.rand(1, generator=generator))) for _ in range(2))
        picture = colours[(7 * i + seed) % len(colours)].expand(SIDE, SIDE, 3).clone()
        shown = ((object_ - sky).abs().amax(-1, keepdim=True) > 0.08).float()
        part = picture[top : top + side, left : left + side]
        picture[top : top + side, left : left + side] = shown * object_ + (1 - shown) * part
        out.append(picture)
    return torch.stack(out)


class Training:
    """One demo model, the data, and the stock trainer."""

    def __init__(self, host: Host, name: str, batch: int, drawn: int, cache: Path = CACHE):
        self.host, self.name, self.batch, self.drawn, self.cache = host, name, batch, drawn, cache
        loader = host.nodes.NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"]()
        # Not through the executor: 0.3.75 cannot train a network like SD3's whose weights were made there.
        self.model, clip, self.vae = loader.load_checkpoint(WEIGHTS[name])
        clip = clip or loader.load_checkpoint(WEIGHTS["unet"])[1]
        encode = lambda text: host.call("CLIPTextEncode", clip=clip, text=text)[0]
        self.positive, self.negative = encode(CAPTION), encode("")
        self.learned, self.held_out = self._latents(pictures(1, LEARNED)), self._latents(pictures(2, HELD_OUT))
        self.judge = load_judge()

    def _latents(self, images: Tensor) -> Tensor:
        return self.host.call("VAEEncode", pixels=images, vae=self.vae)[0]["samples"].clone()

    def curve(self, setting: dict, seed: int, steps: int) -> Curve:
        """`run`, from the cache where it was run before."""
        sources = [WEIGHTS[self.name], *(f"../../{layer}/training_noise.py" for layer in ("kernels", "nodes/_host"))]
        made = [hashlib.sha256((ROOT / "models/weights" / one).read_bytes()).hexdigest() for one in sources]
        facts = [made, setting, seed, steps, self.batch, self.drawn, RATE, RANK, EVERY, FORMAT, torch.__version__]
        self.cache.mkdir(parents=True, exist_ok=True)
        path = self.cache / f"training-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(vars(self.run(setting, seed, steps))), "utf-8")
            temporary.replace(path)
        return Curve.kept(path)

    def run(self, setting: dict, seed: int, steps: int) -> Curve:
        curve = Curve()
        middle = float(self.model.get_model_object("model_sampling").percent_to_sigma(0.5))
        choice = {"planned_draws": steps * self.batch} | setting
        choice = {name: middle if value == MIDDLE else value for name, value in choice.items()}
        (model, *_) = self.host.call("AttuneTrainingNoise", model=self.model, **choice)
        model = model.clone()
        draws_at = {steps * (i + 1) // DRAWN_AT for i in range(DRAWN_AT)} if self.drawn else set()

        def watch(executor, guider, *args, **kwargs):
            sampler, done = executor.class_obj, [0]
            told = sampler.loss_callback

            def note(loss: float) -> None:
                told(loss)
                done[0] += 1
                if done[0] % EVERY == 0:
                    curve.clean[done[0]], levels = self.losses(guider, args[1])
                    curve.prediction[done[0]], curve.levels[done[0]] = statistics.fmean(levels), levels
                if done[0] in draws_at:
                    curve.features[done[0]] = self.judge.features(self.draw(guider, args[1], seed)).tolist()

            sampler.loss_callback = note
            return executor(guider, *args, **kwargs)

        model.add_wrapper_with_key("sampler_sample", "bench", watch)
        torch.manual_seed(seed)
        self._train(model, seed, steps)
        return curve

    def _train(self, model, seed: int, steps: int) -> tuple:
        node = self.host.nodes.NODE_CLASS_MAPPINGS["TrainLoraNode"]
        given = {one.id: [one.default] for one in node.GET_SCHEMA().inputs if hasattr(one, "default")}
        given |= {
            "model": [model], "latents": [{"samples": one[None]} for one in self.learned], "positive": [self.positive],
            "batch_size": [self.batch], "steps": [steps], "learning_rate": [RATE], "rank": [RANK], "seed": [seed],
            "training_dtype": ["fp32"], "lora_dtype": ["fp32"], "gradient_checkpointing": [False],
            "existing_lora": ["[None]"],
        }  # fmt: skip
        return self.host.call("TrainLoraNode", **given)

    @torch.no_grad()
    def losses(self, guider, extra_args: dict) -> tuple[float, list[float]]:
        """Held-out: of the clean picture, the mean over the levels, and of the prediction at each of them."""
        sampling = self.model.get_model_object("model_sampling")  # the stock one, whatever the trainer is given
        x0 = guider.inner_model.process_latent_in(self.held_out)
        conds = guider.conds["positive"]
        guider.conds["positive"] = conds[:1]
        clean, prediction = [], []
        for i in range(LEVELS):
            sigma = torch.full((len(x0),), float(sampling.percent_to_sigma((i + 0.5) / LEVELS)))
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(100 + i))
            x = sampling.noise_scaling(sigma, noise, x0.clone(), False)
            error = float((guider(x, sigma, **extra_args) - x0).square().mean())
            gain = float(sampling.calculate_denoised(sigma[:1], torch.ones(1, 1), torch.zeros(1, 1)).abs())
            clean.append(error)
            prediction.append(error / gain**2)
        guider.conds["positive"] = conds
        return statistics.fmean(clean), prediction

    @torch.no_grad()
    def draw(self, guider, extra_args: dict, seed: int) -> Tensor:
        """Pictures [drawn 3 side side] of the network as it stands, by Euler's method at the guidance CFG."""
        from comfy.sampler_helpers import convert_cond
        from comfy.samplers import process_conds

        noise = torch.randn(self.drawn, *self.learned.shape[1:], generator=torch.Generator().manual_seed(1000 + seed))
        model, (sigmas,) = guider.inner_model, self.host.call(
            "BasicScheduler", model=self.model, scheduler="normal", steps=DRAW_STEPS, denoise=1.0
        )  # fmt: skip
        sampling = self.model.get_model_object("model_sampling")
        conds, cfg = guider.conds, guider.cfg
        both = {"positive": convert_cond(self.positive), "negative": convert_cond(self.negative)}
        guider.conds, guider.cfg = process_conds(model, noise, both, noise.device), CFG
        x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
        for sigma, sigma_next in itertools.pairwise(sigmas):
            denoised = guider(x, sigma.expand(len(x)), **extra_args)
            x = denoised + sigma_next / sigma * (x - denoised)
        guider.conds, guider.cfg = conds, cfg
        x = sampling.inverse_noise_scaling(sigmas[-1], x)
        return self.host.call("VAEDecode", samples={"samples": model.process_latent_out(x)}, vae=self.vae)[0].movedim(
            -1, 1
        )


class Looks:
    """What the judge sees in drawn pictures: how far they are from the learned ones, how many it takes for them."""

    def __init__(self) -> None:
        known = data()
        self.axes = known["axes"]
        features = load_judge().features(pictures(3, KNOWN).movedim(-1, 1)).double()
        self.learned = features @ self.axes
        work = tasks(len(known["features"]))
        objects = torch.tensor([task.obj for task in work])
        means = [known["features"][objects == i].flatten(0, 1).mean(0) for i in range(len(OBJECTS))]
        self.means = torch.stack([features.mean(0), *means])  # the learned picture's first
        self.sure = self.right(load_judge().features(pictures(4, KNOWN).movedim(-1, 1)))

    def right(self, features: Tensor) -> float:
        """The share that lies nearest to the learned picture's mean (a nearest class mean classifier)."""
        return float((torch.cdist(features.double(), self.means).argmin(1) == 0).double().mean())

    def distance(self, features: Tensor) -> str:
        """Fréchet, of the pictures of all seeds [seeds drawn 256] together, with its standard error over the seeds."""
        far = lambda kept: frechet(self.learned, features[kept].flatten(0, 1).double() @ self.axes)
        if len(features) == 1:
            return f"{far([0]):.3g}"
        found, error = jackknife(far, len(features), len(features))
        return f"{found:.3g} ± {error:.2g}"


def sooner(curve: Curve, stock: Curve, kind: str, steps: int) -> float | None:
    """The factor by which fewer steps reach the loss that stock has with the same seed in the end, linear between two
    measurements; None where the loss is never reached."""
    losses, goal = getattr(curve, kind), getattr(stock, kind)[steps]
    at = sorted(losses)
    for before, step in zip([None, *at], at, strict=False):
        if losses[step] <= goal:
            if before is None:
                return steps / step
            return steps / (step - (step - before) * (goal - losses[step]) / (losses[before] - losses[step]))
    return None


def spread(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.4g} ± {error:.2g}"


def factors(curves: list[Curve], stock: list[Curve], kind: str, steps: int) -> str:
    found = [sooner(c, s, kind, steps) for c, s in zip(curves, stock, strict=True)]
    reached = [one for one in found if one is not None]
    if len(reached) < len(found):
        return f"{len(reached)} of {len(found)} reach it"
    return spread(reached)


def loss_table(title: str, found: dict[str, list[Curve]], steps: int) -> Table:
    rows, stock = [], found["stock"]
    for label, curves in found.items():
        row: list = [label]
        for kind in ("clean", "prediction"):
            row.append(spread([getattr(c, kind)[steps] for c in curves]))
            less = [100 * (getattr(c, kind)[steps] / getattr(s, kind)[steps] - 1) for c, s in zip(curves, stock)]  # noqa: B905
            row += ["–", "–"] if label == "stock" else [spread(less), factors(curves, stock, kind, steps)]
        rows.append(row)
    columns = ["training noise"]
    for kind in ("clean picture", "prediction"):
        columns += [f"loss, {kind}", "to stock of the same seed, %", "fewer steps, factor"]
    note = (
        f"Held-out, after {steps} steps; measured every {EVERY}. Factor: by which fewer steps reach the loss that "
        "stock has with the same seed in the end. ± is the standard error over the seeds."
    )
    return Table(f"{title}: a LoRA on 20 pictures", columns, rows, note)


def picture_table(title: str, found: dict[str, list[Curve]], looks: Looks) -> Table:
    at, rows = sorted(found["stock"][0].features), []
    for label, curves in found.items():
        row: list = [label]
        for step in at:
            row.append(spread([100 * looks.right(torch.tensor(c.features[step])) for c in curves]))
        for step in at:
            row.append(looks.distance(torch.tensor([c.features[step] for c in curves])))
        rows.append(row)
    columns = [f"right after {step}, %" for step in at] + [f"Fréchet after {step}" for step in at]
    note = (
        f"{len(found['stock'][0].features[at[0]])} pictures of each seed, {DRAW_STEPS} steps of Euler at cfg {CFG:g}. "
        f"The judge is right on {100 * looks.sure:.0f} % of pictures of the data. "
        "± is the standard error over the seeds."
    )
    return Table(f"{title}: what it draws", ["training noise", *columns], rows, note)


def half_table(title: str, found: dict[str, list[Curve]], steps: int) -> Table:
    """Where a setting helps: the losses of the prediction over the noisier and the cleaner half of the levels."""
    rows = []
    for label, curves in found.items():
        row: list = [label]
        for part in (slice(None, LEVELS // 2), slice(LEVELS // 2, None)):
            losses, stock = ([statistics.fmean(c.levels[steps][part]) for c in of] for of in (curves, found["stock"]))
            less = [100 * (one / its - 1) for one, its in zip(losses, stock, strict=True)]
            row += [spread(losses), "–" if label == "stock" else spread(less)]
        rows.append(row)
    columns = ["training noise"]
    for half in ("noisy", "clean"):
        columns += [f"loss of the prediction, {half} half", "to stock of the same seed, %"]
    return Table(f"{title}: by level", columns, rows)


def pairing_table(host: Host, name: str, latents: Tensor) -> Table:
    """What pairing changes, of the learned pictures' latents as the trainer has them."""
    kernel, draws, rows = host.module("kernels.training_noise"), torch.Generator().manual_seed(0), []
    normal = lambda shape: torch.randn(shape, generator=draws)
    for label, batch, several in (
        *((f"immiscible batch of {n}", n, 1) for n in (4, 16)),
        *((f"nearest of {n}", 1, n) for n in (4, 16)),
    ):
        near, far, lean, apart = [], [], [], []
        for _ in range(PAIRED):
            pictures = latents[torch.randperm(len(latents), generator=draws)[:batch]]
            noise = normal(pictures.shape)
            if several == 1:
                chosen = kernel.assign(pictures, noise)
                towards = pictures - pictures.mean(0)  # what they share decides nothing
            else:
                chosen = kernel.nearest(pictures, noise, several, lambda n=noise: normal(n.shape))
                towards = pictures
            near += (chosen - pictures).flatten(1).norm(dim=1).tolist()
            far += (noise - pictures).flatten(1).norm(dim=1).tolist()
            along = (chosen * towards).flatten(1).sum(1) / towards.flatten(1).norm(dim=1)
            lean += along.tolist()
            apart += [100 * one**2 / chosen[0].numel() for one in along.tolist()]
        less = 100 * (1 - statistics.fmean(near) / statistics.fmean(far))
        rows.append([label, f"{less:.2f}", spread(lean), f"{statistics.fmean(apart):.2f}"])
    columns = [
        "noise", "nearer than as drawn, %", "leans towards its picture, standard deviations",
        "of the noise's variance in that direction, %",
    ]  # fmt: skip
    note = (
        f"{PAIRED} batches of the {LEARNED} pictures' latents, {latents[0].numel()} numbers, in the model's scale. Of "
        f"a batch, towards its picture less the batch's mean. As drawn {100 / latents[0].numel():.2f} % of the "
        "variance lies in any one direction."
    )
    return Table(f"{name}: what pairing changes", columns, rows, note)


def measure(host: Host, args: argparse.Namespace, say: Callable) -> tuple[list, dict]:
    tables, kept = [], {}
    looks = Looks() if args.drawn else None
    for name, batch in [(name, batch) for name in args.models for batch in args.batches]:
        training, found = Training(host, name, batch, args.drawn, args.cache), {}
        labels = args.only or [one for one in SETTINGS if one in BATCHED or batch == 1]
        for label in ["stock", *labels]:
            if label not in found and (batch > 1 or label != "immiscible batch"):
                found[label] = [training.curve(SETTINGS[label], seed, args.steps) for seed in range(args.seeds)]
                say(f"{name}, batch {batch}, {label}: {spread([one.clean[args.steps] for one in found[label]])}")
        title = f"{name}, batch {batch}"
        tables += [loss_table(title, found, args.steps), half_table(title, found, args.steps)]
        if looks:
            tables.append(picture_table(title, found, looks))
        if not any(table.title.startswith(f"{name}: ") for table in tables):
            scaled = training.model.model.process_latent_in(training.learned)
            tables.append(pairing_table(host, name, scaled))
        kept[title] = {
            label: [{"clean": one.clean, "prediction": one.prediction} for one in curves]
            for label, curves in found.items()
        }
    return tables, kept


def with_last(tables: list[Table], kept: dict, out: Path) -> tuple[list[Table], dict]:
    """With rows, tables and curves of the last record that were not made again, where its stock was this one."""
    path = out / "results" / "training_noise.json"
    if not path.exists():
        return tables, kept
    last, command, new = json.loads(path.read_text("utf-8")), command_line("training_noise"), {t.title for t in tables}
    same = {title for title in kept if _same_stock(kept[title]["stock"], last["data"].get(title, {}).get("stock", []))}
    old = {table["title"]: Table(**table) for table in last["tables"]}
    joined = []
    for table in tables:
        labels, rows = {row[0] for row in table.rows}, []
        if table.title in old and table.title.partition(":")[0] in same:
            rows = [row for row in old[table.title].rows if row[0] not in labels]
        commands = dict.fromkeys([old[table.title].command or last["command"]] if rows else [])
        joined.append(replace(table, rows=[*table.rows, *rows], command="`, `".join([*commands, command])))
    rest = [replace(t, command=t.command or last["command"]) for title, t in old.items() if title not in new]
    data = {**last["data"]}
    for title, curves in kept.items():
        data[title] = {**(data.get(title, {}) if title in same else {}), **curves}
    return sorted([*joined, *rest], key=lambda t: t.title.partition(":")[0]), data


def _same_stock(now: list[dict], then: list[dict]) -> bool:
    """The same seeds and steps, and losses but for another processor's arithmetic."""
    ends = lambda curves: [[float(one[kind][max(one[kind], key=int)]) for kind in one] for one in curves]
    steps = lambda curves: [sorted(map(int, one["clean"])) for one in curves]
    near = lambda: torch.allclose(torch.tensor(ends(now)), torch.tensor(ends(then)), rtol=2e-3)
    return steps(now) == steps(then) and near()


def plot(data: dict, path: Path) -> None:
    """The held-out loss of the prediction by step, in percent of stock's with the same seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(data), figsize=(4.6 * len(data), 4.2), squeeze=False, sharey=True, layout="constrained"
    )
    colours = {label: f"C{i}" for i, label in enumerate(SETTINGS)}
    for axis, (title, known) in zip(axes[0], data.items(), strict=True):
        for label, curves in known.items():
            at = sorted(curves[0]["prediction"], key=int)
            less = [
                [100 * (one["prediction"][step] / its["prediction"][step] - 1) for step in at]
                for one, its in zip(curves, known["stock"], strict=True)
            ]
            values = torch.tensor(less)
            error = values.std(0) / len(values) ** 0.5 if len(values) > 1 else None
            given = {
                "label": label,
                "color": colours[label],
                "linestyle": "--" if label in list(SETTINGS)[10:] else "-",
            }
            axis.errorbar([int(step) for step in at], values.mean(0), error, capsize=2, **given)
        axis.set(title=title, xlabel="steps")
    axes[0, 0].set_ylabel("held-out loss of the prediction, to stock, %")
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, fontsize=8, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=["flow", "unet"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4], help="from 2 on immiscible batches, too")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help=f"a multiple of {EVERY}")
    parser.add_argument("--drawn", type=int, default=6, help="pictures to look at; 0: the losses alone")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="settings beside stock")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    if args.steps % EVERY:
        parser.error(f"--steps is a multiple of {EVERY}, but it is {args.steps}.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tables, kept = measure(Host(Path(folder)), args, lambda text: print(text, flush=True))
    print("\n" + "\n".join(map(markdown, tables)))
    notes = [f"Rank {RANK}, learning rate {RATE:g}, {LEARNED} pictures, {HELD_OUT} others held out."]
    tables, kept = with_last(tables, json.loads(json.dumps(kept)), args.out)
    plot(kept, args.out / "training_noise.png")
    record("training_noise", "Noise for training a LoRA", tables, began, ["training_noise.png"], notes, args.out, kept)


if __name__ == "__main__":
    main()
