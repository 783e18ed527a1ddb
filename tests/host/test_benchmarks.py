"""A minute of each benchmark: it runs through the host from the command line and writes what the docs quote.

Each day one of a kind is asked: real_size (networks of real size, from the command line), golden_noise (pictures of the
demo model and the judge), thumbnails (pictures of the workflows), a page of the docs, and a day's prompts on the server
(long_run, in test_server.py). The others of the day run in the host of the tests, which saves the start of another one.
The night asks all of them.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
REUSES = ["plain, 8", "DeepCache 3", "top level fresh, every 3", "first block fresh, every 3", "calibrated"]
SMOKE = {
    "aligned": [
        *("--models", "flow", "--samplers", "euler", "--steps", "5", "--rows", "free", "tuned", "aligned", "limit"),
        *("--tasks", "12", "--converged", "20", "--trials", "3"),
    ],
    "demo_model": ["--flow", "--pictures", "6", "--per-word", "2", "--objects", "32"],
    "exact": ["--solvers", "euler", "euler_ancestral", "--steps", "5", "--samples", "256"],
    "exact_fitted": ["--spaces", "ve", "--solvers", "euler", "--steps", "5", "--samples", "256"],
    "fitted_sampler": ["--quick"],
    "fitted_limits": ["--runs", "flow:euler:3", "--pictures", "4"],
    "gate": ["--quick"],
    "real_size": ["--models", "SD1.5", "--pixels", "SD1.5=64", "--steps", "1"],
    "schedules": [
        "--models",
        "flow",
        "--tasks",
        "12",
        "--samplers",
        "dpmpp_2m",
        "euler_ancestral",
        "--steps",
        "5",
        "--converged",
        "20",
    ],
    "propagation": ["--runs", "unet:euler:10:6", "flow:euler:10:6", "--only", *REUSES],
    "step_cost": ["--runs", "flow:euler:10:3", "--tasks", "6", "--only", "fewer steps, 8", "TaylorSeer N2", "ours"],
    "draft_seeds": ["--runs", "unet:euler:10:3", "--prompts", "2", "--seeds", "4", "--speed", "2"],
    "step_kinds": ["--models", "SD1.5", "--pixels", "64"],
    "whole_runs": ["--models", "SD1.5", "--pixels", "64", "--steps", "8", "--only", "DeepCache 2"],
    "one_more_step": ["--settings", "SD's:1:4", "--seeds", "2", "--steps", "4"],
    "golden_noise": ["--prompts", "3", "--seeds", "2", "--models", "unet", "--steps", "4", "--cfg", "1"],
    "noise_space": ["--models", "flow", "--pictures", "4", "--pairs", "1", "--steps", "3"],
    "timestep_fields": ["--parts", "films", "regions", "starts", "--films", "4", "--pictures", "4", "--steps", "2"],
    "samples": ["--tasks", "12", "--models", "flow", "--steps", "2"],
    "noise_shift": ["--tasks", "12", "--sweep", "8", "--sides", "64", "--models", "flow", "--steps", "5"],
    "long_run": ["--prompts", "12", "--caches", "none", "--control", "0"],
    "peers": ["--models", "unet", "--tasks", "6", "--steps", "10"],
    "thumbnails": ["aligned_schedule", "golden_noise"],
    "training_noise": [
        "--models",
        "flow",
        "--batches",
        "1",
        "2",
        "--seeds",
        "1",
        "--steps",
        "8",
        "--drawn",
        "2",
        "--only",
        "flat prediction",
        "immiscible batch",
    ],
    "precision": ["--models", "unet", "--tasks", "2", "--steps", "3"],
    "attention": ["--models", "unet", "--tasks", "2", "--steps", "8"],
    "protect": ["--pictures", "2", "--steps", "3", "--seeds", "1"],
    "protect_bound": ["--pictures", "1", "--steps", "2", "--long", "3", "--seeds", "1"],
}


def run(name: str, out: Path, *words: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--out", str(out), "--cache", str(out), *words]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def run_here(host, monkeypatch, capsys):
    """As `run`, in this process and its host."""

    def run_here(name: str, out: Path, *words: str) -> str:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "Host", lambda _: host)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", str(out), "--cache", str(out), *words])
        module.main()
        return capsys.readouterr().out

    return run_here


def test_every_benchmark_is_in_the_list_above():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text("utf-8")}
    assert scripts == set(SMOKE)


@pytest.mark.parametrize("name", SMOKE)
def test_it_finds_what_it_imports(name):
    """All of them, each time: some run in the night alone, where others have what they do."""
    assert callable(importlib.import_module(name).main)


@pytest.mark.nightly
@pytest.mark.host
def test_the_demo_models_numbers_and_pictures(tmp_path):
    (tmp_path / "demo_model.md").write_text(
        "before <!-- measured: python dev.py bench demo_model --> old <!-- end --> after"
    )
    run("demo_model", tmp_path, *SMOKE["demo_model"])
    result = json.loads((tmp_path / "demo_model_flow.json").read_text())
    assert result["prompt_following"]["pictures"] == 6 and len(result["prompt_following"]["groups"]) == 3
    assert {"black", "white"} < set(result["brightness"])
    card = (tmp_path / "demo_model.md").read_text()
    assert card.startswith("before ") and card.endswith(" after") and " old " not in card and "M parameters" in card
    for picture in ("demo_model_flow_samples.jpg", "demo_model_flow_vocabulary.jpg", "demo_model_loss.png"):
        assert min(Image.open(tmp_path / picture).size) > 100


def test_tables_take_their_place_in_the_docs(tmp_path):
    from results import Table, fill

    page = tmp_path / "page.md"
    table = Table("Speed", ["steps", "time"], [[5, 0.5]])
    fill(page, "two", [table])
    assert not page.exists()
    one, two = (f"<!-- measured: python dev.py bench {name} --> old <!-- end -->" for name in ("one", "two"))
    page.write_text(f"{one} {two} after")
    fill(page, "two", [table])
    text = page.read_text()
    assert text.startswith(f"{one} ") and text.endswith("<!-- end --> after")
    assert text.count(" old ") == 1 and "| 5 | 0.5 |" in text


@pytest.mark.host
def test_a_strip_shows_the_same_noise_without_our_node_above():
    from thumbnails import rows_of

    prompt = json.loads((ROOT / "tests/prompts/one_more_step.json").read_text("utf-8"))
    (above, plain), (below, ours) = rows_of(prompt)
    assert (above, below) == ("without", "with") and plain != ours
    prompt["10"]["inputs"]["seed"] += 1  # another noise is no comparison
    assert [label for label, _ in rows_of(prompt)] == [""]


@pytest.mark.nightly
@pytest.mark.host
def test_strips_have_a_row_for_each_batch_that_is_compared_and_squares_the_stock_run_above(tmp_path, run_here):
    run_here("thumbnails", tmp_path, *SMOKE["thumbnails"])
    compared, plain = (Image.open(tmp_path / f"{name}.jpg") for name in SMOKE["thumbnails"])
    assert compared.size == (150 + 4 * 192, 2 * 192) and plain.size == (4 * 192, 192)
    shipped = Image.open(ROOT / "web/docs/aligned_schedule.jpg")
    difference = np.abs(np.asarray(compared, np.float32) - np.asarray(shipped, np.float32))
    assert difference.mean() < 4  # JPEG, and another machine's arithmetic


@pytest.mark.nightly
@pytest.mark.host
def test_the_schedules_are_ranked_and_noise_that_is_left_is_seen(tmp_path):
    (tmp_path / "schedules.md").write_text(
        "before <!-- measured: python dev.py bench schedules --> old <!-- end --> after"
    )
    printed = run("schedules", tmp_path, *SMOKE["schedules"])
    result = json.loads((tmp_path / "results" / "schedules.json").read_text())
    rows = {(row["model"], row["sampler"], row["schedule"]): row for row in result["data"]}
    assert len(rows) == 11 + 9
    assert all(row["calls"] == 5 and row["frechet"][0] > 0 for row in rows.values())
    # Five such steps leave noise, and the table must say so.
    assert (
        rows["flow", "dpmpp_2m", "normal"]["object"][0] < 20 < 50 < rows["flow", "dpmpp_2m", "KL-optimal"]["object"][0]
    )
    page = (tmp_path / "schedules.md").read_text()
    assert page.startswith("before ") and page.endswith(" after") and " old " not in page and "| normal |" in page
    assert "converged picture" in page and "euler_ancestral" not in page
    results = (tmp_path / "results.md").read_text()
    assert "flow, euler_ancestral: Fréchet" in results and "flow, euler_ancestral: PSNR" not in results
    assert "| normal |" in printed and Image.open(tmp_path / "aligned_schedule.jpg").size == (1024, 256)
    for picture in result["pictures"]:
        assert min(Image.open(tmp_path / picture).size) > 100


@pytest.mark.nightly
@pytest.mark.host
def test_fitted_schedules_are_weighed_against_the_free_ones(tmp_path):
    (tmp_path / "schedules.md").write_text("<!-- measured: python dev.py bench aligned --> old <!-- end --> after")
    run("aligned", tmp_path, *SMOKE["aligned"])
    result = json.loads((tmp_path / "results" / "aligned.json").read_text())
    rows = {row["schedule"]: row for row in result["data"]}
    aligners = {f"beta, {how}" for how in ("published aligner, sequential", "published aligner, parallel", "aligned")}
    assert aligners | {"normal", "core OptimalSteps", "tuned"} < set(rows)
    assert all(row["deviation"][0] > 0 and row["frechet"][0] > 0 for row in rows.values())
    assert rows["tuned"]["objects"] > 50
    assert rows["tuned"]["deviation"][0] < rows["normal"]["deviation"][0]
    assert len({rows[name]["deviation"][0] for name in ("beta", *aligners)}) == 4
    tables = {table["title"]: table["rows"] for table in result["tables"]}
    (searched,) = tables["How near a schedule can come"]
    assert (
        0 < searched[3] <= searched[2] and searched[-1] >= 3
    )  # on its own pictures never worse than from where it began
    assert len(tables["Fréchet distance without any error of the schedule"]) == 3
    page = (tmp_path / "schedules.md").read_text()
    assert page.endswith(" after") and " old " not in page and "flow: what tuning gains" in page
    for picture in ("tuned_deviation.png", "tuned_pictures.jpg"):
        assert min(Image.open(tmp_path / picture).size) > 100


@pytest.mark.nightly
@pytest.mark.host
def test_asking_less_is_counted_in_answers(tmp_path):
    run("step_cost", tmp_path, *SMOKE["step_cost"])
    rows = {r["label"]: r for r in json.loads((tmp_path / "results" / "step_cost.json").read_text())["data"]}
    assert rows["plain"]["speed"] == 1 and rows["fewer steps, 8"]["speed"] == 1.25
    saved = (
        10 - 10 / rows["ours, one-sided steps alone"]["speed"]
    )  # steps 3 and 5, unless one picture is foretold badly
    assert any(saved == pytest.approx(answers / 2) for answers in (0, 1, 2))
    forecasts = [row for label, row in rows.items() if label.startswith("ours, forecasts")]
    assert forecasts and all(row["speed"] > 1 and 10 < row["summary"]["psnr"][0] <= 100 for row in forecasts)
    assert min(Image.open(tmp_path / "step_cost.png").size) > 100
    run("step_cost", tmp_path, "--add", "--runs", "flow:euler:12:3", "--tasks", "6", "--only", "fewer steps")
    more = json.loads((tmp_path / "results" / "step_cost.json").read_text())["data"]
    assert {r["label"]: r for r in more if r["run"] == rows["plain"]["run"]} == rows
    assert {r["run"] for r in more} == {rows["plain"]["run"], "flow, euler, 12 steps, cfg 3"}


@pytest.mark.nightly
@pytest.mark.host
def test_drafts_are_ranked_beside_whole_pictures(tmp_path):
    run("draft_seeds", tmp_path, *SMOKE["draft_seeds"])
    (table,) = json.loads((tmp_path / "results" / "draft_seeds.json").read_text())["tables"]
    ways = {row[0]: row for row in table["rows"]}
    assert float(ways["ours, by a profile"][1]) <= 50 == float(ways["fewer steps"][1])
    assert all(-1 <= float(row[2].split()[0]) <= 1 for row in ways.values())
    assert min(Image.open(tmp_path / "draft_seeds.jpg").size) > 100


@pytest.mark.nightly
@pytest.mark.host
def test_the_caches_save_evaluations_and_the_mends_do_not(tmp_path):
    run("peers", tmp_path, *SMOKE["peers"])
    rows = {(r["model"], r["label"]): r for r in json.loads((tmp_path / "results" / "peers.json").read_text())["data"]}
    assert rows["unet", "plain"]["calls"] == rows["unet", "RescaleCFG 0.7"]["calls"] == 10
    assert rows["unet", "plain, 5 steps"]["calls"] == 5
    for model, label in (("unet", "EasyCache 0.2"), ("unet", "LazyCache 0.2")):
        assert rows[model, label]["calls"] < 10 and rows[model, label]["summary"]["psnr"][0] < 100
    assert min(Image.open(tmp_path / "peers.png").size) > 100


@pytest.mark.nightly
@pytest.mark.host
def test_noise_space_gives_drawn_pictures_back(tmp_path, run_here, monkeypatch):
    """With the pack's own pictures in the place of the training pictures, which only a training fetches."""
    import noise_space

    def drawn(self, objects, backgrounds, seed):
        images = [
            self.call("AttuneDemoPicture", picture=("apple", "cat", "heart")[i % 3])[0] for i in range(len(objects))
        ]
        latents = [self.call("VAEEncode", pixels=one, vae=self.lab.vaes[self.name])[0]["samples"] for one in images]
        return noise_space.Real(torch.cat(images).permute(0, 3, 1, 2), torch.cat(latents), objects, backgrounds)

    monkeypatch.setattr(noise_space.Bench, "composed", drawn)
    monkeypatch.setattr(noise_space, "alphas", lambda b: torch.ones(len(b.real.objects), 1, 128, 128))
    run_here("noise_space", tmp_path, *SMOKE["noise_space"])
    kept, edited, varied, between = json.loads((tmp_path / "results" / "noise_space.json").read_text())["tables"]
    errors = {(row[0], row[1]): row[3] for row in kept["rows"]}
    assert all(
        errors[cfg, f"noise maps, {kind}"] <= 1e-5 for cfg in (1, 3, 7.5) for kind in ("half precision", "float32")
    )
    assert all(errors[cfg, "euler over flipped sigmas, and back"] > 1e-2 for cfg in (1, 3, 7.5))
    assert {"RF inversion, gamma 0.5, eta 0.9"} < {row[0] for row in edited["rows"]} and varied["rows"]
    ends = {row[0]: float(row[-1].split()[0]) for row in between["rows"]}
    assert ends["Attune Morph, eta 0"] < 0.01 < ends["slerp of inverted noise"]
    assert min(Image.open(tmp_path / "noise_space_flow.jpg").size) > 100


