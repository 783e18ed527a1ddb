"""Long-video noise as a NOISE of the host."""

from __future__ import annotations

import pytest
import torch


def test_later_windows_are_made_of_the_first_and_short_films_keep_theirs(host):
    (plain,) = host.call("RandomNoise", noise_seed=5)
    (long,) = host.call("AttuneLongNoise", noise=plain, window=4, stride=2)
    film = {"samples": torch.zeros(2, 16, 10, 4, 4)}
    got, drawn = long.generate_noise(film), plain.generate_noise(film)
    assert long.seed == 5 and torch.equal(got[:, :, :4], drawn[:, :, :4])
    same = [[torch.equal(got[:, :, i], drawn[:, :, j]) for j in range(10)].index(True) for i in range(10)]
    assert sorted(same[4:6]) == [0, 1] and sorted(same[6:8]) == [2, 3] and set(same) == {0, 1, 2, 3}
    assert torch.equal(long.generate_noise(film), got)
    short = {"samples": torch.zeros(1, 16, 4, 4, 4)}
    assert torch.equal(long.generate_noise(short), plain.generate_noise(short))
    with pytest.raises(ValueError, match="the latent must be a film"):
        long.generate_noise({"samples": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(ValueError, match="set it to 4 or less"):
        host.call("AttuneLongNoise", noise=plain, window=4, stride=5)
