"""Train the demo models from the pictures to the checkpoints; every stage is resumable, finished ones are skipped.

The defaults are the recipe of the shipped files, but for the 16-channel autoencoder, which had 5,500 steps and no
further decoder training. On one CPU core the shipped autoencoders took about 20 and 25 minutes, the UNet 95 and the
flow model 75 (beside other work).
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VIDEO_STEPS, INPAINT_STEPS = 6000, 1100


def stage(script: str, *words: object) -> None:
    """A script with these words, as from the command line, but in this process: loading ComfyUI takes seconds."""
    print("==", script, *words, flush=True)
    sys.argv = [script, *map(str, words)]
    runpy.run_path(str(HERE / script), run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder-steps", type=int, default=4500, help="each of the two")
    parser.add_argument("--decoder-steps", type=int, default=3000)
    parser.add_argument("--text-steps", type=int, default=1200)
    parser.add_argument("--unet-steps", type=int, default=9000)
    parser.add_argument("--flow-steps", type=int, default=7500)
    parser.add_argument("--one-more-step-steps", type=int, default=2000)
    parser.add_argument("--sizes-steps", type=int, default=4000)
    parser.add_argument("--controlnet-steps", type=int, default=640)
    parser.add_argument("--video-steps", type=int, default=VIDEO_STEPS)
    parser.add_argument("--inpaint-steps", type=int, default=INPAINT_STEPS)
    parser.add_argument("--inpaint", action="store_true", help="the inpainting model alone; the rest as shipped")
    parser.add_argument("--video", action="store_true", help="the video model alone; the rest is taken as shipped")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    video = ("train_video.py", "--steps", args.video_steps, "--threads", args.threads)
    inpaint = ("train_inpaint.py", "--steps", args.inpaint_steps, "--threads", args.threads)
    if args.video:
        return stage(*video)
    if args.inpaint:
        return stage(*inpaint)
    for channels in (4, 16):
        stage(
            "train_autoencoder.py", "--channels", channels, "--steps", args.autoencoder_steps, "--threads", args.threads
        )
    stage("train_text.py", "--steps", args.text_steps)
    stage("train_diffusion.py", "unet", "--steps", args.unet_steps, "--threads", args.threads)
    stage("train_diffusion.py", "flow", "--steps", args.flow_steps, "--threads", args.threads)
    for channels in (4, 16):
        words = ("--channels", channels, "--decoder-only", "--steps", args.decoder_steps, "--threads", args.threads)
        stage("train_autoencoder.py", *words)
    stage("export.py")
    stage("train_sizes.py", "--steps", args.sizes_steps, "--threads", args.threads)
    stage("train_one_more_step.py", "--steps", args.one_more_step_steps, "--threads", args.threads)
    stage("train_controlnet.py", "--steps", args.controlnet_steps, "--threads", args.threads)
    stage(*inpaint)
    stage(*video)


if __name__ == "__main__":
    main()
