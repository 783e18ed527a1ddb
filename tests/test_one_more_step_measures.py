"""What the benchmark and the training check of One More Step say of pictures whose variety and error are known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from judge import BACKGROUNDS
from looks import data
from one_more_step import GROUPS, Seen, background_measures, jobs, recall_within, spread_within, summary, words

TRAINING = str(Path(__file__).resolve().parents[1] / "training")
PALETTE = torch.tensor(list(BACKGROUNDS.values())) / 255


def test_recall_and_spread_fall_with_the_variety_of_a_prompt():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(50, 1, 4, generator=generator)
    real, fake = (centres + torch.randn(50, 40, 4, generator=generator) for _ in range(2))
    assert spread_within(real) == pytest.approx(4**0.5, rel=0.05)
    alike = centres + 0.1 * torch.randn(50, 40, 4, generator=generator)
    assert spread_within(alike) == pytest.approx(0.1 * 4**0.5, rel=0.05)
    assert recall_within(real, real) == 1.0
    assert recall_within(real, alike) < 0.01 < 0.6 < recall_within(real, fake) < 1
    assert recall_within(real, fake + 100) == 0.0


def test_training_pictures_themselves_are_what_the_data_is():
    """Their own means and features in the place of drawn pictures: nothing is missing, and every prompt is right."""
    work, prompts = jobs(24), 24
    assert len({(t.obj, t.background) for t in work}) == prompts and len({t.seed for t in work}) == len(work)
    objects, backgrounds = torch.tensor([[t.obj, t.background] for t in work]).T
    seen = Seen(
        data()["features"][:prompts].flatten(0, 1), objects, PALETTE[backgrounds], data()["means"][:prompts].flatten()
    )
    found = {name: value for name, (value, _) in summary(seen, work).items()}
    assert [found.pop(name) for name in ("recall", "within", "spread", "light")] == pytest.approx([1, 1, 1, 1])
    assert found.pop("object") == found.pop("background") == 100
    assert max(found.values()) < 1e-3  # brightness, Wasserstein, Fréchet
    assert words(seen, work)["white"][0] == pytest.approx(255)


def test_the_palette_itself_is_the_whole_variety_of_an_open_prompt():
    everything = torch.arange(len(PALETTE))
    mean, std, distance, recall, colours = (of(everything) for of in background_measures(PALETTE))
    light = 255 * PALETTE.mean(1)
    assert (mean, std) == (pytest.approx(float(light.mean()), rel=1e-5), pytest.approx(float(light.std()), rel=1e-5))
    assert (distance, recall, colours) == (pytest.approx(0, abs=1e-4), 1.0, 20)
    one = background_measures(PALETTE[:1].expand(GROUPS, 3) + 1e-3 * torch.randn(GROUPS, 3))
    assert one[3](torch.arange(GROUPS)) < 0.1 and one[4](torch.arange(GROUPS)) == 1


def test_the_check_of_a_module_finds_its_error_but_not_the_chance_of_few_placements(monkeypatch):
    monkeypatch.syspath_prepend(TRAINING)
    from check_one_more_step import least_loss, prediction_error

    generator = torch.Generator().manual_seed(1)
    means = torch.randn(6, 20, 4, 8, 8, generator=generator)
    x0 = means[:, :, None] + 0.5 * torch.randn(6, 20, 5, 4, 8, 8, generator=generator)
    perfect, wrong = (prediction_error(x0, means + bias) for bias in (0.0, 0.3))
    assert perfect["of_the_prediction"] == pytest.approx(0, abs=0.01)
    assert wrong["of_the_prediction"] == pytest.approx(0.09, abs=0.01)
    assert perfect["within_a_caption"] == pytest.approx(0.25, rel=0.02)
    alike = torch.randn(6, 20, 5, 1, 1, 1, generator=generator).expand(-1, -1, -1, 4, 8, 8)
    assert least_loss(alike, float(alike.var())) == pytest.approx(1, rel=0.2)
    for module in ("check_one_more_step", "common", "data"):
        sys.modules.pop(module, None)
