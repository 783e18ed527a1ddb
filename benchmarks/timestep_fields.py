"""Are films continued, filled in and made long by levels of their own, regions drawn anew alone, pictures mended?

python dev.py bench timestep_fields [--parts films long regions starts] [--films 16] [--pictures 24] [--steps 12]

Films: the demo video model, through the host's own SamplerCustomAdvanced: ours by Attune Timestep Field; the host's way
to give frames, a noise mask on the latent, and its way to long films, Context Windows, with and without Attune
Long-Video Noise. Pictures: the demo flow model, starts from a picture on the demo UNet, too. The real ones are the demo
models' training data, composed anew (`dev.py train-demo --video` fetches them). Writes
docs/results/timestep_fields.json, docs/results.md, docs/timestep_fields.jpg and docs/timestep_fields_long.jpg; in parts
with --parts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from comfy_process import ROOT, Host
from harness import Lab, prompt
from judge import BACKGROUNDS, OBJECTS, load_judge
from metrics import frechet, jackknife, perceptual_distance, restoration_distance, structural_distance
from results import DOCS, Table, command_line, record

PARTS = ("films", "long", "regions", "starts")
ASSETS = ROOT / ".host" / "training" / "package" / "assets"
VIDEO = "attune_demo_video.safetensors"
CFG, WINDOW, WINDOWS, GROUPS = 3.0, 8, 5, 4
COPIES = 16  # films of the reference for each that is drawn: the same things, other motions
DIMENSIONS = 24  # of the features that the Frechet distances compare: the real ones' first principal axes
SEARCH = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)  # strengths that are tried by hand
REFINES = ("refine: by detail", "refine: Resfusion", "refine: ResShift", "refine: HIR-Diff")


def training(name: str):
    """A module of training/, which composes the pictures."""
    if not ASSETS.is_dir():
        raise SystemExit(
            f"No training pictures in {ASSETS}: `python dev.py train-demo --video` fetches them; stop it then."
        )
    if str(ROOT / "training") not in sys.path:
        sys.path.insert(0, str(ROOT / "training"))
    return __import__(name)


def grouped(values: Tensor, digits: int = 3) -> str:
    """Mean and its standard error over groups of films or pictures."""
    mean, error = jackknife(lambda some: float(values[some].double().mean()), len(values), GROUPS)
    return f"{mean:.{digits}g} ± {error:.2g}"


@contextlib.contextmanager
def counting(network, first: str) -> Iterator[list[int]]:
    count = [0]
    handle = getattr(network, first).register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    try:
        yield count
    finally:
        handle.remove()


# --- films ---


@dataclass(frozen=True)
class Films:
    """pictures [n f 3 64 64] in 0..1, latents [n c f h w], prompts."""

    pictures: Tensor
    latents: Tensor
    texts: list[str]


class FilmBench:
    def __init__(self, host: Host, count: int, steps: int):
        self.call, self.steps, self.judge = host.call, steps, load_judge()
        self.model, self.clip, self.vae = host.call("CheckpointLoaderSimple", ckpt_name=VIDEO)
        self.count = count
        self.real = self.composed(count, WINDOW, 1)
        many = self.features_of(self.composed(COPIES * count, WINDOW, 3, encoded=False).pictures)
        self.middle = many.mean(0)
        self.axes = torch.linalg.svd(many - self.middle, full_matrices=False).Vh[:DIMENSIONS]
        self.reference = (many - self.middle) @ self.axes.T

    def composed(self, films_wanted: int, frames: int, seed: int, encoded: bool = True) -> Films:
        """Films of the kind that the model was trained on, drawn and encoded; their backgrounds stay. What they show
        repeats itself after `count` films, their motions do not."""
        films, data = training("films"), training("data")
        generator = torch.Generator().manual_seed(seed)
        scenes = [i % self.count for i in range(films_wanted)]
        names = [films.OBJECTS[i % len(films.OBJECTS)] for i in scenes]
        colours = torch.tensor([(7 * i + 3) % len(BACKGROUNDS) for i in scenes])
        motion = films.draw_motion(films_wanted, generator)
        motion.fade.zero_()
        one = data.background_colours()[colours]
        rgba = data.load_objects(ASSETS)[[OBJECTS.index(name) for name in names]]
        pictures = films.shown(rgba, motion, (one, one), frames)
        texts = [prompt(OBJECTS.index(name), int(c)) for name, c in zip(names, colours, strict=True)]
        return Films(pictures, self.encode(pictures) if encoded else torch.empty(0), texts)

    def encode(self, films: Tensor) -> Tensor:
        flat = films.flatten(0, 1).permute(0, 2, 3, 1)
        frames = torch.cat([self.call("VAEEncode", pixels=x, vae=self.vae)[0]["samples"] for x in flat.split(32)])
        return frames.unflatten(0, films.shape[:2]).transpose(1, 2)

    def pictures(self, latents: Tensor) -> Tensor:
        _, frames = self.call("AttuneFilm", film={"samples": latents})
        parts = [self.call("VAEDecode", samples={"samples": z}, vae=self.vae)[0] for z in frames["samples"].split(32)]
        return torch.cat(parts).permute(0, 3, 1, 2).unflatten(0, (len(latents), -1))

    def draw(self, latents: Tensor, texts: list[str], sampler=None, model=None, mask=None, noise=None):
        """Latents and calls of the network; the sampler is the stock euler where none is given."""
        model, call = model or self.model, self.call
        encoded = [call("CLIPTextEncode", clip=self.clip, text=text)[0][0][0] for text in texts]
        empty = call("CLIPTextEncode", clip=self.clip, text="")[0][0][0]
        conds = {"positive": [[torch.cat(encoded), {}]], "negative": [[empty.expand(len(texts), -1, -1), {}]]}
        sampler = sampler or call("KSamplerSelect", sampler_name="euler")[0]
        (sigmas,) = call("BasicScheduler", model=model, scheduler="simple", steps=self.steps, denoise=1.0)
        (guider,) = call("CFGGuider", model=model, cfg=CFG, **conds)
        (plain,) = call("RandomNoise", noise_seed=1)
        film = {"samples": latents} | ({} if mask is None else {"noise_mask": mask})
        with counting(model.model.diffusion_model, "patch_embedding") as calls:
            out, _ = call(
                "SamplerCustomAdvanced", noise=noise(plain) if noise else plain, guider=guider, sampler=sampler,
                sigmas=sigmas, latent_image=film,
            )  # fmt: skip
        return out["samples"], calls[0]

    def field(self, **wish):
        return self.call("AttuneTimestepField", **wish)[0]

    # --- what is measured ---

    def features_of(self, films: Tensor) -> Tensor:
        """The judge's, of every frame [n d]."""
        return torch.cat([self.judge.features(x).double() for x in films.flatten(0, 1).split(256)])

    def features(self, films: Tensor) -> Tensor:
        """Of every frame [n d], in the reference's own axes."""
        return (self.features_of(films) - self.middle) @ self.axes.T

    def frechet(self, films: Tensor) -> float:
        return frechet(self.reference, self.features(films))

    def steps_between(self, films: Tensor) -> Tensor:
        """Perceptual distance of neighbouring frames, [n f-1]."""
        a, b = films[:, :-1].flatten(0, 1), films[:, 1:].flatten(0, 1)
        return perceptual_distance(self.judge, a, b).unflatten(0, (len(films), -1))


