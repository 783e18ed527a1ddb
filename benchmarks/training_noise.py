"""Does it pay to choose which noise a LoRA is trained on? Held-out loss and pictures against steps, by the stock node.

python dev.py bench training_noise [--models flow unet] [--seeds 5] [--steps 60] [--drawn 8] [--only WORD ...]

The demo models learn a picture that they have never seen, the drawn apple in 20 placements and colours, with the host's
own Train LoRA: same steps, same seeds, same learning rate; only Attune Training Noise in front of it changes. The loss
on 4 other placements is measured while it trains, at fixed noise and levels evenly over the training time: of the clean
picture, which the trainer minimises, and of the network's own prediction. Pictures drawn with the LoRA are compared
with the data in the judge's features. Writes docs/results/training_noise.json and docs/results.md.
"""

from __future__ import annotations

import argparse
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
from harness import WEIGHTS
from judge import BACKGROUNDS, load_judge
from metrics import kernel_distance
from results import DOCS, Table, markdown, record

LEARNED, HELD_OUT, SIDE = 20, 4, 128
CAPTION = "a drawn apple"
LEVELS = 8  # of the held-out loss, evenly over the training time
EVERY = 15  # steps between two of its measurements
RATE, RANK = 1e-3, 8
DRAW_STEPS, CFG = 8, 3.0
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


@dataclass
class Curve:
    """Of one training: held-out losses by step, of clean picture and prediction; the distance of its pictures."""

    clean: dict[int, float] = field(default_factory=dict)
    prediction: dict[int, float] = field(default_factory=dict)
    distance: float | None = None


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

    def __init__(self, host: Host, name: str, batch: int, drawn: int):
        self.host, self.name, self.batch, self.drawn = host, name, batch, drawn
        loader = host.nodes.NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"]()
        # Not through the executor: 0.3.75 cannot train a network like SD3's whose weights were made there.
        self.model, clip, self.vae = loader.load_checkpoint(WEIGHTS[name])
        clip = clip or loader.load_checkpoint(WEIGHTS["unet"])[1]
        encode = lambda text: host.call("CLIPTextEncode", clip=clip, text=text)[0]
        self.positive, self.negative = encode(CAPTION), encode("")
        self.data = pictures(1, LEARNED)
        self.learned, self.held_out = self._latents(self.data), self._latents(pictures(2, HELD_OUT))
        self.judge = load_judge()
        self.features = self.judge.features(torch.cat([self.data, pictures(2, HELD_OUT)]).permute(0, 3, 1, 2))

    def _latents(self, images: Tensor) -> Tensor:
        return self.host.call("VAEEncode", pixels=images, vae=self.vae)[0]["samples"].clone()

    def run(self, setting: dict, seed: int, steps: int) -> Curve:
        curve = Curve()
        choice = {"planned_draws": steps * self.batch} | setting
        (model, *_) = self.host.call("AttuneTrainingNoise", model=self.model, **choice)
        model = model.clone()

        def watch(executor, guider, *args, **kwargs):
            sampler, done = executor.class_obj, [0]
            told = sampler.loss_callback

            def note(loss: float) -> None:
                told(loss)
                done[0] += 1
                if done[0] % EVERY == 0:
                    curve.clean[done[0]], curve.prediction[done[0]] = self.losses(guider, args[1])

            sampler.loss_callback = note
            return executor(guider, *args, **kwargs)

        model.add_wrapper_with_key("sampler_sample", "bench", watch)
        torch.manual_seed(seed)
        output = self._train(model, seed, steps)
        if not self.drawn:
            return curve
        lora = output[1] if len(output) == 4 else output[0]
        trained = self.host.call("LoraModelLoader", model=self.model, lora=lora, strength_model=1.0)[0]
        curve.distance = self.distance(trained, seed)
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

    def distance(self, model, seed: int) -> float:
        """Of pictures that the trained model draws to the data, kernel distance in the judge's features."""
        empty = {"samples": torch.zeros(self.drawn, *self.learned.shape[1:])}
        latent = self.host.call(
            "KSampler", model=model, seed=1000 + seed, steps=DRAW_STEPS, cfg=CFG, sampler_name="euler",
            scheduler="normal", positive=self.positive, negative=self.negative, latent_image=empty, denoise=1.0,
        )[0]  # fmt: skip
        drawn = self.host.call("VAEDecode", samples=latent, vae=self.vae)[0].permute(0, 3, 1, 2)
        return kernel_distance(self.judge.features(drawn), self.features)


