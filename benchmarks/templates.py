"""The workflows that we ship: templates in the order in which a person would try them, and what else help pages show.

The page lists a template by the name of its file, as the file system has it or, sorted alphabetically, by that name:
hence titles with numbers. Which page does which: docs/robustness.md.
"""

from __future__ import annotations

from pathlib import Path

from comfy_process import ROOT

TEMPLATES = ROOT / "example_workflows"
TITLES = {
    "fast_sampler": "Ten steps that look like fifty",
    "everything_at_once": "Let Attune choose",
    "aligned_ksampler": "Good pictures in eight steps",
    "propagation": "The same picture in less time",
    "propagation_transformer": "Less time with Flux and SD3",
    "draft_seeds": "Draft nine seeds and keep the best",
    "one_more_step": "True blacks and whites",
    "golden_noise": "A better start for each prompt",
    "noise_shift": "Small drafts that hold together",
    "noise_space": "Change one thing in a picture",
    "noise_space_morph": "From one picture to another",
    "noise_mask": "Fill a hole in a picture",
    "timestep_field": "A film from one picture",
    "long_video": "A film of any length",
    "share_a_profile": "Fit a sampler and share it",
}  # by the name that prompts, pictures and pages have


def titled(name: str) -> Path:
    """Where a template lies: its title behind its place among the others."""
    return TEMPLATES / f"{1 + list(TITLES).index(name):02} {TITLES[name]}.json"


WORKFLOWS = {path.stem: path for path in sorted((ROOT / "docs/workflows").glob("*.json"))} | {
    name: titled(name) for name in TITLES
}
