"""Does golden noise help the demo models? Re-denoising, zigzags and the trained network against plain runs.

python dev.py bench golden_noise [--models unet flow] [--steps 5 10] [--cfg 1 3] [--prompts 128] [--seeds 4] [--cost]

The prompts are none of those that the demo's NPNet was trained on, each drawn from some noises that it never saw. Every
setting stands beside plain Euler from the same noise with as many steps, and with as many calls of the model. Results
are cached. Writes docs/results/golden_noise.json and docs/results.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from comfy_process import Host
from harness import CACHE, Cell, Lab, Task, tasks
from judge import load_judge, nearest_colour
from looks import Look, data, look
from metrics import frechet, jackknife
from real_size import FAMILIES, build, count, forward_flops, time_parts
from results import DOCS, Table, markdown, record
from schedules import number, progress

SCHEDULE = "beta"
STRONG = 3.0  # guidance on the way down, the same whatever the run's own
NPNET = "attune_demo_npnet.safetensors"
TRAINED = 160  # the first prompts are those of training/train_npnet.py
FIRST_SEED = 5000  # and this is far from its seeds
ROWS = ["NPNet", "re-denoise", "zigzag"]
COLUMNS = {
    "object": "object %", "background": "background %", "frechet": "Fréchet", "agreement": "log p(object)",
    "preferred": "preferred to plain %", "fair": "to as many calls %", "nearer": "nearer the data %",
    "variety": "variety %", "psnr": "PSNR to plain",
}  # fmt: skip


def pairs(prompts: int, seeds: int) -> list[Task]:
    """Every prompt with every one of its seeds; the seeds of a prompt follow each other."""
    chosen = tasks(TRAINED + prompts)[TRAINED:]
    return [
        replace(task, seed=FIRST_SEED + 1000 * group + i) for i, task in enumerate(chosen) for group in range(seeds)
    ]


def cells(lab: Lab, model: str, steps: int, cfg: float, wanted: list[str]) -> dict[str, tuple[Cell, int]]:
    """Label -> a setting, and the steps of the plain run that costs as much."""

    def plain(n: int) -> Cell:
        return Cell(model, "euler", lab.sigmas(model, SCHEDULE, n), cfg)

    def node(name: str, **inputs: object) -> Cell:
        return replace(plain(steps), nodes=((name, tuple(inputs.items())),))

    zigzags = max(1, steps // 5)
    found = {
        "plain": (plain(steps), steps),
        "re-denoise": (node("AttuneRedenoise", strong_cfg=STRONG), steps + 2),
        f"zigzag, {zigzags} steps": (
            replace(plain(steps), sampler=("AttuneRedenoise", (("zigzag_steps", zigzags),))),
            steps + 2 * zigzags,
        ),
    }
    if model == "unet":
        found["NPNet"] = (node("AttuneGoldenNoiseModel", npnet=NPNET), steps)
    found = {label: one for label, one in found.items() if any(label.startswith(row) for row in ("plain", *wanted))}
    fair = sorted({cost for _, cost in found.values()} - {steps})
    return found | {f"plain, {n} steps": (plain(n), n) for n in fair}


def agreement(seen: Look, work: list[Task]) -> Tensor:
    """The judge's log-probability of the object that the prompt asks for, [n]: a scorer that chose nothing here."""
    logits = load_judge().head(F.silu(seen.features))
    return logits.double().log_softmax(1)[range(len(work)), [task.obj for task in work]]


def distance(seen: Look, work: list[Task], seeds: int) -> Tensor:
    """Squared distance of each picture to the training pictures of its own prompt, in their principal axes, [n]."""
    rows = TRAINED + torch.arange(len(work)) // seeds
    wanted = (data()["features"][rows] @ data()["axes"]).mean(1)
    return (seen.features.double() @ data()["axes"] - wanted).square().sum(1)


def variety(features: Tensor, seeds: int) -> Tensor:
    """Mean distance between the pictures of one prompt, [prompts]: small when golden noise makes them alike."""
    each = features.double().unflatten(0, (-1, seeds))
    return torch.cdist(each, each).sum((1, 2)) / (seeds * (seeds - 1))


def wins(a: Tensor, b: Tensor) -> Tensor:
    """1 where a is larger, one half where they are equal: a picture that was left as it was neither wins nor loses."""
    return (a > b).double() + 0.5 * (a == b).double()


