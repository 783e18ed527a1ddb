"""Fit the samplers that the pack ships for its demo models, through the real Attune Fit Sampler node.

python dev.py fit-demo [--models unet flow] [--steps 6 8 10 12 16]

One file for each model in models/profiles/: short runs in the place of 50 steps of Euler on the model's usual schedule,
fitted to two noises of four prompts each and proved on nine other noises of each. A file that was made with the same
weights, prompts and seed stays.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from tune_profiles import CFG, MODELS, PROMPTS, SEED, Host, encode, facts, is_done

from pack.models.store import SHIPPED, SUFFIX, save_profile

SCHEDULES = {"unet": "karras", "flow": "beta"}
LONG, STEPS = 50, [6, 8, 10, 12, 16]
PRESET = "quick"


def fit(host: Host, model: str, steps: list[int]):
    """The node's profile and report."""
    _, clip, _ = host.call("CheckpointLoaderSimple", ckpt_name=MODELS["unet"])
    patcher, *_ = host.call("CheckpointLoaderSimple", ckpt_name=MODELS[model])
    positive, negative = (encode(host, clip, texts) for texts in (PROMPTS, [""]))
    (sampler,) = host.call("KSamplerSelect", sampler_name="euler")
    (sigmas,) = host.call("BasicScheduler", model=patcher, scheduler=SCHEDULES[model], steps=LONG, denoise=1.0)
    profile, _, _, report, _ = host.call(
        "AttuneFitSampler", model=patcher, positive=positive, negative=negative, cfg=CFG, sampler=sampler,
        latent={"samples": torch.zeros(len(PROMPTS), 4, 16, 16)}, steps=steps[0], preset=PRESET, budget_minutes=0.0,
        seed=SEED, coefficients=True, more_steps=", ".join(map(str, steps[1:])), sigmas=sigmas,
    )  # fmt: skip
    return profile, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        for model in args.models:
            known, path = facts(model, PRESET), args.out / f"demo_{model}_fitted{SUFFIX}"
            if is_done(path, known):
                continue
            profile, report = fit(host, model, args.steps)
            named = replace(  # without a setting: on the demo models, too, the first picture is the user's own run
                profile.with_facts(**known), name=f"Attune demo {model}, fitted sampler, euler {LONG} steps",
                source=f"Fitted to {MODELS[model]} by training/fit_samplers.py", setting="",
            )  # fmt: skip
            path.unlink(missing_ok=True)
            save_profile(named, args.out, path.stem)
            print(f"== {path.name}\n{report}", flush=True)


if __name__ == "__main__":
    main()
