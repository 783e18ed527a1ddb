"""Stretches of steps for a coarser attention, against all there are."""

from __future__ import annotations

import pytest
import torch

from pack.kernels.attention import best_windows, kept_by_others


def test_the_best_stretch_of_each_length_is_that_of_all_and_leaves_the_first_step_out():
    costs = torch.rand(9, generator=torch.Generator().manual_seed(0)).tolist()
    found = best_windows(costs)
    assert len(found) == 8
    for n, (total, start) in enumerate(found, start=1):
        every = {i: sum(costs[i : i + n]) for i in range(1, 10 - n)}
        assert total == pytest.approx(min(every.values())) and every[start] == pytest.approx(total)


def test_one_step_has_no_stretch():
    assert best_windows([1.0]) == []


def test_nine_in_ten_others_keep_what_the_bound_says():
    """Of a normal distribution: exactly, whatever its mean and spread."""
    draws = torch.randn(4000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6 + 45
    for prompts in (2, 3, 4):
        kept = [other >= kept_by_others(each) for *each, other in draws[:, -prompts - 1 :].tolist()]
        assert sum(kept) / len(kept) == pytest.approx(0.9, abs=0.015)  # three standard errors


def test_one_prompt_speaks_for_itself():
    assert kept_by_others([41.5]) == 41.5
