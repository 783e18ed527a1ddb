"""Thumbnails of the workflow templates, from real runs: `python dev.py bench thumbnails few_step img2img`.

A workflow that compares shows a labelled row for each of its batches, another one the pictures that it saves; one whose
sampler learns is queued twice, for a row each; one that drafts seeds shows the drafts above the pick; one that saves a
card shows that. Writes workflows/NAME.jpg, and its copy for the help pages.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

import _pack  # noqa: F401 - makes the pack importable
from comfy_process import ROOT, Host
from pack.nodes._draw.axes import INK, PAPER, font

WORKFLOWS = ROOT / "workflows"
CARD = "Attune/card"  # where a workflow saves the card of a fit
SIDE, MOST, LABEL = 192, 4, 150  # pixels of a picture, pictures in a row, pixels of the labels' column


def rows_of(prompt: dict) -> list[tuple[str, list]]:
    """(label, link to an IMAGE) for every row of the thumbnail."""
    nodes = prompt.values()
    compared = next((node["inputs"] for node in nodes if node["class_type"] == "AttuneCompare"), None)
    saves = [node["inputs"] for node in nodes if node["class_type"] == "SaveImage"]
    saved = [one["images"] for one in saves if one["filename_prefix"] == CARD] or [one["images"] for one in saves]
    drafts = next((name for name, node in prompt.items() if node["class_type"] == "AttuneDraftSeeds"), None)
    if drafts is not None:
        return [("drafts", [drafts, 1]), ("pick, whole", saved[0])]
    if learns(prompt):
        return [("first run", saved[0]), ("second run", saved[0])]
    if compared is None:
        return [("", link) for link in saved]
    images = [compared[f"image_{i}"] for i in range(1, 7) if f"image_{i}" in compared]
    labels = [label.strip() for label in compared["labels"].split(",")]
    return list(zip(labels, images, strict=True))


def learns(prompt: dict) -> bool:
    """Whether the second run of a prompt is another than the first."""
    return any(node["class_type"] == "AttuneFastSampler" for node in prompt.values())


def draw(rows: list[tuple[str, list[Path]]]) -> Image.Image:
    if len(rows) == 1 and (sheet := Image.open(rows[0][1][0])).width > MOST * SIDE:  # a card
        size = MOST * SIDE, round(MOST * SIDE * sheet.height / sheet.width)
        return sheet.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    left = LABEL if any(label for label, _ in rows) else 0
    picture = Image.new("RGB", (left + MOST * SIDE, len(rows) * SIDE), PAPER)
    pen = ImageDraw.Draw(picture)
    for r, (label, paths) in enumerate(rows):
        middle = r * SIDE + SIDE // 2
        pen.multiline_text((12, middle), label.replace(" ", "\n", 1), INK, font(18), anchor="lm", spacing=6)
        for i, path in enumerate(paths[:MOST]):
            scaled = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            picture.paste(scaled, (left + i * SIDE, r * SIDE))
    return picture


def main() -> None:
    names = sorted(path.stem for path in (ROOT / "tests/prompts").glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help="of the workflows")
    parser.add_argument("--out", type=Path, default=WORKFLOWS)
    parser.add_argument("--cache", type=Path, help="not used: nothing is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        for name in options.names:
            prompt = json.loads((ROOT / f"tests/prompts/{name}.json").read_text("utf-8"))
            rows = rows_of(prompt)
            saves = {
                f"row{i}": {"class_type": "SaveImage", "inputs": {"filename_prefix": f"{name}_row{i}", "images": link}}
                for i, (_, link) in enumerate(rows)
            }
            for queued in [[row] for row in saves] if learns(prompt) else [list(saves)]:
                host.run({**prompt, **{row: saves[row] for row in queued}})
            output = host.folders / "output"
            found = [(label, sorted(output.glob(f"{name}_row{i}_*.png"))) for i, (label, _) in enumerate(rows)]
            draw(found).save(options.out / f"{name}.jpg", quality=88)
            if options.out == WORKFLOWS and (copy := ROOT / "web/docs" / f"{name}.jpg").exists():
                shutil.copyfile(WORKFLOWS / f"{name}.jpg", copy)
            print(f"{options.out / name}.jpg: {len(rows)} rows")


if __name__ == "__main__":
    main()
