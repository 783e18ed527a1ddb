"""How badly could an inpainting model edit a picture at all, changed within the budget of Attune Protect Image?

python dev.py bench protect_bound [--pictures 3] [--steps 60] [--long 800] [--edits half another]

Both edits of `bench protect`. First what its judge can tell: how often it names the object where nothing of what the
edit hides was painted. Then attacks, all within the node's budget: the node, its objective for as many iterations as
the authors take, with momentum (Dong et al. 2018, arXiv 1710.06081) and with the prompt of the edit; PhotoGuard's with
the latent of the background alone as its goal; the predictions of that background, and for the edit with a prompt those
without it, at several levels of runs of its own; and the end of the very runs that are judged, with mask, noise and
prompt known, through all of their calls, away from the plain end or towards the background alone. No proof, but what
the last cannot do, attacks that know less will hardly do. Changed pictures are kept, and a stopped benchmark goes on;
tables of edits that are not asked for stay in the record. Writes docs/results/protect_bound.json, docs/results.md and
docs/protect_bound.jpg.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from demo_model import sheet
from protect import BUDGET, CFG, CHECKPOINT, EDIT_STEPS, REACH, SIDE, Bench, Edit, apart, drawn, spread, treated
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_process import ROOT, Host
from harness import CACHE
from metrics import psnr
from results import DOCS, Table, beside_last, markdown, record

RUN = 5  # steps of the runs that attacks are sought through; all are judged by the whole edit
NOISES = 2  # runs whose calls stand for those of any run
MOMENTUM = 1.0
KEPT = (0.5, 0.4, 0.3)  # of the object's width, of which the judge is asked
CONTROLS = 48  # pictures of which it is asked that; drawn by no network
FORMAT = 1  # of what is kept; raise it when an attack changes
PUBLISHED, MADE_BY_NODE = "the published objective", "Attune Protect Image"
Loss = Callable[[int, Tensor, Tensor], Tensor]  # iteration, masked pictures, masks [n h w] -> the sum of all, []


class Bound:
    """Attacks on all pictures together, by the node's own copies of the networks."""

    def __init__(self, bench: Bench, edit: Edit, args: argparse.Namespace):
        self.bench, self.edit, self.args, self.kernel = bench, edit, args, bench.kernel
        self.pictures, self.masks = bench.scenes.pictures.clone(), edit.masks.clone()
        n, side = len(self.pictures), SIDE // 8
        self.editor = bench.made.Editor(bench.model, bench.slim, bench.empty, (n, 4, side, side))
        told = [self.editor._conditions(bench.conditioning([text])) for text in edit.texts]
        self.prompts = {name: torch.cat([one[name] for one in told]) for name in told[0]}
        self.nothing = {name: one.expand(n, *one.shape[1:]) for name, one in self.editor.told.items()}
        scheduled = bench.call("BasicScheduler", model=bench.model, scheduler="normal", steps=RUN, denoise=1.0)
        self.sigmas = scheduled[0].clone()
        self.grounds = self.pictures[:, :, :2, :2].mean((2, 3), keepdim=True).expand_as(self.pictures).clone()
        self.inside = torch.nn.functional.interpolate(self.masks[:, None], (side, side))
        # as the host draws them for all pictures together
        shape = self.editor.latent.shape
        self.noises = [torch.randn(shape, generator=torch.manual_seed(1000 * seed)) for seed in range(bench.seeds)]
        others = [torch.randn(shape, generator=torch.manual_seed(7 + i)) for i in range(NOISES)]
        with torch.no_grad():
            self.calls = [call for noise in others for call in self.run(noise, self.hidden(self.pictures), self.masks)]
            self.calls = [call for call in self.calls if float(call[1])]

    def hidden(self, pictures: Tensor) -> Tensor:
        """Latents of what the network is shown of pictures."""
        return self.editor.encoded(self.kernel.shown(pictures, self.masks))

    def answer(self, x: Tensor, sigma: Tensor, latents: Tensor, masks: Tensor, told: dict) -> Tensor:
        """The clean latents that the network sees in x."""
        concat = self.editor.base.concat_cond(
            noise=x, device=self.editor.device, concat_latent_image=latents, concat_mask=masks[:, None]
        )
        return self.editor.base.apply_model(x, sigma.expand(len(x)), c_concat=concat, **told)

    def guided(self, x: Tensor, sigma: Tensor, latents: Tensor, masks: Tensor) -> Tensor:
        without = self.answer(x, sigma, latents, masks, self.nothing)
        if not any(self.edit.texts):
            return without  # an empty prompt on both sides
        return without + CFG * (self.answer(x, sigma, latents, masks, self.prompts) - without)

    def run(self, noise: Tensor, latents: Tensor, masks: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Where Euler's method has its calls, (x, sigma), and where it ends, with sigma 0."""
        x = self.editor.base.model_sampling.noise_scaling(self.sigmas[0], noise, torch.zeros_like(noise), True)
        places = [(x, self.sigmas[0])]
        for sigma, sigma_next in itertools.pairwise(self.sigmas):
            denoised = self.guided(x, sigma, latents, masks)
            x = denoised + sigma_next / sigma * (x - denoised)
            places.append((x, sigma_next))
        return places

    # --- what shall fall ---

    def published(self, draws: torch.Generator, told: dict, i: int, shown: Tensor, masks: Tensor) -> Tensor:
        """Minus the length of the first prediction, from pure noise."""
        editor = self.editor
        noise = torch.randn(editor.latent.shape, generator=draws)
        x = editor.base.model_sampling.noise_scaling(editor.sigma, noise, editor.latent, True)
        denoised = self.answer(x, editor.sigma, editor.encoded(shown), masks, told)
        return len(x) * self.kernel.objective(self.bench.made.own_prediction(x, denoised, editor.sigma, editor.kind))

    def as_background(self, goal: Tensor, i: int, shown: Tensor, masks: Tensor) -> Tensor:
        return (self.editor.encoded(shown) - goal).square().sum()

    def predicts_background(self, goals: list[Tensor], i: int, shown: Tensor, masks: Tensor) -> Tensor:
        """The clean latents of one of the known calls are to be those of the background alone."""
        x, sigma = self.calls[i % len(self.calls)]
        answer = self.answer(x, sigma, self.editor.encoded(shown), masks, self.nothing)
        return (answer - goals[i % len(goals)]).square().sum()

    def ignores_text(self, i: int, shown: Tensor, masks: Tensor) -> Tensor:
        """What the prompt changes in the answer of one of the known calls."""
        (x, sigma), latents = self.calls[i % len(self.calls)], self.editor.encoded(shown)
        with_text, without = (self.answer(x, sigma, latents, masks, told) for told in (self.prompts, self.nothing))
        return (with_text - without).square().sum()

    def ends(self, goals: list[Tensor], sign: float, i: int, shown: Tensor, masks: Tensor) -> Tensor:
        """Of the judged runs in turn, the distance of the end to its goal inside of the mask, times `sign`."""
        which = i % len(self.noises)
        *_, (end, _) = self.run(self.noises[which], self.editor.encoded(shown), masks)
        return sign * ((end - goals[which]) * self.inside).square().sum()

    # --- attacks ---

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        """Changed pictures by each attack, of those that this edit can meet."""
        steps, longer, draws = self.args.steps, self.args.long, torch.Generator().manual_seed(0)
        found = {
            MADE_BY_NODE: lambda: self.bench.by_node(self.edit, REACH),
            f"{PUBLISHED}, {longer} iterations": lambda: self.seek(
                partial(self.published, draws, self.nothing), longer
            ),
        }
        if any(self.edit.texts):
            found |= {
                f"{PUBLISHED}, prompt known": lambda: self.seek(partial(self.published, draws, self.prompts), steps),
                "prompt ignored, several levels": lambda: self.seek(self.ignores_text, steps),
            }
        else:
            found |= {
                f"{PUBLISHED}, momentum": lambda: self.seek(
                    partial(self.published, draws, self.nothing), steps, momentum=MOMENTUM
                ),
                "latent as of the background alone": lambda: self.seek(
                    partial(self.as_background, self.frozen(lambda: self.hidden(self.grounds))), steps
                ),
                "predictions as of the background alone": lambda: self.seek(
                    partial(self.predicts_background, self.frozen(self.background_answers)), steps
                ),
                "whole run, away from the plain end": lambda: self.seek(
                    partial(self.ends, self.frozen(self.plain_ends), -1), steps, 0, MOMENTUM
                ),
            }
        empty = lambda: [self.editor.encoded(self.grounds)] * len(self.noises)
        return found | {
            "whole run, towards the background alone": lambda: self.seek(
                partial(self.ends, self.frozen(empty), 1), steps, 0, MOMENTUM
            )
        }

    def frozen(self, make: Callable):
        with torch.no_grad():
            return make()

    def background_answers(self) -> list[Tensor]:
        latents = self.hidden(self.grounds)
        return [self.answer(x, sigma, latents, self.masks, self.nothing) for x, sigma in self.calls]

    def plain_ends(self) -> list[Tensor]:
        return [self.run(noise, self.hidden(self.pictures), self.masks)[-1][0] for noise in self.noises]

    def seek(self, loss: Loss, steps: int, reach: int = REACH, momentum: float = 0.0) -> Tensor:
        """The node's loop for pictures together, each with the contour of its own mask moved; `momentum` sums
        gradients, each in units of its mean size."""
        budget, step, draws = BUDGET / 510, 1 / 510, torch.Generator().manual_seed(0)
        start, sum_, distances = self.pictures, 0.0, self.kernel.signed_distance(self.masks, reach + 1)
        # at the picture itself the distance to its own end has no gradient
        now = start + (step / 2 if momentum else 0.0)
        for i in range(steps):
            moved = [self.kernel.move_contour(one[None], reach, draws) for one in distances]
            masks, asked = torch.cat(moved), now.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(i, self.kernel.shown(asked, masks), masks), asked)
            sum_ = momentum * sum_ + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-20)
            now = (now - step * sum_.sign()).clamp(start - budget, start + budget).clamp(0, 1)
        return self.kernel.in_levels(start, now.clamp(start - budget, start + budget)).detach()

    def changed(self, way: str, make: Callable[[], Tensor]) -> Tensor:
        """Pictures by one attack, from the cache where it was made before."""
        sources = [f"models/weights/{CHECKPOINT}", "kernels/protect.py", "nodes/_host/protect.py"]
        facts = [hashlib.sha256((ROOT / one).read_bytes()).hexdigest() for one in sources]
        facts += [way, self.edit.texts, len(self.pictures), self.bench.seeds, self.args.steps, FORMAT]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        path = self.args.cache / f"protected-{name}.safetensors"
        if not path.exists():
            self.args.cache.mkdir(parents=True, exist_ok=True)
            save_file({"pictures": make().contiguous()}, path)
        return load_file(path)["pictures"]


