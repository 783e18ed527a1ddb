"""Train one of the two demo models on precomputed latents; resumable.

python train_diffusion.py unet --steps 12000
python train_diffusion.py flow --steps 8000

The learning rate is constant after a warm-up and falls linearly to zero over the last quarter of --steps, so that a run
can be stopped, resumed and extended (a larger --steps) at any time before the fall begins.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import torch
from common import DEVICE, WORK, assets, autocast, load_checkpoint, pack, save_checkpoint, use_host

use_host()
pack()

import comfy.ops  # noqa: E402
from autoencoder import decoder, encoder  # noqa: E402
from captions import ANY, BACKGROUND_SPELLINGS, BRIGHTNESS_NAMES, VOCABULARY, draw  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT, get_2d_sincos_pos_embed_torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.utils import common_upscale  # noqa: E402
from data import BACKGROUND_NAMES, OBJECT_NAMES, SIDE, background_colours, compose, load_objects  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from train_text import build as build_text  # noqa: E402
from train_text import encode, initialise  # noqa: E402

from pack.models.demo import MMDIT_CONFIG, TEXT_WIDTH, UNET_CONFIG  # noqa: E402

PLACEMENTS = 6  # random sizes and positions kept per object and background
WORDINGS = 4  # captions kept per object and background class
CHANNELS = {"unet": 4, "flow": 16}


@lru_cache(maxsize=1)
def sd_alphas_bar() -> Tensor:
    """Stable Diffusion's cumulative alphas ("scaled linear" betas .00085 to .012), float64 [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def build_unet() -> nn.Module:
    net = UNetModel(
        image_size=16, use_spatial_transformer=True, num_heads=-1, num_classes="sequential", legacy=False,
        use_linear_in_transformer=False, dtype=torch.float32, operations=comfy.ops.disable_weight_init, **UNET_CONFIG,
    )  # fmt: skip
    initialise(net)
    for name, layer in net.named_modules():  # residual branches and the output start at zero
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def build_flow() -> nn.Module:
    side, hidden = MMDIT_CONFIG["pos_embed_side"], 64 * MMDIT_CONFIG["depth"]
    net = MMDiT(
        input_size=None, patch_size=MMDIT_CONFIG["patch_size"], in_channels=MMDIT_CONFIG["in_channels"],
        depth=MMDIT_CONFIG["depth"], adm_in_channels=TEXT_WIDTH, pos_embed_max_size=side, num_patches=side * side,
        context_embedder_config={
            "target": "torch.nn.Linear", "params": {"in_features": TEXT_WIDTH, "out_features": hidden},
        },
        qk_norm="rms", dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    initialise(net)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear) and ("adaLN_modulation" in name or name == "final_layer.linear"):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif hasattr(layer, "weight") and name.endswith(("ln_q", "ln_k")):
            nn.init.ones_(layer.weight)
    net.pos_embed.copy_(get_2d_sincos_pos_embed_torch(hidden, side, side).reshape(1, side * side, hidden))
    return net


@torch.no_grad()
def latents(channels: int) -> tuple[Tensor, float]:
    """Unit-variance latents [objects backgrounds PLACEMENTS c h w] in half precision, and their original std."""
    path = WORK / f"latents{channels}.pt"
    if not path.exists():
        z = encoded(channels, SIDE, PLACEMENTS)
        std = float(z.std())
        save_checkpoint(path, latents=(z / std).half(), std=std)
    state = load_checkpoint(path)
    return state["latents"], state["std"]


@torch.no_grad()
def encoded(channels: int, side: int, placements: int) -> Tensor:
    """Every object on every background, made smaller to `side` px: latents [objects backgrounds placements c h w]."""
    enc = encoder(channels)
    enc.load_state_dict(load_checkpoint(WORK / f"autoencoder{channels}.pt")["encoder"])
    enc = enc.to(memory_format=torch.channels_last)
    objects, colours = load_objects(assets()), background_colours()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for picture in objects:
        n = len(colours) * placements
        images = compose(picture.expand(n, -1, -1, -1), colours.repeat_interleave(placements, 0), generator)
        if side != SIDE:
            images = common_upscale(images, side, side, "lanczos", "disabled")
        z = torch.cat([enc(x.contiguous(memory_format=torch.channels_last)) for x in images.split(40)])
        rows.append(z.reshape(len(colours), placements, *z.shape[1:]))
    return torch.stack(rows)


