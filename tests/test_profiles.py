"""Profile files: the shipped ones against the published numbers, foreign ones as hostile input."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pack.kernels.schedules import check_sigmas
from pack.models.calibration import Calibration, CondLevels, conditioning_map, pick_profile
from pack.models.store import (
    LARGEST_PROFILE,
    ProfileReader,
    file_stem,
    load_profile,
    save_profile,
    shipped_profiles,
    update_profile,
)
from pack.nodes._plan.named_schedules import published_profiles, resample_profile

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


@pytest.mark.parametrize("profile", published_profiles().values(), ids=lambda p: p.name)
@pytest.mark.parametrize("steps", [1, 2, 10, 33])
def test_every_shipped_profile_gives_a_runnable_schedule(profile, steps):
    sigmas = resample_profile(profile, steps)
    assert len(check_sigmas(sigmas)) == steps + 1 and sigmas[-1] == 0


def test_all_published_tables_are_shipped():
    assert set(PUBLISHED) == set(published_profiles())


def write(folder, **changes):
    path = folder / "p.json"
    path.write_text(json.dumps({**GOOD, **changes}))
    return path


def test_a_good_file_is_read_as_it_stands(tmp_path):
    want = Calibration("mine", "by hand", "ve", ("SD15",), (512, 512), (14.0, 1.0, 0.1), "a test")
    assert load_profile(write(tmp_path)) == want


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "profile format 2, newer than this pack"),
        ({"format": "1"}, '"format" must be a whole number'),
        ({"format": True}, '"format" must be a whole number'),
        ({"format": 0}, '"format" must be 1'),
        ({"kind": "encoder"}, '"kind" must be one of schedule, noise_shift'),
        ({"kind": ["schedule"]}, '"kind" must be one of'),
        ({"name": ""}, '"name" must be a short text'),
        ({"source": "x" * 501}, '"source" must be a short text'),
        ({"space": "vp"}, '"space" must be'),
        ({"families": []}, "at least one model family"),
        ({"families": [3]}, "at least one model family"),
        ({"resolution": [512]}, r"\[width, height\] in pixels"),
        ({"resolution": [512, -1]}, r"\[width, height\] in pixels"),
        ({"sigmas": [1.0]}, "at least 2 decreasing"),
        ({"sigmas": [1.0, 2.0]}, "at least 2 decreasing"),
        ({"sigmas": [1.0, 0.0, 0.0]}, "at least 2 decreasing"),
        ({"sigmas": [1.0, -0.1]}, "at least 2 decreasing"),
        ({"sigmas": [10**400, 1.0]}, "at least 2 decreasing"),
        ({"sigmas": [True, 0.5]}, "at least 2 decreasing"),
        ({"cfg": -1}, '"cfg" must be a number'),
        ({"cfg": 10**400}, '"cfg" must be a number'),
        ({"solver": 3}, '"solver" must be a short text'),
        ({"name": "\ud800"}, '"name" must be a short text'),
        ({"resolution": [512, 10**400]}, r"\[width, height\] in pixels"),
        ({"metrics": [1]}, '"metrics" must be a small JSON object'),
        ({"provenance": {"n": list(range(5000))}}, '"provenance" must be a small JSON object'),
        ({"metrics": {"a": [[[[[[[1]]]]]]]}}, '"metrics" must be a small JSON object'),
        ({"metrics": {"a": 10**400}}, '"metrics" must be a small JSON object'),
        ({"alignments": {}}, '"alignments" must be a list'),
        ({"alignments": [3]}, r'"alignments"\[0\] must be a JSON object'),
        ({"alignments": [{"resolution": [8, 8], "sigma": [1.0]}]}, r'"alignments"\[0\] "sigma_cond" must list'),
        ({"alignments": [{"resolution": [8, 8], "sigma": [1.0], "sigma_cond": [9.0]}]}, "ratio beyond 8"),
        ({"alignments": [{"resolution": [8, 8], "sigma": [1.0, 0.5], "sigma_cond": [1, 1]}]}, "must ascend"),
        ({"alignments": [{"resolution": [8], "sigma": [1.0], "sigma_cond": [1.0]}]}, "in pixels"),
        ({"kind": "noise_shift"}, "no place in a noise shift"),
        ({"kind": "noise_shift", "sigmas": []}, "at least one resolution"),
        ({"id": "attune-0123456789abcdef"}, "changed after it was saved"),
        ({"sigmas": [1e999, 1.0]}, "Infinity is not a number"),
        ({"sigmas": [float("nan"), 1.0]}, "NaN is not a number"),
        ({"sigmas": "14 1 0"}, "at least 2 decreasing"),
        ({"sigmas": list(range(20000, 1, -1))}, "at least 2 decreasing"),
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
        file.truncate(LARGEST_PROFILE + 1)
    with pytest.raises(ValueError, match=f"the {LARGEST_PROFILE:,} bytes"):
        load_profile(path)


def profile(name, families, resolution):
    return Calibration(name, "m", "ve", families, resolution, (1.0, 0.5), "s")


def test_the_models_own_family_is_preferred_to_its_base_and_the_nearest_size_wins():
    some = [
        profile("base", ("SDXL",), (1024, 1024)),
        profile("small", ("SSD1B",), (512, 512)),
        profile("large", ("SSD1B",), (1024, 1024)),
    ]
    assert pick_profile(some, ("SSD1B", "SDXL"), (640, 640)).name == "small"
    assert pick_profile(some, ("SSD1B", "SDXL"), (800, 800)).name == "large"
    assert pick_profile(some, ("SSD1B", "SDXL")).name == "small"
    assert pick_profile(some, ("SDXL",), (64, 64)).name == "base"
    assert pick_profile(some, ("Flux",)) is None


FITTED = Calibration(
    "mine", "tuner", "ve", ("SD15",), (512, 512), (14.6, 3.0, 0.7, 0.0), "tuned here", solver="euler", prediction="eps",
    cfg=6.5, config_hash="0123456789abcdef",
    alignments=(CondLevels("euler", (512, 512), (0.7, 3.0, 14.6), (0.6, 2.5, 13.9)),),
    metrics={"holdout": {"before": ["karras", 0.12], "after": 0.1}},
    provenance={"host": "0.3.75", "seeds": [1, 2], "prompts": ["51e4674156077982"]},
)  # fmt: skip
SHIFT = Calibration(
    "shift", "noise_shift", "flow", ("SD3",), (1024, 1024), (), "fitted here", kind="noise_shift", prediction="flow",
    alignments=tuple(CondLevels("", (n, n), (0.2, 0.8), (0.21, 0.82)) for n in (512, 768)),
)  # fmt: skip


@pytest.mark.parametrize("profile", [FITTED, SHIFT, *shipped_profiles().values()], ids=lambda p: p.name)
def test_what_is_saved_is_loaded(tmp_path, profile):
    path = save_profile(profile, tmp_path / "new" / "folder")
    assert load_profile(path) == profile
    assert json.loads(path.read_text())["id"] == profile.id
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_the_id_is_the_calibration_and_nothing_else(tmp_path):
    for same in (
        replace(FITTED, name="other"), replace(FITTED, source="elsewhere"), FITTED.with_facts({"after": 0.2}),
        FITTED.with_facts(date="today"),
    ):  # fmt: skip
        assert same.id == FITTED.id
    path = save_profile(FITTED, tmp_path)
    shuffled = dict(reversed(json.loads(path.read_text()).items()))
    path.write_text(json.dumps(shuffled))
    assert load_profile(path).id == FITTED.id
    different = [
        replace(FITTED, sigmas=(14.6, 3.0, 0.7000000000000001, 0.0)), replace(FITTED, solver="heun"),
        replace(FITTED, cfg=6.6), replace(FITTED, alignments=()), replace(FITTED, resolution=(512, 520)),
        replace(FITTED, prediction="v"), replace(FITTED, families=("SDXL",)), replace(FITTED, space="flow"),
        replace(FITTED, weights_hash="w"), replace(FITTED, patches="p"),
    ]  # fmt: skip
    assert len({one.id for one in different} | {FITTED.id}) == len(different) + 1


def test_with_facts_adds_and_keeps():
    more = FITTED.with_facts({"frechet": 1.0}, pack="0.1.0")
    assert more.metrics == {**FITTED.metrics, "frechet": 1.0}
    assert more.provenance == {**FITTED.provenance, "pack": "0.1.0"}


def test_the_same_calibration_has_one_file_which_stays_as_it_is(tmp_path):
    first = save_profile(FITTED, tmp_path)
    before = first.stat().st_mtime_ns, first.read_bytes()
    assert save_profile(FITTED.with_facts({"after": 0.05}), tmp_path) == first
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before and list(tmp_path.iterdir()) == [first]


def test_an_update_takes_the_place_of_what_it_continues_and_of_nothing_else(tmp_path):
    one, two, three = (replace(FITTED, cfg=cfg) for cfg in (1.0, 2.0, 3.0))
    path = save_profile(one, tmp_path, "mine")
    assert update_profile(path, one, two) == path and load_profile(path) == two
    beside = update_profile(path, one, three)  # someone else was here in between
    assert beside.name == "mine (2).json" and load_profile(beside) == three and load_profile(path) == two
    path.write_text("my shopping list")
    assert update_profile(path, two, one).name == "mine (3).json" and path.read_text() == "my shopping list"


def test_another_calibration_of_the_same_name_gets_a_number(tmp_path):
    paths = [save_profile(replace(FITTED, cfg=cfg), tmp_path) for cfg in (1.0, 2.0, 3.0)]
    assert [p.name for p in paths] == ["mine.json", "mine (2).json", "mine (3).json"]
    assert [load_profile(p).cfg for p in paths] == [1, 2, 3]


def test_a_file_that_is_no_profile_stays_as_it_is(tmp_path):
    (tmp_path / "mine.json").write_text("my shopping list")
    assert save_profile(FITTED, tmp_path).name == "mine (2).json"
    assert (tmp_path / "mine.json").read_text() == "my shopping list"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = save_profile(FITTED, tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        update_profile(path, FITTED, replace(FITTED, cfg=1.0))
    monkeypatch.setattr("os.link", full)  # without hard links the name is taken first, and given back
    with pytest.raises(OSError, match="No space left"):
        save_profile(replace(FITTED, cfg=1.0), tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "facts", [{"a": float("nan")}, {"a": object()}, {"a": torch.ones(1)}, {"a": "x" * 501}, {"a": {"b": 10**400}}]
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, facts):
    with pytest.raises(ValueError, match="'mine' cannot be saved"):
        save_profile(FITTED.with_facts(facts), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("SDXL 8 steps, 2M", "SDXL 8 steps, 2M"), ("mine.json", "mine"), ("../../etc/passwd", "_.._etc_passwd"),
        ("C:\\temp\\x", "C_temp_x"), ("...hidden", "hidden"), ("nul", "_nul"), ("COM1.txt", "_COM1.txt"),
        ("a\x00b\nc", "a_b_c"), ("猫 v2", "猫 v2"), ("x" * 500, "x" * 100), ("trailing. ", "trailing"),
    ],
)  # fmt: skip
def test_file_names_are_safe_on_every_system(tmp_path, name, stem):
    assert file_stem(name) == stem
    path = save_profile(FITTED, tmp_path, name)
    assert path.parent == tmp_path and path.name == f"{stem}.json"


@pytest.mark.parametrize("name", ["...", "/", "___", ".json", " "])
def test_a_name_without_letters_is_refused(name):
    with pytest.raises(ValueError, match="no file name"):
        file_stem(name)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_what_has_the_name_is_neither_written_over_nor_written_through(tmp_path, monkeypatch, links):
    folder, outside = tmp_path / "profiles", tmp_path / "precious.json"
    (folder / "mine.json").mkdir(parents=True)
    outside.write_text("keep me")
    (folder / "mine (2).json").symlink_to(outside)
    (folder / "mine (3).json").symlink_to(tmp_path / "nowhere.json")
    if not links:
        monkeypatch.setattr("os.link", no_links)
    assert save_profile(FITTED, folder).name == "mine (4).json"
    assert outside.read_text() == "keep me" and not (tmp_path / "nowhere.json").exists()
    assert sorted(file.name for file in folder.iterdir()) == [f"mine{n}.json" for n in (" (2)", " (3)", " (4)", "")]


def no_links(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


def _save_at(job: tuple) -> str:
    """In a process of its own: wait for the others, then save under the name that all of them want."""
    folder, cfg, links, barrier = job
    if not links:
        os.link = no_links
    barrier.wait(30)
    return str(save_profile(replace(FITTED, cfg=cfg), folder, "same name"))


def _worker(job: tuple, told) -> None:
    told.put(_save_at(job))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be copied")
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_of_several_processes_that_save_one_name_at_once_none_loses_its_profile(tmp_path, links):
    fork = multiprocessing.get_context("fork")
    for turn in range(4):
        folder, barrier, told = tmp_path / str(turn), fork.Barrier(6), fork.Queue()
        jobs = [(folder, 1.0 + i, links, barrier) for i in range(6)]
        workers = [fork.Process(target=_worker, args=(job, told)) for job in jobs]
        for worker in workers:
            worker.start()
        paths = {told.get(timeout=60) for _ in workers}
        for worker in workers:
            worker.join()
        assert len(paths) == 6 and {load_profile(path).cfg for path in folder.iterdir()} == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["p.json", "P.JSON"])
def test_a_profile_of_a_windows_editor_is_read(tmp_path, coding, name):
    (tmp_path / name).write_bytes(json.dumps(GOOD, indent=1).replace("\n", "\r\n").encode(coding))
    assert load_profile(tmp_path / name).name == "mine" and file_stem(name) == name[:-5]


def test_what_is_no_readable_file_is_refused_by_name(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    read = ProfileReader()
    for name, why in (("folder.json", "directory"), ("link.json", "No such file"), ("gone.json", "No such file")):
        for load in (load_profile, read):
            with pytest.raises(ValueError, match=rf"^{name} cannot be read: .*{why}.*\. Allow reading it"):
                load(tmp_path / name)


def test_a_file_that_could_not_be_opened_is_read_once_it_can(tmp_path, monkeypatch):
    path, read = save_profile(FITTED, tmp_path), ProfileReader()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", no_links)
        with pytest.raises(ValueError, match="cannot be read: Operation not permitted"):
            read(path)
    assert read(path) == FITTED


def test_a_reader_reads_a_file_once_until_it_changes(tmp_path, monkeypatch):
    read, calls = ProfileReader(), []
    monkeypatch.setattr("pack.models.store.load_profile", lambda path: calls.append(path) or load_profile(path))
    path = save_profile(FITTED, tmp_path)
    assert read(path) == read(path) == FITTED and len(calls) == 1
    path.write_text("{}")
    for _ in range(2):
        with pytest.raises(ValueError, match='"format" must be'):
            read(path)
    assert len(calls) == 2


def test_an_alignment_becomes_a_map_through_its_knots():
    one = FITTED.alignments[0]
    out = conditioning_map(FITTED, one)(torch.tensor(one.sigma, dtype=torch.float64))
    torch.testing.assert_close(out, torch.tensor(one.sigma_cond, dtype=torch.float64), rtol=1e-12, atol=0)
    assert conditioning_map(FITTED, one, strength=0.0).is_identity
