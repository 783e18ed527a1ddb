"""Which noise levels come closest to the converged picture in few steps? Stock schedules, core AYS and ours.

python dev.py bench schedules [--models unet] [--samplers dpmpp_2m euler] [--steps 5 8 10 20] [--tasks 96]

For every prompt and seed the reference is the same noise taken to the end with 100 DPM++ 2M steps on the karras levels
(flow model: 100 on "simple"). Reported per cell: latent mean squared error to the reference (mean over disjoint groups
of seeds, standard error between them), PSNR of the decoded pictures, share of pictures whose object and background are
right, guided model calls, and sampling time relative to "normal" in the same run. Results are cached; run it again to
continue or to print. Writes docs/schedules.json and the measured part of docs/schedules.md, and the README's picture.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from comfy_process import ROOT, Host
from harness import CACHE, Cell, Lab, Task, tasks
from judge import load_judge, nearest_background
from metrics import psnr, rank_stability

STOCK = ["normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform", "beta", "kl_optimal"]
OURS = ["KL-optimal", "KL-optimal, c = 0.5", "KL-optimal, c = 1.4"]
NAMES = {"unet": [*STOCK, "core AYS", "auto", *OURS], "flow": [*STOCK, *OURS]}
REFERENCE = {"unet": ("dpmpp_2m", "karras", 100), "flow": ("dpmpp_2m", "simple", 100)}
BEGIN, END = "<!-- measured: python dev.py bench schedules -->", "<!-- end -->"
PICTURED = 8


class Yardstick:
    """Where the trajectories end when they have all the steps they want, and what the pictures should show."""

    def __init__(self, lab: Lab, model: str, work: list[Task]):
        sampler, schedule, steps = REFERENCE[model]
        cell = Cell(model, sampler, lab.sigmas(model, schedule, steps))
        self.judge, self.latents = load_judge(), lab.run(cell, work, progress("reference")).latents
        self.pictures = lab.pictures(model, self.latents)
        self.wanted = torch.tensor([[t.obj, t.background] for t in work])

    def errors(self, latents: Tensor) -> Tensor:
        """Latent mean squared error per task, [n]."""
        return (latents - self.latents).square().flatten(1).mean(1)

    def agreement(self, pictures: Tensor) -> tuple[float, float]:
        """Shares of pictures with the right object and with the right background."""
        objects = torch.cat([self.judge(part)[1].argmax(1) for part in pictures.split(32)])
        return (
            float((objects == self.wanted[:, 0]).float().mean()),
            float((nearest_background(pictures) == self.wanted[:, 1]).float().mean()),
        )


def progress(label: str):
    return lambda text: print(f"\r{label}: {text}   ", end="", flush=True)


def measure(lab: Lab, work: list[Task], model: str, sampler: str, steps: int, groups: int) -> list[dict]:
    """One row per schedule, best first; `errors` keeps the value of every task for the bootstrap."""
    yardstick, rows, seconds_of_normal = Yardstick(lab, model, work), [], 0.0
    for name in NAMES[model]:
        cell = Cell(model, sampler, lab.sigmas(model, name, steps))
        drawn = lab.run(cell, work, progress(f"{model} {sampler} {steps} {name}"))
        seconds_of_normal = seconds_of_normal or drawn.seconds
        pictures, errors = lab.pictures(model, drawn.latents), yardstick.errors(drawn.latents)
        means = errors.reshape(groups, -1).mean(1)
        right = yardstick.agreement(pictures)
        rows.append({
            "schedule": name, "error": float(means.mean()), "standard_error": float(means.std() / groups**0.5),
            "psnr": float(psnr(pictures, yardstick.pictures).mean()), "object": right[0], "background": right[1],
            "calls": drawn.calls, "relative_time": drawn.seconds / seconds_of_normal, "errors": errors.tolist(),
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["error"])


def table(cell: dict) -> str:
    """One Markdown table."""
    lines = [
        f"### {cell['model']}, {cell['sampler']}, {cell['steps']} steps\n",
        "| schedule | latent error | ± | PSNR dB | object | background | calls | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in cell["rows"]:
        right = f"{100 * r['object']:.0f} % | {100 * r['background']:.0f} %"
        cost = f"{r['calls']} | {r['relative_time']:.2f}"
        lines.append(
            f"| {r['schedule']} | {r['error']:.4f} | {r['standard_error']:.4f} | {r['psnr']:.1f} | {right} | {cost} |"
        )
    tau, winner = cell["stability"]["all"]
    lines.append(
        f"\nRanking reproduced by as many redrawn samples (n = {cell['tasks']}): Kendall τ {tau:.2f}, same winner in "
        f"{100 * winner:.0f} % of 1,000 bootstrap draws; with half of them τ {cell['stability']['half'][0]:.2f}."
    )
    return "\n".join(lines) + "\n"


def write_page(cells: list[dict], out: Path) -> None:
    """Put the tables between the marks of the docs page."""
    page = out / "schedules.md"
    if page.exists():
        head, _, tail = page.read_text("utf-8").partition(BEGIN)
        body = "\n".join(table(cell) for cell in cells)
        page.write_text(f"{head}{BEGIN}\n\n{body}\n{END}{tail.partition(END)[2]}", "utf-8")


def write_picture(lab: Lab, work: list[Task], sampler: str, steps: int, path: Path) -> None:
    """Stock "normal" above, "auto" below: the same prompts and seeds."""
    rows = []
    for name in ("normal", "auto"):
        drawn = lab.run(Cell("unet", sampler, lab.sigmas("unet", name, steps)), work)
        rows.append(torch.cat(list(lab.pictures("unet", drawn.latents[:PICTURED])), dim=2))
    Image.fromarray((torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0).numpy()).save(path, quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(NAMES), default=["unet"])
    parser.add_argument("--samplers", nargs="+", default=["dpmpp_2m", "euler"])
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 8, 10, 20])
    parser.add_argument("--tasks", type=int, default=96)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if args.tasks % args.groups:
        parser.error("--tasks must be a multiple of --groups")
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        lab, work = Lab(Host(Path(folder)), args.cache), tasks(args.tasks)
        for model in args.models:
            for sampler in args.samplers:
                for steps in args.steps:
                    rows = measure(lab, work, model, sampler, steps, args.groups)
                    errors = torch.tensor([row.pop("errors") for row in rows])
                    stability = {
                        "all": rank_stability(errors, args.tasks),
                        "half": rank_stability(errors, args.tasks // 2),
                    }
                    cells.append({
                        "model": model, "sampler": sampler, "steps": steps, "tasks": args.tasks, "rows": rows,
                        "stability": stability,
                    })  # fmt: skip
                    print("\r" + table(cells[-1]))
        write_picture(lab, work, "dpmpp_2m", 8, args.out / "aligned_schedule.jpg")
    (args.out / "schedules.json").write_text(json.dumps(cells, indent=1) + "\n", "utf-8")
    write_page(cells, args.out)


if __name__ == "__main__":
    main()
