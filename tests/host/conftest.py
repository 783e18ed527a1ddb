"""The ComfyUI that the host tests share, and its demo model."""

from __future__ import annotations

import builtins
import contextlib
import gc
import shutil
import sys
from pathlib import Path

import pytest

from comfy_process import Host
from graphs import Kit
from nightly import daily

ROOT = Path(__file__).resolve().parents[2]
HOSTS: list[Host] = []  # the one that runs, once a test has asked for it
READ: list[Path] = []  # files of the pack that were opened while the host loaded it
IMPORTED: set[str] = set()  # packages that the pack's modules named while the host loaded it, loaded before or not


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Host:
    with loading_watched():
        HOSTS.append(Host(tmp_path_factory.mktemp("comfyui")))
    attend_as_on_a_gpu()
    return HOSTS[0]


@contextlib.contextmanager
def loading_watched():
    """Fill READ and IMPORTED."""
    imported, watching = builtins.__import__, [True]

    def note_import(name, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and is_ours(str((globals or {}).get("__name__"))):  # the host names a pack's modules by its path
            IMPORTED.add(name.partition(".")[0])
        return imported(name, globals, locals, fromlist, level)

    def note_open(event, args):  # a hook stays for good
        if event == "open" and watching and is_ours(str(args[0])):
            READ.append(Path(args[0]))

    sys.addaudithook(note_open)
    builtins.__import__ = note_import
    try:
        yield
    finally:
        builtins.__import__ = imported
        watching.clear()


def is_ours(path: str) -> bool:
    """Of the pack, and not of the host that may lie in its .host."""
    return path.startswith(str(ROOT)) and not path.startswith(str(ROOT / ".host"))


def attend_as_on_a_gpu() -> None:
    """PyTorch's attention, the host's own choice on a GPU, and a fifth faster on a CPU; the server's stays a CPU's."""
    from comfy.ldm.modules import attention

    for module in list(sys.modules.values()):
        for name in ("optimized_attention", "optimized_attention_masked"):
            if vars(module).get(name) is attention.attention_sub_quad:
                setattr(module, name, attention.attention_pytorch)


@pytest.fixture
def read_while_loading(host) -> list[Path]:
    return READ


@pytest.fixture
def imported_while_loading(host) -> set[str]:
    return IMPORTED


@pytest.fixture(scope="module", params=daily(["unet", "flow"], "flow"))
def kit(host, request) -> Kit:
    """Each demo model in turn, with its conditionings and the stock samplers; each day the one that takes less time."""
    return Kit(host, request.param)


@pytest.fixture(scope="module")
def unet(host) -> Kit:
    return Kit(host, "unet")


@pytest.fixture(scope="module")
def net(host) -> Kit:
    """The demo model that takes less time, for what is the same with both."""
    return Kit(host, "flow")


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
def _what_a_file_made_goes_with_it():
    """Objects, and what was trained into the user's models, where Attune Auto of another file would find it."""
    yield
    gc.unfreeze()
    for host in HOSTS:
        for file in (host.folders / "models").rglob("*"):
            if file.is_file() or file.is_symlink():
                file.unlink()


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