def measure(bench: Bench, title: str, edit: Edit, args: argparse.Namespace, say: Callable) -> tuple[Table, list]:
    """The table of one edit, and rows of pictures: as they are, and edited after each attack."""
    plain, rows = bench.scenes.pictures, []
    with torch.inference_mode(False), torch.enable_grad():
        bound = Bound(bench, edit, args)
        changed = {way: bound.changed(way, make) for way, make in bound.ways().items()}
    edits = bench.edits(plain, edit, edit.masks)
    rows.append(["as it is", None, spread(100 * bench.right(edits, edit)), None])
    pictures, first = [plain, edits[0]], edits
    for way, its in changed.items():
        edits = bench.edits(treated(its, lambda picture: picture), edit, edit.masks)
        level = f"{float(psnr(its, plain).mean()):.1f}"
        rows.append([way, level, spread(100 * bench.right(edits, edit)), apart(edits, first, edit.masks)])
        pictures += [its, edits[0]]
        say(f"{title}, {rows[-1]}")
    note = (
        f"{args.steps} iterations where nothing else stands. Whole run: of {RUN} steps, with mask, noise and prompt "
        "known; all are judged by the edits of `bench protect`."
    )
    columns = ["attack", "PSNR dB", "object right, %", "edits apart, dB"]
    return Table(title, columns, rows, note), pictures


