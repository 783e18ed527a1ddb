"""What does reusing features cost in fidelity, at which speed? Ours, core's caches, and fewer plain steps.

python dev.py bench encoder_propagation [--samplers euler dpmpp_2m] [--steps 50 25 20] [--tasks 48]

Every setting draws the same prompts and noises as the plain run of as many steps. PSNR and perceptual distance are to
that run, Fréchet distance is to the training data; the spread is over disjoint groups of seeds. Speed is counted, not
timed: how often the middle of the network ran (whole evaluations) and how often its end ran (all of them), weighed with
the cost of the blocks on the demo model, on SD1.5 at 512 x 512 and on SDXL at 1024 x 1024; dotted lines in the plot are
what infinitely long groups of steps could give. "DeepCache N": one block fresh, held, every N-th step. "calibrated":
fitted by the pack on another prompt and seed. Results are cached. Writes docs/results/encoder_propagation.json,
docs/results.md and a plot.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from peers import cache_node

from comfy_process import ROOT, Host
from harness import CACHE, Cell, Lab, Task, prompt, tasks
from looks import look, summary
from results import DOCS, Table, markdown, record
from schedules import number, progress

TOP, ONE, ENCODER = "top level fresh", "one block fresh", "encoder reused"
INTERVALS = (2, 3, 4, 5)
DEEPCACHE = (2, 3, 5)
THRESHOLDS = (0.02, 0.05, 0.1, 0.2)
SHARES = (0.8, 0.67, 0.57, 0.5, 0.4)  # of the steps: the plain runs that a cache must beat
GROUPS = [
    "plain", "EasyCache", "LazyCache", "DeepCache", "published", "encoder reused", "one block", "top level",
    "calibrated",
]  # fmt: skip
KEYS = ["psnr", "perceptual", "frechet", "object", "background"]
# The networks whose costs weigh the counts, by the host's configuration keys.
UNETS = {
    "SD1.5 512": (64, {
        "model_channels": 320, "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "num_heads": 8,
        "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1, "context_dim": 768,
    }),
    "SDXL 1024": (128, {
        "model_channels": 320, "num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "num_head_channels": 64,
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10, "context_dim": 2048, "use_linear_in_transformer": True,
        "num_classes": "sequential", "adm_in_channels": 2816,
    }),
}  # fmt: skip


@dataclass
class Row:
    sampler: str
    steps: int
    label: str
    whole: int  # evaluations of the whole network
    part: int  # of its ends only
    speed: dict[str, float]  # network -> how many times less computing than the plain run
    summary: dict[str, tuple[float, float]]


# --- what is compared ---


def node(**changed) -> tuple:
    """The pack's node with its defaults but for those given."""
    inputs = {
        "mode": "uniform", "interval": 3, "speed": 1.5, "reuse": TOP, "forecast": True, "keep_last": 2,
        "start_percent": 0.0, "end_percent": 1.0, "prior_noise": 0.0, "cache_dtype": "as computed",
        "cache_device": "as computed", "memory_limit": 0, "parallel": "off", **changed,
    }  # fmt: skip
    return (("AttuneEncoderPropagation", tuple(inputs.items())),)


def settings(steps: int) -> dict[str, tuple[int, tuple, str]]:
    """Label -> (steps, nodes, what the shorter steps reuse), the plain run first."""
    found: dict[str, tuple[int, tuple, str]] = {"plain": (steps, (), "")}
    found |= {f"plain, {round(share * steps)} steps": (round(share * steps), (), "") for share in SHARES}
    found |= {
        f"{name} {t}": (steps, cache_node(name, t), "") for name in ("EasyCache", "LazyCache") for t in THRESHOLDS
    }
    deep = {"reuse": ONE, "forecast": False, "keep_last": 0}
    found |= {f"DeepCache {n}": (steps, node(interval=n, **deep), ONE) for n in DEEPCACHE}
    found["published keys"] = (steps, node(mode="published keys"), ENCODER)
    found["published keys, prior noise"] = (steps, node(mode="published keys", prior_noise=0.003), ENCODER)
    found |= {f"encoder reused, every {n}": (steps, node(reuse=ENCODER, interval=n), ENCODER) for n in INTERVALS}
    found |= {f"one block fresh, every {n}": (steps, node(reuse=ONE, interval=n), ONE) for n in INTERVALS}
    found |= {f"top level fresh, every {n}": (steps, node(interval=n), TOP) for n in INTERVALS}
    return found


