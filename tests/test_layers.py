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
