"""Train the demo video model: a Wan-class transformer on films of moving emoji, each frame with its own noise level.

python train_video.py --steps 6000

Resumable, as train_diffusion.py, whose text encoder and autoencoder it takes over (from the shipped files where no
training of them is there). Frames with levels of their own are what FVDM (Liu et al. 2024, arXiv 2410.03160) calls a
vectorised timestep: the same network then continues, fills in and extends films.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import pairwise

import torch
from common import DEVICE, WORK, assets, autocast, load_checkpoint, pack, save_checkpoint, use_host

use_host()
pack()

import comfy.ldm.wan.model  # noqa: E402
import comfy.ops  # noqa: E402
from autoencoder import decoder, encoder  # noqa: E402
from captions import ANY, draw  # noqa: E402
from data import BACKGROUND_NAMES, OBJECT_NAMES, background_colours, load_objects  # noqa: E402
from export import WEIGHTS, write  # noqa: E402
from films import FRAMES, OBJECTS, draw_motion, shown  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from train_sizes import recover, stored_std  # noqa: E402
from train_text import build as build_text  # noqa: E402
from train_text import encode, initialise  # noqa: E402

from pack.models.demo import VIDEO_CONFIG, VIDEO_SHIFT  # noqa: E402

NAME = "attune_demo_video"
CHANNELS = 16
LONG, FILMS = 16, 128  # frames of a film in the store; films an object
WORDINGS = 4


def build() -> nn.Module:
    net = comfy.ldm.wan.model.WanModel(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **VIDEO_CONFIG)
    initialise(net)
    for name, layer in net.named_modules():  # residual branches and the output start at zero
        if isinstance(layer, comfy.ops.disable_weight_init.RMSNorm):
            nn.init.ones_(layer.weight)
        elif name.endswith("cross_attn.o") or name in ("time_projection.1", "head.head"):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    for name, value in net.named_parameters():
        if name.endswith("modulation"):
            nn.init.zeros_(value)
    return net


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, **_) -> Tensor:
    """Attention in three lines, [b n heads*d]: with so few tokens a step takes a CPU 0.54 s, and with SDPA 0.77."""
    q, k, v = (one.unflatten(2, (heads, -1)).transpose(1, 2) for one in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@torch.no_grad()
def films() -> tuple[Tensor, Tensor]:
    """Unit-variance latents [objects FILMS LONG c h w], float16, and each film's background, ANY if it fades."""
    path = WORK / "films.pt"
    if not path.exists():
        enc = encoder(CHANNELS)
        enc.load_state_dict(load_checkpoint(WORK / f"autoencoder{CHANNELS}.pt")["encoder"])
        enc = enc.to(DEVICE, memory_format=torch.channels_last)
        pictures, colours, generator = load_objects(assets()), background_colours(), torch.Generator().manual_seed(0)
        latents, said = [], []
        for name in OBJECTS:
            first, second = torch.randint(len(colours), (2, FILMS), generator=generator)
            motion = draw_motion(FILMS, generator)
            rgba = pictures[OBJECT_NAMES.index(name)].expand(FILMS, -1, -1, -1)
            frames = shown(rgba, motion, (colours[first], colours[second]), LONG).flatten(0, 1)
            with autocast():
                z = [enc(x.to(DEVICE, memory_format=torch.channels_last)) for x in frames.split(64)]
            latents.append((torch.cat(z).float() / stored_std()).half().cpu().unflatten(0, (FILMS, LONG)))
            said.append(torch.where(motion.fade > 0, ANY, first))
        save_checkpoint(path, latents=torch.stack(latents), said=torch.stack(said))
    state = load_checkpoint(path)
    return state["latents"], state["said"]


@torch.no_grad()
def captions() -> tuple[Tensor, Tensor]:
    """Context of every (object, background or ANY, wording), and of the empty prompt."""
    text, rng = build_text(), random.Random(1)
    text.load_state_dict(load_checkpoint(WORK / "text.pt")["encoder"])
    classes = [*range(len(BACKGROUND_NAMES)), ANY]
    texts = [draw(rng, OBJECT_NAMES.index(o), b) for o in OBJECTS for b in classes for _ in range(WORDINGS)]
    context = torch.cat([encode(text, texts[i : i + 256])[0] for i in range(0, len(texts), 256)])
    return context.unflatten(0, (len(OBJECTS), len(classes), WORDINGS)), encode(text, [""])[0]


