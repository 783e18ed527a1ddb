"""Are real pictures kept, and edited, better through noise maps than by what people use? Reconstruction, edits, morphs.

python dev.py bench noise_space [--models unet flow] [--pictures 8] [--pairs 8] [--steps 20]

The real pictures are the demo models' training pictures, composed anew (`dev.py train-demo` fetches them); the judge
that names objects never saw a generated one. Everything runs through the host's own SamplerCustom: ours by Attune
Invert, Replay and Morph; img2img by BasicScheduler's denoise; approximate inversion by FlipSigmas and euler; RF
inversion (Rout et al. 2024, arXiv 2410.10792) by its published update. Writes docs/results/noise_space.json,
docs/results.md, docs/noise_space.jpg and
docs/noise_space_flow.jpg; in parts with --models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_model import sheet
from PIL import Image
from torch import Tensor

from comfy_process import ROOT, Host
from harness import ANY, BATCH, CACHE, Lab, prompt
from judge import BACKGROUNDS, OBJECTS, corner_colours, load_judge
from metrics import jackknife, perceptual_distance
from results import DOCS, Table, command_line, record

GROUPS = 4  # of seeds, for the standard errors
ASSETS = ROOT / ".host" / "training" / "package" / "assets"
REPLAYS = {  # eta, source cfg, target cfg -> skip, focus of the edits
    (1.0, 3.0, 3.0): ((0.36, 0.0), (0.36, 0.3)),
    (1.0, 1.0, 2.0): ((0.36, 0.3), (0.5, 0.3)),
    (0.0, 1.0, 2.0): ((0.36, 0.3),),
}
STRENGTHS = (0.1, 0.2, 0.4, 0.6)
CFG = 3.0
FRAMES = 9
SKIP, BOOST, CLIP = 0.44, 1.2, 2.0  # of NoiseDiffusion as published: step 140 of 250
RF_GAMMA, RF_ETA, RF_SHARE = 0.5, 0.9, 0.25  # as published for edits; the share of the steps that are drawn back


@dataclass(frozen=True)
class Real:
    """Pictures [n 3 h w] in 0..1, their latents [n c h w], and what they show."""

    pictures: Tensor
    latents: Tensor
    objects: list[int]
    backgrounds: list[int]


class Bench:
    """A demo model and real pictures for it."""

    def __init__(self, lab: Lab, model: str, count: int, steps: int):
        self.lab, self.name, self.model, self.steps = lab, model, lab.models[model], steps
        self.judge, self.call = load_judge(), lab.host.call
        self.sigmas = self.levels()
        self.real = self._real(count)

    def _real(self, count: int) -> Real:
        objects = [37 * i % len(OBJECTS) for i in range(count)]
        return self.composed(objects, [(7 * i + 3) % len(BACKGROUNDS) for i in range(count)], seed=1)

    def composed(self, objects: list[int], backgrounds: list[int], seed: int) -> Real:
        """Training pictures, drawn and encoded."""
        sys.path.insert(0, str(ROOT / "training"))
        from data import background_colours, compose, load_objects

        if not ASSETS.is_dir():
            raise SystemExit(
                f"No training pictures in {ASSETS}: `python dev.py train-demo` fetches them; stop it then."
            )
        generator = torch.Generator().manual_seed(seed)
        pictures = compose(load_objects(ASSETS)[objects], background_colours()[backgrounds], generator)
        parts = [
            self.call("VAEEncode", pixels=part.permute(0, 2, 3, 1), vae=self.lab.vaes[self.name])[0]["samples"]
            for part in pictures.split(BATCH)
        ]
        return Real(pictures, torch.cat(parts), objects, backgrounds)

    def levels(self, denoise: float = 1.0) -> Tensor:
        given = {"scheduler": "normal", "steps": self.steps, "denoise": denoise}
        return self.call("BasicScheduler", model=self.model, **given)[0]

    def conds(self, texts: list[str]) -> dict:
        return {"positive": self.lab.conditioning(texts), "negative": self.lab.conditioning([""] * len(texts))}

    def sample(self, latents: Tensor, texts: list[str], cfg: float, sigmas, sampler="euler", seed: int | None = None):
        """The stock SamplerCustom; seed None adds no noise."""
        if isinstance(sampler, str):
            (sampler,) = self.call("KSamplerSelect", sampler_name=sampler)
        return self.call(
            "SamplerCustom", model=self.model, add_noise=seed is not None, noise_seed=seed or 0, cfg=cfg,
            sampler=sampler, sigmas=sigmas, latent_image={"samples": latents}, **self.conds(texts),
        )[0]["samples"]  # fmt: skip

    def invert(self, latents: Tensor, texts: list[str], cfg: float, **more):
        given = {"sigmas": self.sigmas, "cfg": cfg, **self.conds(texts), **more}
        return self.call("AttuneInvert", model=self.model, latent={"samples": latents}, **given)[0]

    def replay(self, maps, texts: list[str], cfg: float, **more) -> Tensor:
        sampler, sigmas, latent, _ = self.call("AttuneReplay", noise_maps=maps, **more)
        return self.sample(latent["samples"], texts, cfg, sigmas, sampler)

    def up(self, latents: Tensor, texts: list[str], cfg: float, sampler="euler") -> Tensor:
        """Approximate inversion, as people do it: a sampler over FlipSigmas; its state at the highest level.

        What the host makes of a flow's state at its level 1, where there is no picture in it, is left aside.
        """
        (rising,) = self.call("FlipSigmas", sigmas=self.sigmas)
        kept: dict[str, Tensor] = {}
        picture = self.model.model.process_latent_in(latents)
        self.sample(latents, texts, cfg, rising, from_state(sampler, picture, kept))
        return kept["end"]

    def there_and_back(self, latents: Tensor, source: list[str], target: list[str], up: float, down: float) -> Tensor:
        return self.sample(latents, target, down, self.sigmas, from_state("euler", self.up(latents, source, up)))

    def rf(self, latents: Tensor, source: list[str], target: list[str], cfg: float) -> Tensor:
        """RF inversion: a flow up that is drawn to noise, and one down that is at first drawn to the picture."""
        picture = self.model.model.process_latent_in(latents)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
        rise = controlled(lambda x, sigma: (noise - x) / (1 - sigma).clamp(min=1e-3), lambda i: RF_GAMMA)
        fall = controlled(
            lambda x, sigma: (x - picture) / sigma, lambda i: RF_ETA if i < RF_SHARE * self.steps else 0.0
        )
        top = self.up(latents, source, 1.0, rise)
        return self.sample(latents, target, cfg, self.sigmas, from_state(fall, top))

    def pictures(self, latents: Tensor) -> Tensor:
        return self.lab.pictures(self.name, latents)

    def source(self, plain: bool) -> list[str]:
        return [prompt(o, ANY if plain else b) for o, b in zip(self.real.objects, self.real.backgrounds, strict=True)]

    def targets(self) -> list[int]:
        """Another object for each picture."""
        return [(o + 61) % len(OBJECTS) for o in self.real.objects]

    def target(self, plain: bool) -> list[str]:
        return [prompt(o, ANY if plain else b) for o, b in zip(self.targets(), self.real.backgrounds, strict=True)]


def controlled(aim: Callable[[Tensor, Tensor], Tensor], weight: Callable[[int], float]) -> Callable:
    """Euler's method on a flow's velocity that is drawn to another, dx/dsigma."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            sigma = sigmas[i].clamp(min=1e-4)
            v = (x - model(x, sigma * x.new_ones(len(x)), **extra_args)) / sigma
            v = v + weight(i) * (aim(x, sigma) - v)
            x = x + (sigmas[i + 1] - sigmas[i]) * v
        return x

    return sample


