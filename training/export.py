"""Assemble the two checkpoints that ComfyUI's stock loader opens, and the facts of the model card."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from common import ROOT, WORK, assets, load_checkpoint, pack, use_host

use_host()
pack()

import comfy.latent_formats  # noqa: E402
import comfy.taesd.taesd  # noqa: E402
from autoencoder import decoder, encoder, widen  # noqa: E402
from captions import WORDS  # noqa: E402
from data import background_colours, compose, load_objects  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from train_autoencoder import psnr  # noqa: E402
from train_diffusion import CHANNELS  # noqa: E402

from pack.models.demo import VOCABULARY_KEY, pack_vocabulary  # noqa: E402

WEIGHTS = Path(os.environ.get("ATTUNE_WEIGHTS", ROOT / "models" / "weights"))
LIMIT = 25_000_000  # bytes of one checkpoint


def best_autoencoder(channels: int) -> dict:
    """The encoder that made the latents, with the decoder that was sharpened for it where there is one."""
    state = load_checkpoint(WORK / f"autoencoder{channels}.pt")
    sharper = WORK / f"decoder{channels}.pt"
    if sharper.exists():
        state["decoder"] = load_checkpoint(sharper)["decoder"]
    return state


def vae(channels: int, scale: float, shift: float) -> dict[str, Tensor]:
    """The stock TAESD keys; decode(x) = decoder((x - shift) * scale)."""
    state = best_autoencoder(channels)
    out = {"first_stage_model.vae_scale": torch.tensor(scale), "first_stage_model.vae_shift": torch.tensor(shift)}
    stock = {"encoder": comfy.taesd.taesd.Encoder(channels), "decoder": comfy.taesd.taesd.Decoder(channels)}
    for half, build in (("encoder", encoder), ("decoder", decoder)):
        narrow = build(channels)
        narrow.load_state_dict(state[half])
        for name, tensor in widen(narrow, stock[half].state_dict()).items():
            out[f"first_stage_model.taesd_{half}.{name}"] = tensor
    return out


@torch.no_grad()
def preview_factors() -> tuple[list[list[float]], list[float]]:
    """Least squares from the UNet's latents to the mean colours (-1..1) of their 8x8 pixels: for the live preview."""
    state = load_checkpoint(WORK / "latents4.pt")
    enc = encoder(4)
    enc.load_state_dict(best_autoencoder(4)["encoder"])
    colours = background_colours()
    objects = load_objects(assets())
    images = compose(objects, colours[torch.arange(len(objects)) % len(colours)], torch.Generator().manual_seed(2))
    z = (enc(images) / state["std"]).permute(0, 2, 3, 1).reshape(-1, 4)
    mean = torch.nn.functional.avg_pool2d(images * 2 - 1, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], dim=1), mean).solution
    return [[round(v, 4) for v in row] for row in solution[:4].tolist()], [round(v, 4) for v in solution[4].tolist()]


def write(name: str, tensors: dict[str, Tensor]) -> int:
    tensors = {k: (v if v.dtype == torch.uint8 else v.half()).contiguous() for k, v in tensors.items()}
    path = WEIGHTS / f"{name}.safetensors"
    save_file(tensors, path, metadata={"license": "GPL-3.0-or-later", "card": "docs/demo_model.md"})
    path.chmod(0o644)
    size = path.stat().st_size
    if size > LIMIT:
        raise SystemExit(f"{path.name} has {size} bytes; at most {LIMIT} are wanted.")
    return size


def main() -> None:
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    objects = load_objects(assets())
    facts: dict = {"objects": len(objects), "backgrounds": len(background_colours()), "models": {}}
    facts["preview_factors"], facts["preview_bias"] = preview_factors()
    for kind, channels in CHANNELS.items():
        if not (WORK / f"{kind}.pt").exists():
            print(f"{kind}: not trained yet, left out")
            continue
        state = load_checkpoint(WORK / f"{kind}.pt")
        tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in state["ema"].items()}
        if kind == "unet":
            text = load_checkpoint(WORK / "text.pt")["encoder"]
            tensors |= {f"cond_stage_model.{name}": tensor for name, tensor in text.items()}
            tensors[f"cond_stage_model.{VOCABULARY_KEY}"] = pack_vocabulary(WORDS)
            tensors |= vae(channels, state["std"], 0.0)
        else:
            sd3 = comfy.latent_formats.SD3()
            tensors |= vae(channels, state["std"] * sd3.scale_factor, sd3.shift_factor)
        name = {"unet": "attune_demo", "flow": "attune_demo_flow"}[kind]
        autoencoder = best_autoencoder(channels)
        enc, dec = encoder(channels), decoder(channels)
        enc.load_state_dict(autoencoder["encoder"])
        dec.load_state_dict(autoencoder["decoder"])
        facts["models"][name] = {
            "bytes": write(name, tensors),
            "parameters": sum(t.numel() for t in state["ema"].values()),
            "steps": state["step"], "batch": state["batch"], "learning_rate": state["lr"], "loss": state["log"],
            "autoencoder_psnr_db": round(psnr(enc, dec, objects), 2),
        }  # fmt: skip
        print(name, facts["models"][name]["bytes"], "bytes,", state["step"], "steps, loss", state["log"][-1]["loss"])
    (WEIGHTS / "attune_demo.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
