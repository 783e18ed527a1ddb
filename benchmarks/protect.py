"""How badly does an inpainting model edit pictures that Attune Protect Image has changed, and what undoes it?

python dev.py bench protect [--pictures 12] [--steps 60]

Drawn emoji on plain backgrounds (`dev.py train-demo` fetches them) are given to the inpainting demo model by the stock
InpaintModelConditioning and KSampler. Two edits: the missing half of the object without a prompt, where the model has
only the rest of the picture to go by, and another object in a box around it. An edit succeeds where the judge, who saw
no generated picture, names the object. Beside the node: the picture as it is, what is left when the kept part gives way
to noise of the full range, noise of the same budget, and the encoder attack of PhotoGuard (Salman et al. 2023, arXiv
2302.06588), which draws the masked picture's latent to that of grey, with as many iterations. Each is edited as it is,
after JPEG of two qualities and after blur, and with a mask that the protection was not told. Writes
docs/results/protect.json, docs/results.md and docs/protect.jpg.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_model import sheet
from PIL import Image, ImageFilter
from torch import Tensor, nn

from comfy_process import ROOT, Host
from harness import BATCH, CACHE, prompt
from judge import BACKGROUNDS, OBJECTS, load_judge
from metrics import jackknife, psnr
from results import DOCS, Table, markdown, record

ASSETS = ROOT / ".host" / "training" / "package" / "assets"
CHECKPOINT = "attune_demo_inpaint.safetensors"
BUDGET, MORE, REACH, SIDE = 16, 64, 6, 128
EDIT_STEPS, CFG = 20, 3.0


@dataclass(frozen=True)
class Edit:
    """Masks [n h w], those that no protection is told, prompts, and the objects that shall be seen."""

    masks: Tensor
    others: Tensor
    texts: list[str]
    targets: list[int]


@dataclass(frozen=True)
class Scenes:
    """Pictures [n 3 h w] in whole grey levels, boxes (top, left, side) about the objects, and two edits of each."""

    pictures: Tensor
    boxes: list[tuple[int, int, int]]
    half: Edit
    another: Edit


def scenes(count: int) -> Scenes:
    from data import background_colours, load_objects, place

    if not ASSETS.is_dir():
        raise SystemExit(f"No training pictures in {ASSETS}: `python dev.py train-demo` fetches them; stop it then.")
    draws = torch.Generator().manual_seed(5)
    objects = [(37 * i + 11) % len(OBJECTS) for i in range(count)]
    grounds = [(7 * i + 3) % len(BACKGROUNDS) for i in range(count)]
    fill = torch.empty(count).uniform_(0.5, 0.6, generator=draws)
    shift = (2 * torch.rand(count, 2, generator=draws) - 1) * (0.85 - fill)[:, None]
    placed = place(load_objects(ASSETS)[objects], fill, shift)
    pictures = placed[:, :3] + (1 - placed[:, 3:]) * background_colours()[grounds][:, :, None, None]
    boxes = []
    for size, (x, y) in zip((SIDE * fill).round().int().tolist(), shift.tolist(), strict=True):
        boxes.append((round((SIDE * (1 - y) - size) / 2), round((SIDE * (1 - x) - size) / 2), size))
    half = Edit(drawn(boxes, 0.5), drawn(boxes, 0.4), [""] * count, objects)
    targets = [(o + 61) % len(OBJECTS) for o in objects]
    texts = [prompt(o, g) for o, g in zip(targets, grounds, strict=True)]
    return Scenes(
        (pictures * 255).round() / 255, boxes, half, Edit(drawn(boxes, 0), drawn(boxes, -0.1), texts, targets)
    )


def drawn(boxes: list[tuple[int, int, int]], begin: float) -> Tensor:
    """Masks over boxes from a share of their width on, 4 pixels larger on the other sides: [n h w]."""
    masks = torch.zeros(len(boxes), SIDE, SIDE)
    for mask, (top, left, side) in zip(masks, boxes, strict=True):
        start = left + round(begin * side) - 4 * (begin <= 0)
        mask[max(0, top - 4) : top + side + 4, max(0, start) : left + side + 4] = 1
    return masks


class Slim(nn.Module):
    """The demo's autoencoder without the channels that only fill up its encoder: the same function, in less time."""

    def __init__(self, stock: nn.Module):
        from autoencoder import encoder, narrow

        super().__init__()
        self.encoder, self.scale = encoder(4), stock.vae_scale
        self.encoder.load_state_dict(narrow(self.encoder, stock.taesd_encoder.state_dict()))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x * 0.5 + 0.5) / self.scale