def ways(b: FilmBench) -> list[tuple[str, list[int], dict]]:
    """Name, given frames, and what `draw` is told."""
    first, ends, four = [0], [0, WINDOW - 1], [0, 1, 2, 3]
    mask = lambda given: {
        "mask": torch.tensor([float(i not in given) for i in range(WINDOW)])[:, None, None].expand(-1, 8, 8)
    }
    ours = lambda preset, **more: {"sampler": b.field(preset=preset, **more)}
    return [
        ("no frame given, stock euler", [], {}),
        ("no frame given, equal levels, second order", [], ours("free", levels="1")),
        ("first frame, noise mask, stock euler", first, mask(first)),
        ("**first frame given**", first, ours("first frame given")),
        ("the same, euler", first, ours("first frame given", solver="euler")),
        ("the same, shown at level 0.05", first, ours("first frame given", given_noise=0.05)),
        ("first and last, noise mask, stock euler", ends, mask(ends)),
        ("**first and last given**", ends, ours("first and last given")),
        ("four frames, noise mask, stock euler", four, mask(four)),
        ("**extend, four frames given**", four, ours("extend", given_frames=4)),
        ("staircase from four frames", four, ours("staircase", given_frames=4, window=WINDOW, overlap=4)),
    ]


def films_table(b: FilmBench) -> tuple[Table, list[tuple[str, Tensor]]]:
    real, rows, shown = b.real, [], []
    moves = b.steps_between(real.pictures)
    coded = b.pictures(real.latents)
    rows.append(
        [
            "the real films, encoded and decoded",
            "–",
            grouped(b.steps_between(coded).mean(1)),
            "–",
            f"{b.frechet(coded):.3g}",
            "–",
        ]
    )
    for label, given, more in ways(b):
        latents = torch.zeros_like(real.latents)
        latents[:, :, given] = real.latents[:, :, given]
        out, calls = b.draw(latents, real.texts, **more)
        pictures = b.pictures(out)
        kept = float((out - real.latents)[:, :, given].abs().max()) if given else None
        between = b.steps_between(pictures)
        free = [i for i in range(WINDOW) if i not in given]
        edges = [i for i in range(WINDOW - 1) if (i in given) != (i + 1 in given)]
        drawn = [i for i in range(WINDOW - 1) if not (i in given and i + 1 in given)]
        jump = grouped(between[:, edges].mean(1) / moves.mean()) if edges else "–"
        rows.append([
            label, "–" if kept is None else f"{kept:.1g}", grouped(between[:, drawn].mean(1)), jump,
            f"{b.frechet(pictures[:, free]):.3g}", calls,
        ])  # fmt: skip
        print(*rows[-1], flush=True)
        shown.append((label.replace("*", ""), pictures))
    columns = [
        "way",
        "change of given frames",
        "neighbours differ by",
        "at the given frames, of real steps",
        "Fréchet of drawn frames",
        "calls",
    ]
    note = (
        f"{len(real.texts)} films of {WINDOW} frames, {b.steps} steps, cfg {CFG:g}; real neighbours differ by "
        f"{float(moves.mean()):.3g}. Distances are of the judge's features; Fréchet distances in {DIMENSIONS} "
        f"principal axes, to {COPIES * len(real.texts)} real films of the same things in other motions, biased upwards "
        "for few frames: compare rows with as many given ones."
    )
    return Table("Films of the demo video model: given frames", columns, rows, note), shown


