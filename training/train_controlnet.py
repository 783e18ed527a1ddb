"""Train the demo UNet's ControlNet, which says where the object is and how large; stop and go on at any time.

python train_controlnet.py --steps 640 [--minutes 20]
python train_controlnet.py --measure 64

The hint is white where the object shall be: its filled outline, or the box around it. Needs the training pictures and
the shipped demo checkpoint, nothing else of the training. The file is in ControlNet's own format, with the demo's
vocabulary in it, by which the host's loader knows the architecture.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from common import DEVICE, ROOT, WORK, assets, autocast, load_checkpoint, pack, save_checkpoint, use_host

use_host()
pack()

import comfy.ops  # noqa: E402
from autoencoder import encoder  # noqa: E402
from captions import ANY, draw  # noqa: E402
from comfy.cldm.cldm import ControlNet  # noqa: E402
from data import background_colours, load_objects, place  # noqa: E402
from finetuning import Finetuning  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from train_diffusion import build_unet, sd_alphas_bar  # noqa: E402
from train_text import build as build_text  # noqa: E402
from train_text import encode, initialise  # noqa: E402

from pack.models.demo import UNET_CONFIG, VOCABULARY_KEY  # noqa: E402
from pack.models.store import save_tensors  # noqa: E402

FOLDER = Path(os.environ.get("ATTUNE_CONTROLNET", ROOT / "models" / "controlnet"))
NAME = "attune_demo_controlnet"
SHIPPED = Path(os.environ.get("ATTUNE_WEIGHTS", ROOT / "models" / "weights")) / "attune_demo.safetensors"
VOCABULARY = f"cond_stage_model.{VOCABULARY_KEY}"
EXAMPLES = 6144
FILL = (0.4, 0.9)  # of the frame: wider than the UNet's own training, so that the hint has something to say


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.float() for name, value in tensors.items() if name.startswith(prefix)}


def narrow_encoder(tensors: dict[str, Tensor]) -> tuple[nn.Module, float]:
    """The autoencoder's encoder cut back to the channels that are not padding, and the scale of its latents."""
    narrow, wide = encoder(4), part(tensors, "first_stage_model.taesd_encoder.")
    cut = {name: wide[name][tuple(slice(n) for n in own.shape)] for name, own in narrow.state_dict().items()}
    narrow.load_state_dict(cut)
    return narrow, float(tensors["first_stage_model.vae_scale"])


def hint_of(alpha: Tensor, boxed: Tensor) -> Tensor:
    """White where the object is: uint8 [b h w] of alpha [b h w]; where `boxed` [b], the smallest box around it."""
    outline = alpha > 0.5
    rows, columns = outline.any(2).int(), outline.any(1).int()

    def between(inside: Tensor) -> Tensor:
        return (inside.cummax(1).values * inside.flip(1).cummax(1).values.flip(1)).bool()

    box = between(rows)[:, :, None] & between(columns)[:, None, :]
    return torch.where(boxed[:, None, None], box, outline).byte() * 255