@pytest.mark.nightly
@pytest.mark.host
def test_given_frames_and_what_is_far_from_a_hole_stay(tmp_path, run_here, monkeypatch):
    """With plain films and pictures in the place of the training pictures, which only a training fetches."""
    import timestep_fields

    def plain(self, count, frames, seed, encoded=True):
        colours = torch.rand(count, 1, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
        films = colours.expand(-1, frames, -1, 64, 64).clone()
        films[:, :, :, 20:40, 20:40] = torch.linspace(0, 1, frames)[None, :, None, None, None]
        return timestep_fields.Films(films, self.encode(films), ["a cat"] * count)

    def picture(self, lab, name, count, steps):
        self.lab, self.name, self.model, self.steps, self.call = lab, name, lab.models[name], steps, lab.host.call
        self.judge, self.texts = timestep_fields.load_judge(), ["a cat"] * count
        self.clean = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 128, 128)

    monkeypatch.setattr(timestep_fields.FilmBench, "composed", plain)
    monkeypatch.setattr(timestep_fields.PictureBench, "__init__", picture)
    monkeypatch.setattr(timestep_fields, "SEARCH", (0.3, 0.6))
    monkeypatch.setattr(timestep_fields, "DAMAGES", dict([*timestep_fields.DAMAGES.items()][:1]))
    run_here("timestep_fields", tmp_path, *SMOKE["timestep_fields"])
    films, regions, *starts = json.loads((tmp_path / "results" / "timestep_fields.json").read_text())["tables"]
    rows = {row[0].replace("*", ""): row[1:] for row in films["rows"]}
    given = ("first frame given", "first and last given", "extend, four frames given", "staircase from four frames")
    assert all(float(rows[way][0]) <= 1e-6 for way in given)
    assert rows["first frame given"][-1] == 2 and rows["staircase from four frames"][-1] == 2 + 3
    far = {row[0]: row[3] for row in regions["rows"]}
    assert float(far["Attune Noise Mask, floor 0, feather 0"].split()[0]) < 1
    assert far["Attune Noise Mask, floor 0, feather 0"] == far["plain noise mask on the hole"]
    assert min(Image.open(tmp_path / "timestep_fields.jpg").size) > 100
    assert [table["title"].split(":")[0] for table in starts] == ["flow", "unet"]
    for rows in (
        table["rows"] for table in starts
    ):  # of plain pictures nothing is lost, and the nearest keeps the most
        found = {row[1].strip("*"): float(row[-1]) for row in rows}
        assert found["as it is"] < 1 and found["refine: by detail**, 16"] < found["refine: HIR-Diff"]


