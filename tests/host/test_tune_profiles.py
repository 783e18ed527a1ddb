"""The script that tunes the shipped profiles: through the node, resumable, named after the demo models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "training"))
import tune_profiles as script

from pack.models.store import load_profile, save_profile


@pytest.fixture
def small(host, monkeypatch):
    """A preset of a few evaluations, two prompts."""
    kit = sys.modules[host.nodes.NODE_CLASS_MAPPINGS["AttuneFitSampler"].__module__]
    monkeypatch.setitem(kit.TUNER_PRESETS, "mini", type(kit.TUNER_PRESETS["mini"])(1, 1, 8, 2, 1))
    monkeypatch.setattr(script, "PROMPTS", script.PROMPTS[:2])


def run(monkeypatch, host, out, *words):
    monkeypatch.setattr(script, "Host", lambda folder: host)
    monkeypatch.setattr(sys, "argv", ["tune_profiles.py", "--out", str(out), *words])
    script.main()


def test_a_profile_is_tuned_saved_and_left_alone_the_second_time(host, small, monkeypatch, tmp_path, capsys):
    wanted = ("--models", "flow", "--solvers", "euler", "--steps", "3", "--preset", "mini")
    run(monkeypatch, host, tmp_path, *wanted)
    (path,) = tmp_path.glob("*")
    profile = load_profile(path)
    assert path.name == "demo_flow_euler_03.json" and profile.name == "Attune demo flow, euler, 3 steps"
    assert (profile.solver, profile.steps, profile.resolution, profile.cfg) == ("euler", 3, (128, 128), 3.0)
    assert profile.is_fitted and profile.config_hash and profile.weights_hash and "held_out" in profile.metrics
    assert "3 steps of euler" in capsys.readouterr().out
    before = path.read_bytes()
    run(monkeypatch, host, tmp_path, *wanted)
    assert path.read_bytes() == before and capsys.readouterr().out == ""

    monkeypatch.setattr(script, "PROMPTS", script.PROMPTS[::-1])  # another fit: the file is renewed, not numbered
    run(monkeypatch, host, tmp_path, *wanted)
    assert [one.name for one in tmp_path.glob("*")] == [path.name]
    assert load_profile(path).provenance["prompts"] != profile.provenance["prompts"]


def test_prompts_are_encoded_as_one_batch(host, demo, encode):
    ((tokens, extra),) = script.encode(host, demo[1], script.PROMPTS)
    assert tokens.shape[0] == extra["pooled_output"].shape[0] == len(script.PROMPTS)
    alone = encode(script.PROMPTS[2])[0]
    assert tokens[2].equal(alone[0][0]) and extra["pooled_output"][2].equal(alone[1]["pooled_output"][0])


@pytest.mark.parametrize("changed", [{}, {"preset": "standard"}, {"weights": "0" * 16}, {"prompts": ""}])
def test_a_file_is_done_when_it_was_tuned_with_the_same(changed, tmp_path):
    shipped = load_profile(script.SHIPPED / "demo_unet_euler_08.json")
    known = script.facts("unet", script.preset(8))
    path = save_profile(shipped, tmp_path)
    assert script.is_done(path, {**known, **changed}) == (not changed)
    assert not script.is_done(tmp_path / "missing.json", known)


def test_every_shipped_fit_is_of_these_weights_prompts_and_seed():
    for model in script.MODELS:
        for solver in script.SOLVERS:
            for steps in script.STEPS:
                path = script.SHIPPED / f"demo_{model}_{solver}_{steps:02}.json"
                profile = load_profile(path)
                known = script.facts(model, profile.provenance["preset"])
                assert script.is_done(path, known) and profile.name == f"Attune demo {model}, {solver}, {steps} steps"
