"""What the registry, the citation file and the changelog say of the pack agrees, and what they name exists."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from templates import TEMPLATES

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
DOWNLOAD = "https://github.com/comfyui-attune/ComfyUI-Attune/raw/main/models/weights"
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


@pytest.fixture(scope="module")
def package() -> dict[str, int]:
    """Bytes by name of the files that the registry's package holds: what git tracks without .comfyignore's patterns."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    tracked = lambda *words: subprocess.run(
        ["git", "-c", "core.quotePath=false", "ls-files", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    files = set(tracked()) - set(tracked("-ci", "--exclude-from=.comfyignore"))
    return {name: (ROOT / name).stat().st_size for name in files if (ROOT / name).exists()}


def test_the_package_holds_what_runs_and_is_small(package):
    """Also `comfy node pack`; an `includes` in pyproject.toml would put ignored files back."""
    assert sum(package.values()) < 35e6 and len(package) <= 330  # what they are: CONTRIBUTING.md
    assert "includes" not in PROJECT["tool"]["comfy"]
    tops = {name.split("/")[0] for name in package}
    assert tops == {
        "CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md", "__init__.py", "example_workflows", "kernels", "locales",
        "models", "nodes", "pyproject.toml", "requirements.txt", "subgraphs", "web",
    }  # fmt: skip
    assert not [name for name in package if name.startswith("locales/") and name.count("/") < 2]


def test_the_package_has_every_module_that_its_modules_import(package):
    """By the names in their import statements; none imports what is left out, such as tests or benchmarks."""
    for name in package:
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = Path(name).parents[node.level - 1] / (node.module or "").replace(".", "/")
                for one in node.names:
                    found = {f"{base}.py", f"{base}/__init__.py", f"{base}/{one.name}.py"} | {f"{base}/{one.name}/x"}
                    in_folder = any(file.startswith(f"{base}/") for file in package)
                    assert found & set(package) or in_folder, (name, node.module, one.name)


def test_a_template_whose_model_the_package_lacks_says_where_it_is(package):
    """In the node, for the page's list of missing models, and in the note, for a person."""
    for path in TEMPLATES.glob("*.json"):
        workflow = json.loads(path.read_text("utf-8"))
        (note,) = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
        for node in workflow["nodes"]:
            if node["type"] != "CheckpointLoaderSimple":
                continue
            name, url = node["widgets_values"][0], f"{DOWNLOAD}/{node['widgets_values'][0]}"
            told = [{"name": name, "url": url, "directory": "checkpoints"}]
            if f"models/weights/{name}" in package:
                assert "models" not in node["properties"]
            else:
                assert node["properties"]["models"] == told and url in note