@pytest.mark.nightly
@pytest.mark.host
def test_a_lora_is_trained_with_the_stock_noise_and_with_another(tmp_path, run_here):
    run_here("training_noise", tmp_path, *SMOKE["training_noise"])
    result = json.loads((tmp_path / "results" / "training_noise.json").read_text())
    single, batched = result["data"].values()
    assert list(single) == ["stock", "flat prediction"] and list(batched) == [*single, "immiscible batch"]
    curves = [curve for (curve,) in [*single.values(), *batched.values()]]
    assert all(one["clean"].keys() == one["prediction"].keys() == {"8"} for one in curves)
    assert len({one["clean"]["8"] for one in curves}) == len(curves)
    loss, halves, drawn, pairing, *_ = result["tables"]
    assert [len(table["rows"]) for table in result["tables"]] == [2, 2, 2, 4, 3, 3, 3]
    noisy, clean = (statistics.fmean(float(row[at].split()[0]) for row in halves["rows"]) for at in (1, 3))
    assert (noisy + clean) / 2 == pytest.approx(
        statistics.fmean(float(row[4].split()[0]) for row in loss["rows"]), 0.01
    )
    assert all(0 <= float(row[1].split()[0]) <= 100 for row in drawn["rows"])
    batch, more, four, sixteen = (float(row[2].split()[0]) for row in pairing["rows"])
    assert batch < more and four == pytest.approx(0.8, abs=0.25) and sixteen == pytest.approx(1.4, abs=0.25)
    assert min(Image.open(tmp_path / "training_noise.png").size) > 100


