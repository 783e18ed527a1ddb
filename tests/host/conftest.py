"""The ComfyUI that the host tests share, and its demo model."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfy_process import Host


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Host:
    return Host(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="session")
def demo(host):
    """MODEL, CLIP and VAE of the demo checkpoint, through the stock loader."""
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo.safetensors")


@pytest.fixture(scope="session")
def encode(host, demo):
    """A prompt's CONDITIONING, through the stock node."""
    return lambda text: host.call("CLIPTextEncode", clip=demo[1], text=text)[0]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and not any(map(item.get_closest_marker, ("server", "browser"))):
            item.add_marker(pytest.mark.host)