@torch.no_grad()
def examples(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Latents, hints and encoded captions of `count` pictures, each made once."""
    path = WORK / f"controlnet_examples_{count}.pt"
    if path.exists():
        return load_checkpoint(path)
    enc, scale = narrow_encoder(tensors)
    text = build_text()
    text.load_state_dict(part({k: v for k, v in tensors.items() if k != VOCABULARY}, "cond_stage_model."))
    objects, colours, rng, draws = load_objects(assets()), background_colours(), random.Random(0), torch.Generator()
    draws.manual_seed(0)
    made: dict[str, list[Tensor]] = {"latents": [], "hints": [], "context": [], "pooled": []}
    for start in range(0, count, 64):
        n = min(64, count - start)
        which = [(start + i) % len(objects) for i in range(n)]
        of = torch.randint(len(colours), (n,), generator=draws)
        fill = torch.empty(n).uniform_(*FILL, generator=draws)
        shift = (2 * torch.rand(n, 2, generator=draws) - 1) * (1 - fill)[:, None]  # anywhere inside the frame
        placed = place(objects[which], fill, shift)
        pictures = placed[:, :3] + (1 - placed[:, 3:]) * colours[of][:, :, None, None]
        said = [ANY if rng.random() < 0.15 else int(b) for b in of]
        captions = ["" if rng.random() < 0.1 else draw(rng, o, b) for o, b in zip(which, said, strict=True)]
        context, pooled = encode(text, captions)
        made["latents"].append((enc(pictures) / scale).half())
        made["hints"].append(hint_of(placed[:, 3], torch.rand(n, generator=draws) < 0.5))
        made["context"].append(context.half())
        made["pooled"].append(pooled.half())
    found = {name: torch.cat(parts) for name, parts in made.items()}
    save_checkpoint(path, **found)
    return found


def batches(found: dict[str, Tensor], size: int, draws: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    while True:
        some = torch.randint(len(found["latents"]), (size,), generator=draws)
        x0, hint, c, y = (found[name][some].float().to(DEVICE) for name in ("latents", "hints", "context", "pooled"))
        yield x0, hint[:, None].expand(-1, 3, -1, -1) / 255, c, y


def build(unet: nn.Module) -> nn.Module:
    """A copy of the UNet's encoder and middle, with new layers for the hint and zero convolutions at its ends."""
    config = {name: value for name, value in UNET_CONFIG.items() if name != "out_channels"}
    control = ControlNet(
        image_size=16, hint_channels=3, use_spatial_transformer=True, num_heads=-1, num_classes="sequential",
        legacy=False, dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config,
    )  # fmt: skip
    initialise(control)
    control.load_state_dict(unet.state_dict(), strict=False)
    for layer in (*control.zero_convs, control.middle_block_out):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    control.requires_grad_(True)
    # At full resolution random features tell an outline as well as trained ones, and training them costs a fifth more.
    control.input_hint_block[:10].requires_grad_(False)
    return control


def loss_of(unet: nn.Module, control: nn.Module, x0, hint, c, y, draws: torch.Generator) -> Tensor:
    """v-prediction MSE at stratified timesteps of SD's schedule, more of them early, where the layout is decided."""
    b = len(x0)
    u = (torch.arange(b) + torch.rand(b, generator=draws)) / b
    t = (1000 * u.sqrt()).long().clamp(max=999)
    alpha_bar = sd_alphas_bar()[t].float()[:, None, None, None].to(DEVICE)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    eps = torch.randn(x0.shape, generator=draws).to(DEVICE)
    x, t = alpha * x0 + sigma * eps, t.to(DEVICE)
    residuals = control(x=x, hint=hint, timesteps=t, context=c, y=y)
    v = unet(x, t, context=c, y=y, control=residuals).float()
    return (v - (alpha * eps - sigma * x0)).square().mean()


def train(args: argparse.Namespace) -> None:
    tensors = load_file(SHIPPED)
    unet = build_unet()
    unet.load_state_dict(part(tensors, "model.diffusion_model."))
    unet = unet.requires_grad_(False).to(DEVICE)
    control, draws = build(unet), torch.Generator().manual_seed(args.seed)
    run = Finetuning(control, WORK / "controlnet.pt", draws, args.lr)
    if run.step >= args.steps and (FOLDER / f"{NAME}.safetensors").exists():
        return
    made = examples(tensors, min(args.examples, args.steps * args.batch))

    def loss(*batch) -> Tensor:
        with autocast():
            return loss_of(unet, control, *batch, draws)

    feed = batches(made, args.batch, draws)
    run.go(feed, loss, args.steps, args.minutes, warm_up=50, longest=0.995, every=50)
    export(run.average, tensors[VOCABULARY])
    if run.step < args.steps:
        print("stopped; run it again to go on")
        return
    report = {
        "command": f"python training/train_controlnet.py --steps {args.steps} --batch {args.batch} --lr {args.lr}",
        "hint": "white where the object is: half outlines, half boxes",
        "examples": len(made["latents"]), "steps": run.step, "loss": run.log,
        "parameters": sum(p.numel() for p in control.parameters()),
    }  # fmt: skip
    (FOLDER / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def export(average: dict[str, Tensor], vocabulary: Tensor) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    half = {f"control_model.{name}": value.half().contiguous() for name, value in average.items()}
    facts = {"license": "GPL-3.0-or-later", "card": "docs/demo_model.md"}
    save_tensors(FOLDER / f"{NAME}.safetensors", {**half, VOCABULARY: vocabulary}, facts)


def measure(count: int) -> None:
    """How well objects fill the boxes of their hints, drawn by stock nodes with and without the ControlNet."""
    sys.path.append(str(ROOT / "benchmarks"))
    from comfy_process import Host
    from harness import Lab, prompt, tasks

    work, draws = tasks(count, first_seed=1000), torch.Generator().manual_seed(1)
    fill = torch.empty(count).uniform_(*FILL, generator=draws)
    shift = (2 * torch.rand(count, 2, generator=draws) - 1) * (1 - fill)[:, None]
    alpha = place(load_objects(assets())[[task.obj for task in work]], fill, shift)[:, 3]
    hints = hint_of(alpha, torch.arange(count) % 2 == 0).float() / 255
    lab, found = Lab(Host(WORK), WORK / "cache"), {}
    (control,) = lab.host.call("ControlNetLoader", control_net_name=f"{NAME}.safetensors")
    for name, strength in (("without", 0.0), ("with", 1.0)):
        drawn = []
        for start in range(0, count, 16):
            some = work[start : start + 16]
            positive, negative = lab.host.call(
                "ControlNetApplyAdvanced", positive=lab.conditioning([prompt(t.obj, t.background) for t in some]),
                negative=lab.conditioning([""] * len(some)), control_net=control, strength=strength, start_percent=0.0,
                image=hints[start : start + 16, :, :, None].expand(-1, -1, -1, 3), end_percent=1.0,
            )  # fmt: skip
            (out,) = lab.host.call(
                "KSampler", model=lab.models["unet"], seed=start, steps=20, cfg=3.0, sampler_name="euler",
                scheduler="normal", positive=positive, negative=negative, denoise=1.0,
                latent_image={"samples": torch.zeros(len(some), 4, 16, 16)},
            )  # fmt: skip
            drawn.append(lab.pictures("unet", out["samples"]))
        pictures = torch.cat(drawn)
        save_image(pictures, hints, WORK / f"controlnet_{name}.png")
        found[name] = round(float(overlap(object_mask(pictures), hints > 0.5).mean()), 3)
    path = FOLDER / f"{NAME}.json"
    report = json.loads(path.read_text("utf-8"))
    report["overlap"] = {
        "command": f"python training/train_controlnet.py --measure {count}",
        "pictures": count,
        **found,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(found)


def object_mask(pictures: Tensor) -> Tensor:
    """Pixels [b h w] of pictures [b 3 h w] that are far from the colour of the border."""
    border = torch.cat([pictures[:, :, :3].flatten(2), pictures[:, :, -3:].flatten(2)], 2).median(2).values
    return (pictures - border[:, :, None, None]).abs().amax(1) > 0.2


def overlap(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Intersection over union [b] of the boxes around two masks [b h w]."""
    boxes = [hint_of(mask.float(), torch.ones(len(mask), dtype=torch.bool)) > 0 for mask in (drawn, wanted)]
    return (boxes[0] & boxes[1]).sum((1, 2)) / (boxes[0] | boxes[1]).sum((1, 2)).clamp(min=1)


def save_image(pictures: Tensor, hints: Tensor, path: Path) -> None:
    """The first 16 pictures below their hints."""
    rows = [part[i : i + 8] for i in (0, 8) for part in (hints[:, None].expand(-1, 3, -1, -1), pictures)]
    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    Image.fromarray((sheet.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; run again to go on")
    parser.add_argument("--measure", type=int, default=0, metavar="PICTURES", help="draw so many instead")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.measure:
        with torch.inference_mode():
            measure(args.measure)
    else:
        train(args)


if __name__ == "__main__":
    main()
