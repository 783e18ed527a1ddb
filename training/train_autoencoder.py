"""Train one of the two autoencoders (4 channels for the UNet, 16 for the MMDiT); resumable.

python train_autoencoder.py --channels 4 --steps 4500

Phase 1 trains both halves; phase 2 (--decoder-only) freezes the encoder, so that latents stay valid, and sharpens the
decoder. Another --steps after the end continues from the trained weights with a new rise and fall of the rate.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F
from autoencoder import decoder, encoder
from common import DEVICE, WORK, assets, autocast, load_checkpoint, save_checkpoint
from data import OBJECT_NAMES, background_colours, compose, load_everything, load_objects
from torch import Tensor, nn

CROP = 64


def batch(objects: Tensor, everything: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Half vocabulary, half any emoji; half palette colours, half any colour; random crops. [size 3 CROP CROP]."""
    half = size // 2
    rgba = torch.cat([
        objects[torch.randint(len(objects), (size - half,), generator=generator)],
        everything[torch.randint(len(everything), (half,), generator=generator)],
    ])  # fmt: skip
    palette = background_colours()
    colour = palette[torch.randint(len(palette), (size,), generator=generator)]
    free = torch.rand(size, 3, generator=generator)
    colour = torch.where(torch.rand(size, 1, generator=generator) < 0.35, free, colour)
    images = compose(rgba, colour, generator)
    corner = torch.randint(0, images.shape[-1] - CROP + 1, (size, 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + CROP, x : x + CROP] for image, (y, x) in zip(images, corner, strict=True)])


def reconstruction_loss(got: Tensor, want: Tensor) -> Tensor:
    """L1 at three scales, plus L1 of the finite differences (edges), plus MSE (what PSNR measures)."""
    loss = (got - want).abs().mean() + 4 * (got - want).square().mean()
    for axis in (2, 3):
        loss = loss + (got.diff(dim=axis) - want.diff(dim=axis)).abs().mean()
    for side in (4, 8):
        loss = loss + (F.avg_pool2d(got, side) - F.avg_pool2d(want, side)).abs().mean()
    return loss


@torch.no_grad()
def psnr(enc: nn.Module, dec: nn.Module, objects: Tensor) -> float:
    """Mean PSNR (dB) over the vocabulary on fixed backgrounds and placements."""
    generator = torch.Generator().manual_seed(1)
    colour = background_colours()[torch.arange(len(objects)) % len(background_colours())]
    images = compose(objects, colour, generator)
    total = 0.0
    for x in images.to(next(dec.parameters()).device).split(32):
        mse = (dec(enc(x)).clamp(0, 1) - x).square().mean(dim=(1, 2, 3))
        total += float((-10 * mse.log10()).sum())
    return total / len(images)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.channels)

    base = WORK / f"autoencoder{args.channels}.pt"
    path = WORK / f"decoder{args.channels}.pt" if args.decoder_only else base
    objects, everything = load_objects(assets()), load_everything(assets(), WORK / "everything.npy")
    enc, dec = encoder(args.channels), decoder(args.channels)
    if args.decoder_only:
        state = load_checkpoint(base)
        enc.load_state_dict(state["encoder"])
        dec.load_state_dict(state["decoder"])
        enc.requires_grad_(False)
    model = nn.ModuleList([enc, dec]).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(args.channels)
    step, log = 0, []
    if path.exists():
        state = load_checkpoint(path)
        enc.load_state_dict(state["encoder"])
        dec.load_state_dict(state["decoder"])
        if state["steps"] == args.steps:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            generator.set_state(state["generator"])
            step, log = state["step"], state["log"]

    began, running = time.time(), 0.0
    while step < args.steps:
        x = batch(objects, everything, args.batch, generator).to(DEVICE).contiguous(memory_format=torch.channels_last)
        with autocast():
            z = enc(x)
            noisy = z + 0.08 * torch.randn_like(z)
            y = dec(noisy)
        # Keep latents near unit scale, so that the decoder's clamp and the noise above mean something.
        scale_loss = (z.float().square().mean(dim=(0, 2, 3)).log()).square().mean() if not args.decoder_only else 0.0
        loss = reconstruction_loss(y.float(), x) + 0.01 * scale_loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        step += 1
        running += (loss.item() - running) / min(step, 100)
        if step % 250 == 0 or step == args.steps:
            log.append({"step": step, "loss": round(running, 4), "psnr": round(psnr(enc, dec, objects), 2)})
            print(json.dumps(log[-1]), f"{time.time() - began:.0f} s", f"{len(OBJECT_NAMES)} objects", flush=True)
            save_checkpoint(
                path,
                encoder=enc.state_dict(), decoder=dec.state_dict(), optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(), generator=generator.get_state(), step=step, steps=args.steps, log=log,
            )  # fmt: skip


if __name__ == "__main__":
    main()