@torch.no_grad()
def conditions() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Context and pooled text of every (object, background class or ANY, wording), and of the empty prompt."""
    path = WORK / "conditions.pt"
    if not path.exists():
        text = build_text()
        text.load_state_dict(load_checkpoint(WORK / "text.pt")["encoder"])
        rng = random.Random(1)
        classes = [*range(len(BACKGROUND_SPELLINGS)), ANY]
        captions = [draw(rng, o, b) for o in range(len(OBJECT_NAMES)) for b in classes for _ in range(WORDINGS)]
        parts = [encode(text, captions[i : i + 256]) for i in range(0, len(captions), 256)]
        shape = (len(OBJECT_NAMES), len(classes), WORDINGS)
        context, pooled = (torch.cat(p).half() for p in zip(*parts, strict=True))
        empty = encode(text, [""])
        save_checkpoint(
            path, context=context.reshape(*shape, *context.shape[1:]), pooled=pooled.reshape(*shape, -1),
            empty_context=empty[0].half(), empty_pooled=empty[1].half(),
        )  # fmt: skip
    state = load_checkpoint(path)
    return state["context"], state["pooled"], state["empty_context"], state["empty_pooled"]


def batches(x0: Tensor, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Latents with context and pooled text: 12 % empty, 16 % the object alone, some "dark"/"bright", else in full."""
    context, pooled, empty_context, empty_pooled = conditions()
    brightness = torch.full((len(BACKGROUND_NAMES),), ANY)
    for i, word in enumerate(BRIGHTNESS_NAMES):
        for name in VOCABULARY["brightness"][word]:
            brightness[BACKGROUND_NAMES.index(name)] = len(BACKGROUND_NAMES) + i

    def pick(n: int) -> Tensor:
        return torch.randint(n, (size,), generator=generator)

    while True:
        o, b, k, w = pick(x0.shape[0]), pick(x0.shape[1]), pick(x0.shape[2]), pick(WORDINGS)
        u = torch.rand(size, generator=generator)
        said = torch.where(u < 0.28, torch.tensor(ANY), b)
        said = torch.where((u > 0.85) & (brightness[b] != ANY), brightness[b], said)
        empty = u < 0.12
        c = torch.where(empty[:, None, None], empty_context, context[o, said, w])
        y = torch.where(empty[:, None], empty_pooled, pooled[o, said, w])
        yield tuple(part.float().to(DEVICE) for part in (x0[o, b, k], c, y))


