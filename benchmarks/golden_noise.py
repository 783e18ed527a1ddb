"""Does golden noise help the demo models? Re-denoising, zigzags and the trained network against plain runs.

python dev.py bench golden_noise [--models unet flow] [--steps 10 20] [--tasks 48]

Every setting stands beside plain Euler of as many steps and beside plain Euler of as many calls of the model. Results
are cached. Writes docs/results/golden_noise.json and docs/results.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from comfy_process import ROOT, Host
from harness import CACHE, Cell, Lab, tasks
from looks import GROUPS, look, summary
from results import DOCS, Table, markdown, record
from schedules import number, progress

SCHEDULE = {"unet": "beta", "flow": "beta"}
NPNET = "attune_demo_npnet.safetensors"
KEYS = {
    "frechet": "Fréchet",
    "kernel": "kernel",
    "object": "object %",
    "background": "background %",
    "recall": "recall",
}


def cells(lab: Lab, model: str, steps: int) -> dict[str, Cell]:
    """Label -> setting; the plain runs of equal cost between them."""

    def cell(sampler, n: int, *nodes: tuple[str, tuple]) -> Cell:
        return Cell(model, sampler, lab.sigmas(model, SCHEDULE[model], n), nodes=nodes)

    def redenoise(**inputs: object) -> Cell:
        return cell("euler", steps, ("AttuneRedenoise", tuple(inputs.items())))

    zigzags = steps // 4
    found = {
        "plain": cell("euler", steps),
        f"plain, {steps + 2} steps": cell("euler", steps + 2),
        "redenoise": redenoise(),
        "redenoise, direct": redenoise(mode="direct"),
        "redenoise, same norm": redenoise(renormalize=True),
        f"plain, {steps + 2 * zigzags} steps": cell("euler", steps + 2 * zigzags),
        f"zigzag, {zigzags} steps": cell(("AttuneZigzagSampler", (("zigzag_steps", zigzags),)), steps),
    }
    if model == "unet" and (ROOT / "models" / "golden_noise" / NPNET).exists():
        found["NPNet"] = cell("euler", steps, ("AttuneGoldenNoiseModel", (("npnet", NPNET),)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SCHEDULE), default=list(SCHEDULE))
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--tasks", type=int, default=48)
    parser.add_argument("--converged", type=int, default=200, help="steps of the reference picture")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began, work, tables, data = time.perf_counter(), tasks(args.tasks), [], []
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Host(Path(folder)), args.cache, args.converged)
        for model in args.models:
            for steps in args.steps:
                rows = []
                for label, cell in cells(lab, model, steps).items():
                    seen = look(lab, cell, work, progress(f"{model} {steps} {label}"))
                    measured, calls = summary(seen, work), lab.run(cell, work).calls
                    rows.append(
                        [label, calls, *(number(measured[key]) for key in KEYS), f"{spread(lab, cell, work):.3f}"]
                    )
                    data.append({"model": model, "steps": steps, "label": label, "calls": calls, "summary": measured})
                columns = ["noise", "calls", *KEYS.values(), "spread"]
                tables.append(Table(f"{model}, euler, {steps} steps", columns, rows))
    notes = [
        f"{args.tasks} pictures a row, cfg 3, schedule beta; standard errors over {GROUPS} disjoint groups of seeds. "
        "Fréchet and kernel (thousandths) to the training data: lower is better. spread: standard deviation over "
        "pictures of their latents, for golden noise must not make them all alike. calls: evaluations of the network.",
    ]
    record("golden_noise", "Golden noise without and with a network", tables, began, [], notes, args.out, data)
    print("\r" + "\n".join(map(markdown, tables)))


def spread(lab: Lab, cell: Cell, work: list) -> float:
    """Root mean square deviation of the latents from their mean."""
    latents = lab.run(cell, work).latents
    return float((latents - latents.mean(0)).square().mean().sqrt()) if len(latents) > 1 else float(torch.nan)


if __name__ == "__main__":
    main()
