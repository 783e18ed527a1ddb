"""Metrics against closed forms and against what must never happen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from judge import load_judge
from metrics import (
    coverage,
    frechet,
    jackknife,
    kernel_distance,
    perceptual_distance,
    precision_recall,
    psnr,
    rank_stability,
    restoration_distance,
    structural_distance,
)


def normal(n, d, seed, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n, d, seed):
    """A sample whose mean is exactly 0 and whose covariance is exactly 1."""
    x = normal(n, d, seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T).reshape(d, d))).T


@pytest.mark.parametrize("d", [1, 3, 8])
def test_frechet_of_gaussians_is_the_closed_form(d):
    a, b = whitened(200, d, 0), whitened(300, d, 1)
    std = torch.linspace(0.5, 3, d, dtype=torch.float64)
    want = 0.7**2 * d + float((1 - std).square().sum())
    assert frechet(a, b * std + 0.7) == pytest.approx(want, rel=1e-9)


def test_frechet_of_correlated_gaussians_agrees_with_a_matrix_square_root():
    from scipy.linalg import sqrtm

    mix = normal(4, 4, 3)
    a, b = normal(500, 4, 0), normal(400, 4, 1) @ mix + 0.3
    cov_a, cov_b = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = sqrtm(cov_a @ cov_b).real
    want = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet(a, b) == pytest.approx(want, rel=1e-6)


def test_frechet_is_zero_for_the_same_set_and_symmetric():
    a, b = normal(100, 6, 0), normal(100, 6, 1, 0.5)
    assert abs(frechet(a, a)) < 1e-9
    assert frechet(a, b) == pytest.approx(frechet(b, a))


def test_kernel_distance_is_unbiased_around_zero_and_grows_with_the_shift():
    same = [kernel_distance(normal(60, 5, 2 * i), normal(60, 5, 2 * i + 1)) for i in range(60)]
    standard_error = np.std(same) / len(same) ** 0.5
    assert abs(np.mean(same)) < 3 * standard_error
    shifted = [kernel_distance(normal(60, 5, 0), normal(60, 5, 1, shift)) for shift in (0.3, 0.6, 1.2)]
    assert 0 < shifted[0] < shifted[1] < shifted[2]


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 8, 8)
    b = a.clone()
    b[1] += 0.1
    assert psnr(a, b)[0] == math.inf and float(psnr(a, b)[1]) == pytest.approx(20)


def test_perceptual_distance_is_zero_for_equals_and_larger_for_another_shape_than_for_a_shift():
    judge = load_judge()
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")

    def disc(cx, square=False):
        far = (
            torch.maximum((x - cx).abs(), (y - 64).abs()) if square else torch.hypot((x - cx).float(), (y - 64).float())
        )
        return torch.where((far < 36)[None], torch.tensor([0.9, 0.1, 0.1])[:, None, None], torch.ones(3, 1, 1))[None]

    same, moved, other = (float(perceptual_distance(judge, disc(64), p)) for p in (disc(64), disc(66), disc(64, True)))
    assert same == 0 and 0 < moved < other


def test_precision_falls_for_wrong_pictures_and_recall_for_lost_variety():
    real = normal(300, 2, 0)
    assert min(precision_recall(real, normal(300, 2, 1))) > 0.9
    wrong = torch.cat([normal(150, 2, 1), normal(150, 2, 2, 30.0)])
    precision, _ = precision_recall(real, wrong)
    assert precision == pytest.approx(0.5, abs=0.06)
    narrow = normal(300, 2, 1, 0.0, 0.2)
    precision, recall = precision_recall(real, narrow)
    assert precision > 0.95 and recall < 0.3


def test_coverage_counts_the_modes_that_were_reached():
    modes = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]]).double()
    real = torch.cat([normal(50, 2, i) + modes[i] for i in range(4)])
    fake = torch.cat([normal(100, 2, 10 + i) + modes[i] for i in range(2)])
    assert coverage(real, fake) == pytest.approx(0.5, abs=0.06)


def test_more_samples_make_a_ranking_stabler_and_a_clear_winner_is_always_found():
    noise = normal(5, 200, 0)
    close = noise + torch.linspace(0, 0.5, 5)[:, None].double()

    def stability(scores, n):
        return rank_stability(lambda kept: scores[:, kept].mean(1), 200, n, draws=300)

    few, many = stability(close, 4), stability(close, 150)
    assert few[0] < many[0] <= 1 and few[1] < many[1]
    clear = noise + 100 * torch.arange(5)[:, None].double()
    assert stability(clear, 2) == (1.0, 1.0)


def test_the_jackknife_of_a_mean_is_the_standard_error_of_the_groups_means():
    x = normal(24, 1, 0)[:, 0]
    value, error = jackknife(lambda kept: float(x[kept].mean()), 24, 6)
    means = torch.stack([x[g::6].mean() for g in range(6)])
    assert value == pytest.approx(float(x.mean())) and error == pytest.approx(float(means.std() / 6**0.5))


def test_the_jackknife_covers_the_spread_of_a_frechet_distance_between_repetitions():
    real = normal(2000, 3, 0)
    fakes = [normal(60, 3, 10 + i, 0.5) for i in range(40)]
    runs = [jackknife(lambda kept, x=x: frechet(real, x[kept]), 60, 6) for x in fakes]
    spread = np.std([value for value, _ in runs])
    assert 0.6 * spread < np.mean([error for _, error in runs]) < 1.6 * spread


def test_a_restoration_is_judged_by_what_was_kept_and_by_the_strength_of_what_was_lost():
    """For a damage that leaves the mean colour: a shift counts in full, a detail of another shape not at all."""
    flat = lambda pictures: pictures.mean((2, 3), keepdim=True).expand_as(pictures)
    signs = torch.randint(2, (2, 1, 40, 40), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    detail = 0.1 * (signs - flat(signs)).expand(-1, 3, -1, -1)
    clean, distance = 0.5 + detail, lambda pictures: restoration_distance(pictures, clean, flat).tolist()
    assert distance(clean) == [0, 0]
    assert distance(clean + 0.05) == pytest.approx([0.05] * 2)
    assert distance(0.5 - detail) == pytest.approx([0] * 2, abs=1e-6)
    assert distance(flat(clean)) == pytest.approx([0.1] * 2, rel=0.01)  # nothing of it is there
    assert distance(0.5 + 1.3 * detail) == pytest.approx([0.03] * 2, rel=0.01)


def test_structural_distance_is_none_for_the_same_and_grows_with_blur():
    sharp = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    soft = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1)
    assert structural_distance(sharp, sharp).abs().max() < 1e-6
    assert (structural_distance(sharp, soft) > 0.2).all()
