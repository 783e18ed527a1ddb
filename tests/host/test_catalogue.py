"""Every node is complete: tooltips, help page, README row, a workflow with a thumbnail and a prompt that tests run."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image
from templates import TEMPLATES, TITLES, WORKFLOWS

ROOT = Path(__file__).resolve().parents[2]
IDS = [
    "AttuneAuto",
    "AttuneScheduler",
    "AttuneKSampler",
    "AttuneFitSampler",
    "AttuneFastSampler",
    "AttuneFitNoiseShift",
    "AttuneLoadNPNet",
    "AttuneNoise",
    "AttuneGoldenNoiseModel",
    "AttuneRedenoise",
    "AttuneTrainNPNet",
    "AttuneInvert",
    "AttuneReplay",
    "AttuneMorph",
    "AttuneSaveNoiseMaps",
    "AttuneLoadNoiseMaps",
    "AttuneNoiseMask",
    "AttuneProtectImage",
    "AttuneTimestepField",
    "AttuneFilm",
    "AttuneLongNoise",
    "AttuneLoadProfile",
    "AttuneSaveProfile",
    "AttuneApplyProfile",
    "AttunePlotSigmas",
    "AttunePropagation",
    "AttuneFitPropagation",
    "AttuneDraftSeeds",
    "AttunePickSeed",
    "AttuneTrainingNoise",
    "AttunePrecisionGuard",
    "AttuneCalibrationSet",
    "AttuneAttentionBySigma",
    "AttuneFitAttention",
    "AttuneLoadOneMoreStep",
    "AttuneOneMoreStep",
    "AttuneSignalLeak",
    "AttuneTrainOneMoreStep",
    "AttuneCompare",
    "AttuneDemoPicture",
]


@pytest.fixture(scope="module")
def schemas(host):
    return {name: host.nodes.NODE_CLASS_MAPPINGS[name].GET_SCHEMA() for name in IDS}


def test_the_list_above_is_what_the_pack_registers(host):
    assert set(IDS) == set(host.nodes.NODE_CLASS_MAPPINGS) - host.classes_before


@pytest.mark.parametrize("node", IDS)
def test_every_input_and_output_has_a_tooltip(schemas, node):
    schema = schemas[node]
    missing = [socket.id or socket.display_name for socket in [*schema.inputs, *schema.outputs] if not socket.tooltip]
    assert missing == []
    assert schema.category.startswith("attune/")
    verb = schema.description.split()[0]  # the node is the subject: "Draws ...", not "Draw ..." or "A picture of ..."
    assert verb.endswith("s") and schema.description.endswith("."), schema.description


WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


@pytest.mark.parametrize("node", IDS)
def test_at_most_six_widgets_are_in_sight(host, node):
    inputs = host.nodes.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
    given = {**inputs.get("required", {}), **inputs.get("optional", {})}
    widgets = {name: more[0] if more else {} for name, (kind, *more) in given.items() if str(kind) in WIDGETS}
    shown = [name for name, more in widgets.items() if not more.get("advanced") and not more.get("forceInput")]
    assert len(shown) <= 6, shown


SAME_PICTURE = dict.fromkeys(["calibration_set", "precision", "training_noise"], "attention")  # to the bit


@pytest.mark.parametrize("node", IDS)
def test_every_node_has_help_with_a_picture_and_names_a_workflow(node):
    page = (ROOT / "web/docs" / f"{node}.md").read_text("utf-8")
    ((name, caption),) = re.findall(r"!\[[^]]+\]\((\w+)\.jpg\)\n\*(.+)\*\n", page)
    assert (ROOT / f"web/docs/{name}.jpg").stat().st_size > 1000
    told = set(re.findall(r"/docs/workflows/(\w+)\.json\)", caption))
    told |= {stem for stem, title in TITLES.items() if f"“{title}”" in caption}
    assert name in {SAME_PICTURE.get(one, one) for one in told} | told
    assert [one for one in told if f'"type": "{node}"' in WORKFLOWS[one].read_text("utf-8")]
    (docs,) = re.findall(r"\[docs/(\w+)\.md\]\(https://github\.com/[\w/-]+/blob/main/docs/\1\.md\)", page)
    assert (ROOT / f"docs/{docs}.md").exists()
    assert len(page) > 300


def test_every_picture_of_the_help_is_shown():
    shown = {
        name
        for page in (ROOT / "web/docs").glob("*.md")
        for name in re.findall(r"\((\w+\.jpg)\)", page.read_text("utf-8"))
    }
    assert shown == {path.name for path in (ROOT / "web/docs").glob("*.jpg")}


@pytest.mark.parametrize("node", IDS)
def test_the_help_names_every_input_and_no_other(schemas, node):
    page = (ROOT / "web/docs" / f"{node}.md").read_text("utf-8")
    rows = re.findall(r"^\| (.*?) \|", page.split("| input |")[1].split("\n\n")[0], re.M)
    named = set()
    for cell in rows:
        words = re.findall(r"\w+", cell.replace("(optional)", ""))
        if "…" in cell:  # "image_2 … image_6"
            (stem, first), (_, last) = (word.rsplit("_", 1) for word in words)
            words = [f"{stem}_{i}" for i in range(int(first), int(last) + 1)]
        named |= set(words)
    assert named == {socket.id for socket in schemas[node].inputs}


def test_the_readme_lists_every_node_as_its_schema_says(schemas, host):
    """ATTUNE_WRITE=1 writes the table."""
    menu = [name for name in host.nodes.NODE_CLASS_MAPPINGS if name in schemas]
    rows = [f"| **{schemas[name].display_name}** | {schemas[name].description} |" for name in menu]
    table = "\n".join(["| node | what it does |", "|---|---|", *rows])
    readme = ROOT / "README.md"
    before, old, after = re.split("<!-- nodes -->\n\n|\n\n<!-- end of nodes -->", readme.read_text("utf-8"))
    if os.environ.get("ATTUNE_WRITE"):
        readme.write_text(f"{before}<!-- nodes -->\n\n{table}\n\n<!-- end of nodes -->{after}", "utf-8")
        old = table
    assert old == table


def test_every_node_is_found_by_other_words():
    """Read from the source: older hosts have no search aliases and drop them."""
    calls = [
        {**dict(zip(["node_id"], call.args, strict=False)), **{word.arg: word.value for word in call.keywords}}
        for path in (ROOT / "nodes").glob("*.py")
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "schema"
    ]
    aliases = {ast.literal_eval(call["node_id"]): ast.literal_eval(call["search_aliases"]) for call in calls}
    assert set(aliases) == set(IDS)
    for node, words in aliases.items():
        assert len(set(words)) == len(words) >= 2 and all(word.strip() == word for word in words), node
    typed = {
        "spectrum",
        "teacache",
        "easycache",
        "fast sdxl",
        "unsample",
        "turbo sigmas",
        "deepcache",
        "lightning",
        "AYS",
    }
    assert typed <= {word for words in aliases.values() for word in words}


def test_the_menu_lists_each_category_once_in_the_order_of_the_list(schemas, host):
    registered = [name for name in host.nodes.NODE_CLASS_MAPPINGS if name in schemas]
    groups = [category for category, _ in itertools.groupby(schemas[name].category for name in registered)]
    assert len(groups) == len(set(groups)), groups


def test_the_page_offers_at_most_sixteen_templates_in_the_order_of_a_first_visit_each_with_a_square_picture():
    """The page sorts by title, or not at all; it cuts other pictures."""
    files = sorted(path.name for path in TEMPLATES.iterdir())
    assert files == sorted(f"{WORKFLOWS[name].stem}{suffix}" for name in TITLES for suffix in (".json", ".jpg"))
    assert [name[:2] for name in files[::2]] == [f"{1 + i:02}" for i in range(len(TITLES))] and len(TITLES) <= 16
    for name in TITLES:
        assert Image.open(WORKFLOWS[name].with_suffix(".jpg")).size == (384, 384)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_is_in_ui_format_with_a_tested_prompt(name):
    workflow = json.loads(WORKFLOWS[name].read_text("utf-8"))
    assert workflow["version"] == 0.4 and workflow["nodes"] and workflow["links"]
    assert (ROOT / f"tests/prompts/{name}.json").exists()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_node_of_a_workflow_is_seen_or_feeds_another(host, name):
    """The host runs what ends in an output alone: a comparison without a preview would never be made."""
    nodes = json.loads((ROOT / f"tests/prompts/{name}.json").read_text("utf-8"))
    used = {value[0] for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)}
    shown = lambda kind: getattr(host.nodes.NODE_CLASS_MAPPINGS[kind], "OUTPUT_NODE", False)
    assert [
        node["class_type"] for key, node in nodes.items() if key not in used and not shown(node["class_type"])
    ] == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_opens_with_its_note_in_sight(name):
    """On a screen of 1600 x 900, below the bars; as a whole where its names stay readable. ATTUNE_WRITE=1 sets the view."""
    path = WORKFLOWS[name]
    workflow = json.loads(path.read_text("utf-8"))
    view = json.loads(json.dumps(view_of(workflow)))
    if os.environ.get("ATTUNE_WRITE"):
        workflow["extra"]["ds"] = view
        path.write_text(json.dumps(workflow, indent=1) + "\n", "utf-8")
    notes = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1 and "**Your model**: " in notes[0]  # where SDXL, Flux and others go
    assert workflow["extra"].get("ds") == view


def view_of(workflow: dict) -> dict:
    """The page's zoom and offset (screen = (graph + offset) * scale) that put a workflow below the bars."""
    title = 30  # above a node's position
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    left, top = min(x for x, *_ in boxes), min(y for _, y, *_ in boxes) - title
    right, bottom = max(x + w for x, _, w, _ in boxes), max(y + h for _, y, _, h in boxes)
    scale = round(min(max(min(1440 / (right - left), 700 / (bottom - top)), 0.6), 1), 2)  # below 0.6 names vanish
    return {"scale": scale, "offset": [round(100 / scale - left), round(120 / scale - top)]}


def test_every_help_page_belongs_to_a_node():
    assert {path.stem for path in (ROOT / "web/docs").glob("*.md")} == set(IDS)
