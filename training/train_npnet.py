"""Collect noise pairs of a model and train its NPNet on them, from the command line; both resume where they stopped.

python dev.py train-npnet                      the demo UNet's, which the pack ships
python dev.py train-npnet --checkpoint my.safetensors --prompts prompts.txt --pixels 1024 --size published
python dev.py train-npnet --processes 4 ...    on four GPUs of this machine
python dev.py train-npnet --part 2/4 ...       only collect the second of four parts
accelerate launch training/train_npnet.py ...  on several machines, as `accelerate config` was told

Runs the pack's own nodes inside a real ComfyUI (COMFYUI_PATH). Where several processes run, each collects its
part of the pairs into the same folder, and all of them train one network, with the gradient of the whole batch. With
--published FOLDER the pairs are not collected but read in the format of the NPNet authors. The demo's file goes to
models/golden_noise, another one to WORK/models/npnet, from where it may be copied to a ComfyUI's models/npnet.
"""

from __future__ import annotations

import argparse
import importlib
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
DEMO = "attune_demo.safetensors"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=DEMO, help="a file, or the demo's name")
    parser.add_argument("--prompts", default="160", help="a text file, one prompt a line; or how many of the demo's")
    parser.add_argument("--pixels", type=int, default=128, help="side of the pictures")
    parser.add_argument("--seeds", type=int, default=4, help="pairs of each prompt")
    parser.add_argument("--strong", type=float, default=3.0, help="guidance down; the authors used 5.5 for SDXL")
    parser.add_argument("--shard-size", type=int, default=128, help="pairs in a file, of which one is in memory")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the authors used 0.0001")
    parser.add_argument("--size", choices=["small", "published"], default="small")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="pairs in the format of the NPNet authors")
    parser.add_argument("--name", default="attune_demo_npnet", help="of the pairs and of the network")
    parser.add_argument("--work", type=Path, default=WORK / "npnet")
    return parser.parse_args()


def all_processes():
    """The accelerator of a process among several, as `accelerate launch` and torchrun start them; None for one alone.

    It must be made before ComfyUI starts: it chooses the GPU that ComfyUI then takes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())


def load(host: Host, checkpoint: str) -> tuple:
    if Path(checkpoint).parent != Path("."):
        import folder_paths

        folder_paths.add_model_folder_path("checkpoints", str(Path(checkpoint).resolve().parent))
    return host.call("CheckpointLoaderSimple", ckpt_name=Path(checkpoint).name)


def collect(host: Host, args: argparse.Namespace, recipe, part: str) -> str:
    """The pairs of a part, made or imported: what there is now."""
    model, clip, _ = load(host, args.checkpoint)
    noise_pairs, node = host.module("nodes._host.noise_pairs"), host.module("nodes.train_npnet")
    folder = noise_pairs.pairs_folder(args.name)
    node.check_place(folder, args.name)
    if args.published:
        published = importlib.import_module(f"{ROOT}.training.published_pairs")
        count = published.import_published(clip, args.published, folder, args.shard_size)
        return f"{count} published pairs"
    if args.prompts.isdecimal():
        lines = "\n".join(prompt(task.obj, task.background) for task in tasks(int(args.prompts)))
    else:
        lines = Path(args.prompts).read_text("utf-8")
    (negative,) = host.call("CLIPTextEncode", clip=clip, text="")
    (latent,) = host.call("EmptyLatentImage", width=args.pixels, height=args.pixels, batch_size=1)
    settings = host.module("nodes._host.redenoise").Redenoise(args.strong)
    source = noise_pairs.Source(model, clip, negative, latent["samples"], settings)
    with torch.inference_mode():  # seeds far from those of the benchmarks
        return node.collected(source, lines, args.seeds, 10**6, args.shard_size, part, folder, recipe)


def main() -> None:
    args, accelerator = options(), all_processes()
    rank, count = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    if count > 1 and args.part != "1/1":
        raise SystemExit("--part is for single processes: under accelerate every process takes its own part.")
    args.work.mkdir(parents=True, exist_ok=True)
    host = Host(args.work)
    train = host.module("nodes.train_npnet")
    recipe = train.Recipe(args.epochs, args.batch_size, args.learning_rate, size=args.size)
    if rank == 0 or not args.published:
        print(collect(host, args, recipe, f"{rank + 1}/{count}" if accelerator else args.part), flush=True)
    if args.part != "1/1":
        return
    if accelerator:
        accelerator.wait_for_everyone()
    share = train.Share(rank, count, lambda tensor: accelerator.reduce(tensor, "sum")) if accelerator else train.ALONE
    made = train.trained(host.module("nodes._host.noise_pairs").pairs_folder(args.name), args.name, recipe, share)
    if rank == 0:
        print(host.module("models.npnet_files").load_npnet(made).describe())
        if args.checkpoint == DEMO and args.name == "attune_demo_npnet":
            shutil.copyfile(made, ROOT / "models" / "golden_noise" / f"{args.name}.safetensors")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from error