def from_state(sampler, begin: Tensor, kept: dict[str, Tensor] | None = None):
    """A SAMPLER that begins at a state in the model's scale; where it ends goes into `kept`, if that is given."""
    import comfy.samplers

    function = comfy.samplers.ksampler(sampler).sampler_function if isinstance(sampler, str) else sampler

    def run(model, x, sigmas, **more):
        end = function(model, begin.to(x), sigmas, **more)
        if kept is None:
            return end
        kept["end"] = end
        return torch.zeros_like(end)

    return comfy.samplers.KSAMPLER(run)


# --- what is measured ---


def grouped(values: Tensor) -> str:
    """Mean and its standard error over the groups of pictures."""
    mean, error = jackknife(lambda some: float(values[some].double().mean()), len(values), GROUPS)
    return f"{mean:.3g} ± {error:.2g}"


def reconstruction(b: Bench) -> Table:
    """The source prompt at its cfg: what comes back?"""
    rows, texts, latents = [], b.source(False), b.real.latents
    spread = latents.std()

    def row(cfg: float, label: str, calls: int, got: Tensor) -> None:
        error = (got - latents).abs()
        rows.append([cfg, label, calls, float(error.max()), grouped(error.flatten(1).mean(1) / spread)])
        print(b.name, *rows[-1], flush=True)

    n = b.steps
    for cfg in (1.0, 3.0, 7.5):
        half = b.invert(latents, texts, cfg)
        row(cfg, "noise maps, half precision", 2 * n, b.replay(half, texts, cfg, skip=0.0))
        row(cfg, "the same, 36 % skipped", 2 * n - round(0.36 * n), b.replay(half, texts, cfg, skip=0.36))
        whole = b.invert(latents, texts, cfg, precision="float32")
        row(cfg, "noise maps, float32", 2 * n, b.replay(whole, texts, cfg, skip=0.0))
        row(cfg, "without what the last step misses", 2 * n, b.replay(half, texts, cfg, skip=0.0, detail=0.0))
        if cfg == 7.5:
            ddim = b.invert(latents, texts, cfg, eta=0.0)
            row(cfg, "noise maps at eta 0", 3 * n, b.replay(ddim, texts, cfg, skip=0.0))
        row(cfg, "euler over flipped sigmas, and back", 2 * n, b.there_and_back(latents, texts, texts, cfg, cfg))
        if b.name == "flow":
            row(cfg, "RF inversion, gamma 0.5, eta 0.9", 2 * n, b.rf(latents, texts, texts, cfg))
    columns = ["cfg", "way", "calls", "largest error", "mean error, of the spread"]
    return Table(
        f"{b.name}: the picture with its own prompt, {len(latents)} pictures", columns, rows, NOTE_RECONSTRUCTION
    )


