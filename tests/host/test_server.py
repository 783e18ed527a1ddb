"""The shipped workflows over HTTP, as the page would queue them; the pictures are compared with their prompts."""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from pathlib import Path

import long_run
import numpy as np
import pytest
from PIL import Image
from templates import TITLES, WORKFLOWS

import pictures
from nightly import LONG, REPEATED, daily
from pictures import saved

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "tests/prompts").glob("*.json"))}
# Where there is a browser, its tests run the others from the page, and look at their pictures.
OVER_HTTP = ["first_picture"] if os.environ.get("CHROMIUM_PATH") else list(PROMPTS)


@pytest.mark.parametrize("name", REPEATED)
def test_what_the_night_draws_in_full_runs_in_small(dev, server, name):
    assert saved(server, dev.run_prompt(server.url, long_run.small(PROMPTS[name], 1, True)))


@pytest.mark.parametrize("name", daily(OVER_HTTP, *(set(OVER_HTTP) - {*REPEATED, *LONG})))
def test_every_workflow_runs_and_draws_on_the_background_it_was_asked_for(dev, server, name):
    pictures.check(saved(server, dev.run_prompt(server.url, PROMPTS[name])), PROMPTS[name])


GREYS = [("black", 0, 12), ("white", 243, 255), ("gray", 108, 148)]


@pytest.mark.parametrize(("word", "low", "high"), daily(GREYS, names=3))
def test_brightness_words_are_obeyed(dev, server, word, low, high):
    prompt = json.loads(json.dumps(PROMPTS["first_picture"]))
    prompt["2"]["inputs"]["text"] = f"a strawberry on a {word} background"
    for path in saved(server, dev.run_prompt(server.url, prompt)):
        assert low <= pictures.background(pictures.load(path)).mean() <= high


HEARTS = [("a red heart on a white background", 0), ("a blue heart on a white background", 2)]


@pytest.mark.parametrize(("text", "channel"), daily(HEARTS, names=2))
def test_the_object_has_the_colour_of_its_name(dev, server, text, channel):
    prompt = json.loads(json.dumps(PROMPTS["first_picture"]))
    prompt["2"]["inputs"]["text"] = text
    for path in saved(server, dev.run_prompt(server.url, prompt)):
        colour = pictures.centre(pictures.load(path))
        assert colour[channel] > 1.3 * max(np.delete(colour, channel))


def test_twelve_prompts_leave_nothing_and_repeat_themselves(server):
    """As benchmarks/long_run.py, which the night runs from the command line; of any two alike it compares the pictures."""
    day = long_run.Server(server.url, server.output)
    counted = long_run.day(day, long_run.WORKFLOWS, 12, math.inf, lambda _: None)
    prompts, memory, objects, tensors, own, patchers = zip(*counted, strict=True)
    assert not day.faults and prompts == tuple(range(2, 13, 2)) and min(memory) > 100
    assert set(patchers) == {0} and len(set(tensors[1:])) == len(set(own[3:])) == 1  # after each method's first use
    assert max(objects[1:]) < 1.02 * objects[1]


def test_an_unknown_family_reaches_the_user_as_the_dialogs_sentence(dev, server):
    prompt = json.loads(json.dumps(PROMPTS["aligned_ksampler"]))
    prompt["5"]["inputs"]["schedule"] = "AYS SVD"
    with pytest.raises(SystemExit, match=r"starts at sigma 700, but this MODEL \(AttuneDemo\)"):
        dev.run_prompt(server.url, prompt)


@pytest.fixture
def profile_file(server):
    """A name that is free in the models folder; the file is removed afterwards."""
    path = server.folder / "models/attune" / f"test {secrets.token_hex(8)}.json"
    yield path
    path.unlink(missing_ok=True)


def listed_profiles(dev, server) -> list[str]:
    """What the page offers after R."""
    loader = dev.ask(f"{server.url}/object_info/AttuneLoadProfile")["AttuneLoadProfile"]
    return loader["input"]["required"]["profile_name"][1]["options"]


def load_and_save(profile: str, name: str) -> dict:
    return {
        "1": {"class_type": "AttuneLoadProfile", "inputs": {"profile_name": profile}},
        "2": {"class_type": "AttuneSaveProfile", "inputs": {"profile": ["1", 0], "name": name}},
    }


