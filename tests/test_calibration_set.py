"""Which steps a quantiser sees, and the files that hold what it sees."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch

from pack.kernels.calibration_set import normal_steps, uniform_steps
from pack.models.calibration_set import sample_path, samples_in, save_samples

MADE = {"weights": "a", "spacing": "uniform"}


def test_uniform_steps_are_the_middles_of_equal_parts():
    assert uniform_steps(20, 4) == [2, 7, 12, 17]
    assert uniform_steps(5, 5) == uniform_steps(5, 9) == [0, 1, 2, 3, 4]


def test_normal_steps_lie_as_the_normals_quantiles():
    times = [1 - i / 1000 for i in range(1000)]
    found = [times[i] for i in normal_steps(times, 200, 0.4, 0.1)]
    bell = NormalDist(0.4, 0.1)
    for share in (0.1, 0.25, 0.5, 0.9):
        assert sum(time <= bell.inv_cdf(share) for time in found) / 200 == pytest.approx(share, abs=0.01)


def test_no_step_is_taken_twice_and_all_where_more_are_wanted():
    assert normal_steps([1.0, 0.5, 0.0], 9, 0.4, 0.01) == [0, 1, 2]


def test_runs_add_up_and_none_is_written_twice(tmp_path):
    tensors = {"x": torch.zeros(3, 4, 2, 2), "sigma": torch.ones(3)}
    assert samples_in(tmp_path / "none", MADE) == 0
    for run in ("aa", "bb"):
        save_samples(sample_path(tmp_path, run), tensors, MADE)
    assert samples_in(tmp_path, MADE) == 6
    with pytest.raises(FileExistsError):
        save_samples(sample_path(tmp_path, "aa"), tensors, MADE)


def test_another_models_samples_and_foreign_files_are_told(tmp_path):
    save_samples(sample_path(tmp_path, "aa"), {"sigma": torch.ones(1)}, MADE)
    with pytest.raises(ValueError, match=r"made with another model or other settings: weights a \(now b\)"):
        samples_in(tmp_path, {**MADE, "weights": "b"})
    sample_path(tmp_path, "bb").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=r"samples-bb.safetensors holds no samples"):
        samples_in(tmp_path, MADE)