NOTE_RECONSTRUCTION = (
    "Errors of latents; the spread is their standard deviation. Without what the last step misses is the paper's form "
    "(z of the last step 0)."
)


def alphas(b: Bench) -> Tensor:
    """Where neither the object nor what it becomes is, 8 pixels away from both: [n 1 h w] of 0 and 1."""
    from data import load_objects, place

    generator, n = torch.Generator().manual_seed(1), len(b.real.objects)  # as `compose` drew them
    fill = torch.empty(n).uniform_(0.74, 0.88, generator=generator)
    shift = torch.empty(n, 2).uniform_(-0.08, 0.08, generator=generator)
    drawn = load_objects(ASSETS)
    covered = [place(drawn[which], fill, shift)[:, 3:] for which in (b.real.objects, b.targets())]
    return (F.max_pool2d((torch.maximum(*covered) > 0.01).float(), 17, 1, 8) < 0.5).float()


def edits(b: Bench) -> tuple[Table, list[Tensor]]:
    """Another object on the same background, by name: is it there, and what became of the rest?"""
    latents, source, target = b.real.latents, b.source(False), b.target(False)
    before, free, wanted = b.pictures(latents), alphas(b), torch.tensor(b.targets())
    rows, shown = [], [before]

    def row(label: str, got: Tensor, show: bool = False) -> None:
        pictures = b.pictures(got)
        right = (b.judge(pictures)[1].argmax(1) == wanted).float()
        change = 255 * ((pictures - before).abs() * free).sum((1, 2, 3)) / (3 * free.sum((1, 2, 3))).clamp(min=1)
        distance = perceptual_distance(b.judge, pictures, before)
        rows.append([label, grouped(100 * right), grouped(change), grouped(distance)])
        print(b.name, *rows[-1], flush=True)
        if show:
            shown.append(pictures)

    for strength in STRENGTHS:
        row(f"img2img, denoise {strength}", b.sample(latents, target, CFG, b.levels(strength), seed=4), strength == 0.4)
    for (eta, up, down), settings in REPLAYS.items():
        maps = b.invert(latents, source, up, eta=eta)
        for skip, focus in settings:
            label = f"noise maps, eta {eta:g}, cfg {up:g} to {down:g}, skip {skip}, focus {focus:g}"
            row(label, b.replay(maps, target, down, skip=skip, focus=focus), eta == 1 and skip == 0.36)
    row("euler over flipped sigmas, cfg 1 up", b.there_and_back(latents, source, target, 1.0, CFG), True)
    if b.name == "flow":
        row("RF inversion, gamma 0.5, eta 0.9", b.rf(latents, source, target, CFG), True)
    columns = ["way", "object right, %", "change outside, of 255", "perceptual distance"]
    return Table(
        f"{b.name}: another object, cfg {CFG:g} where not said, {len(latents)} pictures", columns, rows, NOTE_EDITS
    ), shown