def batches(size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Films [b c f h w], half of them backwards, and context: 12 % empty, 16 % the object alone, else in full."""
    (x0, said), (context, empty) = films(), captions()

    def pick(n: int) -> Tensor:
        return torch.randint(n, (size,), generator=generator)

    while True:
        o, k, at = pick(len(OBJECTS)), pick(FILMS), pick(LONG - FRAMES + 1)
        frames = at[:, None] + torch.arange(FRAMES)
        backwards = torch.rand(size, generator=generator) < 0.5
        frames = torch.where(backwards[:, None], frames.flip(1), frames)
        u = torch.rand(size, generator=generator)
        background = torch.where(u < 0.28, torch.tensor(ANY), said[o, k])
        c = torch.where((u < 0.12)[:, None, None], empty, context[o, background, pick(WORDINGS)])
        x = x0[o[:, None], k[:, None], frames].float().transpose(1, 2)
        yield x.to(DEVICE), c.float().to(DEVICE)


def levels(b: int, generator: torch.Generator) -> Tensor:
    """Noise levels of every frame, [b FRAMES] in 0..1: equal ones, free ones, given frames and staircases.

    Equal levels and those of frames that are not given are logit-normal, shifted by 3 as the flow model's.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    u = (torch.arange(b) + uniform(b)) / b  # stratified
    common = torch.sigmoid(math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.9999, 0.9999)))[:, None]
    common = common.expand(-1, FRAMES)
    kind, i = uniform(b, 1), torch.arange(FRAMES)
    given = i < 1 + 6 * uniform(b, 1)
    both = (i == 0) | (i == FRAMES - 1)
    slope = 0.05 + 0.45 * uniform(b, 1)
    stairs = (1 + slope * FRAMES) * uniform(b, 1) + slope * (i - FRAMES + 1)
    rest = torch.where(uniform(b, 1) < 0.5, 0.0, 0.1 * uniform(b, 1))  # given frames are clean or nearly so
    level = common.clone()
    level = torch.where(kind < 0.70, torch.where(given, rest, common), level)
    level = torch.where(kind < 0.45, torch.where(both, rest, common), level)
    level = torch.where(kind < 0.37, stairs.clamp(0, 1), level)
    level = torch.where(kind < 0.17, uniform(b, FRAMES), level)
    return VIDEO_SHIFT * level / (1 + (VIDEO_SHIFT - 1) * level)


def video_loss(net: nn.Module, x0: Tensor, c: Tensor, generator: torch.Generator) -> Tensor:
    """Velocity MSE over the frames that have noise; the network sees 1000 times each frame's level."""
    level = levels(len(x0), generator).to(DEVICE)
    sigma = level[:, None, :, None, None]
    eps = torch.randn(x0.shape, generator=generator).to(DEVICE)
    v = net((1 - sigma) * x0 + sigma * eps, 1000 * level, context=c).float()
    error = (v - (eps - x0)).square().mean(dim=(1, 3, 4))
    return error[level > 0].mean()


@torch.no_grad()
def strips(net: nn.Module, dec: nn.Module, steps: int = 20, cfg: float = 3.0) -> Image.Image:
    """Six films from noise, six that continue a first frame; plain Euler steps: a look at progress, no benchmark."""
    (x0, said), (context, empty) = films(), captions()
    o = torch.arange(12) % len(OBJECTS)
    c = torch.cat([context[o, said[o, 0], 0], empty.expand(12, -1, -1)]).to(DEVICE)
    x = torch.randn(12, CHANNELS, FRAMES, 8, 8, generator=torch.Generator().manual_seed(0))
    free = torch.ones(12, FRAMES)
    free[6:, 0] = 0
    x[6:, :, 0] = x0[o[6:], 0, 0].float()
    x = x.to(DEVICE)
    s = torch.linspace(1, 0, steps + 1)
    for sigma, sigma_next in pairwise(VIDEO_SHIFT * s / (1 + (VIDEO_SHIFT - 1) * s)):
        t = (1000 * sigma * free).to(DEVICE)
        with autocast():
            positive, negative = net(torch.cat([x, x]), torch.cat([t, t]), context=c).float().chunk(2)
        x = x + (sigma_next - sigma) * free.to(DEVICE)[:, None, :, None, None] * (
            negative + cfg * (positive - negative)
        )
    frames = dec((x * stored_std()).cpu().transpose(1, 2).flatten(0, 1)).clamp(0, 1).unflatten(0, (12, FRAMES))
    rows = torch.cat([torch.cat(list(film), dim=2) for film in frames], dim=1)
    return Image.fromarray((rows * 255).byte().permute(1, 2, 0).numpy())


