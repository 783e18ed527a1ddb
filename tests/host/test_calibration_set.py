"""What runs of the host put into a calibration set, and that they are the runs without it."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors import safe_open

from graphs import STEPS


@pytest.fixture
def folder(host):
    place = host.folders / "output" / "attune_calibration"
    yield place
    shutil.rmtree(place, ignore_errors=True)


def collect(kit, **choice):
    return kit.host.call("AttuneCalibrationSet", model=kit.model, **({"name": "set", "per_run": 3} | choice))


def read(folder) -> list[dict]:
    found = []
    for path in sorted(folder.glob("set/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize("kit", ["unet", "flow"], indirect=True)
def test_a_run_is_kept_at_its_levels_and_is_the_run_without(kit, folder):
    model = collect(kit)[0]
    asked = []

    def watch(executor, x, sigma, *args, **kwargs):
        asked.append((x.clone(), sigma.clone()))
        return executor(x, sigma, *args, **kwargs)

    model.add_wrapper_with_key("apply_model", "zzz", watch)
    assert torch.equal(kit.ksampler(model), kit.ksampler(kit.model))
    (found,) = read(folder)
    assert set(found) == {"x", "sigma"} and found["x"].dtype == torch.float16
    wanted = [asked[i] for i in (1, 4, 6)]  # the middles of three parts of 8 steps
    torch.testing.assert_close(found["x"], torch.cat([x for x, _ in wanted]).half())
    torch.testing.assert_close(found["sigma"], torch.cat([sigma for _, sigma in wanted]).float())
    assert len(asked) == STEPS


def test_runs_add_up_to_what_is_wanted_and_none_counts_twice(unet, folder):
    model, report = collect(unet, samples=10, conditioning="embeddings")
    assert report.startswith("0 of 10 samples in ")
    for seed in (3, 3, 4, 5):
        unet.ksampler(model, seed=seed)
    found = read(folder)
    assert [len(one["x"]) for one in found] in ([6, 4], [4, 6])
    assert all(len(one["c_crossattn"]) == len(one["y"]) == len(one["x"]) for one in found)
    assert collect(unet, samples=10, conditioning="embeddings")[1].startswith("10 of 10 samples in ")
    with pytest.raises(
        ValueError, match=r"other settings: conditioning embeddings \(now none\). Choose another 'name'"
    ):
        collect(unet, samples=10)


def test_a_run_that_ends_in_an_error_leaves_nothing(unet, folder):
    model = collect(unet)[0]

    def fail(executor, *args, **kwargs):
        raise RuntimeError("stopped")

    model.add_wrapper_with_key("apply_model", "zzz", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        unet.ksampler(model)
    assert read(folder) == []