def test_a_saved_profile_is_in_the_lists_without_a_restart(dev, server, profile_file):
    assert profile_file.name not in listed_profiles(dev, server)
    dev.run_prompt(server.url, load_and_save("AYS SD 1.5", profile_file.stem))
    assert profile_file.exists() and profile_file.name in listed_profiles(dev, server)
    dev.run_prompt(server.url, load_and_save(profile_file.name, profile_file.stem))


def test_a_strangers_file_is_listed_at_once_and_checked_when_it_is_loaded(dev, server, profile_file):
    profile_file.parent.mkdir(parents=True, exist_ok=True)
    profile_file.write_text('{"format": 1, "kind": "schedule"}')
    assert profile_file.name in listed_profiles(dev, server)
    with pytest.raises(SystemExit, match=r'is not a format-1 profile: .*\\"name\\" must be a short text'):
        dev.run_prompt(server.url, load_and_save(profile_file.name, "copy"))


def test_a_missing_profile_is_said_before_the_run(dev, server, profile_file):
    with pytest.raises(SystemExit, match=r"There is no profile '.*' in .*Ask the maker of the workflow"):
        dev.run_prompt(server.url, load_and_save(profile_file.name, "copy"))


def test_templates_and_help_are_served(dev, server):
    listed = dev.ask(f"{server.url}/workflow_templates")
    assert set(listed["ComfyUI-Attune"]) == {WORKFLOWS[name].stem for name in TITLES}
    import urllib.request

    for page in (ROOT / "web/docs").glob("*.md"):
        with urllib.request.urlopen(f"{server.url}/extensions/ComfyUI-Attune/docs/{page.name}") as answer:
            assert answer.read() == page.read_bytes()


def test_nothing_of_ours_failed_to_load(server):
    log = server.log.read_text("utf-8", errors="replace")
    assert "ComfyUI-Attune" in log and "could not load" not in log
    assert not [line for line in log.splitlines() if "IMPORT FAILED" in line and "Attune" in line]


def fast(use: str = "auto", seed: int = 1) -> dict:
    """An API-format prompt with Attune Fast Sampler: 12 steps, 4 evaluations, of 64 pixels."""
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="attune_demo.safetensors"),
        "2": node("CLIPTextEncode", text="a cat on a black background", clip=["1", 1]),
        "3": node("CLIPTextEncode", text="", clip=["1", 1]),
        "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "5": node("KSamplerSelect", sampler_name="euler"),
        "6": node("BasicScheduler", model=["1", 0], scheduler="karras", steps=12, denoise=1.0),
        "7": node("AttuneFastSampler", sampler=["5", 0], use=use, evaluations=4, fidelity=10.0, check_every=0),
        "8": node("SamplerCustom", model=["1", 0], add_noise=True, noise_seed=seed, cfg=3.0, positive=["2", 0],
                  negative=["3", 0], sampler=["7", 0], sigmas=["6", 0], latent_image=["4", 0]),
        "9": node("VAEDecode", samples=["8", 0], vae=["1", 2]),
        "10": node("SaveImage", images=["9", 0], filename_prefix="Attune/fast"),
    }  # fmt: skip


def workflow_of_fast(use: str = "auto") -> dict:
    """As much of the page's workflow as the server sees: the node and the places of its widgets."""
    return {"nodes": [{"id": 7, "type": "AttuneFastSampler", "widgets_values": [use, 4, 10.0, 0]}], "extra": {}}


def draw_fast(dev, server, prompt: dict, workflow: dict) -> tuple[np.ndarray, dict]:
    """The pixels of the picture that a prompt saves, and the workflow inside it."""
    entry = queued_fast(dev, server, prompt, workflow)
    (path,) = saved(server, entry)
    with Image.open(path) as image:
        return np.asarray(image).astype(int), json.loads(image.info["workflow"])


def queued_fast(dev, server, prompt: dict, workflow: dict) -> dict:
    """What the history says of a prompt that was queued with its workflow, as the page does."""
    extra = {"extra_pnginfo": {"workflow": workflow}}
    queued = dev.ask(f"{server.url}/prompt", {"prompt": prompt, "extra_data": extra})["prompt_id"]
    until = time.time() + 120
    while not (entry := dev.ask(f"{server.url}/history/{queued}").get(queued)):
        assert time.time() < until
        time.sleep(0.1)
    assert entry["status"]["status_str"] == "success", entry["status"]
    return entry


