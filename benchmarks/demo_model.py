"""The demo models in numbers and pictures: are prompts followed, how bright is "black", how long does a picture take?

python dev.py bench demo_model [--pictures 512] [--flow]

Draws through the real host: every object in turn, backgrounds in turn, three disjoint groups of seeds. The judge that
names the objects never saw a generated picture. Writes docs/demo_model.json, the sample grids beside it, and the
measured part of the model card.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from comfy_process import ROOT, Host
from harness import CACHE, Cell, Lab, Task, prompt, tasks
from judge import BACKGROUNDS, OBJECTS, corner_colours, load_judge, nearest_background

GROUPS = 3
FACTS = json.loads((ROOT / "models" / "weights" / "attune_demo.json").read_text("utf-8"))
BEGIN, END = "<!-- measured: python dev.py bench demo_model -->", "<!-- end -->"
GRID = [
    ("red apple", "white"), ("cat", "black"), ("rocket", "dark blue"), ("sunflower", "light blue"), ("panda", "green"),
    ("red heart", "pink"), ("guitar", "beige"), ("penguin", "orange"),
]  # fmt: skip


def prompt_following(lab: Lab, model: str, count: int) -> dict:
    """Share of pictures whose object and background are those of the prompt, per group of seeds and per object."""
    work = tasks(count)
    pictures = draw(lab, model, work, 20)
    objects = torch.cat([load_judge()(part)[1].argmax(1) for part in pictures.split(32)])
    right = objects == torch.tensor([t.obj for t in work])
    right_background = nearest_background(pictures) == torch.tensor([t.background for t in work])
    groups = [
        {"object": float(o.float().mean()), "background": float(b.float().mean())}
        for o, b in zip(right.chunk(GROUPS), right_background.chunk(GROUPS), strict=True)
    ]
    share = [float(right[[t.obj == i for t in work]].float().mean()) for i in range(len(OBJECTS))]
    return {
        "pictures": count, "groups": groups, "objects_mostly_right": sum(s >= 0.5 for s in share),
        "objects": {name: round(s, 2) for name, s in zip(OBJECTS, share, strict=True)},
    }  # fmt: skip


def brightness(lab: Lab, model: str, per_word: int) -> dict:
    """Mean corner brightness (0..1) for the grey background words at 50 steps, against the training colours."""
    rows = {}
    for word in ("black", "dark gray", "gray", "light gray", "white"):
        index = list(BACKGROUNDS).index(word)
        work = [Task(i * len(OBJECTS) // per_word, index, i) for i in range(per_word)]
        got = corner_colours(draw(lab, model, work, 50)).mean(dim=1)
        rows[word] = {
            "data": round(sum(BACKGROUNDS[word]) / 765, 4), "samples": round(float(got.mean()), 4),
            "std": round(float(got.std()), 4), "n": per_word,
        }  # fmt: skip
    return rows


def draw(lab: Lab, model: str, work: list[Task], steps: int) -> Tensor:
    """[n 3 128 128] in 0..1: Euler on the model's stock "normal" levels, CFG 3."""
    cell = Cell(model, "euler", lab.sigmas(model, "normal", steps))
    print(f"{len(work)} pictures of {steps} steps", flush=True)
    return lab.pictures(model, lab.run(cell, work).latents)


