"""Long-video noise: every frame is a drawn one, in local order."""

from __future__ import annotations

import pytest
import torch

from pack.kernels.long_noise import shuffled_frames


@pytest.mark.parametrize(("frames", "window", "stride"), [(29, 8, 4), (16, 8, 8), (9, 8, 3), (5, 8, 2)])
def test_later_windows_are_local_permutations_of_the_one_before(frames, window, stride):
    order = shuffled_frames(frames, window, stride, torch.Generator().manual_seed(0)).tolist()
    assert len(order) == frames and order[:window] == list(range(min(frames, window)))
    for at in range(window, frames - stride + 1, stride):
        assert sorted(order[at : at + stride]) == sorted(order[at - window : at - window + stride])
    if stride == 1:
        assert order[window:] == order[: frames - window]


def test_all_frames_of_the_first_window_are_used_alike():
    order = shuffled_frames(64, 8, 4, torch.Generator().manual_seed(1))
    assert order.bincount().tolist() == [8] * 8
    assert order.tolist() != (list(range(8)) * 8)


def test_a_stride_beyond_the_window_is_refused():
    with pytest.raises(ValueError, match="cannot move on by 9"):
        shuffled_frames(20, 8, 9, torch.Generator())
