"""The demo models in numbers and pictures: are prompts followed, how bright is "black", how long does a picture take?

python dev.py bench demo_model [--pictures 512] [--flow]

Draws through the real host (CheckpointLoaderSimple, CLIPTextEncode, KSampler, VAEDecode): every object of the list
in turn, backgrounds in turn, three disjoint groups of seeds. The judge that names the objects never saw a generated
picture. Writes docs/demo_model.json and the sample grids beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from harness import article
from PIL import Image, ImageDraw
from torch import Tensor

from comfy_process import ROOT, Host
from judge import BACKGROUNDS, OBJECTS, corner_colours, load_judge, nearest_background

GROUPS = 3
FACTS = json.loads((ROOT / "models" / "weights" / "attune_demo.json").read_text("utf-8"))
BEGIN, END = "<!-- measured: python dev.py bench demo_model -->", "<!-- end -->"
GRID_PROMPTS = [
    "a red apple on a white background", "a cat on a black background", "a rocket on a dark blue background",
    "a sunflower on a light blue background", "a panda on a green background", "a red heart on a pink background",
    "a guitar on a beige background", "a penguin on an orange background",
]  # fmt: skip


class Painter:
    """Prompts to pictures with one of the demo models, through stock nodes."""

    def __init__(self, host: Host, flow: bool):
        self.host = host
        self.model, self.clip, self.vae = host.call("CheckpointLoaderSimple", ckpt_name="attune_demo.safetensors")
        if flow:
            self.model, _, self.vae = host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")
        self.empty = self.encode("")

    def encode(self, text: str):
        return self.host.call("CLIPTextEncode", clip=self.clip, text=text)[0]

    def draw(self, text: str, seed: int, steps: int = 20, cfg: float = 3.0, batch: int = 1) -> Tensor:
        """[batch 3 128 128] in 0..1, Euler on the model's stock "normal" schedule."""
        (latent,) = self.host.call("EmptyLatentImage", width=128, height=128, batch_size=batch)
        (latent,) = self.host.call(
            "KSampler", model=self.model, seed=seed, steps=steps, cfg=cfg, sampler_name="euler", scheduler="normal",
            positive=self.encode(text), negative=self.empty, latent_image=latent, denoise=1.0,
        )  # fmt: skip
        (pictures,) = self.host.call("VAEDecode", samples=latent, vae=self.vae)
        return pictures.permute(0, 3, 1, 2)


def prompt_following(painter: Painter, pictures: int) -> dict:
    """Share of pictures whose object and background are those of the prompt, with the spread over groups of seeds."""
    judge, names = load_judge(), list(BACKGROUNDS)
    groups, per_object = [], torch.zeros(len(OBJECTS), 2)
    for group in range(GROUPS):
        right_object = right_background = 0
        for i in range(pictures // GROUPS):
            o, b = i % len(OBJECTS), (7 * i + i // len(OBJECTS) + group) % len(names)
            text = f"{article(OBJECTS[o])} {OBJECTS[o]} on {article(names[b])} {names[b]} background"
            picture = painter.draw(text, seed=100_000 * group + i)
            hit = int(judge(picture)[1].argmax()) == o
            right_object += hit
            right_background += int(nearest_background(picture)) == b
            per_object[o] += torch.tensor([float(hit), 1.0])
            if i % 32 == 0:
                print(f"\rgroup {group + 1}/{GROUPS}: {i}/{pictures // GROUPS}", end="", flush=True)
        n = pictures // GROUPS
        groups.append({"object": right_object / n, "background": right_background / n})
        print(f"\rgroup {group + 1}/{GROUPS}: object {right_object / n:.3f}, background {right_background / n:.3f}")
    share = per_object[:, 0] / per_object[:, 1].clamp(min=1)
    return {
        "pictures": pictures // GROUPS * GROUPS,
        "groups": groups,
        "objects_mostly_right": int((share >= 0.5).sum()),
        "objects": {name: round(float(s), 2) for name, s in zip(OBJECTS, share, strict=True)},
    }


def brightness(painter: Painter, per_word: int = 12) -> dict:
    """Mean corner brightness (0..1) for the background words at 50 steps, against the training colours."""
    rows = {}
    for word in ("black", "dark gray", "gray", "light gray", "white"):
        objects = [OBJECTS[i * len(OBJECTS) // per_word] for i in range(per_word)]
        got = [
            float(corner_colours(painter.draw(f"{article(o)} {o} on a {word} background", seed=i, steps=50)).mean())
            for i, o in enumerate(objects)
        ]
        got_t = torch.tensor(got)
        rows[word] = {
            "data": round(sum(BACKGROUNDS[word]) / 765, 4), "samples": round(float(got_t.mean()), 4),
            "std": round(float(got_t.std()), 4), "n": per_word,
        }  # fmt: skip
        print(word, rows[word])
    return rows


def speed(painter: Painter, repeats: int = 5) -> dict:
    """Seconds per 20-step picture with CFG and decoding, batch 1; minimum and median of `repeats`."""
    painter.draw("warm up", seed=0, steps=2)
    times = []
    for i in range(repeats):
        began = time.perf_counter()
        painter.draw("a cat on a black background", seed=i)
        times.append(time.perf_counter() - began)
    return {
        "min": round(min(times), 2),
        "median": round(sorted(times)[repeats // 2], 2),
        "threads": torch.get_num_threads(),
    }


def grid(painter: Painter, path: Path, steps: int = 50, columns: int = 4) -> None:
    """Each row one prompt, `columns` seeds, the prompt written beside it."""
    canvas = Image.new("RGB", (300 + 128 * columns, 128 * len(GRID_PROMPTS)), "white")
    for row, text in enumerate(GRID_PROMPTS):
        ImageDraw.Draw(canvas).text((8, 128 * row + 56), text, fill="black")
        for column, picture in enumerate(painter.draw(text, seed=row, steps=steps, batch=columns)):
            array = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
            canvas.paste(Image.fromarray(array), (300 + 128 * column, 128 * row))
    canvas.save(path, quality=88)


def vocabulary_grid(painter: Painter, path: Path, columns: int = 16) -> None:
    """Every object once, backgrounds in turn."""
    names = list(BACKGROUNDS)
    canvas = Image.new("RGB", (96 * columns, 96 * -(-len(OBJECTS) // columns)))
    for i, name in enumerate(OBJECTS):
        word = names[7 * i % len(names)]
        picture = painter.draw(f"{article(name)} {name} on {article(word)} {word} background", seed=i)[0]
        tile = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).resize((96, 96), Image.LANCZOS)
        canvas.paste(tile, (96 * (i % columns), 96 * (i // columns)))
    canvas.save(path, quality=85)


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
    parser.add_argument("--flow", action="store_true", help="the flow model instead of the UNet")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    name = "demo_model_flow" if args.flow else "demo_model"
    with tempfile.TemporaryDirectory() as folder:
        painter = Painter(Host(Path(folder)), args.flow)
        result = {"seconds_per_20_step_picture": speed(painter)}
        grid(painter, args.out / f"{name}_samples.jpg")
        vocabulary_grid(painter, args.out / f"{name}_vocabulary.jpg")
        result["prompt_following"] = prompt_following(painter, args.pictures)
        result["brightness"] = brightness(painter)
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    loss_curves(args.out / "demo_model_loss.png")
    write_card(args.out)
    following = result["prompt_following"]
    print(f"objects mostly right: {following['objects_mostly_right']} of {len(OBJECTS)}")
    print(json.dumps(result["seconds_per_20_step_picture"]))


if __name__ == "__main__":
    main()