def test_rows_of_an_earlier_training_stay_beside_the_same_stock_alone(tmp_path, monkeypatch):
    module = importlib.import_module("training_noise")
    monkeypatch.setattr(sys, "argv", ["training_noise.py", "--only", "mode"])
    (tmp_path / "results").mkdir()

    def curves(end: float) -> list[dict]:
        return [{"clean": {"8": end}, "prediction": {"8": end}}]

    def joined(end: float) -> tuple[list, dict]:
        table = module.Table("flow, batch 1: losses", ["", ""], [["stock", "1"], ["mode", "2"]])
        return module.with_last([table], {"flow, batch 1": {"stock": curves(end), "mode": curves(2.0)}}, tmp_path)

    assert len(joined(1.0)[0][0].rows) == 2
    old = {"title": "flow, batch 1: losses", "columns": ["", ""], "rows": [["stock", "1"], ["clusters", "3"]]}
    other = {"title": "flow, batch 4: losses", "columns": [""], "rows": [["stock"]]}
    data = {"flow, batch 1": {"stock": curves(1.0), "clusters": curves(3.0)}}
    last = {"command": "an earlier one", "tables": [old, other], "data": data}
    (tmp_path / "results" / "training_noise.json").write_text(json.dumps(last))
    (table, kept), found = joined(1.001)
    assert [row[0] for row in table.rows] == ["stock", "mode", "clusters"] and kept.title == other["title"]
    assert table.command.startswith("an earlier one`, `") and list(found["flow, batch 1"]) == [
        "stock",
        "clusters",
        "mode",
    ]
    (table, _), found = joined(1.1)
    assert [row[0] for row in table.rows] == ["stock", "mode"] and list(found["flow, batch 1"]) == ["stock", "mode"]