def drift(b: FilmBench, pictures: Tensor) -> tuple[list[float], str]:
    """Frechet distance of each window of these films; the worst of the next three over the first, with its error."""
    seen = b.features(pictures).unflatten(0, pictures.shape[:2]).split(WINDOW, dim=1)
    parts = lambda some: [frechet(b.reference, window[some].flatten(0, 1)) for window in seen]

    def worst(some: Tensor) -> float:
        first, *others = parts(some)
        return max(others[:3]) / first

    count = len(pictures)
    ratio, error = jackknife(worst, count, min(2 * GROUPS, count))
    return parts(torch.arange(count)), f"{ratio:.3g} ± {error:.2g}"


def long_table(b: FilmBench) -> tuple[Table, list[tuple[str, Tensor]]]:
    frames, texts = WINDOW * WINDOWS, b.real.texts
    asked = b.call("ContextWindowsManual", model=b.model, **CONTEXT)[0]
    shuffled = lambda noise: b.call("AttuneLongNoise", noise=noise, window=WINDOW, stride=4)[0]
    stairs = {"preset": "staircase", "given_frames": 0, "window": WINDOW}
    rows, shown = [], []

    def row(label: str, pictures: Tensor, calls: int | str) -> None:
        parts, worst = drift(b, pictures)
        moves = grouped(b.steps_between(pictures).mean(1))
        rows.append([label, *(f"{one:.3g}" for one in parts), worst, moves, calls])
        print(*rows[-1], flush=True)

    row("real films, encoded and decoded", b.pictures(b.composed(len(texts), frames, 2).latents), "–")
    for label, more in (
        ("**staircase**, overlap 4", {"sampler": b.field(**stairs, overlap=4)}),
        ("the same, finished frames shown at 0.2", {"sampler": b.field(**stairs, overlap=4, given_noise=0.2)}),
        ("Context Windows, stock euler", {"model": asked}),
        ("the same with Attune Long-Video Noise", {"model": asked, "noise": shuffled}),
    ):
        latents = torch.zeros(len(texts), b.real.latents.shape[1], frames, *b.real.latents.shape[3:])
        if "model" in more:  # the host of 0.3.75 has Context Windows for one film at a time
            each = [b.draw(one, [text], **more) for one, text in zip(latents.split(1), texts, strict=True)]
            out, calls = torch.cat([film for film, _ in each]), each[0][1]
        else:
            out, calls = b.draw(latents, texts, **more)
        pictures = b.pictures(out)
        row(label, pictures, calls)
        shown.append((label.replace("*", ""), pictures))
    columns = [
        "way",
        *(f"Fréchet {8 * i}–{8 * i + 7}" for i in range(WINDOWS)),
        "worst of 2–4 over 1",
        "neighbours differ by",
        "calls",
    ]
    note = (
        f"{len(texts)} films of {frames} frames, {b.steps} steps a frame, cfg {CFG:g}; a window is {WINDOW} frames. A "
        "call sees one window. Distances as above; the error of the worst leaves out a group of films at a time."
    )
    return Table("Films of the demo video model: five windows long", columns, rows, note), shown