NOTE_EDITS = (
    "Outside: 8 pixels and more from where the old object is and the new one would be. The distance is to the picture, "
    "of the judge's features: an edit has some."
)


def variations(b: Bench) -> Table:
    """The same prompt, other details: how much do two differ, and is the shape kept?"""
    count = min(16, len(b.real.latents))
    latents, texts = b.real.latents[:count], b.source(False)[:count]
    before, objects = b.pictures(latents), torch.tensor(b.real.objects[:count])
    maps, rows = b.invert(latents, texts, CFG), []

    def row(label: str, draw: Callable[[int], Tensor]) -> None:
        drawn = [b.pictures(draw(seed)) for seed in range(2)]
        right = torch.stack([(b.judge(p)[1].argmax(1) == objects).float() for p in drawn]).mean(0)
        variety = perceptual_distance(b.judge, *drawn)
        kept = torch.stack([shape_kept(p, before) for p in drawn]).mean(0)
        rows.append([label, grouped(100 * right), grouped(variety), grouped(kept)])
        print(b.name, *rows[-1], flush=True)

    for amount, start in ((0.3, 0.0), (0.6, 0.0), (1.0, 0.2), (1.0, 0.4)):
        given = {"skip": 0.0, "variation": amount, "vary_from": start}
        row(f"variation {amount}, from {start:.0%}", lambda seed, g=given: b.replay(maps, texts, CFG, seed=seed, **g))
    for strength in (0.5, 0.8):
        levels = b.levels(strength)
        row(f"img2img, denoise {strength}", lambda seed, at=levels: b.sample(latents, texts, CFG, at, seed=seed))
    columns = ["way", "object right, %", "variety", "shape kept"]
    return Table(f"{b.name}: variations, cfg {CFG:g}, {count} pictures", columns, rows, NOTE_VARIATIONS)


NOTE_VARIATIONS = (
    "Variety: perceptual distance of two seeds' pictures. Shape kept: overlap (intersection over "
    "union) of what differs from the background with what does in the picture."
)


def shape_kept(pictures: Tensor, before: Tensor) -> Tensor:
    """Overlap of the foregrounds of two sets of pictures, [n]."""
    masks = [
        ((p - corner_colours(p)[:, :, None, None]).abs().amax(1) > 0.12).float().flatten(1) for p in (pictures, before)
    ]
    return (masks[0] * masks[1]).sum(1) / torch.maximum(*masks).sum(1).clamp(min=1)


# --- morphs ---