def controls(bench: Bench) -> Table:
    """How often the judge names the object in pictures of whose hidden part no network has painted anything."""
    scenes, rows = bench.scenes, []
    grounds = scenes.pictures[:, :, :2, :2].mean((2, 3), keepdim=True).expand_as(scenes.pictures)
    for share in KEPT:
        masks = drawn(scenes.boxes, share)
        hole = masks[:, None]
        right = lambda other, m: spread(100 * bench.right((scenes.pictures * (1 - m) + other * m)[None], scenes.half))
        others = scenes.pictures.roll(1, 0)
        rows.append([f"{share:.0%}", right(grounds, hole), right(others, hole), right(grounds, 1 - hole)])
    right = lambda pictures: spread(100 * bench.right(pictures[None], scenes.another))
    rows.append(["another object in a box", right(grounds * hole), right(scenes.pictures), None])
    columns = ["kept of the object", "hidden: the background", "hidden: another object's part", "kept: the background"]
    note = f"{len(scenes.pictures)} pictures. What an edit that paints nothing, or another thing, would be judged."
    return Table("What the judge can tell: object right, %", columns, rows, note)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--long", type=int, default=800, help="iterations of the published objective")
    parser.add_argument("--seeds", type=int, default=2, help="of the edits")
    parser.add_argument("--edits", nargs="+", choices=["half", "another"], default=["another", "half"])
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    say = lambda text: print(text, flush=True)
    titles = {"half": "The other half, within the budget", "another": "Another object in a box, within the budget"}
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        tables, pictures = [controls(Bench(host, CONTROLS, args.steps, 1))], []
        bench = Bench(host, args.pictures, args.steps, args.seeds)
        for name in args.edits:
            table, shown = measure(bench, titles[name], getattr(bench.scenes, name), args, say)
            tables.append(table)
            pictures += shown
    print("\n" + "\n".join(map(markdown, tables)))
    sheet(torch.cat(pictures).clamp(0, 1), args.pictures).save(args.out / "protect_bound.jpg", quality=90)
    notes = [
        f"{args.pictures} pictures, {args.seeds} edits each ({EDIT_STEPS} steps of euler, cfg {CFG:g}), budget "
        f"{BUDGET}/255 of a picture in -1..1. Rows of protect_bound.jpg: for each row of the tables but the first one "
        "the pictures, then the first edits of them."
    ]
    tables = beside_last("protect_bound", tables, args.out)
    record("protect_bound", "How far protection could go", tables, began, ["protect_bound.jpg"], notes, args.out)


if __name__ == "__main__":
    main()