CONTEXT = {
    "context_length": WINDOW, "context_overlap": 4, "context_schedule": "standard_static", "context_stride": 1,
    "closed_loop": False, "fuse_method": "pyramid", "dim": 2,
}  # fmt: skip


# --- pictures ---


class PictureBench:
    def __init__(self, lab: Lab, name: str, count: int, steps: int):
        self.lab, self.name, self.model, self.steps, self.call = lab, name, lab.models[name], steps, lab.host.call
        self.judge, data = load_judge(), training("data")
        objects = [37 * i % len(OBJECTS) for i in range(count)]
        backgrounds = [(7 * i + 3) % len(BACKGROUNDS) for i in range(count)]
        generator = torch.Generator().manual_seed(1)
        self.clean = data.compose(data.load_objects(ASSETS)[objects], data.background_colours()[backgrounds], generator)
        self.texts = [prompt(o, c) for o, c in zip(objects, backgrounds, strict=True)]

    def encode(self, pictures: Tensor) -> Tensor:
        parts = pictures.permute(0, 2, 3, 1).split(16)
        return torch.cat([self.call("VAEEncode", pixels=x, vae=self.lab.vaes[self.name])[0]["samples"] for x in parts])

    def levels(self, denoise: float) -> Tensor:
        return self.call("BasicScheduler", model=self.model, scheduler="simple", steps=self.steps, denoise=denoise)[0]

    def draw(self, latents: Tensor, sigmas: Tensor, model=None, mask=None) -> Tensor:
        """Pictures that the stock euler makes of these, with a noise mask [n h w] or none."""
        latent = {"samples": latents}
        if mask is not None:
            (latent,) = self.call("SetLatentNoiseMask", samples=latent, mask=mask)
        (out,) = self.call(
            "SamplerCustom", model=model or self.model, add_noise=True, noise_seed=2, cfg=2.0,
            positive=self.lab.conditioning(self.texts), negative=self.lab.conditioning([""] * len(self.texts)),
            sampler=self.call("KSamplerSelect", sampler_name="euler")[0], sigmas=sigmas, latent_image=latent,
        )[:1]  # fmt: skip
        return self.lab.pictures(self.name, out["samples"])


