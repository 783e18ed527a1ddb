"""Other versions of the host, simulated on this one: what they lack, add, share and number differently."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from functools import lru_cache

import pytest
import torch

from graphs import Kit
from methods import EVERY_DAY, METHODS
from nightly import daily


@pytest.fixture(scope="module")
def kits(host):
    return {name: Kit(host, name) for name in ("unet", "flow")}


@pytest.fixture(scope="module")
def drawn(kits):
    """What a method draws with KSampler on this host, once for all tests; without a name, what the stock model does."""

    def run(model: str, method: str = "") -> torch.Tensor:
        kit = kits[model]
        return kit.ksampler(METHODS[method].on(kit)(kit.model) if method else kit.model)

    return lru_cache(maxsize=None)(run)


@pytest.mark.parametrize("old", ["0.3.63", "0.3.52", "0.2.9", "0.3"])
def test_a_host_that_is_too_old_is_told_so_at_import(host, monkeypatch, old):
    import pack.nodes._host

    monkeypatch.setattr("comfyui_version.__version__", old)
    with pytest.raises(ImportError, match=rf"needs ComfyUI 0.3.64 or newer, but this is {old}. Update ComfyUI"):
        importlib.reload(pack.nodes._host)


@pytest.mark.parametrize("new", ["0.3.64", "0.3.75", "0.28.0", "0.38.1", "1.0", "0.4.0rc1", "nightly", ""])
def test_newer_hosts_and_those_that_do_not_say_pass(host, monkeypatch, new):
    from pack.nodes import _host

    monkeypatch.setattr("comfyui_version.__version__", new)
    _host.check_host()
    monkeypatch.setitem(sys.modules, "comfyui_version", None)
    assert _host.host_version() == ""
    _host.check_host()


def fresh(module: str):
    """A module of the pack imported once more, beside the one in use."""
    found = importlib.util.find_spec(module)
    again = importlib.util.module_from_spec(found)
    found.loader.exec_module(again)
    return again


def test_a_host_without_the_numbered_api_gives_the_latest(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_api.v0_0_2", None)
    api = fresh("pack.nodes._host.api")
    assert api.io.__name__.startswith("comfy_api.latest") and api.Profile.io_type == "ATTUNE_PROFILE"


def test_fields_that_a_host_does_not_know_are_left_out(host):
    api = fresh("pack.nodes._host.api")
    given = {"inputs": [], "outputs": []}
    assert api.schema("X", "x", "", "", **given, only_in_the_future=1).node_id == "X"
    api._FIELDS.discard("search_aliases")
    assert api.schema("X", "x", "", "", **given, search_aliases=["y"]).display_name == "x"


WRAPPED = [name for name in METHODS if name != "precision guard"]  # which leaves a MODEL without rounded weights alone


@pytest.mark.parametrize("method", daily(WRAPPED, *EVERY_DAY[::3]))
def test_arguments_that_a_newer_host_adds_are_passed_on(kits, drawn, method):
    """Every wrapper of ours stands between one that adds an argument and one that looks for it."""
    from comfy.patcher_extension import WrappersMP

    chosen = METHODS[method]
    kit = kits[chosen.model]
    ours = drawn(chosen.model, method)
    kinds = [kind for kind, keyed in chosen.on(kit)(kit.model).wrappers.items() if keyed]
    options = chosen.on(kit)(kit.model).model_options["transformer_options"].get("wrappers", {})
    kinds += [kind for kind, keyed in options.items() if keyed and kind not in kinds]
    assert kinds
    arrived: set[str] = set()
    future = object()

    def surrounded(model):
        for kind in kinds:
            model.add_wrapper_with_key(
                kind, "test.newer", lambda executor, *a, **k: executor(*a, **k, from_later=future)
            )
        model = chosen.on(kit)(model)
        for kind in kinds:

            def older(executor, *args, kind=kind, **kwargs):
                assert kwargs.pop("from_later", None) is future or kind == WrappersMP.DIFFUSION_MODEL
                arrived.add(kind)
                return executor(*args, **kwargs)

            model.add_wrapper_with_key(kind, "test.older", older)
        return model

    assert torch.equal(kit.ksampler(surrounded(kit.model.clone())), ours)
    assert arrived == set(kinds)


def containers(value):
    """How newer hosts copy model_options: dicts and lists, and nothing in them."""
    if isinstance(value, dict):
        return {key: containers(one) for key, one in value.items()}
    return [containers(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("method", daily(METHODS, *EVERY_DAY[1::3]))
def test_options_that_clones_share(kits, drawn, method, monkeypatch):
    import comfy.model_patcher

    class Copy:
        deepcopy, copy = staticmethod(containers), staticmethod(copy.copy)

    chosen = METHODS[method]
    kit = kits[chosen.model]
    stock, ours = drawn(chosen.model), drawn(chosen.model, method)
    if hasattr(comfy.model_patcher, "copy"):  # newer hosts do it themselves
        monkeypatch.setattr(comfy.model_patcher, "copy", Copy)
    model = chosen.on(kit)(kit.model)
    assert torch.equal(kit.ksampler(model), ours)
    assert torch.equal(kit.ksampler(model.clone().clone()), ours) and torch.equal(kit.ksampler(model), ours)
    assert torch.equal(kit.ksampler(kit.model), stock)


def test_a_network_without_the_hosts_hook_for_timesteps_is_refused(kits, monkeypatch):
    import comfy.model_base

    monkeypatch.delattr(comfy.model_base.BaseModel, "process_timestep")
    with pytest.raises(ValueError, match=r"too old to change what a model is told: update it to 0\.3\.64"):
        METHODS["aligned timesteps"].on(kits["unet"])(kits["unet"].model)