@pytest.mark.nightly
@pytest.mark.host
def test_an_fp8_model_comes_nearer_by_its_sensitive_weights(tmp_path, run_here):
    run_here("precision", tmp_path, *SMOKE["precision"])
    table, where, without = json.loads((tmp_path / "results" / "precision.json").read_text())["tables"]
    gains = {(row[0], row[1], row[2]): float(row[4]) for row in table["rows"]}
    for dtype in ("fp8_e4m3fn", "fp8_e5m2"):
        few, finer = (gains[dtype, "sensitive", bits] for bits in (0, 2))
        assert gains[dtype, "none", 0] == 0 < few and finer > few + 6
    *parts, none = where["rows"]
    assert sum(row[3] for row in parts) == pytest.approx(100) and len(parts) >= 5
    assert none[2] == "the full model's, bit for bit"
    wider, in_8_bits = without["rows"]
    assert len(set(wider[1:])) == 1 and float(in_8_bits[1]) < float(wider[1])


@pytest.mark.nightly
@pytest.mark.host
def test_a_protected_picture_is_edited_beside_a_plain_one(tmp_path, run_here, monkeypatch):
    """With plain squares in the place of the training pictures, which only a training fetches."""
    import protect

    def plain(count):
        pictures, boxes = torch.full((count, 3, 128, 128), 0.4), [(30, 30, 64)] * count
        pictures[:, 0, 30:94, 30:94] = 0.8
        masks = protect.drawn(boxes, 0.5), protect.drawn(boxes, 0.4)
        half, another = (
            protect.Edit(*masks, [""] * count, [0] * count),
            protect.Edit(*masks, ["a cat"] * count, [5] * count),
        )
        return protect.Scenes((pictures * 255).round() / 255, boxes, half, another)

    monkeypatch.setattr(protect, "scenes", plain)
    monkeypatch.setattr(protect, "EDIT_STEPS", 3)
    run_here("protect", tmp_path, *SMOKE["protect"])
    right, apart, another = json.loads((tmp_path / "results" / "protect.json").read_text())["tables"]
    assert [row[0] for row in right["rows"]] == [row[0] for row in apart["rows"]] and len(another["rows"]) == 3
    moved = {row[0]: float(row[2].split()[0]) for row in right["rows"][1:]}
    assert moved["kept part replaced by noise"] > 10 * moved["Attune Protect Image"] > 0
    assert min(Image.open(tmp_path / "protect.jpg").size) > 100
    run_here("protect_bound", tmp_path, *SMOKE["protect_bound"])
    told, another, half = json.loads((tmp_path / "results" / "protect_bound.json").read_text())["tables"]
    *_, thin, boxed = told["rows"]
    assert (
        all(0 <= float(cell.split()[0]) <= 100 for cell in thin[1:]) and boxed[1] == "0 ± 0"
    )  # squares are no objects
    for table, attacks in ((another, 5), (half, 7)):
        plain, *rows = table["rows"]
        assert plain[0] == "as it is" and len({row[3] for row in rows}) == len(rows) == attacks
        assert all(20 < float(row[1]) < 60 for row in rows)
    assert min(Image.open(tmp_path / "protect_bound.jpg").size) > 100