def regions_table(b: PictureBench) -> Table:
    """A third of each picture is a hole; what is drawn there, and what becomes of the rest?"""
    holes = torch.zeros(len(b.clean), *b.clean.shape[2:])
    holes[:, 32:80, 40:88] = 1
    warped = torch.where(holes[:, None] > 0, 0.5, b.clean)
    latents, sigmas = b.encode(warped), b.levels(0.9)
    coded = b.lab.pictures(b.name, latents)
    (differential,) = b.call("DifferentialDiffusion", model=b.model)
    far = (F.max_pool2d(holes[:, None], 65, 1, 32) == 0).float()  # beyond what the decoder mixes
    rows = []

    def row(label: str, pictures: Tensor) -> None:
        change = (pictures - coded).abs()
        inside = (change * holes[:, None]).sum((1, 2, 3)) / (3 * holes.sum((1, 2)))
        outside = (change * far).sum((1, 2, 3)) / (3 * far.sum((1, 2, 3)))
        gap = perceptual_distance(b.judge, pictures, b.clean)
        rows.append(
            [
                label,
                grouped(255 * inside),
                grouped(255 * outside),
                f"{100 * float(outside.mean() / inside.mean()):.2g} %" if inside.any() else "–",
                grouped(gap),
            ]
        )
        print(*rows[-1], flush=True)

    given = {
        "model": b.model,
        "sigmas": sigmas,
        "image": warped.permute(0, 2, 3, 1),
        "source": "warped picture",
        "holes": holes,
    }
    row("as it is", coded)
    row("whole picture, no mask", b.draw(latents, sigmas))
    row("plain noise mask on the hole", b.draw(latents, sigmas, mask=holes))
    for floor, feather in ((0.0, 0), (0.0, 16), (0.3, 16), (0.45, 16)):
        mask, _ = b.call("AttuneNoiseMask", **given, floor=floor, feather=feather)
        row(f"Attune Noise Mask, floor {floor:g}, feather {feather}", b.draw(latents, sigmas, differential, mask))
    columns = [
        "way",
        "change in the hole, of 255",
        "change far from it, of 255",
        "far, of inside",
        "distance to the whole picture",
    ]
    note = (
        f"{len(b.clean)} pictures of 128 px with a grey hole of 48 px, denoise 0.9, {b.steps} steps of euler, cfg 2. "
        "Far: 32 px and more from the hole. The distance is of the judge's features, to the picture without a hole."
    )
    return Table(f"{b.name}: a hole drawn anew", columns, rows, note)


