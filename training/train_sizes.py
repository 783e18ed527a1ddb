"""Teach the demo flow model smaller pictures: a LoRA for the stock Load LoRA (model only); resumable.

python train_sizes.py --steps 4000 [--early 0.975]

The shipped flow model saw 128 px only and draws crops below. Models at large saw small pictures early and their native
size last; so does this LoRA: over the first share of the steps every batch has one of the SIDES, then all are native.
Let the end be short: some 300 native steps undo the rest.
Needs the emoji pictures only: the parts of the shipped checkpoints are taken for what an earlier training left.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from common import DEVICE, ROOT, WORK, autocast, load_checkpoint, pack, save_checkpoint, use_host

use_host()
pack()

import comfy.latent_formats  # noqa: E402
from autoencoder import decoder, encoder, narrow  # noqa: E402
from data import SIDE  # noqa: E402
from export import WEIGHTS as SHIPPED  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.func import functional_call  # noqa: E402
from train_diffusion import CHANNELS, batches, build_flow, encoded, flow_loss  # noqa: E402

SIDES = (64, 80, 96, 112, SIDE)  # pixels
PLACEMENTS = 1  # random size and position kept per object and background
RANK = 32
FOLDER = Path(os.environ.get("ATTUNE_LORAS", ROOT / "models" / "loras"))
NAME = "attune_demo_flow_sizes"
PREFIX = "model.diffusion_model."


def recover() -> None:
    """Put what training needs of the shipped checkpoints where it looks, unless it is there."""
    WORK.mkdir(parents=True, exist_ok=True)
    channels = CHANNELS["flow"]
    if not (WORK / "text.pt").exists():
        stored = load_file(SHIPPED / "attune_demo.safetensors")
        names = {
            name: name.removeprefix("cond_stage_model.") for name in stored if name.startswith("cond_stage_model.")
        }
        text = {short: stored[name].float() for name, short in names.items() if stored[name].is_floating_point()}
        save_checkpoint(WORK / "text.pt", encoder=text)
    if not (WORK / f"autoencoder{channels}.pt").exists():
        stored = load_file(SHIPPED / "attune_demo_flow.safetensors")
        halves = {}
        for half, build in (("encoder", encoder), ("decoder", decoder)):
            start = f"first_stage_model.taesd_{half}."
            wide = {name.removeprefix(start): tensor for name, tensor in stored.items() if name.startswith(start)}
            halves[half] = narrow(build(channels), wide)
        save_checkpoint(WORK / f"autoencoder{channels}.pt", **halves)


def stored_std() -> float:
    """By which the shipped flow model's latents were divided."""
    with safe_open(SHIPPED / "attune_demo_flow.safetensors", "pt") as stored:
        return float(stored.get_tensor("first_stage_model.vae_scale")) / comfy.latent_formats.SD3().scale_factor


def pictures() -> dict[int, Tensor]:
    """Side -> latents [objects backgrounds placements c h w], in the scale of the native ones."""
    std, found = stored_std(), {}
    for side in SIDES:
        path = WORK / f"latents{CHANNELS['flow']}-{side}.pt"
        if not path.exists():
            save_checkpoint(path, latents=(encoded(CHANNELS["flow"], side, PLACEMENTS) / std).half())
        found[side] = load_checkpoint(path)["latents"]
    return found


class LoRA(nn.Module):
    """W + up down for every linear layer of a network; nothing at first."""

    def __init__(self, net: nn.Module, rank: int):
        super().__init__()
        self.base = {name: value.detach() for name, value in net.state_dict().items()}
        layers = [f"{name}.weight" for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
        self.layers = layers
        self.down = nn.ParameterList([torch.randn(rank, self.base[w].shape[1]) / rank for w in layers])
        self.up = nn.ParameterList([torch.zeros(self.base[w].shape[0], rank) for w in layers])

    def weights(self) -> dict[str, Tensor]:
        """The state dict of the network as it is now."""
        parts = zip(self.layers, self.up, self.down, strict=True)
        return self.base | {name: self.base[name] + up @ down for name, up, down in parts}

    def tensors(self, average: dict[str, Tensor]) -> dict[str, Tensor]:
        """The stock names and float16 values of a file, from a state dict of this module."""
        named = {}
        for i, layer in enumerate(self.layers):
            stem = f"diffusion_model.{layer.removesuffix('.weight')}"
            named[f"{stem}.lora_up.weight"] = average[f"up.{i}"].half().contiguous()
            named[f"{stem}.lora_down.weight"] = average[f"down.{i}"].half().contiguous()
        return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--early", type=float, default=0.975, help="first share of the steps, with all sizes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    recover()

    net = build_flow().to(DEVICE)
    stored = load_file(SHIPPED / "attune_demo_flow.safetensors")
    net.load_state_dict({k.removeprefix(PREFIX): v.float() for k, v in stored.items() if k.startswith(PREFIX)})
    lora = LoRA(net.requires_grad_(False), RANK).to(DEVICE)
    average = {name: value.clone() for name, value in lora.state_dict().items()}
    optimizer = torch.optim.AdamW(lora.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    path, step, log = WORK / "flow-sizes.pt", 0, []
    if path.exists():
        state = load_checkpoint(path)
        lora.load_state_dict(state["lora"])
        average = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        step, log = state["step"], state["log"]
    feeds = {side: batches(x0, args.batch, generator) for side, x0 in pictures().items()}

    began, running = time.time(), {}
    while step < args.steps:
        early = step < args.early * args.steps
        side = SIDES[int(torch.randint(len(SIDES), (), generator=generator))] if early else SIDE
        fall = min(1.0, (args.steps - step) / (0.25 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 100) * fall
        weights = lora.weights()
        with autocast():
            loss = flow_loss(lambda *a, w=weights, **k: functional_call(net, w, a, k), *next(feeds[side]), generator)
        loss.backward()
        nn.utils.clip_grad_norm_(lora.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(0.995, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), list(lora.state_dict().values()), 1 - decay)
        running[side] = running.get(side, loss.item()) + (loss.item() - running.get(side, loss.item())) / 30
        if step % args.save_every == 0 or step == args.steps:
            log.append({"step": step, "loss": {str(s): round(running[s], 4) for s in sorted(running)}})
            print(json.dumps(log[-1]), f"{time.time() - began:.0f} s", flush=True)
            save_checkpoint(
                path, lora=lora.state_dict(), average=average, optimizer=optimizer.state_dict(),
                generator=generator.get_state(), step=step, log=log,
            )  # fmt: skip
            FOLDER.mkdir(parents=True, exist_ok=True)
            facts = {"license": "GPL-3.0-or-later", "card": "docs/noise_shift.md", "steps": str(step)}
            save_file(lora.tensors(average), FOLDER / f"{NAME}.safetensors", metadata=facts)


if __name__ == "__main__":
    main()