@pytest.mark.nightly
@pytest.mark.host
def test_fewer_steps_of_a_coarse_attention_err_less(tmp_path, run_here):
    run_here("attention", tmp_path, *SMOKE["attention"])
    shares, fits, better, errors = json.loads((tmp_path / "results" / "attention.json").read_text())["tables"]
    assert [row[0] for row in shares["rows"]] == ["2 of 8", "4 of 8", "6 of 8", "8 of 8"]
    assert shares["rows"][0][4] > shares["rows"][3][4] and [row[1] for row in fits["rows"]] == [1, 4, 1, 4]
    *_, four_bits, eight_bits = better["rows"]
    assert eight_bits[4] > four_bits[4] + 12 > better["rows"][0][4] + 12  # 4 bits more are 24 dB
    assert all(eight < four for four, eight in zip(*(row[1:] for row in errors["rows"][2:]), strict=True))
    assert min(Image.open(tmp_path / "attention_kernels.png").size) > 100


@pytest.mark.host
@pytest.mark.nightly
def test_golden_noise_stands_beside_plain_runs_of_equal_cost(tmp_path, run_here):
    run_here("golden_noise", tmp_path, *SMOKE["golden_noise"])
    rows = {r["label"]: r for r in json.loads((tmp_path / "results" / "golden_noise.json").read_text())["data"]}
    assert rows["plain"]["calls"] == rows["NPNet"]["calls"] == 4
    assert rows["re-denoise"]["calls"] == rows["zigzag, 1 steps"]["calls"] == rows["plain, 6 steps"]["calls"] == 6
    assert all(0 <= row["summary"]["preferred"][0] <= 100 for row in rows.values())
    assert rows["plain"]["summary"]["variety"][0] == 100 and rows["plain"]["summary"]["psnr"][0] == 100


@pytest.mark.nightly
@pytest.mark.host
def test_the_distances_are_ranked_by_all_and_by_fewer_pictures(tmp_path):
    printed = run("samples", tmp_path, *SMOKE["samples"])
    ranking, stability = json.loads((tmp_path / "results" / "samples.json").read_text())["tables"]
    assert len(ranking["rows"]) == 11 and [row[0] for row in stability["rows"]] == [12]
    assert "how many pictures make the ranking stable?" in printed


@pytest.mark.nightly
@pytest.mark.host
def test_exact_answers_of_schedules_and_solvers(tmp_path):
    printed = run("exact", tmp_path, *SMOKE["exact"])
    result = json.loads((tmp_path / "results" / "exact.json").read_text())
    assert len(result["tables"]) == 8 and {len(rows) for rows in result["data"].values()} == {22, 20}
    for rows in result["data"].values():
        assert all(row["kl"] > 0 and row["w2"] > 0 for row in rows)
        assert all((row["field_error"] is None) == (row["solver"] == "euler_ancestral") for row in rows)
    assert "| euler | normal |" in printed and "Wasserstein-2" in (tmp_path / "results.md").read_text()


@pytest.mark.nightly
@pytest.mark.host
def test_fits_on_exact_targets_are_weighed_against_the_best_free_schedule(tmp_path):
    run("exact_fitted", tmp_path, *SMOKE["exact_fitted"])
    result = json.loads((tmp_path / "results" / "exact_fitted.json").read_text())
    for target in ("mixture", "1/f field"):
        error = {row["row"]: row["error"] for row in result["data"] if row["target"] == target}
        assert error["tuned"] <= 0.7 * error["best free"] and error["beta, aligned"] < error["best free"]
        assert error["KLUB minimised"] == max(error[name] for name in error if "published" not in name)
        assert (
            error["KLUB minimised"] > 2 * error["best free"] and error["KLUB stopped early"] < error["KLUB minimised"]
        )
    assert len(result["tables"]) == 3 and result["tables"][1]["rows"][1][0] == "its name"


@pytest.mark.nightly
@pytest.mark.host
def test_a_fit_to_the_picture_itself_bounds_every_fit_to_another_one(tmp_path):
    (tmp_path / "fitted_sampler.md").write_text("<!-- measured: python dev.py bench fitted_limits --> old <!-- end -->")
    run("fitted_limits", tmp_path, *SMOKE["fitted_limits"])
    (table,) = json.loads((tmp_path / "results" / "fitted_limits.json").read_text())["tables"]
    more = {row[1]: float(row[5].split()[0]) for row in table["rows"]}
    *one_picture, _, _, bound = more.values()
    assert len(more) == 10 and bound > max(one_picture) and min(more.values()) > 30
    assert "What keeps" in (tmp_path / "fitted_sampler.md").read_text()