def morphs(b: Bench, count: int) -> tuple[Table, list[Tensor]]:
    """From an object to another on the same background, in nine frames: the largest jump, and how the middle looks."""
    objects = [o for i in range(count) for o in (37 * i % len(OBJECTS), (37 * i + 61) % len(OBJECTS))]
    real = b.composed(objects, [(7 * (i // 2) + 3) % len(BACKGROUNDS) for i in range(2 * count)], seed=2)
    ways: dict[str, list[Tensor]] = {name: [] for name in MORPHS}
    for i in range(0, 2 * count, 2):
        for name, frames in morph(b, real, i).items():
            ways[name].append(b.pictures(frames))
    truth = b.pictures(real.latents).unflatten(0, (count, 2))
    jumps = {name: torch.stack([largest_jump(b, p) for p in frames]) for name, frames in ways.items()}
    rows = []
    for name, frames in ways.items():
        ends, middle = torch.stack(frames)[:, [0, FRAMES - 1]], torch.stack(frames)[:, FRAMES // 2]
        share = [of(middle) / (of(truth[:, 0]) + of(truth[:, 1])) * 2 for of in (contrast, sharpness, chroma)]
        missed = 255 * (ends - truth).abs().flatten(1).mean(1)
        rows.append([name, *map(grouped, (jumps[name], jumps[name] / jumps[SLERP], *share, missed))])
        print(b.name, *rows[-1], flush=True)
    columns = ["way", "largest jump", "of slerp's", "contrast", "sharpness", "chroma", "ends, of 255"]
    table = Table(f"{b.name}: morphs of {FRAMES} frames, cfg 1, {count} pairs", columns, rows, NOTE_MORPHS)
    return table, [frames[0] for frames in ways.values()]


SLERP = "slerp of inverted noise"
MORPHS = (
    "latents on a line", SLERP, "NoiseDiffusion as published, euler", "Attune Morph, eta 0", "Attune Morph, eta 1",
)  # fmt: skip
NOTE_MORPHS = (
    "The largest perceptual distance of neighbouring frames; contrast, sharpness and chroma of the middle frame, in "
    "parts of the pictures'; how far the ends are from the pictures. Slerp goes between the flipped-sigmas noises at "
    "the highest level; prompts go from one to the other along with the frames, in every way but the first."
)


def largest_jump(b: Bench, frames: Tensor) -> Tensor:
    return perceptual_distance(b.judge, frames[1:], frames[:-1]).max()


def contrast(pictures: Tensor) -> Tensor:
    return pictures.flatten(1).std(1)


def sharpness(pictures: Tensor) -> Tensor:
    """Mean size of the differences of neighbouring pixels, [n]."""
    return pictures.diff(dim=-2).abs().flatten(1).mean(1) + pictures.diff(dim=-1).abs().flatten(1).mean(1)


def chroma(pictures: Tensor) -> Tensor:
    """Mean distance of a pixel's largest and smallest channel, [n]."""
    return (pictures.amax(1) - pictures.amin(1)).flatten(1).mean(1).clamp(min=0.02)


def slerp(one: Tensor, other: Tensor, factor: float) -> Tensor:
    """Along the arc that two noises span."""
    angle = torch.acos((one / one.norm() * other / other.norm()).sum().clamp(-1, 1))
    return (((1 - factor) * angle).sin() * one + (factor * angle).sin() * other) / angle.sin()


def noise_diffusion(one, other, factors: list[float]) -> tuple[Tensor, Tensor]:
    """States between two inverted pictures by NoiseDiffusion as published, but for its ends, where it divides by zero;
    and the levels from there on."""
    at = round(SKIP * one.steps)
    sigma, alpha = one.sigmas[at].float(), one.space.alpha(one.sigmas[at].float())
    size = (alpha**2 + (one.space.scale * sigma) ** 2).sqrt()
    ends = [(maps.states[at].float(), maps.picture) for maps in (one, other)]
    states = []
    for factor in factors:
        if factor in (0, 1):
            states.append(ends[int(factor)][0])
            continue
        weights = torch.tensor([1 - factor, factor]).mul(torch.pi / 2).sin()
        shares = BOOST * weights / weights.sum()
        parts = [
            w * (state / size).clamp(-CLIP, CLIP) + (share - w) * alpha / size * picture
            for w, share, (state, picture) in zip(weights, shares, ends, strict=True)
        ]
        states.append(sum(parts).clamp(-CLIP, CLIP) * size)
    return torch.cat(states), one.sigmas[at:].float()


def morph(b: Bench, real: Real, i: int) -> dict[str, Tensor]:
    """Latents of the frames between picture i and the next, by each way."""
    texts = [prompt(o, g) for o, g in zip(real.objects[i : i + 2], real.backgrounds[i : i + 2], strict=True)]
    pair = [real.latents[i + j : i + j + 1] for j in range(2)]
    factors = [j / (FRAMES - 1) for j in range(FRAMES)]
    prompts = {f"positive_{j + 1}": b.lab.conditioning([texts[j]]) for j in range(2)}
    found = {MORPHS[0]: torch.cat([torch.lerp(*pair, f) for f in factors])}

    def run(latent: dict, sampler, sigmas: Tensor, positive: list) -> Tensor:
        return b.call(
            "SamplerCustom", model=b.model, add_noise=False, noise_seed=0, cfg=1.0, positive=positive,
            negative=b.lab.conditioning([""]), sampler=sampler, sigmas=sigmas, latent_image=latent,
        )[0]["samples"]  # fmt: skip

    for eta in (0.0, 1.0):
        maps = {f"maps_{j + 1}": b.invert(pair[j], [texts[j]], 1.0, eta=eta, seed=j) for j in range(2)}
        given = {"model": b.model, "frames": FRAMES, **maps, **prompts}
        latent, sampler, sigmas, positive, _ = b.call("AttuneMorph", **given)
        if eta == 0:
            tops = [b.up(pair[j], [texts[j]], 1.0) for j in range(2)]
            noise = torch.cat([slerp(*tops, f) for f in factors])
            found[SLERP] = run({"samples": torch.zeros_like(noise)}, from_state("euler", noise), b.sigmas, positive)
            states, levels = noise_diffusion(*(one.maps for one in maps.values()), factors)
            found[MORPHS[2]] = run({"samples": torch.zeros_like(noise)}, from_state("euler", states), levels, positive)
        found[f"Attune Morph, eta {eta:g}"] = run(latent, sampler, sigmas, positive)
    return {name: found[name] for name in MORPHS}


# --- the page ---


def grid(sets: list[Tensor]) -> Image.Image:
    """A row for each set, of FRAMES pictures at most."""
    columns = min(FRAMES, len(sets[0]))
    return sheet(torch.cat([one[:columns] for one in sets]), columns, 96)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["unet", "flow"], default=["unet", "flow"])
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=8, help="of pictures to morph")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began, tables = time.perf_counter(), earlier(args.out, args.models)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        lab = Lab(Host(Path(folder)), args.cache)
        for model in args.models:
            b = Bench(lab, model, args.pictures, args.steps)
            edited, shown = edits(b)
            between, frames = morphs(b, args.pairs)
            made = command_line("noise_space")
            tables += [replace(one, command=made) for one in (reconstruction(b), edited, variations(b), between)]
            below_each_other([grid(shown), grid(frames)]).save(args.out / SHEETS[model], quality=85)
            pictures = [SHEETS[one] for one in SHEETS if any(table.title.startswith(one) for table in tables)]
            record("noise_space", "Editing real pictures in noise space", tables, began, pictures, NOTES, args.out)


def earlier(out: Path, models: list[str]) -> list[Table]:
    """The recorded tables of the models that are not asked for: a run may be made in parts."""
    path = out / "results" / "noise_space.json"
    recorded = json.loads(path.read_text("utf-8"))["tables"] if path.exists() else []
    return [Table(**one) for one in recorded if not one["title"].startswith(tuple(models))]


def below_each_other(sheets: list[Image.Image]) -> Image.Image:
    page = Image.new("RGB", (max(one.width for one in sheets), sum(one.height + 8 for one in sheets) - 8), "white")
    at = 0
    for one in sheets:
        page.paste(one, (0, at))
        at += one.height + 8
    return page


SHEETS = {"unet": "noise_space.jpg", "flow": "noise_space_flow.jpg"}
NOTES = [
    "Training pictures of the demo models, composed anew and encoded; standard errors over four groups of pictures. In "
    "the sheet, for each model: the pictures, img2img at 0.4, noise maps (cfg 3 to 3 with focus 0 and 0.3, 1 to "
    "2 with 0.3), approximate inversion; then one morph by each way, in the order of the table."
]

if __name__ == "__main__":
    main()
