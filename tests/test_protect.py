"""Protection against exact answers: gradients of linear models, the corner of the box that a linear model asks for."""

from __future__ import annotations

import torch

from pack.kernels.protect import (
    Protection,
    in_levels,
    move_contour,
    objective,
    own_prediction,
    protect,
    shown,
    signed_distance,
)

ALL_KEPT_BUT = torch.zeros(1, 8, 8, dtype=torch.float64)
ALL_KEPT_BUT[:, 2:5, 3:7] = 1


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(side: int = 8) -> torch.Tensor:
    """Away from black and white, where the range would cut a change."""
    return 0.1 + 0.8 * torch.rand(1, 3, side, side, generator=draws(1), dtype=torch.float64)


def test_one_step_follows_the_closed_form_gradient_of_a_linear_model():
    x, weight = picture(), torch.randn(5, 192, generator=draws(2), dtype=torch.float64)
    out = next(protect(x, ALL_KEPT_BUT, lambda s, m: objective((weight @ s.flatten())[None]), settings(), draws()))
    kept = (1 - ALL_KEPT_BUT)[:, None]
    answer = weight @ shown(x, ALL_KEPT_BUT).flatten()
    gradient = -(weight.T @ answer / answer.norm()).view_as(x) * kept
    torch.testing.assert_close(out, x - 0.01 * gradient.sign(), rtol=0, atol=1e-12)


def settings(steps: int = 1, budget: float = 0.03, reach: int = 0) -> Protection:
    return Protection(budget, 0.01, steps, reach)


def test_a_diagonal_model_is_led_to_the_best_corner_of_the_box():
    """The length of a (x - c) grows away from c in every pixel alone, so the best picture is known."""
    x = picture()
    centre = x + 0.02 * torch.randn(x.shape, generator=draws(4), dtype=torch.float64)
    *_, found = protect(x, ALL_KEPT_BUT, lambda s, m: objective(s - centre), settings(7), draws())
    kept = (1 - ALL_KEPT_BUT)[:, None].expand_as(x) > 0
    torch.testing.assert_close(found[kept], (x + 0.03 * (x - centre).sign())[kept], rtol=0, atol=1e-12)
    assert torch.equal(found[~kept], x[~kept])  # what the mask hides stays as it is


def test_no_pixel_leaves_the_budget_or_the_range():
    x = (1.25 * (picture() - 0.1)).float()
    weight = torch.randn(4, 192, generator=draws(3))
    for found in protect(
        x, ALL_KEPT_BUT.float(), lambda s, m: objective((weight @ s.flatten())[None]), settings(20, 0.07), draws()
    ):
        assert (found >= (x - 0.07).clamp(min=0)).all() and (found <= (x + 0.07).clamp(max=1)).all()
    assert ((found - x).abs() > 0.06).float().mean() > 0.5


def test_whole_grey_levels_stay_inside_the_budget_and_survive_eight_bits():
    x = (picture() * 255).round().float() / 255
    changed = (x + 0.05 * torch.randn(x.shape, generator=draws(5)).clamp(-1, 1) * 8 / 255 / 0.05).clamp(0, 1)
    kept = in_levels(x, changed)
    assert ((kept - x).abs() <= (changed - x).abs() + 1e-5).all()
    torch.testing.assert_close((kept * 255).round() / 255, kept, rtol=0, atol=1e-6)
    bound = x + 8 / 255  # is eight levels, and stays so in spite of rounding
    torch.testing.assert_close(in_levels(x, bound), bound.clamp(max=1), rtol=0, atol=1e-6)


def test_the_objective_is_the_published_one():
    noise = torch.zeros(2, 1, 2, 2)
    noise[0, 0, 0] = torch.tensor([3.0, 4.0])
    assert float(objective(noise)) == -2.5  # the mean of 5 and 0


def test_the_prediction_is_the_networks_own():
    eps, x0, sigma = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), torch.tensor(7.0)
    torch.testing.assert_close(own_prediction(x0 + sigma * eps, x0, sigma, "eps"), eps)
    alpha, noise = 1 / 50**0.5, 7 / 50**0.5  # of a variance-preserving latent at sigma 7
    torch.testing.assert_close(own_prediction(x0 + sigma * eps, x0, sigma, "v"), alpha * eps - noise * x0)


def test_the_distance_of_a_half_plane_counts_pixels():
    mask = torch.zeros(1, 9, 9)
    mask[:, :, 4:] = 1
    row = torch.tensor([-3.0, -3, -2, -1, 1, 2, 3, 3, 3])
    assert torch.equal(signed_distance(mask, 3)[0], row.expand(9, 9))


def test_the_distance_of_a_dot_is_that_of_a_circle_to_an_eighth():
    mask = torch.zeros(1, 41, 41)
    mask[:, 20, 20] = 1
    at = torch.arange(41.0) - 20
    radius = (at[:, None] ** 2 + at**2).sqrt()
    inside = (radius > 4) & (radius < 16)
    found = -signed_distance(mask, 20)[0]
    assert ((found - radius).abs()[inside] <= radius[inside] / 8 + 0.5).all()


def test_contours_move_both_ways_and_no_further_than_the_reach():
    mask = torch.zeros(1, 40, 40)
    mask[:, 12:28, 10:30] = 1
    distance, sizes = signed_distance(mask, 5), []
    for seed in range(40):
        moved = move_contour(distance, 4, draws(seed))
        assert (moved[distance >= 5] == 1).all() and (moved[distance <= -5] == 0).all()
        sizes.append(float(moved.sum() / mask.sum()))
    assert min(sizes) < 0.85 and max(sizes) > 1.15
    assert torch.equal(move_contour(signed_distance(mask, 1), 0, draws()), mask)


def test_a_mask_that_would_vanish_stays():
    mask = torch.zeros(1, 20, 20)
    mask[:, 9:11, 9:11] = 1
    distance = signed_distance(mask, 9)
    assert all(move_contour(distance, 8, draws(seed)).any() for seed in range(30))