def unet_loss(net: nn.Module, x0: Tensor, c: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """v-prediction MSE per picture at stratified timesteps of SD's schedule (Salimans and Ho 2022, equation 11)."""
    b = len(x0)
    t = ((torch.arange(b) + torch.rand(b, generator=generator)) / b * 1000).long()
    alpha_bar = sd_alphas_bar()[t].float()[:, None, None, None].to(DEVICE)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    eps = torch.randn(x0.shape, generator=generator).to(DEVICE)
    v = net(alpha * x0 + sigma * eps, t.to(DEVICE), context=c, y=y).float()
    return (v - (alpha * eps - sigma * x0)).square().mean()


def flow_loss(net: nn.Module, x0: Tensor, c: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Rectified flow at stratified logit-normal levels, shifted by 3 as SD3 samples; the network sees 1000 sigma."""
    b = len(x0)
    u = (torch.arange(b) + torch.rand(b, generator=generator)) / b
    s = torch.sigmoid(math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.9999, 0.9999)))
    sigma = (3 * s / (1 + 2 * s))[:, None, None, None].to(DEVICE)
    eps = torch.randn(x0.shape, generator=generator).to(DEVICE)
    v = net((1 - sigma) * x0 + sigma * eps, 1000 * sigma[:, 0, 0, 0], context=c, y=y).float()
    return (v - (eps - x0)).square().mean()


GRID = 16  # pictures of a progress grid


@torch.no_grad()
def sample_grid(
    kind: str, net: nn.Module, dec: nn.Module, std: float, steps: int = 20, cfg: float = 3.0
) -> Image.Image:
    """Sixteen prompts with plain Euler steps; a look at progress, not a benchmark."""
    context, pooled, empty_context, empty_pooled = conditions()
    o = torch.arange(GRID) * len(OBJECT_NAMES) // GRID
    b = torch.arange(GRID) * 7 % len(BACKGROUND_NAMES)
    c = torch.cat([context[o, b, 0], empty_context.expand(GRID, -1, -1)]).float().to(DEVICE)
    y = torch.cat([pooled[o, b, 0], empty_pooled.expand(GRID, -1)]).float().to(DEVICE)
    x = torch.randn(GRID, CHANNELS[kind], 16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with autocast():
            out = net(torch.cat([x, x]), t.to(DEVICE).expand(2 * len(x)), context=c, y=y).float()
        positive, negative = out.chunk(2)
        return negative + cfg * (positive - negative)

    if kind == "unet":
        timesteps = torch.linspace(999, 0, steps + 1).long()
        alpha_bar = sd_alphas_bar().float()
        for t, t_next in pairwise(timesteps):
            a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
            v = guided(x, t)
            x0, eps = a * x - s * v, s * x + a * v
            a_next = alpha_bar[t_next].sqrt() if t_next > 0 else torch.tensor(1.0)
            x = a_next * x0 + (1 - a_next**2).sqrt() * eps
    else:
        s = torch.linspace(1, 0, steps + 1)
        sigmas = 3 * s / (1 + 2 * s)
        for sigma, sigma_next in pairwise(sigmas):
            x = x + (sigma_next - sigma) * guided(x, 1000 * sigma)
    images = dec((x * std).cpu()).clamp(0, 1)
    rows = [torch.cat(list(images[i : i + 8]), dim=2) for i in range(0, len(images), 8)]
    return Image.fromarray((torch.cat(rows, dim=1) * 255).byte().permute(1, 2, 0).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["unet", "flow"])
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--fall", type=float, default=0.25, help="last share of the steps, over which the rate falls to 0"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=250)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    channels = CHANNELS[args.kind]
    x0, std = latents(channels)
    net = (build_unet() if args.kind == "unet" else build_flow()).to(DEVICE)
    loss_of = unet_loss if args.kind == "unet" else flow_loss
    ema = copy.deepcopy(net).requires_grad_(False)
    dec = decoder(channels)
    sharper, first = WORK / f"decoder{channels}.pt", WORK / f"autoencoder{channels}.pt"
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    path = WORK / f"{args.kind}.pt"
    step, log = 0, []
    if path.exists():
        state = load_checkpoint(path)
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        step, log = state["step"], state["log"]

    feed = batches(x0, args.batch, generator)
    began, started_at, running = time.time(), step, float("nan")
    while step < args.steps:
        fall = min(1.0, (args.steps - step) / (args.fall * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 200) * fall
        with autocast():
            loss = loss_of(net, *next(feed), generator)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(0.9985, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        running = loss.item() if math.isnan(running) else running + (loss.item() - running) / 100
        if step % args.save_every == 0 or step == args.steps:
            pace = (step - started_at) * args.batch / (time.time() - began)
            log.append({"step": step, "pictures": step * args.batch, "loss": round(running, 4)})
            print(json.dumps(log[-1]), f"{pace:.0f} pictures/s", flush=True)
            save_checkpoint(
                path, net=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                generator=generator.get_state(), step=step, log=log, std=std, batch=args.batch, lr=args.lr,
            )  # fmt: skip
        if step % 1000 == 0 or step == args.steps:
            dec.load_state_dict(load_checkpoint(sharper if sharper.exists() else first)["decoder"])
            sample_grid(args.kind, ema, dec, std).save(WORK / f"{args.kind}-{step:06d}.png")


if __name__ == "__main__":
    main()
