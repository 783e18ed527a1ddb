"""Recorded results: what is printed is what was measured, with what made it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import pytest

from results import Table, markdown, page, record

TABLE = Table("Speed", ["steps", "time", "gain"], [[5, 0.123456, None], ["all", 12.0, "1.5x"]], "Lower is better.")


def test_a_table_prints_numbers_short_and_missing_ones_as_a_dash():
    assert markdown(TABLE) == (
        "### Speed\n\n| steps | time | gain |\n| --- | --- | --- |\n| 5 | 0.1235 | – |\n| all | 12 | 1.5x |\n"
        "\nLower is better.\n"
    )


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--steps", "5", "--out", str(tmp_path), "--say", "a b"])
    return record(
        "speed", "How fast?", [TABLE], time.perf_counter() - 7, ["plot.png"], ["Why."], tmp_path, {"raw": [1]}
    )


def test_the_json_names_command_versions_machine_and_duration(recorded, tmp_path):
    stored = json.loads((tmp_path / "results" / "speed.json").read_text("utf-8"))
    assert stored == recorded and stored["data"] == {"raw": [1]}
    assert stored["command"] == "python dev.py bench speed --steps 5 --say 'a b'"
    assert {"python", "torch", "pack"} <= set(stored["versions"]) and all(stored["versions"].values())
    assert "cores" in stored["machine"] and 7 <= stored["seconds"] < 8


def test_the_page_holds_every_recorded_benchmark_and_nothing_else(recorded, tmp_path):
    record("accuracy", "How right?", [], time.perf_counter(), out=tmp_path)
    text = (tmp_path / "results.md").read_text("utf-8")
    assert text == page(tmp_path)
    assert text.index("## How right?") < text.index("## How fast?")
    assert "- [How fast?](#how-fast)" in text and "![plot.png](plot.png)" in text and markdown(TABLE) in text


def test_parts_of_a_page_name_the_command_of_each(recorded, tmp_path):
    parts = [replace(TABLE, command="python dev.py bench parts --only 1"), replace(TABLE, title="Size")]
    record("parts", "In parts", parts, time.perf_counter(), out=tmp_path)
    text = (tmp_path / "results.md").read_text("utf-8").split("\n## In parts")[1].split("\n## ")[0]
    head, first, second = text.split("### ")
    assert "python dev.py" not in head and "In parts, each with its command" in head
    assert "\nLower is better.\n\n`python dev.py bench parts --only 1`\n" in first and "python dev.py" not in second
