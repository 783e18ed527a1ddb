"""What the registry, the citation file and the changelog say of the pack agrees, and what they name exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_version_is_semantic_and_the_same_everywhere():
    version = PROJECT["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[1] == version


def test_nothing_is_installed():
    assert PROJECT["project"]["dependencies"] == []
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert not [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("key", ["Icon", "Banner"])
def test_the_registrys_pictures_exist(key):
    repository = PROJECT["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    prefix = f"https://raw.githubusercontent.com/{repository}/main/"
    url = PROJECT["tool"]["comfy"][key]
    assert url.startswith(prefix) and (ROOT / url.removeprefix(prefix)).stat().st_size > 1000


def test_folders_in_the_package_exist():
    assert all((ROOT / folder).is_dir() for folder in PROJECT["tool"]["comfy"]["includes"])
