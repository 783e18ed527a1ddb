"""Teach the demo UNet to inpaint: nine input channels, and a low-rank change of the other weights; resumable.

python train_inpaint.py --steps 1100 [--minutes 20]

The input is Stable Diffusion's for inpainting (Rombach et al. 2022): noisy latent, mask, latent of the picture that is
grey where the mask is. The new channels start at zero, so that training starts at the shipped UNet. Needs the training
pictures and the shipped demo checkpoint. The file holds the difference alone; models/demo.py says how.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common import DEVICE, WORK, assets, autocast, load_checkpoint, pack, save_checkpoint, use_host

use_host()
pack()

from captions import ANY, draw  # noqa: E402
from data import SIDE, background_colours, load_objects, place  # noqa: E402
from export import WEIGHTS, write  # noqa: E402
from finetuning import Finetuning  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.func import functional_call  # noqa: E402
from train_controlnet import SHIPPED, VOCABULARY, hint_of, narrow_encoder, part  # noqa: E402
from train_diffusion import build_unet, sd_alphas_bar  # noqa: E402
from train_text import build as build_text  # noqa: E402
from train_text import encode  # noqa: E402

from pack.models.demo import DIFFERENCE, FIRST_LAYER, INPAINT_CHANNELS  # noqa: E402

NAME = "attune_demo_inpaint"
PREFIX = "model.diffusion_model."
EXAMPLES = 12288
FILL = (0.5, 0.85)  # of the frame
RANK = 16
KEPT = ("latents", "masks", "masked", "context", "pooled")


def masks_of(alpha: Tensor, draws: torch.Generator) -> Tensor:
    """What is to be painted anew, [b 1 h w] of 0 and 1, for objects with these outlines [b h w].

    35 % the box around the object and 15 % its outline, each grown by up to 12 px; 15 % all but the grown outline; 15 %
    a free rectangle; 15 % blotches; 5 % everything.
    """
    b, kind = len(alpha), torch.rand(len(alpha), 1, 1, generator=draws)
    grown = [hint_of(alpha, torch.full((b,), boxed)) > 0 for boxed in (True, False)]
    for mask in grown:
        for i, by in enumerate(torch.randint(13, (b,), generator=draws).tolist()):
            rows = F.max_pool2d(mask[i][None].float(), (2 * by + 1, 1), 1, (by, 0))
            mask[i] = F.max_pool2d(rows, (1, 2 * by + 1), 1, (0, by))[0] > 0
    box, outline = grown
    corners = torch.rand(b, 2, 2, generator=draws).sort(dim=2).values * SIDE
    at = torch.arange(SIDE)
    rows, columns = ((at >= corners[:, i, :1]) & (at <= corners[:, i, 1:]) for i in (0, 1))
    noise = F.interpolate(torch.randn(b, 1, 6, 6, generator=draws), (SIDE, SIDE), mode="bicubic")[:, 0]
    blotches = noise > torch.rand(b, 1, 1, generator=draws) - 0.5
    mask = torch.ones_like(box)
    for below, of in (
        (0.95, blotches), (0.80, rows[:, :, None] & columns[:, None]), (0.65, ~outline), (0.50, outline), (0.35, box)
    ):  # fmt: skip
        mask = torch.where(kind < below, of, mask)
    return mask[:, None].float()


def masked(pictures: Tensor, mask: Tensor) -> Tensor:
    """Grey where the mask is, as the host's InpaintModelConditioning paints it."""
    return (pictures - 0.5) * (1 - mask) + 0.5


