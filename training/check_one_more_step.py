"""How near is the demo's One More Step module to the best there is, and would longer training help?

python check_one_more_step.py [--objects 6] [--placements 6]

The best module says the mean of a caption's pictures. Here that mean is taken from new placements of some objects on
every background, compared with the module's prediction, and given to the sampler in its place. Adds what it finds to
the report beside the module and draws docs/one_more_step_training.png. A few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, assets
from data import BACKGROUND_NAMES, OBJECT_NAMES, VOCABULARY, background_colours, compose, load_objects
from torch import Tensor

sys.path.append(str(ROOT / "benchmarks"))
from comfy_process import Host
from harness import Noise, Task, prompt
from judge import corner_colours
from one_more_step import OneMoreStepLab, levels

REPORT = ROOT / "models" / "one_more_step" / "attune_demo.json"
PLOT = ROOT / "docs" / "one_more_step_training.png"
START, STEPS, BATCH = "SD's", 8, 16
SHARES = {"empty": 0.12, "object": 0.16, "full": 0.57, "brightness": 0.15}  # of captions, as train_diffusion draws them


@torch.no_grad()
def new_latents(lab: OneMoreStepLab, objects: list[int], placements: int) -> Tensor:
    """Pictures that no training saw, in the model's scale: [objects backgrounds placements c h w]."""
    known, colours = load_objects(assets()), background_colours()
    generator, model = torch.Generator().manual_seed(5), lab.models["unet"].model
    rows = []
    for picture in known[objects]:
        n = len(colours) * placements
        images = compose(picture.expand(n, -1, -1, -1), colours.repeat_interleave(placements, 0), generator)
        z = torch.cat([lab.host.call("VAEEncode", pixels=part.movedim(1, -1), vae=lab.vaes["unet"])[0]["samples"]
                       for part in images.split(20)])  # fmt: skip
        rows.append(model.process_latent_in(z).unflatten(0, (len(colours), placements)))
    return torch.stack(rows)


def predictions(lab: OneMoreStepLab, objects: list[int]) -> Tensor:
    """What the module says of every caption in full, [objects backgrounds c h w]."""
    n, rows = len(BACKGROUND_NAMES), []
    for obj in objects:
        _, x0 = lab.host.call(
            "AttuneOneMoreStep", model=lab.models["unet"], oms_model=lab.module,
            positive=lab.conditioning([prompt(obj, b) for b in range(n)]),
            latent={"samples": torch.zeros(n, 4, 16, 16)},
        )  # fmt: skip
        rows.append(lab.models["unet"].model.process_latent_in(x0["samples"]))
    return torch.stack(rows)


def prediction_error(x0: Tensor, predicted: Tensor) -> dict[str, float]:
    """Mean squares: of pictures about their caption's mean (which no module can lower), of the captions' means about
    the mean of all, and of the prediction about its caption's mean, without the chance of so few placements."""
    within, mean = x0.var(2, unbiased=True), x0.mean(2)
    error = (predicted - mean).square() - within / x0.shape[2]
    between = (mean - mean.mean((0, 1))).square()
    return {"within_a_caption": float(within.mean()), "between_captions": float(between.mean()),
            "of_the_prediction": float(error.mean())}  # fmt: skip


def least_loss(x0: Tensor, mean_of_all: float) -> float:
    """The training's loss if every prediction were perfect, for the kinds of captions that it draws."""
    one_object = float(x0.flatten(1, 2).var(1, unbiased=True).mean())
    full = float(x0.var(2, unbiased=True).mean())
    named = [[BACKGROUND_NAMES.index(name) for name in names] for names in VOCABULARY["brightness"].values()]
    parts = [(len(of), float(x0[:, of].flatten(1, 2).var(1, unbiased=True).mean())) for of in named]
    rest = len(BACKGROUND_NAMES) - sum(count for count, _ in parts)
    brightness = sum(n * loss for n, loss in [*parts, (rest, full)]) / len(BACKGROUND_NAMES)
    losses = {"empty": mean_of_all, "object": one_object, "full": full, "brightness": brightness}
    return sum(SHARES[kind] * loss for kind, loss in losses.items())


