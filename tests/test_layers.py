"""The layers, read off the imports: mathematics knows no host, and the host is known in one folder."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "comfyui_version",
    "execution",
    "folder_paths",
    "latent_preview",
    "nodes",
    "server",
}
MAY = {  # folder -> (outside packages beyond the standard library, layers of the pack)
    "kernels": ({"torch", "einops", "kornia", "numpy"}, {"kernels"}),
    "models": ({"torch", "einops", "kornia", "numpy", "safetensors"}, {"kernels", "models"}),
    "nodes/_plan": ({"torch", "einops", "kornia", "numpy"}, {"kernels", "models", "nodes/_plan"}),
    "nodes/_draw": ({"torch", "numpy", "PIL"}, {"kernels", "models", "nodes/_plan", "nodes/_draw"}),
    "nodes": (
        {"torch", "einops", "kornia", "numpy", "PIL"},
        {"kernels", "models", "nodes", "nodes/_plan", "nodes/_draw", "nodes/_host"},
    ),
    "nodes/_host": (
        {"torch", "einops", "kornia", "numpy", "PIL"} | HOST,
        {"kernels", "models", "nodes/_plan", "nodes/_host"},
    ),
}
CONVENTIONS = {  # names that modules share, each for its own
    "AUTO": "the option of a list that leaves the choice to the node",
    "CATEGORY": "where the nodes stand in the menu",
    "FORMAT": "the version of the files that the module writes",
    "KEY": "under what the module keeps its own in a MODEL's options or a workflow",
    "LOG": "the module's logger",
    "MOST_NAMES": "how many weights a file may hold",
    "NODES": "the nodes that the module adds",
    "T": "any type",
    "WHO": "the node's title in what it says",
}
FILES = [path for folder in ("kernels", "models", "nodes") for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path):
    """(outside packages, layers of the pack) that a file names."""
    outside, inside = set(), set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            inside |= {layer_of((*base, *name.split("."))) for name in names}
    return outside, inside


def layer_of(parts: tuple[str, ...]) -> str:
    """The row of the table that a file or a module belongs to."""
    return "/".join(parts[:2]) if "/".join(parts[:2]) in MAY else parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    packages, layers = MAY[layer_of(path.relative_to(ROOT).parts)]
    outside, inside = imports(path)
    assert outside - set(sys.stdlib_module_names) - packages == set()
    assert inside <= layers


def test_nothing_touches_the_search_path():
    assert not [path for path in FILES if "sys.path" in path.read_text("utf-8")]


def test_most_of_the_pack_does_not_know_the_host():
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in FILES}
    coupled = sum(n for path, n in lines.items() if imports(path)[0] & HOST)
    assert coupled <= 0.4 * sum(lines.values())


def public_names(path: Path) -> set[str]:
    """What a file defines at its top level; what it imports is defined elsewhere."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            found |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return {name for name in found if not name.startswith("_")}


def test_a_public_name_is_defined_once():
    """Whoever searches for a name finds what it means; it is imported from there, or another word is found for it."""
    defined: dict[str, list[str]] = {}
    for path in FILES:
        for name in public_names(path):
            defined.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    twice = {name: paths for name, paths in defined.items() if len(paths) > 1}
    assert {name: paths for name, paths in twice.items() if name not in CONVENTIONS} == {}
    assert set(CONVENTIONS) == set(twice)  # what is no convention any more is taken off the list


def test_the_names_of_a_file_are_what_it_defines_and_not_what_it_imports(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(
        "from x import imported\nA, (B, _c) = 1, (2, 3)\nD: int = 4\nA.attribute = E[0] = 5\n"
        "def f(g):\n    h = 1\nclass I:\n    j = 2\nasync def k(): ...\n"
    )
    assert public_names(file) == {"A", "B", "D", "f", "I", "k"}