class Bench:
    def __init__(self, host: Host, count: int, steps: int, seeds: int):
        sys.path.insert(0, str(ROOT / "training"))
        self.call, self.steps, self.seeds = host.call, steps, seeds
        self.scenes, self.judge = scenes(count), load_judge()
        self.model, self.clip, self.vae = host.call("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
        self.slim = copy.copy(self.vae)
        self.slim.first_stage_model = Slim(self.vae.first_stage_model)
        self.made, self.kernel = host.module("nodes._host.protect"), host.module("kernels.protect")
        self.empty = self.conditioning([""])

    def conditioning(self, texts: list[str]) -> list:
        encoded = [self.call("CLIPTextEncode", clip=self.clip, text=text)[0][0] for text in texts]
        pooled = torch.cat([extra["pooled_output"] for _, extra in encoded])
        return [[torch.cat([context for context, _ in encoded]), {"pooled_output": pooled}]]

    def edited(self, pictures: Tensor, masks: Tensor, texts: list[str], seed: int) -> Tensor:
        """As a user would: [n 3 h w]."""
        out = []
        for start in range(0, len(pictures), BATCH):
            part = slice(start, start + BATCH)
            positive, negative, latent = self.call(
                "InpaintModelConditioning", positive=self.conditioning(texts[part]), vae=self.vae,
                negative=self.conditioning([""] * len(texts[part])), pixels=pictures[part].movedim(1, -1),
                mask=masks[part], noise_mask=True,
            )  # fmt: skip
            (sampled,) = self.call(
                "KSampler", model=self.model, seed=seed + start, steps=EDIT_STEPS, cfg=CFG, sampler_name="euler",
                scheduler="normal", positive=positive, negative=negative, latent_image=latent, denoise=1.0,
            )  # fmt: skip
            out.append(self.call("VAEDecode", samples=sampled, vae=self.vae)[0].movedim(-1, 1))
        return torch.cat(out)

    def edits(self, pictures: Tensor, edit: Edit, masks: Tensor) -> Tensor:
        """One for each seed: [seeds n 3 h w]."""
        return torch.stack([self.edited(pictures, masks, edit.texts, 1000 * seed) for seed in range(self.seeds)])

    def right(self, edits: Tensor, edit: Edit) -> Tensor:
        """Share of the seeds with which the judge names the object in the box, [n]."""
        crops = []
        for picture, (top, left, side) in zip(edits.flatten(0, 1), self.scenes.boxes * self.seeds, strict=True):
            about = min(SIDE, round(side / 0.82))
            y, x = (min(max(0, n - (about - side) // 2), SIDE - about) for n in (top, left))
            crops.append(F.interpolate(picture[None, :, y : y + about, x : x + about], (64, 64), mode="area"))
        seen = self.judge(torch.cat(crops))[1].argmax(1).unflatten(0, (self.seeds, -1))
        return (seen == torch.tensor(edit.targets)).float().mean(0)

    def moved(self, pictures: Tensor, edit: Edit) -> str:
        """How far the latents of the masked pictures are from the plain ones', in percent of these."""
        hidden = [self.kernel.shown(one, edit.masks) for one in (pictures, self.scenes.pictures)]
        z, plain = (self.call("VAEEncode", pixels=one.movedim(1, -1), vae=self.vae)[0]["samples"] for one in hidden)
        return spread(100 * (z - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1), 1)

    def by_node(self, edit: Edit, reach: int, budget: int = BUDGET) -> Tensor:
        found = [
            self.call(
                "AttuneProtectImage", image=picture[None].movedim(1, -1), mask=mask[None], model=self.model,
                vae=self.slim, conditioning=self.empty, budget=budget, steps=self.steps, mask_reach=reach,
                step_size=budget / BUDGET, gradient_checkpointing=False,
            )[0].movedim(-1, 1)
            for picture, mask in zip(self.scenes.pictures, edit.masks, strict=True)
        ]  # fmt: skip
        return torch.cat(found)

    def by_encoder(self, edit: Edit, reach: int) -> Tensor:
        """The node's loop with PhotoGuard's loss."""
        settings, found = self.kernel.Protection(BUDGET / 510, 1 / 510, self.steps, reach), []
        with torch.inference_mode(False), torch.enable_grad():
            editor = self.made.Editor(self.model, self.slim, self.empty, (1, 4, SIDE // 8, SIDE // 8))
            for picture, mask in zip(self.scenes.pictures, edit.masks, strict=True):
                start, draws = picture[None].clone(), torch.Generator().manual_seed(0)
                loss = partial(encoder_loss, editor)
                *_, now = self.kernel.protect(start, mask[None].clone(), loss, settings, draws)
                found.append(self.kernel.in_levels(start, now))
        return torch.cat(found)

    def noisy(self, edit: Edit, levels: int | None) -> Tensor:
        """Outside of the mask `levels` grey levels more or less, by chance; None: colours by chance in its place."""
        draws, pictures = torch.Generator().manual_seed(7), self.scenes.pictures
        kept = (1 - edit.masks)[:, None]
        if levels is None:
            return pictures * (1 - kept) + torch.rand(pictures.shape, generator=draws) * kept
        sign = 2.0 * torch.randint(2, pictures.shape, generator=draws) - 1
        return (pictures + kept * sign * levels / 255).clamp(0, 1)


def encoder_loss(editor, picture: Tensor, mask: Tensor) -> Tensor:
    """PhotoGuard's: the latent's distance from that of a grey picture."""
    grey = torch.full_like(picture, 0.5)
    return (editor.encoded(picture) - editor.encoded(grey)).square().mean()


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def through(picture: Image.Image) -> Image.Image:
        kept = io.BytesIO()
        picture.save(kept, "JPEG", quality=quality)
        return Image.open(kept).convert("RGB")

    return through


TREATMENTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as saved": lambda picture: picture, "JPEG 90": jpeg(90), "JPEG 75": jpeg(75),
    "blur, 1 pixel": lambda picture: picture.filter(ImageFilter.GaussianBlur(1)),
}  # fmt: skip


def treated(pictures: Tensor, how: Callable[[Image.Image], Image.Image]) -> Tensor:
    saved = (pictures * 255).round().byte().movedim(1, -1).numpy()
    arrays = [np.asarray(how(Image.fromarray(one))) for one in saved]
    return torch.from_numpy(np.stack(arrays)).movedim(-1, 1).float() / 255


def spread(values: Tensor, digits: int = 0) -> str:
    """Mean and its standard error, the pictures in groups."""
    mean, error = jackknife(lambda some: float(values[some].mean()), len(values), min(6, len(values)))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def apart(edits: Tensor, plain: Tensor, masks: Tensor) -> str:
    """PSNR in dB to the edits of the plain picture [seeds n 3 h w], of what the masks [n h w] hide."""
    error = ((edits - plain).square() * masks[:, None]).sum((2, 3, 4)) / (3 * masks.sum((1, 2)))
    return spread(-10 * error.log10().mean(0), 1)


def measure_half(bench: Bench, say: Callable[[str], None]) -> tuple[list[Table], Tensor]:
    edit, plain = bench.scenes.half, bench.scenes.pictures
    ways: dict[str, Callable[[], Tensor]] = {
        "as it is": lambda: plain,
        "kept part replaced by noise": lambda: bench.noisy(edit, None),
        "noise": lambda: bench.noisy(edit, BUDGET // 2),
        "encoder attack": lambda: bench.by_encoder(edit, REACH),
        "Attune Protect Image, mask_reach 0": lambda: bench.by_node(edit, 0),
        "Attune Protect Image": lambda: bench.by_node(edit, REACH),
        f"Attune Protect Image, budget {MORE}": lambda: bench.by_node(edit, REACH, MORE),
    }
    rights, changes, shown, first = [], [], [plain], {}
    for name, make in ways.items():
        pictures = make()
        right, change = [], []
        for kind, how in {**TREATMENTS, "another mask": TREATMENTS["as saved"]}.items():
            masks = edit.others if kind == "another mask" else edit.masks
            edits = bench.edits(treated(pictures, how), edit, masks)
            first.setdefault(kind, edits)
            right.append(spread(100 * bench.right(edits, edit)))
            change.append(apart(edits, first[kind], masks) if name != "as it is" else "-")
            if kind == "as saved" and name in ("as it is", "Attune Protect Image"):
                shown += [edits[0]] if name == "as it is" else [pictures, edits[0]]
        each = psnr(pictures, plain)
        level = "-" if name == "as it is" else f"{float(each.mean()):.1f} ({float(each.min()):.1f})"
        moved = bench.moved(pictures, edit) if name != "as it is" else "-"
        rights.append([name, level, moved, *right])
        changes.append([name, *change])
        say(f"{name}: PSNR {level}; latent moved {moved}; right {right}; edits apart {change}")
    columns = [*TREATMENTS, "another mask"]
    return [
        Table(
            "The other half: object right, %",
            ["picture", "PSNR dB (worst)", "latent moved, %", *columns],
            rights,
            NOTE_RIGHT,
        ),
        Table("The other half: PSNR to the plain picture's edit, dB", ["picture", *columns], changes, NOTE_APART),
    ], torch.stack([one[:8] for one in shown])


NOTE_RIGHT = (
    "PSNR is the changed picture's; by so much of its size its latent, behind the mask, is another one than the plain "
    "picture's. The other columns are what was done to the picture before the edit."
)
NOTE_APART = "Of what the mask hides. Lower is a stronger effect; the plain picture is treated in the same way."


def measure_another(bench: Bench, say: Callable[[str], None]) -> Table:
    edit, plain, rows, first = bench.scenes.another, bench.scenes.pictures, [], None
    for name, make in {
        "as it is": lambda: plain,
        "kept part replaced by noise": lambda: bench.noisy(edit, None),
        "Attune Protect Image": lambda: bench.by_node(edit, REACH),
    }.items():
        pictures = make()
        edits = bench.edits(treated(pictures, TREATMENTS["as saved"]), edit, edit.masks)
        first = edits if first is None else first
        level = "-" if name == "as it is" else f"{float(psnr(pictures, plain).mean()):.1f}"
        right = spread(100 * bench.right(edits, edit))
        rows.append([name, level, right, apart(edits, first, edit.masks) if name != "as it is" else "-"])
        say(f"another object, {rows[-1]}")
    return Table("Another object in a box", ["picture", "PSNR dB", "object right, %", "edits apart, dB"], rows)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2, help="of the edits")
    parser.add_argument("--cache", type=Path, default=CACHE, help="not used: nothing is kept")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    say = lambda text: print(text, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Host(Path(folder)), args.pictures, args.steps, args.seeds)
        tables, shown = measure_half(bench, say)
        tables.append(measure_another(bench, say))
    print("\n" + "\n".join(map(markdown, tables)))
    sheet(shown.flatten(0, 1).clamp(0, 1), shown.shape[1]).save(args.out / "protect.jpg", quality=90)
    notes = [
        f"{args.pictures} pictures of {SIDE} px, {args.seeds} edits each ({EDIT_STEPS} steps of euler, cfg {CFG:g}). "
        f"Budget {BUDGET}/255 of a picture in -1..1 where nothing else stands, {args.steps} iterations, contours moved "
        f"by up to {REACH} px.",
        "Rows of protect.jpg: pictures, their other halves painted anew, protected pictures, theirs painted anew.",
    ]
    record("protect", "Pictures protected against inpainting", tables, began, ["protect.jpg"], notes, args.out)


if __name__ == "__main__":
    main()
