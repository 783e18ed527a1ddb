"""Does it pay to choose which noise a LoRA is trained on? Held-out loss and pictures against steps, by the stock node.

python dev.py bench training_noise [--models flow unet] [--batches 1 4] [--seeds 5] [--steps 40] [--drawn 6] [--only …]

The demo models learn a picture that they have never seen, the drawn apple in 20 placements and colours, with the host's
own Train LoRA: same steps, same seeds, same learning rate; only Attune Training Noise in front of it changes. The loss
on 4 other placements is measured while it trains, at fixed noise and levels evenly over the training time: of the clean
picture, which the trainer minimises, and of the network's own prediction. After half of the steps and all of them the
network draws pictures. The judge's features say how far these are from the learned ones (Fréchet), and how many lie
nearer to the learned picture's mean than to that of each of the 128 pictures that it was to be told from. Writes
docs/results/training_noise.json and docs/results.md; every training is kept, and a stopped benchmark goes on.
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
from dataclasses import dataclass, field
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
from results import DOCS, Table, markdown, record

LEARNED, HELD_OUT, KNOWN, SIDE = 20, 4, 200, 128
CAPTION = "a drawn apple"
LEVELS = 8  # of the held-out loss, evenly over the training time
EVERY = 8  # steps between two of its measurements
RATE, RANK = 1e-3, 8
DRAWN_AT, DRAW_STEPS, CFG = 2, 8, 3.0  # how often pictures are drawn, and how
FORMAT = 1  # of what is kept; raise it when a training changes
SETTINGS: dict[str, dict[str, Any]] = {
    "stock": {},
    "logit-normal": {"timesteps": "logit-normal"},
    "mode": {"timesteps": "mode"},
    "flat prediction": {"timesteps": "flat prediction"},
    "min-SNR": {"timesteps": "min-SNR"},
    "clusters": {"timesteps": "clusters"},
    "curriculum": {"timesteps": "curriculum"},
    "immiscible batch": {"noise": "immiscible batch"},
    "nearest of 4": {"noise": "nearest of several"},
}
BATCHED = ["stock", "immiscible batch", "nearest of 4", "logit-normal"]  # in batches: each costs its square


@dataclass
class Curve:
    """Of one training, by step: held-out losses of clean picture and prediction, features of what was drawn."""

    clean: dict[int, float] = field(default_factory=dict)
    prediction: dict[int, float] = field(default_factory=dict)
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
        choice = {"planned_draws": steps * self.batch} | setting
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
                    curve.clean[done[0]], curve.prediction[done[0]] = self.losses(guider, args[1])
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
    def losses(self, guider, extra_args: dict) -> tuple[float, float]:
        """Held-out, of the clean picture and of the prediction, means over the levels."""
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
        return statistics.fmean(clean), statistics.fmean(prediction)

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
        tables.append(loss_table(title, found, args.steps))
        if looks:
            tables.append(picture_table(title, found, looks))
        kept[title] = {
            label: [{"clean": one.clean, "prediction": one.prediction} for one in curves]
            for label, curves in found.items()
        }
    return tables, kept


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
    record("training_noise", "Noise for training a LoRA", tables, began, (), notes, args.out, kept)


if __name__ == "__main__":
    main()
