"""Fit the demo models' noise shifts on training pictures with their captions: models/profiles/attune_demo*_shift.json.

Resumable: sizes that a stopped run has finished lie in .host/training/noise_shift. It runs the pack's own node in a
real ComfyUI, so it is also the recipe for other models.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from common import ROOT, WORK, assets
from data import background_colours, compose, load_objects
from PIL import Image
from torch import Tensor

sys.path.append(str(ROOT / "benchmarks"))
from comfy_process import Host
from harness import Lab, Task, prompt

SIZES = "64x64, 80x80, 96x96, 112x112, 128x128"
NATIVE = 128
NAMES = {
    "unet": "Attune demo, noise shift", "flow": "Attune demo flow, noise shift",
    "sizes": "Attune demo flow with small sizes, noise shift",
}  # fmt: skip
FILES = {"unet": "attune_demo_shift", "flow": "attune_demo_flow_shift", "sizes": "attune_demo_flow_sizes_shift"}
LORA = "attune_demo_flow_sizes.safetensors"
PRESETS = {"quick": 8, "normal": 32, "thorough": 128}  # pictures
CFG = 3.0  # of the model's own pictures


def pictures(count: int) -> tuple[list[Task], Tensor]:
    """Tasks and training pictures IMAGE [count 128 128 3] of them, placed as no benchmark places them."""
    work = [Task(53 * i % 128, (3 * i + 1) % 20, i) for i in range(count)]
    rgba, colour = load_objects(assets())[[t.obj for t in work]], background_colours()[[t.background for t in work]]
    return work, compose(rgba, colour, torch.Generator().manual_seed(77)).movedim(1, -1)


def fit(lab: Lab, name: str, preset: str, sizes: str, save_as: str, own: bool):
    """The profile, plot and report of the node; `own`: on pictures that the model draws itself."""
    work, images = pictures(PRESETS[preset])
    model, vae = ("flow" if name == "sizes" else name), lab.vaes["flow" if name == "sizes" else name]
    network = lab.models[model]
    if name == "sizes":
        (network,) = lab.host.call("LoraLoaderModelOnly", model=network, lora_name=LORA, strength_model=1.0)
    with torch.inference_mode():
        captions = lab.conditioning([prompt(t.obj, t.background) for t in work])
        given = {"negative": lab.conditioning([""]), "cfg": CFG} if own else {"images": images}
    return lab.host.call(
        "AttuneFitNoiseShift", model=network, sizes=sizes, native_width=NATIVE, native_height=NATIVE, preset=preset,
        seed=0, save_as=save_as, positive=captions, vae=vae, **given,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--preset", choices=list(PRESETS), default="normal")
    parser.add_argument("--own", action="store_true", help="on pictures that the model draws itself")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "profiles")
    parser.add_argument("--plots", type=Path, help="a folder for pictures of the curves")
    args = parser.parse_args()
    folder = WORK / "noise_shift"
    folder.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    lab = Lab(Host(folder), folder / "cache")
    for model in args.models:
        name = f"{FILES[model]}{' own' if args.own else ''}"
        profile, plot, report = fit(lab, model, args.preset, args.sizes, name, args.own)
        print(report, flush=True)
        told = "pictures of its own" if args.own else "training pictures"
        named = replace(profile, name=NAMES[model], source=f"training/fit_noise_shift.py: {told} and captions.")
        _, path = lab.host.call("AttuneSaveProfile", profile=named, name=f"{name} finished")
        (args.out / f"{FILES[model]}.json").write_text(Path(path).read_text("utf-8"), "utf-8")
        if args.plots:
            picture = Image.fromarray((plot[0] * 255).round().byte().numpy())
            picture.save(args.plots / f"noise_shift_curves_{model}.png", optimize=True)


if __name__ == "__main__":
    main()
