"""Pictures of the workflows, from real runs: `python dev.py bench thumbnails aligned_schedule propagation`.

For a help page, a strip: a workflow that compares shows a labelled row for each of its batches, one that draws the same
noise without our node shows that above, another one the pictures that it saves; one whose sampler learns is queued
twice, for a row each; one that drafts seeds shows the drafts above the pick; one that saves a card, or only compares,
shows that. For a template, a square: two pictures before, and the same two after. Where the workflow itself draws no
picture without our nodes, before is the workflow with them at strength 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps
from templates import TITLES, WORKFLOWS

import _pack  # noqa: F401 - makes the pack importable
from comfy_process import ROOT, Host
from pack.nodes._draw.axes import INK, PAPER, font

HELP = ROOT / "web/docs"
COMPARES = "compare_profile"  # whose strip is what the node that compares draws
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
    if compared is None and (plain := without_ours(prompt, saved[0])):
        return [("without", plain), ("with", saved[0])]
    if compared is None:
        return [("", link) for link in saved]
    images = [compared[f"image_{i}"] for i in range(1, 7) if f"image_{i}" in compared]
    labels = [label.strip() for label in compared["labels"].split(",")]
    return list(zip(labels, images, strict=True))


def without_ours(prompt: dict, saved: list) -> list | None:
    """The preview of the same noise without our node on the MODEL, where a workflow draws both."""

    def run(link: list) -> dict:
        decoded = prompt[link[0]]["inputs"].get("samples")
        return prompt[decoded[0]]["inputs"] if decoded else {}

    apart = lambda link: {**run(link), "model": None}
    previews = [node["inputs"]["images"] for node in prompt.values() if node["class_type"] == "PreviewImage"]
    return next((one for one in previews if "model" in run(one) and apart(one) == apart(saved)), None)


def compared_whole(prompt: dict) -> list[tuple[str, list]]:
    """The grid of the node that compares, as it comes."""
    return [("", [key, 0]) for key, node in prompt.items() if node["class_type"] == "AttuneCompare"]


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


def stock(prompt: dict) -> dict:
    """The same run without our nodes' part in it."""
    off = copy.deepcopy(prompt)
    for node in off.values():
        given = node["inputs"]
        if node["class_type"] == "AttuneKSampler":
            node["class_type"] = "KSampler"
            given.update(scheduler="normal")
            del given["schedule"], given["fast"]
        elif node["class_type"].startswith("Attune"):
            given.update({name: value for name, value in {"strength": 0.0, "interval": 1}.items() if name in given})
    return off


def square(before: list[Path], after: list[Path]) -> Image.Image:
    """Two pictures of each, one below the other; of single ones, the left half and the right half."""
    side = 2 * SIDE
    opened = [[Image.open(path).convert("RGB") for path in paths] for paths in (before, after)]
    picture = Image.new("RGB", (side, side), PAPER)
    if not before and opened[1][0].width != opened[1][0].height:  # a card or a plot, whole
        sheet = ImageOps.contain(opened[1][0], (side, side), Image.Resampling.LANCZOS)
        picture.paste(sheet, (0, (side - sheet.height) // 2))
    elif before and min(len(before), len(after)) == 1:
        for x, (one, *_) in zip((0, SIDE), opened, strict=True):
            half = one.resize((side, side), Image.Resampling.LANCZOS).crop((x, 0, x + SIDE, side))
            picture.paste(half, (x, 0))
    else:
        four = [*opened[0][:2], *opened[1][:2]] if before else opened[1][:4]
        for i, one in enumerate(four):
            picture.paste(one.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (i % 2 * SIDE, i // 2 * SIDE))
    return picture


def save_to(folder: str, link: list) -> dict:
    return {"class_type": "SaveImage", "inputs": {"filename_prefix": folder, "images": link}}


def run_rows(host: Host, name: str, prompt: dict) -> list[tuple[str, list[Path]]]:
    """(label, the pictures of the row) for each row of a workflow's strip."""
    rows = compared_whole(prompt) if name == COMPARES else rows_of(prompt)
    saves = {f"{name}_row{i}": save_to(f"{name}_row{i}", link) for i, (_, link) in enumerate(rows)}
    for queued in [[row] for row in saves] if learns(prompt) else [list(saves)]:
        host.run({**prompt, **{row: saves[row] for row in queued}})
    output = host.folders / "output"
    return [(label, sorted(output.glob(f"{row}_*.png"))) for (label, _), row in zip(rows, saves, strict=True)]


def before_and_after(host: Host, name: str, prompt: dict, rows: list[tuple[str, list[Path]]]) -> list[list[Path]]:
    if len(rows) > 1:
        return [rows[0][1], rows[-1][1]]
    if stock(prompt) == prompt:  # nothing to turn off
        return [[], rows[0][1]]
    return [run_rows(host, f"{name}_stock", stock(prompt))[0][1], rows[0][1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=list(WORKFLOWS), metavar="NAME", help="of the workflows")
    parser.add_argument("--out", type=Path, help="a folder for all pictures; else each takes its place in the pack")
    parser.add_argument("--cache", type=Path, help="not used: nothing is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        for name in options.names:
            prompt = json.loads((ROOT / f"tests/prompts/{name}.json").read_text("utf-8"))
            rows = run_rows(host, name, prompt)
            strip = (options.out or HELP) / f"{name}.jpg"
            if options.out or strip.exists():
                draw(rows).save(strip, quality=88)
            if name in TITLES:
                card = (options.out / WORKFLOWS[name].name if options.out else WORKFLOWS[name]).with_suffix(".jpg")
                square(*before_and_after(host, name, prompt, rows)).save(card, quality=88)
            print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