@torch.no_grad()
def preview_factors() -> tuple[list[list[float]], list[float]]:
    """Least squares from the latents to the mean colours (-1..1) of their 8x8 pixels: for the live preview."""
    dec, (x0, _) = decoder(CHANNELS), films()
    dec.load_state_dict(load_checkpoint(WORK / f"autoencoder{CHANNELS}.pt")["decoder"])
    z = x0[:, :4, 0].float().flatten(0, 1)
    mean = nn.functional.avg_pool2d(dec(z * stored_std()).clamp(0, 1) * 2 - 1, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    z = z.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], dim=1), mean).solution
    rows = [[round(v, 4) for v in row] for row in solution.tolist()]
    return rows[:CHANNELS], rows[CHANNELS]


def export(state: dict) -> None:
    """The checkpoint that the stock loader opens, with the text encoder and the autoencoder of the shipped ones."""
    unet, flow = (load_file(WEIGHTS / f"{name}.safetensors") for name in ("attune_demo", "attune_demo_flow"))
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in state["ema"].items()}
    tensors |= {name: tensor for name, tensor in unet.items() if name.startswith("cond_stage_model.")}
    tensors |= {name: tensor for name, tensor in flow.items() if name.startswith("first_stage_model.")}
    tensors["first_stage_model.vae_scale"] = torch.tensor(stored_std())
    tensors["first_stage_model.vae_shift"] = torch.tensor(0.0)
    factors, bias = preview_factors()
    facts = {
        "bytes": write(NAME, tensors), "parameters": sum(t.numel() for t in state["ema"].values()),
        "steps": state["step"], "films": state["films"], "batch": state["batch"], "learning_rate": state["lr"],
        "loss": state["log"],
        "preview_factors": factors, "preview_bias": bias,
    }  # fmt: skip
    (WEIGHTS / f"{NAME}.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(NAME, facts["bytes"], "bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--fall", type=float, default=0.25, help="last share of the steps: the rate falls to 0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=250)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    recover()

    comfy.ldm.wan.model.optimized_attention = attend
    net = build().to(DEVICE)
    ema = copy.deepcopy(net).requires_grad_(False)
    dec = decoder(CHANNELS)
    dec.load_state_dict(load_checkpoint(WORK / f"autoencoder{CHANNELS}.pt")["decoder"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    generator, path = torch.Generator().manual_seed(0), WORK / "video.pt"
    step, seen, log = 0, 0, []
    if path.exists():
        state = load_checkpoint(path)
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        step, seen, log = state["step"], state["films"], state["log"]
    feed = batches(args.batch, generator)
    began, started_at, running = time.time(), step, float("nan")
    while step < args.steps:
        fall = min(1.0, (args.steps - step) / (args.fall * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 200) * fall
        x0, c = next(feed)
        with autocast():
            loss = video_loss(net, x0, c, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + args.batch
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - min(0.995, (1 + step) / (10 + step)))
        running = loss.item() if math.isnan(running) else running + (loss.item() - running) / 100
        if step % args.save_every == 0 or step == args.steps:
            pace = (step - started_at) * args.batch / (time.time() - began)
            log.append({"step": step, "films": seen, "loss": round(running, 4)})
            print(json.dumps(log[-1]), f"{pace:.1f} films/s, {time.process_time():.0f} s of processor", flush=True)
            save_checkpoint(
                path, net=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                generator=generator.get_state(), step=step, films=seen, log=log, batch=args.batch, lr=args.lr,
            )  # fmt: skip
        if step % 1000 == 0 or step == args.steps:
            strips(ema, dec).save(WORK / f"video-{step:06d}.png")
    export(load_checkpoint(path))


if __name__ == "__main__":
    main()
