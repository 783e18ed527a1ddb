"""The ComfyUI that the host tests share, and its demo model."""

from __future__ import annotations

import gc
import shutil
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


@pytest.fixture(autouse=True)
def _old_objects_are_set_aside():
    """The host collects garbage at every run once a model ended in a cycle, as stock dpm_fast's do: .6 s a run in the end.

    What lives before a test is not looked at again by the collector, until the file of tests ends.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _what_a_file_made_is_collected():
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_profile_stays(request):
    """Fits keep what they find in the user's models/attune, where the next test's nodes would find it."""
    yield
    if "host" in request.fixturenames:
        for file in request.getfixturevalue("host").profiles.glob("*"):
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and not any(map(item.get_closest_marker, ("server", "browser"))):
            item.add_marker(pytest.mark.host)
