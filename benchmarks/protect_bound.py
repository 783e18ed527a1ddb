"""How badly could an inpainting model edit a picture at all, changed within the budget of Attune Protect Image?

python dev.py bench protect_bound [--pictures 3] [--steps 40]

The first edit of `bench protect`, the missing half of an object, with one noise. Beside the node: four times as many
iterations, a sum of signed gradients with momentum (Dong et al. 2018, arXiv 1710.06081), several levels of a run in
place of the first alone, and an attack that knows mask, noise and solver, and pushes the end of that very run away from
the end of the plain picture's, through all of its calls. No proof, but what it cannot do, attacks that know less will
hardly do. Writes docs/results/protect_bound.json and docs/results.md.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from protect import BUDGET, CFG, EDIT_STEPS, REACH, SIDE, Bench, apart, spread, treated
from torch import Tensor

from comfy_process import Host
from harness import CACHE
from metrics import psnr
from results import DOCS, Table, markdown, record

LEVELS = 4  # of a run, evenly over its steps, for the attack on several
RUN = 5  # steps of the run that the last attack is sought through; it is judged by the whole edit as all others are
MOMENTUM = 1.0
KNOWS_ALL = "through the whole run, mask and noise known"


def with_momentum(loss: Callable, start: Tensor, mask: Tensor, settings, shown: Callable) -> Tensor:
    """Sign steps along a sum of gradients, each in units of its own mean size."""
    now, sum_ = start, torch.zeros_like(start)
    for _ in range(settings.steps):
        asked = now.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(shown(asked, mask), mask), asked)
        sum_ = MOMENTUM * sum_ + gradient / gradient.abs().mean()
        now = (now - settings.step * sum_.sign()).clamp(start - settings.budget, start + settings.budget).clamp(0, 1)
    return now.detach()


class Bound:
    """Attacks on one picture after the other, by the node's own copies of the networks."""

    def __init__(self, bench: Bench, steps: int):
        self.bench, self.steps, self.kernel = bench, steps, bench.kernel
        self.editor = bench.made.Editor(bench.model, bench.slim, bench.empty, (1, 4, SIDE // 8, SIDE // 8))
        of = lambda count: bench.call(
            "BasicScheduler", model=bench.model, scheduler="normal", steps=count, denoise=1.0
        )[0].clone()  # fmt: skip
        self.levels, self.sigmas = of(LEVELS)[:-1], of(RUN)
        # as the host draws it for all pictures together
        self.noise = torch.randn((len(bench.scenes.pictures), 4, SIDE // 8, SIDE // 8), generator=torch.manual_seed(0))

    def answer(self, x: Tensor, sigma: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
        """The clean latent that the network sees in x."""
        told = self.editor
        concat = told.base.concat_cond(
            noise=x, device=told.device, concat_latent_image=told.encoded(picture), concat_mask=mask[:, None]
        )
        return told.base.apply_model(x, sigma[None], c_concat=concat, **told.told)

    def on_levels(self, draws: torch.Generator, latent: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
        """The published objective at a level of a run by chance, of the plain picture's latent with noise of it."""
        sigma = self.levels[int(torch.randint(LEVELS, (), generator=draws))]
        noise = torch.randn(latent.shape, generator=draws)
        x = self.editor.base.model_sampling.noise_scaling(sigma, noise, latent)
        own = self.bench.made.own_prediction(x, self.answer(x, sigma, picture, mask), sigma, self.editor.kind)
        return self.kernel.objective(own)

    def end(self, noise: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
        """Of the run by Euler's method; an empty prompt on both sides of the guidance leaves one call a step."""
        sampling = self.editor.base.model_sampling
        x = sampling.noise_scaling(self.sigmas[0], noise, torch.zeros_like(noise), True)
        for sigma, sigma_next in itertools.pairwise(self.sigmas):
            denoised = self.answer(x, sigma, picture, mask)
            x = denoised + sigma_next / sigma * (x - denoised)
        return x

    def attacked(self, way: str) -> Tensor:
        """All pictures, changed by one way."""
        kernel, scenes, found = self.kernel, self.bench.scenes, []
        times = 4 if way == "four times the iterations" else 1
        settings = kernel.Protection(BUDGET / 510, 1 / 510, times * self.steps, REACH)
        with torch.inference_mode(False), torch.enable_grad():
            for i, (picture, mask) in enumerate(zip(scenes.pictures, scenes.half.masks, strict=True)):
                start, its, draws = picture[None].clone(), mask[None].clone(), torch.Generator().manual_seed(0)
                loss = partial(self.editor.loss, draws)
                if way == "several levels":
                    with torch.no_grad():
                        loss = partial(self.on_levels, draws, self.editor.encoded(start))
                if way == KNOWS_ALL:
                    noise = self.noise[i : i + 1].clone()
                    with torch.no_grad():
                        goal = self.end(noise, kernel.shown(start, its), its)
                    inside = torch.nn.functional.interpolate(its[:, None], goal.shape[2:])
                    far = lambda shown, m, n=noise, g=goal, w=inside: -((self.end(n, shown, m) - g) * w).square().mean()
                    now = with_momentum(far, start + 0.5 / 510, its, settings, kernel.shown)
                elif way == "momentum":
                    now = with_momentum(loss, start, its, settings, kernel.shown)
                else:
                    *_, now = kernel.protect(start, its, loss, settings, draws)
                found.append(kernel.in_levels(start, now.clamp(start - BUDGET / 510, start + BUDGET / 510)))
        return torch.cat(found).detach()


def measure(bench: Bench, steps: int, say: Callable[[str], None]) -> Table:
    edit, plain, rows = bench.scenes.half, bench.scenes.pictures, []
    bound, first = Bound(bench, steps), None
    for way in ("as it is", "as the node", "momentum", "several levels", "four times the iterations", KNOWS_ALL):
        pictures = plain if way == "as it is" else bound.attacked(way)
        edits = bench.edits(treated(pictures, lambda picture: picture), edit, edit.masks)
        first = edits if first is None else first
        same = way == "as it is"
        level = "–" if same else f"{float(psnr(pictures, plain).mean()):.1f}"
        row = [way, level, spread(100 * bench.right(edits, edit)), "–" if same else apart(edits, first, edit.masks)]
        rows.append(row)
        say(f"{row}")
    columns = ["attack", "PSNR dB", "object right, %", "edits apart, dB"]
    note = (
        f"{steps} iterations, four times as many where it says so. The last is sought through "
        f"a run of {RUN} steps; all are judged by the edits of the plain bench, with the first noise."
    )
    return Table("The other half, within the budget", columns, rows, note)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cache", type=Path, default=CACHE, help="not used: nothing is kept")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Host(Path(folder)), args.pictures, args.steps, 1)
        table = measure(bench, args.steps, lambda text: print(text, flush=True))
    print("\n" + markdown(table))
    notes = [f"{args.pictures} pictures, one edit each ({EDIT_STEPS} steps of euler, cfg {CFG:g}), budget {BUDGET}."]
    record("protect_bound", "How far protection could go", [table], began, (), notes, args.out)


if __name__ == "__main__":
    main()