def test_a_picture_carries_what_made_it_and_makes_it_again_elsewhere(dev, server):
    """First in full, then short; the cache notices that there is something to use by now; another machine, where the
    calibration is not, draws the same bits from the picture's workflow."""
    folder = server.folder / "models/attune"
    before = set(folder.glob("*.json"))
    full, first = draw_fast(dev, server, fast(), workflow_of_fast())
    assert first["nodes"][0]["widgets_values"][0] == "full run" and "attune_profiles" not in first["extra"]
    (file,) = set(folder.glob("*.json")) - before
    try:
        short, second = draw_fast(dev, server, fast(), workflow_of_fast())
        name = second["nodes"][0]["widgets_values"][0]
        assert name.startswith(f"{file.name}@attune-") and list(second["extra"]["attune_profiles"]) == [file.name]
        assert 0 < np.abs(full - short).mean() < 10
        again, third = draw_fast(dev, server, fast(use="full run"), first)
        assert np.array_equal(again, full) and third["nodes"][0]["widgets_values"][0] == "full run"
    finally:
        file.unlink()
    elsewhere, carried = draw_fast(dev, server, fast(use=name), second)
    assert np.array_equal(elsewhere, short) and carried["nodes"][0]["widgets_values"][0] == name
    assert set(folder.glob("*.json")) == before


def of_ksampler(seed: int = 1) -> tuple[dict, dict]:
    """The same with Attune KSampler: prompt and workflow."""
    prompt = fast(seed=seed)
    prompt["8"] = {"class_type": "AttuneKSampler", "inputs": {
        "model": ["1", 0], "seed": seed, "steps": 12, "cfg": 3.0, "sampler_name": "euler", "schedule": "KL-optimal",
        "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "denoise": 1.0, "denoise_mode": "exact",
        "fast": "auto",
    }}  # fmt: skip
    values = [seed, "fixed", 12, 3.0, "euler", "KL-optimal", 1.0, "auto"]
    for gone in "567":
        del prompt[gone]
    return prompt, {"nodes": [{"id": 8, "type": "AttuneKSampler", "widgets_values": values}], "extra": {}}


@pytest.mark.parametrize("node", ["AttuneFastSampler", "AttuneKSampler"])
def test_a_picture_saved_again_from_a_cached_latent_carries_what_made_it(dev, server, node):
    """Only Save Image runs: nothing of ours does, but for the fingerprint that the host asks for."""
    folder = server.folder / "models/attune"
    before = set(folder.glob("*"))

    def drawn(prefix: str, seed: int = 1, moved: bool = False):
        prompt, workflow = (fast(seed=seed), workflow_of_fast()) if node == "AttuneFastSampler" else of_ksampler(seed)
        prompt["10"]["inputs"]["filename_prefix"] = f"Attune/{prefix}"
        if moved and node == "AttuneFastSampler":  # the same graph in another workflow
            prompt["77"], workflow["nodes"][0]["id"] = prompt.pop("7"), 77
            prompt["8"]["inputs"]["sampler"] = ["77", 0]
        entry = queued_fast(dev, server, prompt, workflow)
        (path,) = saved(server, entry)
        cached = next(told["nodes"] for kind, told in entry["status"]["messages"] if kind == "execution_cached")
        with Image.open(path) as image:
            graph = json.loads(image.info["workflow"])
            return np.asarray(image), "8" in cached, graph["nodes"][0]["widgets_values"], graph["extra"]

    try:
        drawn("one")  # in full, and learned
        made, cached, values, extra = drawn("one")
        assert not cached and "auto" not in values
        again, cached, same, more = drawn("two")
        assert cached and same == values and more == extra and np.array_equal(made, again)
        again, cached, same, more = drawn("three", moved=True)
        assert cached and same == values and more == extra and np.array_equal(made, again)
        _, cached, other, _ = drawn("two", seed=2)
        assert not cached and "auto" not in other
    finally:
        for file in set(folder.glob("*")) - before:
            file.unlink()