class CalibratedLab(Lab):
    """A lab whose cells name profiles by file: nodes get what is in them."""

    def patched(self, model: str, nodes: tuple[tuple[str, tuple], ...]):
        load = pack("models.profiles").load_profile
        read = lambda name, value: load(self.cache / value) if name == "profile" else value
        opened = ((id_, tuple((name, read(name, value)) for name, value in inputs)) for id_, inputs in nodes)
        return super().patched(model, tuple(opened))


def calibrated(lab: Lab, sampler: str, steps: int) -> dict[str, tuple[int, tuple, str]]:
    """The settings of the pack's own calibration, on a prompt and a seed that no task has."""
    (latent,) = lab.host.call("EmptyLatentImage", width=128, height=128, batch_size=1)
    profile, _, _ = lab.host.call(
        "AttuneFitEncoderPropagation", model=lab.models["unet"], positive=lab.conditioning([prompt(100, 3)]),
        negative=lab.conditioning([""]), latent_image=latent, seed=987654321, steps=steps, cfg=3.0,
        sampler_name=sampler, scheduler="normal", reuse="parts that cost little", fastest=3.0, longest=5,
    )  # fmt: skip
    file = pack("models.profiles").save_profile(profile, lab.cache, profile.id).name
    found = {}
    for point in profile.calibration.points:
        nodes = node(mode="speed target", speed=point.speed, profile=file)
        found[f"calibrated {point.speed:.2f}"] = (steps, nodes, ONE if point.reuse.fresh == 1 else TOP)
    return found


# --- what it costs ---


def pack(module: str) -> ModuleType:
    """A module of the pack as the host has loaded it."""
    return sys.modules[f"{ROOT}.{module}"]


def networks(lab: Lab) -> dict[str, tuple]:
    """Name -> (cost of each block, number of blocks at full resolution)."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    measure, top = pack("nodes._host.unet_blocks").measure_unet, pack("nodes._host.encoder_propagation").top_blocks
    demo = lab.models["unet"].model.diffusion_model
    found = {"demo": (measure(demo, 16, 16).costs, top(demo))}
    for name, (side, config) in UNETS.items():
        unet = UNetModel(
            image_size=32, in_channels=4, out_channels=4, use_spatial_transformer=True, legacy=False, device="meta",
            operations=comfy.ops.disable_weight_init, **config,
        )  # fmt: skip
        found[name] = (measure(unet, side, side).costs, top(unet))
    return found


def share(costs, top: int, reuse: str) -> float:
    """What a shorter step costs; nothing where core's caches skip the network."""
    if not reuse:
        return 0.0
    return costs.of_step(pack("models.encoder_propagation").reuse_by_name(reuse, False, len(costs.input), top))