def blurred(pictures: Tensor, width: float) -> Tensor:
    """By a Gaussian of this standard deviation in pixels."""
    t = torch.arange(-16, 17.0)
    kernel = torch.exp(-(t**2) / (2 * width**2))
    kernel = (kernel / kernel.sum()).to(pictures).expand(3, 1, 1, -1)
    padded = F.pad(pictures, (16, 16, 16, 16), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def small(pictures: Tensor, factor: int) -> Tensor:
    """A picture of one part in `factor` of the side, and back."""
    reduced = F.interpolate(pictures, scale_factor=1 / factor, mode="area")
    return F.interpolate(reduced, pictures.shape[2:], mode="bicubic").clamp(0, 1)


@dataclass(frozen=True)
class Damage:
    """What is done to a picture, and the `detail` in pixels: of a blur four standard deviations, the whole width of a
    smeared edge, and of an enlarged picture its factor."""

    of: Callable[[Tensor], Tensor]
    detail: float


DAMAGES = {
    "blur of 4 px": Damage(lambda pictures: blurred(pictures, 4.0), 16.0),
    "blur of 6 px": Damage(lambda pictures: blurred(pictures, 6.0), 24.0),
    "an eighth of the size": Damage(lambda pictures: small(pictures, 8), 8.0),
}


def starts_table(b: PictureBench) -> Table:
    """Refine schedules against the best strength that a search finds, on the same pictures."""
    rows, shown = [], b.lab.pictures(b.name, b.encode(b.clean))  # the best that a latent can hold
    for kind, damage in DAMAGES.items():
        latents = b.encode(damage.of(b.clean))

        def started(start: str, levels: Tensor | None, latents=latents, kind=kind, of=damage.of) -> tuple[list, float]:
            pictures = b.lab.pictures(b.name, latents) if levels is None else b.draw(latents, levels)
            far = 255 * restoration_distance(pictures, shown, of)
            known = (structural_distance(pictures, shown), perceptual_distance(b.judge, pictures, shown))
            sigma = "–" if levels is None else f"{float(levels[0]):.3g}"
            return [kind, start, sigma, *(grouped(one) for one in (far, *known))], float(far.mean())

        tried = (started(f"best of the search: denoise {d:g}", b.levels(d)) for d in SEARCH)
        best = min(tried, key=lambda one: one[1])
        some = [started("as it is", None), best]
        for name in REFINES:
            (sigmas,) = b.call(
                "AttuneScheduler", model=b.model, steps=b.steps, denoise=1.0, schedule=name, detail=damage.detail,
                latent={"samples": latents},
            )  # fmt: skip
            some.append(started(f"**{name}**, {damage.detail:g}" if name == REFINES[0] else name, sigmas))
        for cells, far in some:
            rows.append([*cells, f"{far / best[1]:.3g}"])
            print(*rows[-1], flush=True)
    columns = ["picture", "start", "from sigma", "distance, of 255", "1 - SSIM", "perceptual distance", "of the best"]
    note = (
        f"{len(b.clean)} pictures, {b.steps} steps of euler, cfg 2, the prompt names object and background. Distance: "
        "what the damage leaves of a picture must agree with the clean one, what it takes away must be as strong "
        "around each place (17 px); the last column is its mean over that of the best. The clean pictures are those "
        f"that the latents hold. The search: denoise {', '.join(f'{d:g}' for d in SEARCH)} of the stock simple, judged "
        "on these very pictures."
    )
    return Table(f"{b.name}: starts from a picture", columns, rows, note)


# --- the page ---


def strips(shown: list[tuple[str, Tensor]], films: int, every: int = 1) -> Image.Image:
    """A block for each way: its first films, a row each, their frames from left to right."""
    blocks = [torch.cat([torch.cat(list(film[::every]), dim=2) for film in one[:films]], dim=1) for _, one in shown]
    gap = torch.ones(3, 8, blocks[0].shape[2])
    whole = torch.cat([part for block in blocks for part in (block, gap)][:-1], dim=1)
    return Image.fromarray((whole * 255).round().byte().permute(1, 2, 0).numpy())


def earlier(out: Path, parts: list[str]) -> dict[str, list[Table]]:
    """The recorded tables of the parts that are not asked for: a run may be made in parts."""
    path = out / "results" / "timestep_fields.json"
    recorded = json.loads(path.read_text("utf-8"))["data"] if path.exists() else {}
    return {part: [Table(**one) for one in tables] for part, tables in recorded.items() if part not in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--films", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cache", type=Path, help="not used: nothing is kept")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began, tables = time.perf_counter(), earlier(args.out, args.parts)

    def keep(part: str, *made: Table) -> None:
        """A part is on the page as soon as it is done: an interrupted run keeps what it has."""
        tables[part] = [replace(table, command=command_line("timestep_fields")) for table in made]
        data = {part: [vars(table) for table in tables[part]] for part in PARTS if part in tables}
        figures = [name for name in FIGURES if (args.out / name).exists()]
        flat = [table for part in PARTS for table in tables.get(part, [])]
        record("timestep_fields", "Noise in space and time", flat, began, figures, NOTES, args.out, data)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        host = Host(Path(folder))
        if {"films", "long"} & set(args.parts):
            films = FilmBench(host, args.films, args.steps)
            for part, make, name in (("films", films_table, FIGURES[0]), ("long", long_table, FIGURES[1])):
                if part in args.parts:
                    table, shown = make(films)
                    strips(shown, 2).save(args.out / name, quality=88)
                    keep(part, table)
        if {"regions", "starts"} & set(args.parts):
            lab = Lab(host, Path(folder))
            flow = PictureBench(lab, "flow", args.pictures, args.steps)
            if "regions" in args.parts:
                keep("regions", regions_table(flow))
            if "starts" in args.parts:
                unet = PictureBench(lab, "unet", args.pictures, args.steps)
                keep("starts", starts_table(flow), starts_table(unet))


FIGURES = ("timestep_fields.jpg", "timestep_fields_long.jpg")
NOTES = [
    "Standard errors over four groups of films or pictures. The strips show the first two films of each row of the "
    "table, in its order, without the real ones."
]

if __name__ == "__main__":
    main()
