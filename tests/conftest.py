"""Tests see the pack under one name, wherever it was cloned, without running its `__init__`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST_MARKS = ("host", "server", "browser")
SETTINGS = {  # of the page, so that its screenshots show whole graphs with readable names
    "Comfy.TutorialCompleted": True,  # else a first visit opens the templates over the canvas
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "Comfy.VueNodes.Enabled": bool(os.environ.get("ATTUNE_VUE_NODES")),
}

pack = types.ModuleType("pack")
pack.__path__ = [str(ROOT)]
sys.modules["pack"] = pack  # from here on: from pack.kernels.schedules import check_sigmas


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also what repeats a kind: the tests marked nightly")
    parser.addoption("--fuzz", type=int, metavar="N", help="mutated files, of all kinds together: 400, --all: 1000")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Of what was selected: the nightly only with --all; kernels first, the browser last; what the machine lacks skipped."""
    if not config.getoption("--all"):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
    items.sort(
        key=lambda item: max([0, *(1 + i for i, mark in enumerate(HOST_MARKS) if item.get_closest_marker(mark))])
    )
    missing = {}
    if not os.environ.get("COMFYUI_PATH"):
        missing = dict.fromkeys(HOST_MARKS, "COMFYUI_PATH is not set: run `python dev.py test`")
    elif not os.environ.get("CHROMIUM_PATH"):
        missing = {"browser": "no Chromium: install one, or set CHROMIUM_PATH"}
    skipped = set()
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
                skipped.add(reason)
    if skipped and os.environ.get("CI"):
        raise pytest.UsageError(f"CI must run every test, but: {'; '.join(skipped)}")


@pytest.fixture(scope="session")
def fuzz(pytestconfig) -> int:
    """How many mutated files, of all kinds together."""
    return pytestconfig.getoption("--fuzz") or (1000 if pytestconfig.getoption("--all") else 400)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def dev():
    """dev.py as a module."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Server:
    """A running ComfyUI with the pack, all of its files in `folder`."""

    url: str
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"


@pytest.fixture(scope="session")
def server(dev, tmp_path_factory):
    run = tmp_path_factory.mktemp("server")
    settings = run / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS))
    (run / "custom_nodes").mkdir()
    shutil.copy(ROOT / "benchmarks/count_objects.py", run / "custom_nodes")
    flags = ("--base-directory", str(run), "--cache-classic")  # newer hosts keep what fits into memory
    with dev.server(dev.Host(os.environ["COMFYUI_PATH"]), run, *flags) as url:
        yield Server(url, run)
