"""The rivals' published forms against what they must do exactly."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rivals import DBCache, Known, fsampler, magcache, sea_filtered, seacache, spectrum, taylor_at, taylorseer

SIGMAS = [1 - i / 50 for i in range(51)]
X = torch.zeros(1, 1, 8, 8)


def run(decide, f, sigmas=SIGMAS, states=None) -> tuple[list[int], dict[int, torch.Tensor]]:
    """The asked steps and the forecasts, of answers f(step)."""
    known, said = Known(sigmas, [], [], {}), {}
    for step in range(len(sigmas) - 1):
        found = decide(step, X if states is None else states[step], known)
        if found is None:
            known.asked.append((step, f(step)))
        else:
            said[step] = found
    return [i for i, _ in known.asked], said


def polynomial(*coefficients: float):
    return lambda i: sum(c * (i / 50) ** k for k, c in enumerate(coefficients)) * torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize(("order", "degree"), [(1, 1), (2, 2), (2, 1)])
def test_taylorseer_is_exact_on_polynomials_of_its_order_and_asks_every_nth(order, degree):
    f = polynomial(*[1.0, -2.0, 3.0][: degree + 1])
    asked, said = run(taylorseer(4, order), f)
    assert asked[order + 1 :] == list(range(order + 1, 50, 4))
    assert all(torch.allclose(value, f(i), atol=1e-9) for i, value in said.items()) and len(said) > 30
    past = [(i, polynomial(0, 0, 0, 1.0)(i)) for i in (0, 3, 7)]  # a cubic is none of its span
    assert not torch.allclose(taylor_at(9, past, 2), polynomial(0, 0, 0, 1.0)(9), atol=1e-6)


@pytest.mark.parametrize(("alpha", "count"), [(0.75, 14), (3.0, 10)])
def test_spectrum_asks_as_often_as_published_and_is_ridge_regression_on_chebyshevs(alpha, count):
    f = polynomial(1.0, -0.5, 0.2)
    asked, said = run(spectrum(alpha, 1.0), f)
    assert abs(len(asked) - count) <= 2
    basis = lambda i: torch.cos(torch.acos(torch.tensor(2 * i / 49 - 1, dtype=torch.float64)) * torch.arange(5))
    for i, value in said.items():
        past = [k for k in asked if k < i][-10:]
        rows = torch.cat([torch.stack([basis(k) for k in past]), 0.1**0.5 * torch.eye(5, dtype=torch.float64)])
        wanted = torch.cat([*(f(k) for k in past), torch.zeros(5, dtype=torch.float64)])
        assert torch.allclose(value, (basis(i) @ torch.linalg.lstsq(rows, wanted[:, None]).solution), atol=1e-9)
    asked, said = run(spectrum(alpha, 0.0), polynomial(1.0, -0.5))
    assert all(torch.allclose(value, polynomial(1.0, -0.5)(i), atol=1e-9) for i, value in said.items())


def test_fsampler_is_exact_on_its_order_between_neighbours():
    line = polynomial(1.0, -2.0)
    asked, said = run(fsampler(2, 2), line)
    assert asked[-1] == 49 and len(said) > 10
    after = {i: said[i] for i in said if {i - 1, i - 2} <= {*asked}}
    assert after and all(torch.allclose(value, line(i), atol=1e-9) for i, value in after.items())


def test_magcache_holds_until_the_magnitudes_have_moved():
    ratios = (1.0, *[0.99] * 49)
    asked, _ = run(magcache(ratios, 0.035, 9), polynomial(1.0))
    assert asked[:10] == list(range(10)) and {b - a for a, b in pairwise(asked[10:])} == {3}
    assert len(run(magcache((1.0,) * 50, 0.03, 2), polynomial(1.0))[0]) == 10 + 13  # most skipped: 2 of 3


def test_the_filter_keeps_the_mean_gain_and_passes_more_detail_with_less_noise():
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    fine = lambda y: float(y.diff(dim=-1).square().mean() / y.square().mean())
    assert fine(sea_filtered(x, 0.1, 0.9)) < fine(sea_filtered(x, 0.9, 0.1)) < fine(x) * 1.01
    assert sea_filtered(x, 0.0, 1.0).isfinite().all()
    states = [x * (1 - i / 100) for i in range(50)]
    loose, tight = (len(run(seacache(d, True), polynomial(1.0), states=states)[0]) for d in (0.2, 0.02))
    assert 1 < loose < tight <= 50


def through(cache: DBCache, x: torch.Tensor, blocks: list) -> torch.Tensor:
    """A row of blocks under the patches of DBCache, each (picture, prompt) -> both; the last gives no prompt."""
    streams = {"img": x, "txt": torch.ones(1, 2, 1)}
    for block, patch in zip(blocks, cache.patches(len(blocks)), strict=True):
        original = lambda args, block=block: dict(zip(("img", "txt"), block(args["img"], args["txt"]), strict=True))
        streams = patch(streams, {"original_block": original})
    return streams["img"]


def test_dbcache_adds_what_the_others_added_while_the_first_block_adds_the_like():
    ran, slope = [], [1.0]
    inner = lambda img, txt: (ran.append(1) or img + slope[0] * txt.mean(), 2 * txt)
    blocks = [lambda img, txt: (img + img * 0.1, txt + img.mean()), inner, lambda img, txt: (img + txt.sum(), None)]
    whole, cache = lambda x: through(DBCache(0.0, 99), x, blocks), DBCache(0.02, warmup=3)
    x, drift = torch.ones(1, 4, 1), 0.015  # what the first block adds changes by 1.5 % a step of what it was
    seen = []
    for step in range(9):
        at = x * (1 + drift * step)
        seen.append((at, through(cache, at, blocks), slope[0]))
        slope[0] += 1.0
    assert cache.asked == [0, 1, 2, 4, 6, 8] and len(ran) == 6  # two steps on it is 2.9 %, above the threshold
    (before, at_whole, then), (at, held, now) = seen[2], seen[3]
    assert torch.allclose(held, 1.1 * at + (at_whole - 1.1 * before), atol=1e-6)
    slope[0] = now
    assert not torch.allclose(held, whole(at), atol=1e-2)  # nothing of the inner blocks is new
    slope[0] = then
    assert torch.allclose(at_whole, whole(before), atol=1e-6)