def speed(lab: Lab, model: str, repeats: int = 5) -> dict:
    """Seconds per 20-step picture, one at a time, through KSampler and VAEDecode; minimum and median of `repeats`."""
    call, times = lab.host.call, []
    positive, negative = lab.conditioning(["a cat on a black background"]), lab.conditioning([""])
    channels = lab.models[model].get_model_object("latent_format").latent_channels
    for seed in range(repeats + 1):
        began = time.perf_counter()
        (latent,) = call(
            "KSampler", model=lab.models[model], seed=seed, steps=20, cfg=3.0, sampler_name="euler", scheduler="normal",
            positive=positive, negative=negative, denoise=1.0,
            latent_image={"samples": torch.zeros(1, channels, 16, 16)},
        )  # fmt: skip
        call("VAEDecode", samples=latent, vae=lab.vaes[model])
        times.append(time.perf_counter() - began)
    times = sorted(times[1:])  # the first one loads the model
    return {"min": round(times[0], 2), "median": round(times[repeats // 2], 2), "threads": torch.get_num_threads()}


def sheet(pictures: Tensor, columns: int, side: int = 128) -> Image.Image:
    """Pictures in rows, left to right."""
    canvas = Image.new("RGB", (side * columns, side * -(-len(pictures) // columns)))
    for i, picture in enumerate((pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        tile = Image.fromarray(picture).resize((side, side), Image.LANCZOS)
        canvas.paste(tile, (side * (i % columns), side * (i // columns)))
    return canvas


def samples(lab: Lab, model: str, columns: int = 4) -> Image.Image:
    """Each row one prompt at 50 steps, `columns` seeds, the prompt written beside it."""
    rows = [(OBJECTS.index(o), list(BACKGROUNDS).index(b)) for o, b in GRID]
    work = [Task(o, b, 10 * row + column) for row, (o, b) in enumerate(rows) for column in range(columns)]
    pictures = sheet(draw(lab, model, work, 50), columns)
    canvas = Image.new("RGB", (260 + pictures.width, pictures.height), "white")
    canvas.paste(pictures, (260, 0))
    for row, (o, b) in enumerate(rows):
        ImageDraw.Draw(canvas).text((8, 128 * row + 56), prompt(o, b), fill="black")
    return canvas


def loss_curves(path: Path) -> None:
    """The training losses that came with the weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, facts in FACTS["models"].items():
        axes.plot([p["pictures"] / 1000 for p in facts["loss"]], [p["loss"] for p in facts["loss"]], label=name)
    axes.set(xlabel="thousand pictures seen", ylabel="training loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


def percent(following: dict, key: str) -> str:
    """Mean over the groups of seeds, and each group."""
    shares = [100 * group[key] for group in following["groups"]]
    return f"**{sum(shares) / len(shares):.1f} %** (groups {', '.join(f'{share:.1f}' for share in shares)})"


def write_card(out: Path) -> None:
    """Fill the measured part of the model card from the JSON files, never by hand."""
    rows = []
    for name, title in (("demo_model", "attune_demo (UNet)"), ("demo_model_flow", "attune_demo_flow (MMDiT)")):
        path = out / f"{name}.json"
        if not path.exists():
            continue
        result, facts = json.loads(path.read_text("utf-8")), FACTS["models"][name.replace("demo_model", "attune_demo")]
        following = result["prompt_following"]
        took = result["seconds_per_20_step_picture"]
        rows += [
            f"### {title}", "",
            f"- {facts['parameters'] / 1e6:.2f} M parameters, file {facts['bytes'] / 1e6:.1f} MB; {facts['steps']} "
            f"steps of {facts['batch']} pictures, last training loss {facts['loss'][-1]['loss']:.3f}; autoencoder "
            f"{facts['autoencoder_psnr_db']:.1f} dB on the vocabulary.",
            f"- {following['pictures']} pictures, 20 Euler steps, CFG 3, {GROUPS} groups of seeds: object right "
            f"{percent(following, 'object')}, background right {percent(following, 'background')}; "
            f"{following['objects_mostly_right']} of {len(OBJECTS)} objects right in at least half of their pictures.",
            f"- A 20-step picture takes {took['median']} s (minimum {took['min']} s) on "
            f"{took['threads']} CPU thread(s).",
            "", "| background word | corner brightness in the data | in samples, 50 steps | spread |",
            "|---|---|---|---|",
            *(f"| {w} | {r['data']:.3f} | {r['samples']:.3f} | {r['std']:.3f} (n = {r['n']}) |"
              for w, r in result["brightness"].items()),
            "", f"![samples]({name}_samples.jpg)", "",
        ]  # fmt: skip
    card = out / "demo_model.md"
    if not card.exists():
        return
    head, _, tail = card.read_text("utf-8").partition(BEGIN)
    card.write_text(head + BEGIN + "\n\n" + "\n".join(rows) + END + tail.partition(END)[2], "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=3 * len(OBJECTS))
    parser.add_argument("--per-word", type=int, default=16, help="pictures per brightness word")
    parser.add_argument("--objects", type=int, default=len(OBJECTS), help="on the sheet of the vocabulary")
    parser.add_argument("--flow", action="store_true", help="the flow model instead of the UNet")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    name, model = ("demo_model_flow", "flow") if args.flow else ("demo_model", "unet")
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Host(Path(folder)), args.cache)
        result = {
            "seconds_per_20_step_picture": speed(lab, model),
            "prompt_following": prompt_following(lab, model, args.pictures),
            "brightness": brightness(lab, model, args.per_word),
        }
        samples(lab, model).save(args.out / f"{name}_samples.jpg", quality=88)
        everything = [Task(i, 7 * i % len(BACKGROUNDS), i) for i in range(args.objects)]
        sheet(draw(lab, model, everything, 20), 16, 96).save(args.out / f"{name}_vocabulary.jpg", quality=85)
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    loss_curves(args.out / "demo_model_loss.png")
    write_card(args.out)
    groups = result["prompt_following"].pop("groups")
    result["prompt_following"].pop("objects")
    print(json.dumps(groups), json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
