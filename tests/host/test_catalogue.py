"""Every node is complete: tooltips, help page, README row, a workflow with a thumbnail and a prompt that tests run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IDS = [
    "AttuneAuto",
    "AttuneScheduler",
    "AttuneKSampler",
    "AttuneTuneSchedule",
    "AttuneAlignTimesteps",
    "AttuneFitNoiseShift",
    "AttuneNoiseShift",
    "AttuneLoadNPNet",
    "AttuneGoldenNoise",
    "AttuneGoldenNoiseModel",
    "AttuneRedenoise",
    "AttuneZigzagSampler",
    "AttuneSelectNoise",
    "AttuneCollectNoisePairs",
    "AttuneTrainNPNet",
    "AttuneLoadProfile",
    "AttuneSaveProfile",
    "AttuneApplyProfile",
    "AttunePlotSigmas",
    "AttuneEncoderPropagation",
    "AttuneFitEncoderPropagation",
    "AttuneBlockPropagation",
    "AttuneLoadOneMoreStep",
    "AttuneOneMoreStep",
    "AttuneOneMoreStepPredict",
    "AttuneOneMoreStepNoise",
    "AttuneSignalLeak",
    "AttuneTrainOneMoreStep",
    "AttuneCompare",
]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


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
    assert schema.description and schema.category.startswith("attune/")


@pytest.mark.parametrize("node", IDS)
def test_every_node_has_help_a_readme_row_and_a_workflow(node):
    assert len((ROOT / "web/docs" / f"{node}.md").read_text("utf-8")) > 300
    assert f"| `{node}`" in (ROOT / "README.md").read_text("utf-8")
    assert [path for path in WORKFLOWS if f'"type": "{node}"' in path.read_text("utf-8")]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_every_workflow_is_in_ui_format_with_thumbnail_and_tested_prompt(path):
    workflow = json.loads(path.read_text("utf-8"))
    assert workflow["version"] == 0.4 and workflow["nodes"] and workflow["links"]
    assert path.with_suffix(".jpg").stat().st_size > 1000
    assert (ROOT / "tests/prompts" / path.name).exists()


def test_every_help_page_belongs_to_a_node():
    assert {path.stem for path in (ROOT / "web/docs").glob("*.md")} == set(IDS)