@pytest.mark.nightly
@pytest.mark.host
def test_short_runs_are_weighed_against_all_that_costs_as_little(tmp_path):
    (tmp_path / "fitted_sampler.md").write_text(
        "before <!-- measured: python dev.py bench fitted_sampler --> old <!-- end --> after"
    )
    run("fitted_sampler", tmp_path, *SMOKE["fitted_sampler"])
    result = json.loads((tmp_path / "results" / "fitted_sampler.json").read_text())
    tables = {table["title"]: table["rows"] for table in result["tables"]}
    dB = lambda cell: float(cell.split()[0])
    rows = {
        row[0].split(",")[0]: row[1:] for row in tables["dB to flow, 12 steps of euler (beta), cfg 3, by evaluations"]
    }
    assert dB(rows["**fitted**"][1]) > dB(rows["**fitted**"][0]) > 20 and rows["heun"][1].endswith("5 calls")
    assert {"OLSS", "searched plan (USF)"} < set(rows) and sum("forecast" in name for name in rows) == 2
    assert all(row[2] for row in tables["Times fewer evaluations"])
    path = tables["Deviation from the converged picture"]
    assert [row[2] for row in path] == [5, 6] and all(dB(row[6]) < 1 for row in path)
    *targets, mean = tables["Exact targets: error as a share of the best free run's"]
    assert all(dB(row[5]) < 1 for row in targets) and mean[0] == "**geometric mean**" and len(targets) == 2
    carries = next(rows for title, rows in tables.items() if title.startswith("What carries over"))
    there = {row[0]: row[1:] for row in carries}
    assert dB(there["cfg 2 times"][1]) < dB(there["other prompts and seeds"][1])
    assert dB(there["cfg 2 times"][3]) > dB(there["other prompts and seeds"][3])  # the sign
    assert there["by the first fit, one at a time"] == there["by the first fit, 4 at once"]
    (sign,) = tables["The sign of leaving the fitted range, in all uses"]
    assert all(" of " in cell for cell in sign[1:])
    picks = tables["A blind pick by the judge's features"]
    assert [row[1].split()[-2] for row in picks] == ["6", "6", "8"] and dB(picks[2][2]) < dB(picks[1][2])
    (session,) = tables["A session of two pictures"]
    assert [cell.split()[-1] for cell in session[1:5]] == ["(12)", "(12)", "(32)", "(10)"]
    assert len(tables["Goals"]) == 8 and {row[3] for row in tables["Goals"]} <= {"met", "**missed**"}
    assert min(Image.open(tmp_path / "fitted_blind.jpg").size) > 200
    page = (tmp_path / "fitted_sampler.md").read_text()
    assert page.startswith("before ") and page.endswith(" after") and " old " not in page and "at 45 dB" in page
    again = run("fitted_sampler", tmp_path, *SMOKE["fitted_sampler"], "--drawn")
    assert json.loads((tmp_path / "results" / "fitted_sampler.json").read_text())["tables"] == result["tables"]
    assert "A session of two pictures" in again


@pytest.mark.host
@pytest.mark.nightly
def test_parts_of_a_real_size_network(tmp_path):
    run("real_size", tmp_path, *SMOKE["real_size"])
    result = json.loads((tmp_path / "results" / "real_size.json").read_text())
    flops, times = result["tables"]
    assert flops["rows"][-1][0] == "total" and flops["rows"][-1][1] == pytest.approx(803, rel=2e-3)
    percent = times["columns"].index("time %")
    assert sum(row[percent] for row in times["rows"] if row[0] != "total") == pytest.approx(100)
    assert "Encoder" in flops["note"] and "64 px, bf16" in times["title"]


@pytest.mark.nightly
@pytest.mark.host
def test_reused_features_are_weighed_against_fewer_steps(tmp_path):
    printed = run("propagation", tmp_path, *SMOKE["propagation"])
    data = json.loads((tmp_path / "results" / "propagation.json").read_text())["data"]
    rows, flow = ({row["label"]: row for row in data if row["model"] == model} for model in ("unet", "flow"))
    assert (rows["plain"]["whole"], rows["plain"]["part"]) == (10, 0) and rows["plain"]["speed"]["demo"] == 1
    assert (rows["DeepCache 3"]["whole"], rows["DeepCache 3"]["part"]) == (4, 6)
    top = rows["top level fresh, every 3"]["speed"]
    assert top["SDXL 1024"] > top["SD1.5 512"] > 1
    first = flow["first block fresh, every 3"]
    assert (first["whole"], first["part"]) == (5, 5)  # 0 3 6 8 9
    assert all(any(label.startswith("calibrated") for label in found) for found in (rows, flow))
    assert "| DeepCache 3 |" in printed and "at least 45 dB" in printed
    for picture in ("propagation.png", "propagation_grid.jpg"):
        assert min(Image.open(tmp_path / picture).size) > 200


@pytest.mark.nightly
@pytest.mark.host
def test_rows_of_reused_features_join_a_record_or_take_the_place_of_their_run(tmp_path, run_here):
    from propagation import added, recorded

    runs, first = ["flow:euler:9:6", "flow:euler:8:6"], "first block fresh, every 3"
    run_here("propagation", tmp_path, "--runs", *runs, "--only", first)
    data = json.loads((tmp_path / "results" / "propagation.json").read_text("utf-8"))["data"]
    nine, eight = recorded(tmp_path)
    assert [row.label for rows in (nine, eight) for row in rows] == [row["label"] for row in data]
    assert [rows[0].run.steps for rows in (nine, eight)] == [9, 8] and eight[0].run.model == "flow"
    assert [row.label for row in nine] == ["plain", first] and (nine[1].whole, nine[1].part) == (5, 4)  # 0 3 6 7 8
    assert nine[1].summary["psnr"] == tuple(data[1]["summary"]["psnr"])
    again = [replace(row, run=replace(row.run, tasks=24)) for row in eight]
    assert added([again], [nine, eight], [first]) == [nine, again] and added([eight], [nine], [first]) == [nine, eight]
    others = [
        replace(row, label=label) for row, label in zip(nine, ("plain, 6 steps", f"{first}, last 6"), strict=True)
    ]
    assert added([nine], [[*nine, *others]], [first]) == [[*nine, others[0]]]


