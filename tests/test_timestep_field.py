"""Films whose frames have levels of their own, against Gaussian films: every path of levels ends in their law."""

from __future__ import annotations

import math

import pytest
import torch

from pack.kernels.timestep_field import given_shares, sample_field, staircase, stretched, stride_for, together


def law(frames: int, rho: float = 0.8, spread: float = 0.7) -> torch.Tensor:
    """The covariance of a film's frames: neighbours correlate by `rho`."""
    i = torch.arange(frames, dtype=torch.float64)
    return spread**2 * rho ** (i[:, None] - i[None]).abs()


def exact(covariance: torch.Tensor):
    """The denoiser of a flow for films of this law whose frames have levels of their own: E[x0 | x]."""

    def denoise(x, levels, frames):
        c, level = covariance[frames, frames], levels.flatten()
        a = 1 - level
        both = a[:, None] * c * a[None] + torch.diag(level**2)
        gain = c * a[None] @ torch.linalg.pinv(both)
        return torch.einsum("fg,bcghw->bcfhw", gain, x)

    return denoise


def ends(table, frames: int, order: int, covariance=None, start=None):
    """What unit noises of each frame become: a matrix whose columns are films, and the evaluations it took."""
    covariance = law(frames) if covariance is None else covariance
    x = torch.eye(frames, dtype=torch.float64)[:, None, :, None, None] if start is None else start
    *_, (last, _, _, out) = sample_field(exact(covariance), x, table, order)
    assert last == table.steps - 1
    return out[:, 0, :, 0, 0].T


def sigmas(n: int) -> torch.Tensor:
    s = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    return 3 * s / (1 + 2 * s)


@pytest.mark.parametrize("order", [1, 2])
def test_equal_and_unequal_paths_of_the_levels_end_in_the_same_law(order):
    """M M' is the law's covariance, whichever frame goes first: the flow of independent noises (module's docstring)."""
    n = {1: 240, 2: 150}[order]
    equal = together(sigmas(n), torch.ones(4, 1, 1))
    steps = staircase(sigmas(n), 4, 0, 4, 1, 0)
    for table in (equal, steps):
        m = ends(table, 4, order)
        torch.testing.assert_close(m @ m.T, law(4), rtol=0, atol={1: 0.015, 2: 3e-3}[order])


def test_given_frames_stay_and_the_others_follow_the_conditional_law():
    table, c = together(sigmas(300), given_shares(3, 1, 1)), law(3)
    start = torch.zeros(2, 1, 3, 1, 1, dtype=torch.float64)
    start[0, 0, 0], start[0, 0, 2] = 1.0, -0.4  # ends
    start[1, 0, 1] = 1.0  # noise alone
    m = ends(table, 3, 2, start=start)
    assert torch.equal(m[[0, 2], 0], torch.tensor([1.0, -0.4], dtype=torch.float64))
    outer = c[1, [0, 2]] @ torch.linalg.inv(c[[0, 2]][:, [0, 2]])
    assert float(m[1, 0]) == pytest.approx(float(outer @ torch.tensor([1.0, -0.4], dtype=torch.float64)), abs=2e-3)
    assert float(m[1, 1]) ** 2 == pytest.approx(float(c[1, 1] - outer @ c[[0, 2], 1]), abs=2e-3)


@pytest.mark.parametrize(("order", "factor"), [(1, 2), (2, 4)])
def test_the_order_of_convergence_with_each_frames_own_history(order, factor):
    def error(n):
        m = ends(staircase(sigmas(n), 4, 0, 4, 1, 0), 4, order)
        return float((m @ m.T - law(4)).abs().max())

    assert error(80) / error(160) == pytest.approx(factor, rel=0.25)


def test_the_second_step_of_a_frame_is_adams_bashforth():
    """By hand, on one frame, with steps of different length."""
    c = law(1)
    table = together(torch.tensor([0.9, 0.6, 0.5, 0.2], dtype=torch.float64), torch.ones(1, 1, 1))
    x, slope, before = torch.tensor(1.0, dtype=torch.float64), None, None
    for level, level_next in ((0.9, 0.6), (0.6, 0.5), (0.5, 0.2)):
        a = 1 - level
        d = (x - c[0, 0] * a / (a * a * c[0, 0] + level**2) * x) / level
        h = level_next - level
        x = x + h * (d if slope is None else d + h / (2 * before) * (d - slope))
        slope, before = d, h
    assert float(ends(table, 1, 2)) == pytest.approx(float(x), rel=1e-12)


