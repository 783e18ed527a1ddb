"""Results as files: every benchmark records its tables as JSON, and docs/results.md is generated from all of them."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from comfy_process import ROOT

DOCS = ROOT / "docs"
HEAD = """# Results

Generated from `docs/results/*.json` by the benchmarks themselves (`python dev.py bench NAME`); never edited by hand.
What the methods are, and which one to use, is on their own pages; here are the figures, with the commands behind them.
"""


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers under `columns`; `note` says what a reader must know to read them, `command` what made
    them where the page's parts were made by several."""

    title: str
    columns: list[str]
    rows: list[list[str | float | int | None]]
    note: str = ""
    command: str = ""


def record(
    name: str,
    title: str,
    tables: Sequence[Table],
    began: float,
    pictures: Sequence[str] = (),
    notes: Sequence[str] = (),
    out: Path = DOCS,
    data: Any = None,
) -> dict:
    """Write `out`/results/`name`.json and generate `out`/results.md anew.

    began: time.perf_counter() at the start. pictures: file names beside results.md. data: anything else that a plot or
    a test may want from the JSON.
    """
    result = {
        "name": name, "title": title, "command": command_line(name), "date": date.today().isoformat(),
        "versions": _versions(), "machine": _machine(), "seconds": round(time.perf_counter() - began, 1),
        "notes": list(notes), "pictures": list(pictures), "tables": [asdict(table) for table in tables], "data": data,
    }  # fmt: skip
    (out / "results").mkdir(parents=True, exist_ok=True)
    (out / "results" / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (out / "results.md").write_text(page(out), "utf-8")
    return result


def beside_last(name: str, tables: list[Table], out: Path) -> list[Table]:
    """After those of the last record that were not made again, each with the command that made it."""
    path, made = out / "results" / f"{name}.json", {table.title for table in tables}
    last = json.loads(path.read_text("utf-8")) if path.exists() else {"tables": []}
    kept = [Table(**table) for table in last["tables"] if table["title"] not in made]
    if not kept:
        return tables
    kept = [table if table.command else replace(table, command=last["command"]) for table in kept]
    return [*kept, *(replace(table, command=command_line(name)) for table in tables)]


def page(out: Path) -> str:
    """The Markdown of all recorded results, in the order of their names."""
    results = [json.loads(path.read_text("utf-8")) for path in sorted((out / "results").glob("*.json"))]
    contents = "\n".join(f"- [{r['title']}](#{_anchor(r['title'])})" for r in results)
    return "\n".join([HEAD, contents, *map(section, results)])


def section(result: dict) -> str:
    """One benchmark: what made it, its pictures, its tables."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    made = f"`{result['command']}` · {result['date']} · {result['machine']} · {versions} · {result['seconds']:.0f} s\n"
    if any(table.get("command") for table in result["tables"]):
        made = f"In parts, each with its command; the last one on {result['date']} · {result['machine']} · {versions}\n"
    lines = [
        f"\n## {result['title']}\n",
        made,
        *(f"{note}\n" for note in result["notes"]),
        *(f"![{name}]({name})\n" for name in result["pictures"]),
    ]
    return "\n".join(lines + [markdown(Table(**table)) for table in result["tables"]])


def markdown(table: Table) -> str:
    """A Markdown table with its title and note."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    body = "\n".join("| " + " | ".join(map(_text, row)) + " |" for row in rows)
    below = [table.note] * bool(table.note) + [f"`{table.command}`"] * bool(table.command)
    return "\n\n".join([f"### {table.title}", body, *below]) + "\n"


def fill(page: Path, name: str, tables: Sequence[Table]) -> None:
    """Put tables between the marks of benchmark `name` on a page of the manual, where it has them."""
    begin, end = f"<!-- measured: python dev.py bench {name} -->", "<!-- end -->"
    head, found, tail = page.read_text("utf-8").partition(begin) if page.exists() else ("", "", "")
    if found:
        body = "\n".join(map(markdown, tables))
        page.write_text(f"{head}{begin}\n\n{body}\n{end}{tail.partition(end)[2]}", "utf-8")


def _text(value: str | float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def command_line(name: str) -> str:
    """The command that makes the same figures, without where this run kept its files."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not (skip or word in ("--out", "--cache")):
            words.append(word)
        skip = word in ("--out", "--cache")
    return shlex.join(["python", "dev.py", "bench", name, *words])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if comfyui := sys.modules.get("comfyui_version"):
        versions["ComfyUI"] = comfyui.__version__
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    return versions | {"pack": text.partition('\nversion = "')[2].partition('"')[0]}


def _machine() -> str:
    """The class of machine, not the machine."""
    threads = torch.get_num_threads()
    processor = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}"
    )
    return f"{processor}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"{processor}, no GPU"