@pytest.mark.nightly
@pytest.mark.host
def test_the_cost_of_each_kind_of_step(tmp_path):
    run("step_kinds", tmp_path, *SMOKE["step_kinds"])
    result = json.loads((tmp_path / "results" / "step_kinds.json").read_text())
    counted, predicted = ([row[result["tables"][0]["columns"].index(name)] for row in result["tables"][0]["rows"]]
                          for name in ("FLOPs %", "FLOPs % predicted"))  # fmt: skip
    assert counted == pytest.approx(predicted, rel=0.02) and 100 > counted[0] > counted[1] > counted[2] > 0
    assert [step["whole"] for step in result["data"][0]["steps"]] == [i % 4 == 0 for i in range(9)]


@pytest.mark.nightly
@pytest.mark.host
def test_a_whole_run_takes_less_time_with_shorter_steps(tmp_path):
    run("whole_runs", tmp_path, *SMOKE["whole_runs"])
    (table,) = json.loads((tmp_path / "results" / "whole_runs.json").read_text())["tables"]
    plain, deep = (dict(zip(table["columns"], row, strict=True)) for row in table["rows"])
    assert (plain["whole"], plain["shorter"], deep["whole"], deep["shorter"]) == (8, 0, 4, 4)
    assert plain["times less computing"] == plain["times less time"] == 1
    assert deep["times less computing"] == pytest.approx(8 / (4 + 4 * 0.07), rel=0.02)
    assert 1.2 < deep["times less time"] < 2.2


@pytest.mark.nightly
@pytest.mark.host
def test_small_pictures_are_measured_beside_an_oracle_and_the_stock_shift(tmp_path):
    (tmp_path / "noise_shift.md").write_text(
        "before <!-- measured: python dev.py bench noise_shift --> old <!-- end --> after"
    )
    printed = run("noise_shift", tmp_path, *SMOKE["noise_shift"])
    rows = {r["setting"]: r for r in json.loads((tmp_path / "results" / "noise_shift.json").read_text())["data"]}
    oracle, stock = rows["best constant shift (oracle)"], rows["ModelSamplingSD3, best shift"]
    assert {"best shift and slope (oracle)", "tuned schedule", "tuned schedule + noise shift, joint"} < set(rows)
    assert rows["plain"]["change"] is None and oracle["note"].startswith("offset") and stock["note"].startswith("shift")
    # A model that was only ever shown 128 px draws a crop at 64 px.
    assert rows["drawn at 128 px, made smaller"]["frechet"][0] < rows["plain"]["frechet"][0]
    wrong, mended = rows["told wrong"]["frechet"][0], rows["told wrong + noise shift, joint"]["frechet"][0]
    assert "896 evaluations a size" in printed and mended != wrong and rows["told right"]["change"] is None
    assert "| plain |" in printed and " old " not in (tmp_path / "noise_shift.md").read_text()
    assert min(Image.open(tmp_path / "noise_shift_flow.jpg").size) > 200


@pytest.mark.nightly
@pytest.mark.host
def test_one_more_step_repairs_a_start_that_lacks_the_picture(tmp_path):
    printed = run("one_more_step", tmp_path, *SMOKE["one_more_step"])
    rows = json.loads((tmp_path / "results" / "one_more_step.json").read_text())["data"]
    found = {row["label"]: row["summary"]["brightness"][0] for row in rows}
    assert len(rows) == 3
    assert found["plain"] > 10 and found["One More Step"] < 0.4 * found["plain"]
    assert "| data: every background once |" in printed
    for picture in ("one_more_step.png", "one_more_step_grid.jpg"):
        assert min(Image.open(tmp_path / picture).size) > 100


@pytest.mark.nightly
@pytest.mark.host
def test_twelve_prompts_leave_nothing_and_repeat_themselves(tmp_path):
    printed = run("long_run", tmp_path, *SMOKE["long_run"])
    counted = json.loads((tmp_path / "results" / "long_run.json").read_text())["data"]["all methods"]["counted"]
    prompts, memory, objects, tensors, own, patchers = zip(*counted, strict=True)
    assert prompts == tuple(range(2, 13, 2)) and min(memory) > 100
    assert set(patchers) == {0} and len(set(tensors[1:])) == len(set(own[1:])) == 1  # the first use of each method
    assert max(objects[1:]) < 1.02 * objects[1]
    assert "| --cache-none | 6 |" in printed and min(Image.open(tmp_path / "long_run.png").size) > 100
