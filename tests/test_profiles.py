"""Profile files: the shipped ones against the published numbers, foreign ones as hostile input."""

from __future__ import annotations

import json

import pytest
import torch

from pack.kernels.schedules import check_sigmas, end_at_zero, resample_loglinear
from pack.models.profiles import LARGEST_FILE, Profile, load_profile, pick_profile, shipped_profiles

GOOD = {
    "format": 1, "kind": "schedule", "name": "mine", "method": "by hand", "space": "ve", "families": ["SD15"],
    "resolution": [512, 512], "sigmas": [14.0, 1.0, 0.1], "source": "a test",
}  # fmt: skip

# Table 3 of arXiv 2404.14507, as printed there (three decimals).
PUBLISHED = {
    "AYS SD 1.5": "14.615 6.475 3.861 2.697 1.886 1.396 .963 .652 .399 .152 .029",
    "AYS SDXL": "14.615 6.315 3.771 2.181 1.342 .862 .555 .380 .234 .113 .029",
    "AYS DeepFloyd-IF stage 1": "160.41 8.081 3.315 1.885 1.207 .785 .553 .293 .186 .030 .006",
    "AYS SVD": "700 54.5 15.886 7.977 4.248 1.789 .981 .403 .173 .034 .002",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_levels_are_the_published_ones(name):
    want = torch.tensor([float(s) for s in PUBLISHED[name].split()])
    # The paper rounds sigmas of whole timesteps: up to 1.4 % away from the levels themselves.
    torch.testing.assert_close(torch.tensor(shipped_profiles()[name].sigmas), want, rtol=0.015, atol=0)


@pytest.mark.parametrize("profile", shipped_profiles().values(), ids=lambda p: p.name)
@pytest.mark.parametrize("steps", [1, 2, 10, 33])
def test_every_shipped_profile_gives_a_runnable_schedule(profile, steps):
    sigmas = end_at_zero(resample_loglinear(torch.tensor(profile.sigmas), steps))
    assert len(check_sigmas(sigmas)) == steps + 1


def test_all_published_tables_are_shipped():
    assert set(PUBLISHED) == set(shipped_profiles())


def write(folder, **changes):
    path = folder / "p.json"
    path.write_text(json.dumps({**GOOD, **changes}))
    return path


def test_a_good_file_is_read_as_it_stands(tmp_path):
    want = Profile("mine", "by hand", "ve", ("SD15",), (512, 512), (14.0, 1.0, 0.1), "a test")
    assert load_profile(write(tmp_path)) == want


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "profile format 2, newer than this pack"),
        ({"format": "1"}, '"format" must be a whole number'),
        ({"format": True}, '"format" must be a whole number'),
        ({"format": 0}, '"format" must be 1'),
        ({"kind": "encoder"}, '"kind" must be "schedule"'),
        ({"name": ""}, '"name" must be a short text'),
        ({"source": "x" * 501}, '"source" must be a short text'),
        ({"space": "vp"}, '"space" must be'),
        ({"families": []}, "at least one model family"),
        ({"families": [3]}, "at least one model family"),
        ({"resolution": [512]}, r"\[width, height\] in pixels"),
        ({"resolution": [512, -1]}, r"\[width, height\] in pixels"),
        ({"sigmas": [1.0]}, "at least 2 positive, decreasing"),
        ({"sigmas": [1.0, 2.0]}, "at least 2 positive, decreasing"),
        ({"sigmas": [1.0, 0.0]}, "at least 2 positive, decreasing"),
        ({"sigmas": [1e999, 1.0]}, "Infinity is not a number"),
        ({"sigmas": [float("nan"), 1.0]}, "NaN is not a number"),
        ({"sigmas": "14 1 0"}, "at least 2 positive, decreasing"),
        ({"sigmas": list(range(20000, 1, -1))}, "at least 2 positive, decreasing"),
        ({"space": "flow"}, "at most 1"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_field(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as refusal:
        load_profile(write(tmp_path, **changes))
    assert "p.json" in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", '{"format": 1, "format": 1}', "[" * 100_000, '{"format": 1e400}', '"\\ud800"', "\x00"],
)
def test_broken_json_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"p\.json is not a"):
        load_profile(path)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "p.json"
    path.write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(ValueError, match="not a profile"):
        load_profile(path)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "p.json"
    with path.open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(ValueError, match=f"at most {LARGEST_FILE}"):
        load_profile(path)


def profile(name, families, resolution):
    return Profile(name, "m", "ve", families, resolution, (1.0, 0.5), "s")


def test_the_models_own_family_is_preferred_to_its_base_and_the_nearest_size_wins():
    some = [
        profile("base", ("SDXL",), (1024, 1024)),
        profile("small", ("SSD1B",), (512, 512)),
        profile("large", ("SSD1B",), (1024, 1024)),
    ]
    assert pick_profile(some, ("SSD1B", "SDXL", "BASE"), (640, 640)).name == "small"
    assert pick_profile(some, ("SSD1B", "SDXL", "BASE"), (800, 800)).name == "large"
    assert pick_profile(some, ("SSD1B", "SDXL", "BASE")).name == "small"
    assert pick_profile(some, ("SDXL", "BASE"), (64, 64)).name == "base"
    assert pick_profile(some, ("Flux", "BASE")) is None
