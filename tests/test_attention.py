"""Stretches of steps for a coarser attention, against all there are."""

from __future__ import annotations

import pytest
import torch

from pack.kernels.attention import best_windows


def test_the_best_stretch_of_each_length_is_that_of_all_and_leaves_the_first_step_out():
    costs = torch.rand(9, generator=torch.Generator().manual_seed(0)).tolist()
    found = best_windows(costs)
    assert len(found) == 8
    for n, (total, start) in enumerate(found, start=1):
        every = {i: sum(costs[i : i + n]) for i in range(1, 10 - n)}
        assert total == pytest.approx(min(every.values())) and every[start] == pytest.approx(total)


def test_one_step_has_no_stretch():
    assert best_windows([1.0]) == []
