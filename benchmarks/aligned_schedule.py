"""Eight steps, stock schedules against Attune's: distance to the converged picture, same seeds, real host.

python dev.py bench aligned_schedule [--steps 8] [--sampler dpmpp_2m] [--seeds 48]

For every prompt and seed the reference is the same noise sampled with 100 karras steps. The error of a schedule is the
mean squared difference of the final latents. Mean and standard error over disjoint groups of seeds; all schedules see
the same noise. Writes docs/aligned_schedule.json and, for the picture in the README, docs/aligned_schedule.jpg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from demo_model import Painter, article
from PIL import Image

from comfy_process import ROOT, Host
from judge import BACKGROUNDS, OBJECTS

STOCK = ["normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform", "beta", "kl_optimal"]
OURS = ["auto", "KL-optimal", "KL-optimal, c = 0.5", "KL-optimal, c = 1.4"]
PICTURED = 8


def prompts(count: int) -> list[str]:
    """Objects spread over the vocabulary, backgrounds in turn."""
    names = list(BACKGROUNDS)
    chosen = [(OBJECTS[i * len(OBJECTS) // count], names[7 * i % len(names)]) for i in range(count)]
    return [f"{article(o)} {o} on {article(b)} {b} background" for o, b in chosen]


class Sampling:
    """One noise per prompt, any SIGMAS, through the stock SamplerCustom."""

    def __init__(self, painter: Painter, sampler: str):
        self.painter, self.host = painter, painter.host
        (self.solver,) = self.host.call("KSamplerSelect", sampler_name=sampler)

    def sigmas(self, name: str, steps: int):
        model = self.painter.model
        if name in STOCK:
            return self.host.call("BasicScheduler", model=model, scheduler=name, steps=steps, denoise=1.0)[0]
        if name == "core AYS":
            return self.host.call("AlignYourStepsScheduler", model_type="SD1", steps=steps, denoise=1.0)[0]
        return self.host.call("AttuneScheduler", model=model, steps=steps, denoise=1.0, schedule=name)[0]

    def latent(self, text: str, seed: int, sigmas) -> torch.Tensor:
        out, _ = self.host.call(
            "SamplerCustom", model=self.painter.model, add_noise=True, noise_seed=seed, cfg=3.0,
            positive=self.painter.encode(text), negative=self.painter.empty, sampler=self.solver, sigmas=sigmas,
            latent_image={"samples": torch.zeros(1, 4, 16, 16)},
        )  # fmt: skip
        return out["samples"]

    def picture(self, latent) -> Image.Image:
        (decoded,) = self.host.call("VAEDecode", samples={"samples": latent}, vae=self.painter.vae)
        return Image.fromarray((decoded[0] * 255).round().byte().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--seeds", type=int, default=48)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if args.seeds % args.groups:
        parser.error("--seeds must be a multiple of --groups")
    names = [*STOCK, "core AYS", *OURS]
    texts = prompts(args.seeds)
    with tempfile.TemporaryDirectory() as folder:
        sampling = Sampling(Painter(Host(Path(folder)), flow=False), args.sampler)
        schedules = {name: sampling.sigmas(name, args.steps) for name in names}
        long = sampling.sigmas("karras", 100)
        errors = {name: [] for name in names}
        shown: list[list[Image.Image]] = []
        began = time.time()
        for seed, text in enumerate(texts):
            reference = sampling.latent(text, seed, long)
            latents = {name: sampling.latent(text, seed, sigmas) for name, sigmas in schedules.items()}
            for name, latent in latents.items():
                errors[name].append(float((latent - reference).square().mean()))
            if len(shown) < PICTURED and seed % (args.seeds // PICTURED) == 0:
                shown.append([sampling.picture(latents["normal"]), sampling.picture(latents["auto"])])
            print(f"\r{seed + 1}/{len(texts)}", end="", flush=True)
    rows = []
    for name in names:
        groups = torch.tensor(errors[name]).reshape(args.groups, -1).mean(dim=1)
        rows.append(
            {"schedule": name, "error": float(groups.mean()), "standard_error": float(groups.std() / args.groups**0.5)}
        )
    rows.sort(key=lambda row: row["error"])
    print(f"\n{args.sampler}, {args.steps} steps, {args.seeds} pictures, {time.time() - began:.0f} s\n")
    print("| schedule | latent MSE to 100 steps | standard error |\n|---|---|---|")
    for row in rows:
        print(f"| {row['schedule']} | {row['error']:.4f} | {row['standard_error']:.4f} |")
    result = {"steps": args.steps, "sampler": args.sampler, "pictures": args.seeds, "rows": rows}
    (args.out / "aligned_schedule.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    canvas = Image.new("RGB", (128 * len(shown), 256))
    for column, pair in enumerate(shown):
        for row, picture in enumerate(pair):
            canvas.paste(picture, (128 * column, 128 * row))
    canvas.save(args.out / "aligned_schedule.jpg", quality=88)


if __name__ == "__main__":
    main()