@torch.no_grad()
def examples(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Latents, masks at their size, latents of masked pictures and encoded captions of `count` pictures."""
    path = WORK / f"inpaint_examples_{count}.pt"
    if path.exists():
        return load_checkpoint(path)
    enc, scale = narrow_encoder(tensors)
    enc = enc.to(memory_format=torch.channels_last)
    text = build_text()
    text.load_state_dict(part({k: v for k, v in tensors.items() if k != VOCABULARY}, "cond_stage_model."))
    objects, colours, rng, draws = load_objects(assets()), background_colours(), random.Random(0), torch.Generator()
    draws.manual_seed(0)
    made: dict[str, list[Tensor]] = {name: [] for name in KEPT}
    for start in range(0, count, 64):
        n = min(64, count - start)
        which = [(start + i) % len(objects) for i in range(n)]
        of = torch.randint(len(colours), (n,), generator=draws)
        fill = torch.empty(n).uniform_(*FILL, generator=draws)
        shift = (2 * torch.rand(n, 2, generator=draws) - 1) * (1 - fill)[:, None]  # anywhere inside the frame
        placed = place(objects[which], fill, shift)
        pictures = placed[:, :3] + (1 - placed[:, 3:]) * colours[of][:, :, None, None]
        mask = masks_of(placed[:, 3], draws)
        said = [ANY if rng.random() < 0.15 else int(b) for b in of]
        captions = ["" if rng.random() < 0.1 else draw(rng, o, b) for o, b in zip(which, said, strict=True)]
        context, pooled = encode(text, captions)
        small = F.interpolate(mask, (SIDE // 8, SIDE // 8), mode="bilinear").round()
        both = torch.cat([pictures, masked(pictures, mask)]).contiguous(memory_format=torch.channels_last)
        with autocast():
            latents, kept = (enc(both).float() / scale).chunk(2)
        found = (latents, small, kept, context, pooled)
        for name, tensor in zip(KEPT, found, strict=True):
            made[name].append(tensor.half())
    result = {name: torch.cat(parts) for name, parts in made.items()}
    result["grey"] = (enc(torch.full((1, 3, SIDE, SIDE), 0.5)) / scale).mean((0, 2, 3))
    save_checkpoint(path, **result)
    return result


def batches(found: dict[str, Tensor], size: int, draws: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    while True:
        some = torch.randint(len(found["latents"]), (size,), generator=draws)
        yield tuple(found[name][some].float().to(DEVICE) for name in KEPT)


class Difference(nn.Module):
    """The UNet's weights with more input channels: whole where a low rank saves nothing, else W + up down."""

    def __init__(self, base: dict[str, Tensor], rank: int):
        super().__init__()
        self.base = dict(base)
        first = base[FIRST_LAYER]
        more = first.new_zeros(len(first), INPAINT_CHANNELS - first.shape[1], *first.shape[2:])
        self.base[FIRST_LAYER] = torch.cat([first, more], 1)
        flat = {name: (len(w), w[0].numel()) for name, w in base.items()}
        self.low = [n for n, (o, i) in flat.items() if n != FIRST_LAYER and rank * (o + i) < o * i]
        self.rest = [n for n in base if n not in self.low]
        self.down = nn.ParameterList([torch.randn(rank, flat[n][1]) / flat[n][1] ** 0.5 for n in self.low])
        self.up = nn.ParameterList([torch.zeros(flat[n][0], rank) for n in self.low])
        self.whole = nn.ParameterList([self.base[n].clone() for n in self.rest])

    def weights(self) -> dict[str, Tensor]:
        """The state dict of the network as it is now."""
        parts = zip(self.low, self.up, self.down, strict=True)
        low = {n: self.base[n] + (up @ down).view(self.base[n].shape) for n, up, down in parts}
        return low | dict(zip(self.rest, self.whole, strict=True))

    def tensors(self, average: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the file holds, from a state dict of this module."""
        found = {f"{DIFFERENCE}{n}": average[f"whole.{i}"] for i, n in enumerate(self.rest)}
        for i, n in enumerate(self.low):
            found |= {f"{DIFFERENCE}{n}.{half}": average[f"{half}.{i}"] for half in ("up", "down")}
        found[FIRST_LAYER] = found.pop(f"{DIFFERENCE}{FIRST_LAYER}")
        return {f"{PREFIX}{name}": tensor for name, tensor in found.items()}


def loss_of(net, x0, mask, kept, c, y, draws: torch.Generator) -> Tensor:
    """v-prediction MSE at stratified timesteps of SD's schedule, as the UNet was trained."""
    b = len(x0)
    t = ((torch.arange(b) + torch.rand(b, generator=draws)) / b * 1000).long()
    alpha_bar = sd_alphas_bar()[t].float()[:, None, None, None].to(DEVICE)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    eps = torch.randn(x0.shape, generator=draws).to(DEVICE)
    v = net(torch.cat([alpha * x0 + sigma * eps, mask, kept], 1), t.to(DEVICE), context=c, y=y).float()
    return (v - (alpha * eps - sigma * x0)).square().mean()


def export(difference: Difference, average: dict[str, Tensor], vocabulary: Tensor, facts: dict) -> None:
    facts["bytes"] = write(NAME, {**difference.tensors(average), VOCABULARY: vocabulary})
    (WEIGHTS / f"{NAME}.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(NAME, facts["bytes"], "bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; run again to go on")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tensors = load_file(SHIPPED)
    net = build_unet().requires_grad_(False).to(DEVICE)
    base = {name: tensor.to(DEVICE) for name, tensor in part(tensors, PREFIX).items()}
    difference, draws = Difference(base, RANK), torch.Generator().manual_seed(0)
    run = Finetuning(difference, WORK / "inpaint.pt", draws, args.lr)
    if run.step >= args.steps and (WEIGHTS / f"{NAME}.safetensors").exists():
        return
    made = examples(tensors, min(args.examples, args.steps * args.batch))

    def loss(*batch) -> Tensor:
        weights = difference.weights()
        with autocast():
            return loss_of(lambda *a, **k: functional_call(net, weights, a, k), *batch, draws)

    feed = batches(made, args.batch, draws)
    run.go(feed, loss, args.steps, args.minutes, warm_up=100, longest=0.998, every=100)
    facts = {
        "command": f"python training/train_inpaint.py --steps {args.steps} --batch {args.batch} --lr {args.lr}",
        "examples": len(made["latents"]), "steps": run.step, "rank": RANK, "loss": run.log,
        "parameters": sum(p.numel() for p in difference.parameters()),
        "grey": [round(float(v), 4) for v in made["grey"]],
    }  # fmt: skip
    export(difference, run.average, tensors[VOCABULARY], facts)
    if run.step < args.steps:
        print("stopped; run it again to go on")


if __name__ == "__main__":
    main()