def drawn(lab: OneMoreStepLab, objects: list[int], x0: Tensor) -> dict[str, dict[str, float]]:
    """Every second caption from the same noises, begun plainly, from the prediction and from the mean itself: mean
    absolute error of the background's brightness and of the pixels' mean, in 0..255."""
    pairs = [(i, b) for i in range(len(objects)) for b in range(len(BACKGROUND_NAMES)) if (i + b) % 2 == 0]
    work = [Task(objects[i], b, 777 + n) for n, (i, b) in enumerate(pairs)]
    truth = torch.stack([255 * lab.decode(x0[i, b]).mean() for i, b in pairs])
    colours = 255 * background_colours()[[b for _, b in pairs]].mean(1)
    means = torch.stack([x0[i, b].mean(0) for i, b in pairs])
    found = {}
    for name in ("plain", "prediction", "exact_mean"):
        pictures = []
        for at in range(0, len(work), BATCH):
            part = work[at : at + BATCH]
            latents = lab.models["unet"].model.process_latent_out(means[at : at + BATCH])
            pictures.append(lab.decode(begin(lab, part, name, latents)))
        all_of_them = torch.cat(pictures)
        error = (255 * corner_colours(all_of_them).mean(1) - colours).abs().mean()
        pixels = (255 * all_of_them.flatten(1).mean(1) - truth).abs().mean()
        found[name] = {"background": round(float(error), 2), "pixels": round(float(pixels), 2)}
    return found | {"pictures": len(work)}


def begin(lab: OneMoreStepLab, part: list[Task], name: str, latents: Tensor) -> Tensor:
    """A batch from one of the three beginnings: below the model's highest noise a latent is a mean of the noise."""
    model = lab.patched("unet", lab.nodes() if name == "prediction" else (), part)
    positive, negative = (lab.conditioning(texts) for texts in ([prompt(t.obj, t.background) for t in part],
                                                                [""] * len(part)))  # fmt: skip
    (guider,) = lab.host.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=1.0)
    (solver,) = lab.host.call("KSamplerSelect", sampler_name="euler")
    latent = {"samples": latents if name == "exact_mean" else torch.zeros_like(latents)}
    return lab.host.call(
        "SamplerCustomAdvanced", noise=Noise([task.seed for task in part]), guider=guider, sampler=solver,
        sigmas=torch.tensor(levels(lab, START, STEPS)), latent_image=latent,
    )[0]["samples"]  # fmt: skip


def plot(report: dict[str, Any], path: Path) -> None:
    """The loss of every hundred steps, between that of saying the mean of everything and the least possible."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses = report["loss"]
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.plot([100 * (i + 1) for i in range(len(losses))], losses, color="C0", label="training, mean of 100 steps")
    axis.axhline(report["floors"]["mean_of_all"], color="0.6", ls=":", label="the mean of all pictures")
    axis.axhline(report["check"]["least_loss"], color="0.3", ls="--", label="every caption's own mean")
    axis.set(xlabel="step", ylabel="loss", ylim=(0, None), xlim=(0, None))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=6)
    parser.add_argument("--placements", type=int, default=6)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(args.report.read_text("utf-8"))
    objects = list(range(0, len(OBJECT_NAMES), -(-len(OBJECT_NAMES) // args.objects)))
    with tempfile.TemporaryDirectory() as folder:
        lab = OneMoreStepLab(Host(Path(folder)), Path(folder))
        x0 = new_latents(lab, objects, args.placements)
        errors = prediction_error(x0, predictions(lab, objects))
        begun = drawn(lab, objects, x0)
    report["check"] = {
        "command": f"python training/check_one_more_step.py --objects {args.objects} --placements {args.placements}",
        "mean_squares": {name: round(value, 4) for name, value in errors.items()},
        "least_loss": round(least_loss(x0, report["floors"]["mean_of_all"]), 4),
        "brightness_error": begun,
    }
    args.report.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    plot(report, args.plot)
    print(json.dumps(report["check"], indent=1))


if __name__ == "__main__":
    main()
