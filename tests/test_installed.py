"""The list of what is installed."""

from __future__ import annotations

from dataclasses import replace

from families import FAMILIES, FULL

from pack.models.calibration import Calibration, CondLevels
from pack.models.store import shipped_profiles
from pack.nodes._plan.auto import Shelf
from pack.nodes._plan.installed import listing

MINE = replace(shipped_profiles()["Attune demo unet, euler, 8 steps"], families=("SD15",), config_hash="", cfg=None)
SHIFT = Calibration(
    "s", "m", "flow", ("SD3",), (1024, 1024), (), "", kind="noise_shift",
    alignments=tuple(CondLevels("", (n, n), (0.2, 0.8), (0.21, 0.82)) for n in (512, 768)),
)  # fmt: skip
SHELF = Shelf(
    {"mine.json": MINE, "small.json": SHIFT, "AYS SDXL": shipped_profiles()["AYS SDXL"]}, {"o": ("SD15", 1024)}
)


def test_each_file_has_a_line_with_what_it_was_made_for():
    assert listing(SHELF, []).splitlines() == [
        "Profiles, 3",
        "- mine.json: schedule for SD15, 128x128, euler, 8 steps",
        "- small.json: noise shift for SD3, 512x512 and 768x768",
        "- AYS SDXL: schedule for SDXL, 1024x1024, any steps",
        "",
        "One More Step, 1",
        "- o: for SD15 latents and prompts of width 1024",
    ]


def test_a_star_marks_what_was_made_for_the_model_and_unread_files_are_named():
    said = listing(SHELF, ["bad.json is not a profile."], FAMILIES["SD 1.5"].facts.model)
    assert "Profiles, 3 (* made for this model, SD15)\n* mine.json" in said and "\n- AYS SDXL" in said
    assert said.endswith("Cannot be read, 1\n! bad.json is not a profile.")


def test_a_full_shelf_names_its_networks():
    assert f"Golden noise, {len(FULL.npnets)}\n" in listing(FULL, []) and FULL.npnets
