"""The two noise conventions, through the identity that joins them: sigma_ve = sigma_flow / (1 - sigma_flow)."""

from __future__ import annotations

import math

import pytest
import torch

from pack.kernels.space import NoiseSpace

VE, FLOW = NoiseSpace("ve"), NoiseSpace("flow")


@pytest.mark.parametrize("c", [0.5, 1.0, 1.7])
def test_a_flow_level_has_the_angle_of_the_same_corruption_in_ve(c):
    s = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(FLOW.angle(s, c), VE.angle(s / (1 - s), c), rtol=1e-12, atol=0)


@pytest.mark.parametrize("space", [VE, FLOW], ids=lambda s: s.kind)
@pytest.mark.parametrize("c", [0.5, 1.0, 1.7])
def test_angles_can_be_turned_back(space, c):
    sigma = torch.linspace(0, 1, 50, dtype=torch.float64) * (1 if space.kind == "flow" else 80)
    torch.testing.assert_close(space.at_angle(space.angle(sigma, c), c), sigma, rtol=1e-11, atol=1e-12)


def test_pure_noise_of_a_flow_model_is_a_right_angle():
    assert float(FLOW.angle(torch.tensor(1.0, dtype=torch.float64))) == pytest.approx(math.pi / 2)


def test_the_log_ratio_is_the_same_corruption_in_both_spaces_and_turns_back():
    s = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(FLOW.log_ratio(s), VE.log_ratio(s / (1 - s)), rtol=1e-10, atol=1e-12)
    for space in (VE, FLOW):
        torch.testing.assert_close(space.at_log_ratio(space.log_ratio(s)), s, rtol=1e-12, atol=0)


def test_noise_of_another_scale_is_the_same_corruption_of_smaller_data():
    """x = (1 - sigma) x0 + 8 sigma eps is 8 times a latent of plain noise whose data are x0 / 8."""
    loud, s = NoiseSpace("flow", 8.0), torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(loud.angle(s, 1.0), FLOW.angle(s, 1 / 8), rtol=1e-12, atol=0)
    torch.testing.assert_close(loud.at_angle(loud.angle(s, 0.7), 0.7), s, rtol=1e-12, atol=0)
    torch.testing.assert_close(loud.log_ratio(s), FLOW.log_ratio(s) + math.log(8), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loud.at_log_ratio(loud.log_ratio(s)), s, rtol=1e-12, atol=0)