@contextlib.contextmanager
def counting(model) -> Iterator[dict[str, int]]:
    """Count how often the middle and the end of a MODEL's UNet run."""
    unet, counts = model.model.diffusion_model, {"middle": 0, "end": 0}

    def see(name: str):
        def hook(*_) -> None:
            counts[name] += 1

        return hook

    handles = [
        unet.middle_block[0].register_forward_pre_hook(see("middle")),
        unet.out.register_forward_pre_hook(see("end")),
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def count(lab: Lab, cell: Cell) -> tuple[int, int]:
    """(whole, shorter) evaluations of one guided run."""
    part = tasks(1)
    lab.path(cell, part).unlink(missing_ok=True)
    with counting(lab.models[cell.model]) as counts:
        lab.run(cell, part)
    return counts["middle"], counts["end"] - counts["middle"]


# --- the measurement ---


def measure(lab: Lab, work: list[Task], sampler: str, steps: int, only: list[str]) -> list[Row]:
    known, rows = networks(lab), []
    goal = Cell("unet", sampler, lab.sigmas("unet", "normal", steps))
    plain = count(lab, goal)[0]
    every = settings(steps) | (calibrated(lab, sampler, steps) if "calibrated" in only else {})
    for label, (of, nodes, reuse) in every.items():
        if label != "plain" and not label.startswith(tuple(only)):
            continue
        cell = Cell("unet", sampler, lab.sigmas("unet", "normal", of), nodes=nodes)
        whole, part = count(lab, cell)
        seen = look(lab, cell, work, progress(f"{sampler} {steps} {label}"), goal)
        speed = {n: plain / max(whole + part * share(*costs, reuse), 1e-9) for n, costs in known.items()}
        rows.append(Row(sampler, steps, label, whole, part, speed, summary(seen, work)))
    return rows


def table(rows: list[Row]) -> Table:
    names = list(rows[0].speed)
    body = [
        [r.label, r.whole, r.part, *(f"{r.speed[n]:.2f}" for n in names),
         *(None if r.label == "plain" and k in KEYS[:2] else number(r.summary[k]) for k in KEYS)]
        for r in rows
    ]  # fmt: skip
    columns = ["setting", "whole", "part", *(f"speed, {n}" for n in names)]
    return Table(
        f"{rows[0].sampler}, {rows[0].steps} steps",
        [*columns, "PSNR dB", "perceptual", "Fréchet", "object", "background"],
        body,
        "PSNR and perceptual distance (thousandths) to the plain run of the same noise; the rest to the data.",
    )


def limits_table(lab: Lab) -> Table:
    """Costs of a shorter step, and the speed that no number of them can exceed."""
    body = [
        [name, reuse, f"{100 * share(*costs, reuse):.1f} %", f"{1 / share(*costs, reuse):.2f}"]
        for name, costs in networks(lab).items()
        for reuse in (ENCODER, TOP, ONE)
    ]
    return Table(
        "What a shorter step costs, by the multiplications of its blocks", ["network", "reuse", "cost", "limit"], body
    )


def plot(blocks: list[list[Row]], limits: dict[str, float], path: Path) -> None:
    """Fidelity against speed (weights of SD1.5), one panel per sampler and number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = {
        "plain, ": ("k.--", "fewer steps"), "EasyCache": ("C0o-", "EasyCache"), "LazyCache": ("C1s-", "LazyCache"),
        "DeepCache": ("C2^-", "DeepCache"), "published": ("C3*", "published keys"),
        "encoder reused": ("C4v-", "encoder reused"), "one block": ("C5D-", "one block fresh"),
        "top level": ("C6P-", "top level fresh"), "calibrated": ("C7X-", "calibrated"),
    }  # fmt: skip
    figure, axes = plt.subplots(1, len(blocks), figsize=(4.2 * len(blocks), 3.8), layout="constrained", squeeze=False)
    for axis, rows in zip(axes[0], blocks, strict=True):
        for start, (style, label) in styles.items():
            line = sorted((r.speed["SD1.5 512"], *r.summary["psnr"]) for r in rows if r.label.startswith(start))
            if line:
                x, y, error = zip(*line, strict=True)
                axis.errorbar(x, y, error, fmt=style, label=label, markersize=5)
        for reuse, speed in limits.items():
            axis.axvline(speed, color="0.7", linestyle=":")
            axis.text(speed, axis.get_ylim()[0], f" limit, {reuse}", rotation=90, va="bottom", fontsize=7, color="0.5")
        axis.set(
            title=f"{rows[0].sampler}, {rows[0].steps} steps", xlim=(0.9, 4.2),
            xlabel="times less computing, SD1.5 512 costs", ylabel="PSNR to plain, dB",
        )  # fmt: skip
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", nargs="+", default=["euler", "dpmpp_2m", "euler_ancestral"])
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 25, 20])
    parser.add_argument("--tasks", type=int, default=48)
    parser.add_argument("--only", nargs="+", default=GROUPS, help="settings whose names begin with one of these")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lab, work = CalibratedLab(Host(Path(folder)), args.cache), tasks(args.tasks)
        blocks = [measure(lab, work, sampler, steps, args.only) for sampler in args.samplers for steps in args.steps]
        tables = [limits_table(lab), *map(table, blocks)]
        sd15 = networks(lab)["SD1.5 512"]
        plot(blocks, {reuse: 1 / share(*sd15, reuse) for reuse in (ENCODER, TOP)}, args.out / "encoder_propagation.png")
    notes = [" ".join(__doc__.split("\n\n")[2].split())]
    data = [{**vars(row), "summary": {k: list(v) for k, v in row.summary.items()}} for rows in blocks for row in rows]
    record(
        "encoder_propagation", "Encoder propagation", tables, began, ["encoder_propagation.png"], notes, args.out, data
    )
    print("\r" + "\n".join(map(markdown, tables)))


if __name__ == "__main__":
    main()
