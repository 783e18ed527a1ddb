"""Summaries of pictures: training pictures themselves score like training pictures, and each fault moves its measure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness import tasks
from judge import BACKGROUNDS
from looks import Look, data, summary

N = 96
BIAS = 0.3  # upper bound of the Frechet distance that 96 samples show where there is none
WORK = tasks(N)
PALETTE = torch.tensor(list(BACKGROUNDS.values())) / 255


def perfect() -> Look:
    """What the pictures of a perfect model would show: one placement of the data, the right colours, no error."""
    backgrounds = torch.tensor([task.background for task in WORK])
    return Look(
        features=data()["features"][:N, 0].float(), objects=torch.tensor([task.obj for task in WORK]),
        corners=PALETTE[backgrounds], means=data()["means"][:N, 0].float(), errors=torch.zeros(N),
        psnr=torch.full((N,), 100.0), perceptual=torch.zeros(N),
    )  # fmt: skip


@pytest.fixture(scope="module")
def best() -> dict[str, tuple[float, float]]:
    return summary(perfect(), WORK)


def value(look: Look, name: str) -> float:
    return summary(look, WORK)[name][0]


def test_training_pictures_are_right_in_every_respect(best):
    assert [best[name][0] for name in ("object", "background", "error", "perceptual")] == [100, 100, 0, 0]
    assert best["brightness"][0] == pytest.approx(0, abs=1e-4) and best["precision"][0] == best["recall"][0] == 1
    assert best["wasserstein"][0] < 1.5 and best["frechet"][0] < BIAS


def test_an_autoencoder_alone_costs_nothing_that_these_samples_could_show(best):
    for model in ("unet", "flow"):
        through = value(replace(perfect(), features=data()[model][:N].float()), "frechet")
        assert abs(through - best["frechet"][0]) < 3 * best["frechet"][1]


def test_each_fault_moves_its_own_measure(best):
    look, swapped = perfect(), torch.arange(N).roll(1)
    assert value(replace(look, objects=look.objects[swapped]), "object") < 5
    assert value(replace(look, corners=look.corners[swapped]), "background") < 30
    assert value(replace(look, corners=look.corners * 0.5), "brightness") > 40
    assert value(replace(look, means=look.means * 0.5), "wasserstein") > 40
    assert value(replace(look, means=0.5 + 0.1 * (look.means - 0.5)), "wasserstein") > 10
    narrow = look.features.mean(0) + 0.3 * (look.features - look.features.mean(0))
    assert value(replace(look, features=narrow), "recall") < best["recall"][0]
    assert value(replace(look, features=narrow), "frechet") > 2 * best["frechet"][0]
    noisy = look.features + 3 * torch.randn(look.features.shape, generator=torch.Generator().manual_seed(0))
    assert value(replace(look, features=noisy), "precision") < best["precision"][0]


def test_more_tasks_than_the_data_holds_are_refused():
    with pytest.raises(ValueError, match="384 tasks, but 400"):
        summary(perfect(), tasks(400))
