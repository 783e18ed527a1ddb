"""Tune the profiles that the pack ships for its demo models, through the real Attune Tune Schedule node.

python dev.py tune-demo [--models unet flow] [--solvers euler dpmpp_2m uni_pc] [--steps 5 6 8 10 20]

One file for each model, solver and number of steps in models/profiles/, with what was measured on held-out noises
inside. Resumable: a file that was tuned with the same weights, preset, prompt and seed stays. What the node refuses to
change is kept as it is, the best known schedule, and its file says so. Four prompts are fitted at once; their objects
and seeds are none of those that the benchmarks draw.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import _pack  # noqa: E402, F401
from comfy_process import Host  # noqa: E402
from pack.models.calibration import Calibration  # noqa: E402
from pack.models.store import SHIPPED, SUFFIX, load_profile, save_profile  # noqa: E402

MODELS = {"unet": "attune_demo.safetensors", "flow": "attune_demo_flow.safetensors"}
SOLVERS = ["euler", "dpmpp_2m", "uni_pc"]
STEPS = [5, 6, 8, 10, 20]
PROMPTS = [
    "a penguin on a light gray background",
    "a pizza on a dark blue background",
    "a rose on a black background",
    "a robot on an orange background",
]
SEED = 1_000_000
CFG = 3.0


def preset(steps: int) -> str:
    """Many steps cost most and gain least: the smallest will do for them."""
    return "mini" if steps >= 20 else "quick"


def facts(model: str, preset: str) -> dict[str, str]:
    """What a finished file must agree with to stay."""
    weights = hashlib.sha256((ROOT / "models" / "weights" / MODELS[model]).read_bytes()).hexdigest()[:16]
    prompts = hashlib.sha256("\n".join(PROMPTS).encode()).hexdigest()[:16]
    return {"weights": weights, "preset": preset, "prompts": prompts}


def is_done(path: Path, known: dict[str, str]) -> bool:
    if not path.exists():
        return False
    found = load_profile(path).provenance
    return known.items() <= found.items() and found["seed"] == SEED


def encode(host: Host, clip, texts: list[str]) -> list:
    """One CONDITIONING whose batch holds the texts, [n tokens width]."""
    encoded = [host.call("CLIPTextEncode", clip=clip, text=text)[0][0] for text in texts]
    pooled = torch.cat([extra["pooled_output"] for _, extra in encoded])
    return [[torch.cat([tokens for tokens, _ in encoded]), {"pooled_output": pooled}]]


def tune(host: Host, model: str, solver: str, steps: int, preset: str) -> tuple[Calibration, str]:
    """The node's profile and report, as a user's graph would get them."""
    _, clip, _ = host.call("CheckpointLoaderSimple", ckpt_name=MODELS["unet"])
    patcher, *_ = host.call("CheckpointLoaderSimple", ckpt_name=MODELS[model])
    positive, negative = (encode(host, clip, texts) for texts in (PROMPTS, [""]))
    (sampler,) = host.call("KSamplerSelect", sampler_name=solver)
    latent = {"samples": torch.zeros(len(PROMPTS), 4, 16, 16)}
    profile, _, _, report, _ = host.call(
        "AttuneFitSampler", model=patcher, positive=positive, negative=negative, cfg=CFG, sampler=sampler,
        latent=latent, steps=steps, preset=preset, budget_minutes=0.0, seed=SEED,
        coefficients=False,
    )  # fmt: skip
    return profile, report


def named(profile: Calibration, model: str) -> Calibration:
    """By the demo model, whose family may be that of a large model with the same blocks."""
    return replace(
        profile,
        name=f"Attune demo {model}, {profile.solver}, {profile.steps} steps",
        source=f"Tuned to {MODELS[model]} by training/tune_profiles.py",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--solvers", nargs="+", default=SOLVERS)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--preset", help="another one than the table's, for a quick look")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        for model in args.models:
            for solver in args.solvers:
                for steps in args.steps:
                    size = args.preset or preset(steps)
                    known = facts(model, size)
                    path = args.out / f"demo_{model}_{solver}_{steps:02}{SUFFIX}"
                    if is_done(path, known):
                        continue
                    profile, report = tune(host, model, solver, steps, size)
                    path.unlink(missing_ok=True)
                    save_profile(named(profile.with_facts(**known), model), args.out, path.stem)
                    print(f"== {path.name}\n{report}", flush=True)


if __name__ == "__main__":
    main()