def published_rows(n: int, blocks: int, stride: int) -> list[list[int]]:
    """Counters of SkyReels-V2, a row an iteration: block 0 counts up; one whose predecessor is done too, else follows."""
    rows, row = [], [0] * blocks
    while min(row) < n:
        new = [min(row[0] + 1, n + 1)]
        for j in range(1, blocks):
            step = row[j] + 1 if new[j - 1] > n or (row[j - 1] >= n and row[j] > 0) else new[j - 1] - stride
            new.append(min(max(step, 0), n + 1))
        row = new
        rows.append([min(c, n) for c in row])
    return rows


def test_the_staircase_is_the_published_one():
    n, frames, given, block = 6, 11, 3, 2
    table = staircase(sigmas(n), frames, given, 6, block, 2)
    stride = stride_for(n, 6, 2, block)
    want = published_rows(n, 4, stride)
    assert stride == 3 and table.steps == n + 3 * stride == len(want)
    taken = [[int((sigmas(n) - level).abs().argmin()) for level in row.flatten()] for row in table.levels]
    assert [row[given::block] for row in taken[1:]] == want
    assert all(row[:given] == [n] * given for row in taken)


@pytest.mark.parametrize(("window", "block", "overlap"), [(8, 1, 3), (6, 2, 2), (5, 2, 0)])
def test_a_window_holds_every_frame_in_work_and_the_finished_ones_before_it(window, block, overlap):
    n, frames = 12, 23
    table = staircase(sigmas(n), frames, 1, window, block, overlap)
    for (first, behind), now, after in zip(table.windows, table.levels, table.levels[1:], strict=False):
        work = (after < now).flatten().nonzero().flatten()
        assert len(work) and first <= int(work[0]) and int(work[-1]) < behind <= frames and behind - first == window
        assert int(work[0]) - first >= overlap or first == 0
        assert (now.flatten()[:first] == 0).all() and (now.flatten()[behind:] == sigmas(n)[0]).all()
    assert (table.levels[-1] == 0).all() and (table.levels.diff(dim=0) <= 0).all()


def test_frames_without_noise_are_shown_a_little_of_it_and_stay():
    seen = []

    def denoise(x, levels, frames):
        seen.append((x.clone(), levels.flatten().tolist()))
        return torch.zeros_like(x)

    x, noise = torch.ones(1, 1, 3, 1, 1), torch.full((1, 1, 3, 1, 1), 2.0)
    table = together(torch.tensor([0.8, 0.0]), given_shares(3, 1))
    ((_, _, denoised, out),) = sample_field(denoise, x, table, shown=0.1, noise=noise)
    assert seen[0][1] == pytest.approx([0.1, 0.8, 0.8])
    torch.testing.assert_close(seen[0][0].flatten(), torch.tensor([0.9 + 0.2, 1, 1]))
    assert float(out[0, 0, 0]) == float(denoised[0, 0, 0]) == 1.0
    torch.testing.assert_close(out.flatten()[1:], torch.zeros(2))


def test_shares_from_a_list_are_linear_between_its_values():
    assert stretched([0, 1], 5).flatten().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert stretched([0.3], 3).flatten().tolist() == pytest.approx([0.3] * 3)
    assert stretched([0, 0.5, 1], 3).flatten().tolist() == [0, 0.5, 1]


def test_what_cannot_be_sampled_is_refused():
    for shares in ([], [0.5, 1.2], [math.nan]):
        with pytest.raises(ValueError, match="numbers from 0 to 1"):
            stretched(shares, 4)
    with pytest.raises(ValueError, match="leaves none to sample"):
        given_shares(3, 2, 1)
    with pytest.raises(ValueError, match="no room for a block of 4"):
        staircase(sigmas(4), 20, 0, 8, 4, 6)
