"""Collect noise pairs of the demo UNet and train its NPNet on them: both resume where they stopped.

python training/train_npnet.py [--prompts 160] [--seeds 4] [--epochs 6] [--part 1/1] [--work FOLDER]

Runs the pack's own nodes inside a real ComfyUI (COMFYUI_PATH). With --part 2/4 it only collects the second of four
parts; when all are there, one run without it trains. The file goes to models/golden_noise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from comfy_process import Host  # noqa: E402
from harness import prompt, tasks  # noqa: E402

WORK = Path(os.environ.get("ATTUNE_TRAINING", ROOT / ".host" / "training"))
NAME = "attune_demo_npnet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=4, help="pairs of each prompt")
    parser.add_argument("--strong", type=float, default=3.0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--work", type=Path, default=WORK / "npnet")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    host = Host(args.work)
    model, clip, _ = host.call("CheckpointLoaderSimple", ckpt_name="attune_demo.safetensors")
    (negative,) = host.call("CLIPTextEncode", clip=clip, text="")
    # Seeds far from those of the benchmarks.
    lines = "\n".join(prompt(task.obj, task.background) for task in tasks(args.prompts))
    name, said = host.call(
        "AttuneCollectNoisePairs", model=model, clip=clip, prompts=lines, negative=negative, name="demo",
        latent_image={"samples": torch.zeros(1, 4, 16, 16)}, seeds_per_prompt=args.seeds, seed=10**6,
        strong_cfg=args.strong, shard_size=128, part=args.part,
    )  # fmt: skip
    print(said)
    if args.part != "1/1":
        return
    _, report = host.call(
        "AttuneTrainNPNet", pairs=name, name=NAME, epochs=args.epochs, batch_size=32, learning_rate=3e-3, size="small"
    )
    print(report)
    made = args.work / "models" / "npnet" / f"{NAME}.safetensors"
    shutil.copyfile(made, ROOT / "models" / "golden_noise" / made.name)


if __name__ == "__main__":
    main()
