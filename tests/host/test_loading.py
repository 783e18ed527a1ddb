"""The host loads the pack, quickly, and is not changed by it."""

from __future__ import annotations

import sys


def test_the_hosts_own_loader_loads_every_node(host):
    assert host.loaded
    new = set(host.nodes.NODE_CLASS_MAPPINGS) - host.classes_before
    pages = {path.stem for path in (host.root / "web/docs").glob("*.md")}
    assert new == pages and all(name.startswith("Attune") for name in new)


def test_loading_changes_no_attribute_of_the_host(host):
    gone = host.before.keys() - host.after.keys()
    changed = {name for name in host.before if name in host.after and host.before[name] != host.after[name]}
    assert gone == set() and changed == set()


def test_samplers_and_schedulers_of_the_host_are_left_alone(host):
    import comfy.samplers

    assert not [name for name in comfy.samplers.SCHEDULER_NAMES + comfy.samplers.SAMPLER_NAMES if "ttune" in name]


def test_the_demo_models_are_registered_once_and_last(host):
    import comfy.supported_models

    host.loop.run_until_complete(host.nodes.load_custom_node(str(host.root), module_parent="custom_nodes"))
    names = [model.__name__ for model in comfy.supported_models.models]
    assert names[-2:] == ["AttuneDemo", "AttuneDemoInpaint"] and len(set(names)) == len(names)


OF_THE_HOST = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfyui_version",
    "folder_paths",
    "latent_preview",
    "nodes",
    "server",
}
THERE_ALREADY = {"PIL", "einops", "numpy", "safetensors", "torch"}  # the host has loaded them before any pack


def test_loading_the_pack_imports_no_package_that_the_host_has_not_loaded(imported_while_loading):
    """Counted, for a clock says more about the machine: it took .2 s, when the limit was a third of a second."""
    others = imported_while_loading - set(sys.stdlib_module_names)
    assert "torch" in others and others <= OF_THE_HOST | THERE_ALREADY


def test_loading_the_pack_reads_profiles_and_no_weights(read_while_loading, host):
    files = {path for path in read_while_loading if path.exists() and path.parent.name != "__pycache__"}
    assert host.root / "models/profiles/ays_sd15.json" in files
    assert {path.suffix for path in files} <= {".py", ".json", ".toml"}
    assert sum(path.stat().st_size for path in files if path.suffix != ".py") < 500_000


def test_the_demo_checkpoints_are_in_the_stock_loaders_list(host):
    import folder_paths

    assert "attune_demo.safetensors" in folder_paths.get_filename_list("checkpoints")


def test_the_registry_reads_our_project_file(host):
    from comfy_config import config_parser

    config = config_parser.extract_node_configuration(str(host.root))
    assert config.project.name == "attune" and config.project.version and config.project.description
    assert config.project.urls.repository.startswith("https://")
    assert config.tool_comfy.display_name == "Attune" and config.tool_comfy.icon.endswith(".png")
    assert not config.tool_comfy.includes  # they would put back what .comfyignore leaves out
    assert 'requires-comfyui = ">=0.3.64"' in (host.root / "pyproject.toml").read_text("utf-8")


def test_requirements_install_nothing(host):
    lines = (host.root / "requirements.txt").read_text("utf-8").splitlines()
    assert [line for line in lines if line.strip() and not line.startswith("#")] == []


def test_a_broken_node_file_leaves_its_traceback_in_the_log(host, tmp_path, caplog):
    """The host itself would print only the message."""
    pack = tmp_path / "attune_broken"
    (pack / "nodes").mkdir(parents=True)
    (pack / "__init__.py").write_text((host.root / "__init__.py").read_text("utf-8"))
    (pack / "nodes" / "__init__.py").write_text("raise RuntimeError('boom in our file')")
    assert not host.loop.run_until_complete(host.nodes.load_custom_node(str(pack), module_parent="custom_nodes"))
    assert "could not load its nodes" in caplog.text
    assert "boom in our file" in caplog.text and "Traceback" in caplog.text
