"""Train the One More Step module of the demo UNet on its precomputed latents; stop and go on at any time.

python train_one_more_step.py --steps 2000 [--minutes 9]

Reads what train_diffusion.py left: latents of every picture and encoded captions. Writes the module that
Load One More Step lists, with how pictures differ from its prediction, and a report of the training beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

import torch
from common import DEVICE, ROOT, WORK, pack, use_host

use_host()
pack()

from data import BACKGROUND_NAMES, OBJECT_NAMES  # noqa: E402
from torch import Tensor  # noqa: E402
from train_diffusion import PLACEMENTS, batches, conditions, latents  # noqa: E402

from pack.kernels.one_more_step import SignalLeak, clean_of_v  # noqa: E402
from pack.models.demo import TEXT_WIDTH  # noqa: E402
from pack.models.one_more_step import Architecture, save_module  # noqa: E402
from pack.models.train_one_more_step import ModuleTraining  # noqa: E402
from pack.models.training import digest  # noqa: E402
from pack.nodes._host.one_more_step import TimelessUNet, diffusers_names, initialise  # noqa: E402

FOLDER = Path(os.environ.get("ATTUNE_ONE_MORE_STEP", ROOT / "models" / "one_more_step"))
NAME = "attune_demo"
ARCHITECTURE = Architecture(
    in_channels=4, channels=(32, 64, 96), blocks=(1, 1, 1), down=(0, 1, 1), middle=1, up=(1, 1, 1, 1, 0, 0),
    context_dim=TEXT_WIDTH, linear=False, head_dim=32,
)  # fmt: skip
FREQUENCIES = 3
EXAMPLES = 2560  # for the leak: every object on every background once


@torch.no_grad()
def residuals(network: TimelessUNet, x0: Tensor) -> Tensor:
    """What pictures differ by from the prediction of their full caption, [EXAMPLES c h w]."""
    context, *_ = conditions()
    generator = torch.Generator().manual_seed(1)
    found = []
    for obj in range(len(OBJECT_NAMES)):
        place = torch.randint(PLACEMENTS, (len(BACKGROUND_NAMES),), generator=generator)
        of = x0[obj, torch.arange(len(place)), place].float().to(DEVICE)
        said = context[obj, : len(place), 0].float().to(DEVICE)
        noise = torch.randn(of.shape, generator=generator).to(DEVICE)
        found.append((of - clean_of_v(network(noise, said))).cpu())
    return torch.cat(found)


def floors(x0: Tensor) -> dict[str, float]:
    """The loss of saying the mean of everything, and the least possible when every caption is full."""
    x = x0.float()
    everything = float((x - x.mean((0, 1, 2))).square().mean())
    return {"mean_of_all": round(everything, 4), "within_a_caption": round(float(x.var(2, unbiased=True).mean()), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; run again to go on")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = WORK / "one_more_step.safetensors"
    x0, _ = latents(ARCHITECTURE.in_channels)
    network = TimelessUNet(ARCHITECTURE, dtype=torch.float32)
    initialise(network, torch.Generator().manual_seed(args.seed))
    draws = torch.Generator()
    feed = batches(x0, args.batch, draws)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        draws.set_state(generator.get_state())
        of, said, _ = next(feed)
        generator.set_state(draws.get_state())
        return of, said

    made = {
        "pictures": digest(x0, *conditions()), "steps": args.steps, "batch": args.batch, "lr": args.lr,
        "seed": args.seed,
    }  # fmt: skip
    training = ModuleTraining(network.to(DEVICE), draw, made, args.steps, args.lr, warm_up=200, seed=args.seed)
    began = time.monotonic()
    with contextlib.closing(training.run(path, every=100)) as taken:
        for step in taken:
            if step % 100 == 0 or step == args.steps:
                last = sum(training.losses[-100:]) / len(training.losses[-100:])
                print(step, f"{last:.4f}", f"{time.monotonic() - began:.0f} s", flush=True)
            if time.monotonic() - began > 60 * args.minutes:
                break
    if training.step < args.steps:
        print("stopped; run it again to go on")
        return
    average = training.result()
    leak = SignalLeak.fit(residuals(average, x0), FREQUENCIES)
    own = average.state_dict()
    tensors = {theirs: own[ours] for theirs, ours in diffusers_names(ARCHITECTURE).items()}
    facts = {
        "oms.prediction": "v", "oms.head_dim": str(ARCHITECTURE.head_dim), "oms.latent_format": "DemoLatent",
        "oms.context": "attune_demo", "oms.context_dim": str(TEXT_WIDTH), "oms.steps": str(args.steps),
        "license": "GPL-3.0-or-later", "card": "docs/one_more_step.md",
    }  # fmt: skip
    save_module(FOLDER / f"{NAME}.safetensors", tensors, leak, facts)
    hundreds = torch.tensor(training.losses[: args.steps // 100 * 100]).reshape(-1, 100).mean(1)
    report = {
        "command": f"python training/train_one_more_step.py --steps {args.steps} --batch {args.batch} --lr {args.lr}",
        "data": f"{len(OBJECT_NAMES)} objects x {len(BACKGROUND_NAMES)} backgrounds x {PLACEMENTS} placements; 12 % "
        "empty prompts, 16 % without a background",
        "parameters": sum(p.numel() for p in average.parameters()), "steps": args.steps, "batch": args.batch,
        "learning_rate": args.lr, "seed": args.seed, "floors": floors(x0),
        "loss": [round(x, 4) for x in hundreds.tolist()],
    }  # fmt: skip
    (FOLDER / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print("done,", report["floors"])


if __name__ == "__main__":
    main()