def summary(seen: Look, plain: Look, fair: Look, work: list[Task], seeds: int) -> dict[str, tuple[float, float]]:
    """Name -> (value, standard error over the groups of seeds), by the jackknife."""
    objects, backgrounds = torch.tensor([[task.obj, task.background] for task in work]).T
    of, of_plain, of_fair = (agreement(found, work) for found in (seen, plain, fair))
    near, near_plain = (distance(found, work, seeds) for found in (seen, plain))
    shares = {
        "object": seen.objects == objects, "background": nearest_colour(seen.corners) == backgrounds,
        "preferred": wins(of, of_plain), "fair": wins(of, of_fair), "nearer": wins(near_plain, near),
    }  # fmt: skip

    def mean(values: Tensor):
        return lambda kept: float(values[kept].double().mean())

    def to_data(kept: Tensor) -> float:
        wanted = data()["features"][TRAINED + (kept // seeds).unique()].flatten(0, 1)
        return frechet(wanted @ data()["axes"], seen.features[kept].double() @ data()["axes"])

    def relative_variety(kept: Tensor) -> float:
        left = len(kept) // (len(work) // seeds)
        return 100 * float(variety(seen.features[kept], left).mean() / variety(plain.features[kept], left).mean())

    measures = {name: mean(100 * right.double()) for name, right in shares.items()}
    measures |= {"agreement": mean(of), "psnr": mean(seen.psnr), "frechet": to_data, "variety": relative_variety}
    return {name: jackknife(measure, len(work), seeds) for name, measure in measures.items()}


def cost(host: Host, steps: int = 20) -> Table:
    """What the published network adds to a run of SDXL at its own size, with guidance."""
    npnet = host.module("models.npnet")
    net, family = npnet.NPNet(npnet.NPNetConfig()).eval(), FAMILIES["SDXL"]
    noise, text = torch.randn(1, 4, 128, 128), torch.randn(1, 77, 2048)
    with torch.inference_mode():
        (flops, _), seconds = count(lambda: net(noise, text), {}), []
        for _ in range(5):
            began = time.process_time()
            net(noise, text)
            seconds.append(time.process_time() - began)
    forward_flop = sum(forward_flops("SDXL")[0].values())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build("SDXL", device, torch.bfloat16)
    forward = statistics.median(sum(one.values()) for one in time_parts(host, model, family, family.pixels, 1))
    megabytes = sum(p.numel() * p.element_size() for p in net.parameters()) / 1e6
    shares = [100 * sum(flops.values()) / forward_flop, 100 * statistics.median(seconds) / forward]
    rows = [["one forward of SDXL's UNet", *shares], [f"a run of {steps} steps", *(s / (2 * steps) for s in shares)]]
    return Table(
        "What NPNet costs: the published size beside SDXL at 1024 px",
        ["share of", "FLOPs %", "processor time %"],
        [[name, *(f"{value:.2g}" for value in values)] for name, *values in rows],
        f"The network with its singular value decomposition in float32, SDXL in bfloat16; two forwards a step. "
        f"Weights: {megabytes:.0f} MB. The decomposition's FLOPs are not counted, its time is.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["unet", "flow"], default=["unet", "flow"])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="beside plain runs")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=4, help="noises of each prompt, three or more")
    parser.add_argument("--cost", action="store_true", help="time NPNet beside an SDXL of random weights, too: 6 GB")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began, work, tables, found = time.perf_counter(), pairs(args.prompts, args.seeds), [], []
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Host(Path(folder)), args.cache)
        for model in args.models:
            for steps, cfg in product(args.steps, args.cfg):
                every = cells(lab, model, steps, cfg, args.rows)
                plain, looks = every["plain"][0], {}
                for label, (cell, _) in every.items():
                    looks[label] = look(lab, cell, work, progress(f"{model} {steps} {cfg:g} {label}"), goal=plain)
                rows = []
                for label, (cell, equal) in every.items():
                    fair = looks["plain" if equal == steps else f"plain, {equal} steps"]
                    measured = summary(looks[label], looks["plain"], fair, work, args.seeds)
                    calls = lab.run(cell, work).calls
                    rows.append([label, calls, *(_cell(label, key, measured[key]) for key in COLUMNS)])
                    found.append({"model": model, "steps": steps, "cfg": cfg, "label": label, "calls": calls})
                    found[-1]["summary"] = measured
                tables.append(
                    Table(f"{model}, Euler, {steps} steps, cfg {cfg:g}", ["noise", "calls", *COLUMNS.values()], rows)
                )
        if args.cost:
            tables.append(cost(lab.host))
    notes = [
        f"{len(work)} pictures a row ({args.prompts} prompts that the demo's NPNet was not trained on, {args.seeds} "
        f"noises each), schedule {SCHEDULE}; re-denoising with guidance {STRONG:g} and 1; standard errors over the "
        f"{args.seeds} groups of seeds. calls: evaluations of the network for a picture. log p(object): the judge's "
        "logarithm of the probability of the object that was asked for, the scorer of the two columns 'preferred' and "
        "'as many calls'; it chose neither noises nor weights. Preferred: the share of pictures that it scores higher "
        "than plain Euler's from the same noise, with as many steps and with as many calls, equal pictures by half; 50 "
        "is no gain. nearer the data: the share that is nearer to the training pictures of the prompt, in the judge's "
        "features. variety: mean distance between the pictures of a prompt, plain is 100.",
    ]
    record("golden_noise", "Golden noise without and with a network", tables, began, [], notes, args.out, found)
    print("\r" + "\n".join(map(markdown, tables)))


def _cell(label: str, key: str, measured: tuple[float, float]) -> str:
    compares = {"preferred", "fair", "nearer", "variety", "psnr"}
    return "–" if label == "plain" and key in compares else number(measured)


if __name__ == "__main__":
    main()