def reached(curves: list[Curve], goal: float, kind: str, steps: int) -> float | None:
    """The mean over the seeds of the factor by which fewer steps reach the loss `goal`; None where some never do."""
    factors = []
    for curve in curves:
        losses = getattr(curve, kind)
        first = next((step for step in sorted(losses) if losses[step] <= goal), None)
        if first is None:
            return None
        factors.append(steps / first)
    return statistics.fmean(factors)


def spread(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.4g} ± {error:.2g}"


def table_of(name: str, found: dict[str, list[Curve]], steps: int) -> Table:
    rows = []
    goals = {
        kind: statistics.fmean(getattr(c, kind)[steps] for c in found["stock"]) for kind in ("clean", "prediction")
    }
    for label, curves in found.items():
        sooner = []
        for kind in ("clean", "prediction"):
            factor = reached(curves, goals[kind], kind, steps)
            sooner.append("not by all seeds" if factor is None else f"{factor:.2f}")
        paired = [c.prediction[steps] - s.prediction[steps] for c, s in zip(curves, found["stock"], strict=True)]
        rows.append(
            [label, spread([c.clean[steps] for c in curves]), spread([c.prediction[steps] for c in curves]),
             "–" if label == "stock" else spread(paired), *sooner,
             None if curves[0].distance is None else spread([c.distance for c in curves])]
        )  # fmt: skip
    columns = [
        "training noise", "held-out loss, clean", "held-out loss, prediction", "prediction minus stock, by seed",
        "fewer steps, clean", "fewer steps, prediction", "kernel distance",
    ]  # fmt: skip
    note = (
        f"After {steps} steps. Fewer steps: by which factor fewer reach the mean loss that stock has at the end, "
        f"measured every {EVERY} steps. ± is the standard error over the seeds."
    )
    return Table(f"{name}: a LoRA on 20 pictures", columns, rows, note)


def measure(
    host: Host, names: list[str], labels: list[str], seeds: int, steps: int, batch: int, drawn: int, say: Callable
) -> tuple[list, dict]:
    tables, data = [], {}
    for name in names:
        training, found = Training(host, name, batch, drawn), {}
        for label in labels:
            found[label] = [training.run(SETTINGS[label], seed, steps) for seed in range(seeds)]
            say(f"{name}, {label}: {spread([one.prediction[steps] for one in found[label]])}")
        tables.append(table_of(name, found, steps))
        data[name] = {label: [vars(curve) for curve in curves] for label, curves in found.items()}
    return tables, data


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=["flow", "unet"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1, help="from 2 on immiscible batches, too")
    parser.add_argument("--drawn", type=int, default=8, help="pictures to compare; 0: the losses alone")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="settings beside stock")
    parser.add_argument("--cache", type=Path, help="not used: nothing is kept")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = [label for label in args.only or SETTINGS if args.batch > 1 or label != "immiscible batch"]
    labels = ["stock", *(label for label in known if label != "stock")]
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        say = lambda text: print(text, flush=True)
        tables, data = measure(host, args.models, labels, args.seeds, args.steps, args.batch, args.drawn, say)
    print("\n" + "\n".join(map(markdown, tables)))
    notes = [
        f"Batch {args.batch}, rank {RANK}, learning rate {RATE:g}, {LEARNED} pictures, {HELD_OUT} others held out."
    ]
    record("training_noise", "Noise for training a LoRA", tables, began, (), notes, args.out, data)


if __name__ == "__main__":
    main()
