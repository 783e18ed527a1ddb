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
from torch import Tensor

sys.path.append(str(ROOT / "benchmarks"))
from comfy_process import Host
from harness import Lab, Task, prompt

SIZES = "64x64, 80x80, 96x96, 112x112, 128x128"
NATIVE = 128
NAMES = {"unet": "Attune demo, noise shift", "flow": "Attune demo flow, noise shift"}
FILES = {"unet": "attune_demo_shift", "flow": "attune_demo_flow_shift"}
PRESETS = {"quick": 8, "normal": 32, "thorough": 128}  # pictures


def pictures(count: int) -> tuple[list[Task], Tensor]:
    """Tasks and training pictures IMAGE [count 128 128 3] of them, placed as no benchmark places them."""
    work = [Task(53 * i % 128, (3 * i + 1) % 20, i) for i in range(count)]
    rgba, colour = load_objects(assets())[[t.obj for t in work]], background_colours()[[t.background for t in work]]
    return work, compose(rgba, colour, torch.Generator().manual_seed(77)).movedim(1, -1)


def fit(lab: Lab, model: str, method: str, preset: str, sizes: str = SIZES, save_as: str = ""):
    """The profile, plot and report of the node."""
    work, images = pictures(PRESETS[preset])
    with torch.inference_mode():
        captions = lab.conditioning([prompt(t.obj, t.background) for t in work])
    return lab.host.call(
        "AttuneFitNoiseShift", model=lab.models[model], sizes=sizes, native_width=NATIVE, native_height=NATIVE,
        preset=preset, method=method, seed=0, save_as=save_as, positive=captions, images=images, vae=lab.vaes[model],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--preset", choices=list(PRESETS), default="normal")
    parser.add_argument("--method", default="joint")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "profiles")
    args = parser.parse_args()
    folder = WORK / "noise_shift"
    folder.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    lab = Lab(Host(folder), folder / "cache")
    for model in args.models:
        name = f"{FILES[model]} {args.method}"
        profile, _, report = fit(lab, model, args.method, args.preset, args.sizes, name)
        print(report, flush=True)
        named = replace(
            profile, name=NAMES[model], source="training/fit_noise_shift.py: training pictures and captions."
        )
        _, path = lab.host.call("AttuneSaveProfile", profile=named, name=f"{name} finished")
        (args.out / f"{FILES[model]}.json").write_text(Path(path).read_text("utf-8"), "utf-8")


if __name__ == "__main__":
    main()
