"""Train the judge of the benchmarks: which object does a picture show? Minutes on one CPU core.

With --data only: write benchmarks/data.safetensors, what the judge sees in training pictures of the benchmark's first
tasks, plain and after the demo models' autoencoders. With --sizes only: write benchmarks/data_sizes.safetensors, what
it sees in fewer of them, made smaller as Attune Fit Noise Shift makes them smaller.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from common import DEVICE, ROOT, assets, use_host
from data import background_colours, compose, load_objects
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.append(str(ROOT / "benchmarks"))
from harness import WEIGHTS, tasks
from judge import SIDE, Judge, load_judge

TASKS, PLACEMENTS = 384, 4
SMALL_TASKS, SIDES = 96, (64, 80, 96, 112, 128)


def disturb(x: Tensor, generator: torch.Generator) -> Tensor:
    """What a generator may do wrong without changing the object: blur, noise, a colour cast."""
    b = len(x)
    soft = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    x = torch.lerp(x, soft, torch.rand(b, 1, 1, 1, generator=generator))
    x = x + 0.06 * torch.rand(b, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    return x * (1 + 0.1 * torch.randn(b, 3, 1, 1, generator=generator)) + 0.04 * torch.randn(
        b, 3, 1, 1, generator=generator
    )


@torch.no_grad()
def describe_data() -> None:
    """Features and means of PLACEMENTS training pictures for each of the first TASKS tasks of the benchmarks."""
    objects, palette, judge = load_objects(assets()), background_colours(), load_judge()
    generator, work = torch.Generator().manual_seed(1), tasks(TASKS)
    rgba, colour = objects[[task.obj for task in work]], palette[[task.background for task in work]]
    drawn = [compose(rgba, colour, generator) for _ in range(PLACEMENTS)]
    features = {
        "features": torch.stack([judge.features(pictures) for pictures in drawn], 1),
        "means": torch.stack([pictures.flatten(1).mean(1) for pictures in drawn], 1),
    }
    for name, file in WEIGHTS.items():
        through = in_and_out(load_file(ROOT / "models" / "weights" / file), drawn[0])
        features[name] = judge.features(through)
    save_file({k: v.half().contiguous() for k, v in features.items()}, ROOT / "benchmarks" / "data.safetensors")


@torch.no_grad()
def describe_sizes() -> None:
    """Features [SMALL_TASKS PLACEMENTS 256] of training pictures at each of the SIDES, by Lanczos' filter."""
    use_host()
    from comfy.utils import common_upscale

    objects, palette, judge = load_objects(assets()), background_colours(), load_judge()
    generator, work = torch.Generator().manual_seed(1), tasks(SMALL_TASKS)
    rgba, colour = objects[[task.obj for task in work]], palette[[task.background for task in work]]
    drawn = [compose(rgba, colour, generator) for _ in range(PLACEMENTS)]
    features = {
        str(side): torch.stack(
            [judge.features(common_upscale(pictures, side, side, "lanczos", "disabled")) for pictures in drawn], 1
        )
        for side in SIDES
    }
    path = ROOT / "benchmarks" / "data_sizes.safetensors"
    save_file({k: v.half().contiguous() for k, v in features.items()}, path)


def in_and_out(checkpoint: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """Pictures [n 3 h w] in 0..1 through the autoencoder of a checkpoint, as VAEEncode and VAEDecode do it."""
    use_host()
    from comfy.sd import VAE

    vae = VAE(sd={k.removeprefix("first_stage_model."): v for k, v in checkpoint.items() if "first_stage" in k})
    parts = [vae.decode(vae.encode(part.movedim(1, -1))) for part in pictures.split(16)]
    return torch.cat(parts).movedim(-1, 1).float()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--data", action="store_true")
    parser.add_argument("--sizes", action="store_true")
    args = parser.parse_args()
    if args.data:
        describe_data()
        return
    if args.sizes:
        describe_sizes()
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    objects = F.interpolate(load_objects(assets()).float(), (SIDE, SIDE), mode="area").round().to(torch.uint8)
    palette = background_colours()

    def batch(size: int) -> tuple[Tensor, Tensor]:
        label = torch.randint(len(objects), (size,), generator=generator)
        colour = palette[torch.randint(len(palette), (size,), generator=generator)]
        free = torch.rand(size, 3, generator=generator)
        colour = torch.where(torch.rand(size, 1, generator=generator) < 0.3, free, colour)
        return compose(objects[label], colour, generator, SIDE), label

    judge = Judge(len(objects)).to(DEVICE)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps, pct_start=0.1)
    for step in range(1, args.steps + 1):
        x, label = batch(args.batch)
        _, logits = judge(disturb(x, generator).to(DEVICE))
        loss = F.cross_entropy(logits, label.to(DEVICE), label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 250 == 0 or step == args.steps:
            with torch.no_grad():
                x, label = batch(512)
                right = (judge(x.to(DEVICE))[1].argmax(1).cpu() == label).float().mean()
            print(f"step {step}: loss {loss.item():.3f}, accuracy on fresh pictures {right:.4f}", flush=True)
    save_file(
        {k: v.half().contiguous().cpu() for k, v in judge.state_dict().items()},
        ROOT / "benchmarks" / "judge.safetensors",
    )


if __name__ == "__main__":
    main()
