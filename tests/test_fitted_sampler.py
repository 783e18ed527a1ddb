"""The fitted sampler against exact answers: it becomes the solver that it is shown, and follows exact paths."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from analytic import Gaussian, PowerLawField
from nightly import daily
from oracles import mixture_2d
from pack.kernels import fitted_sampler as kernel
from pack.kernels.fitted_sampler import (
    FittedRun,
    OnPaper,
    advance,
    fidelity,
    fit_steps,
    half,
    learn,
    search_levels,
    solve,
)
from pack.kernels.space import NoiseSpace
from pack.kernels.timestep_aligner import Trajectory

SPACES = {kind: NoiseSpace(kind) for kind in ("ve", "flow")}
TOP = {"ve": 14.6, "flow": 1.0}


def levels(space: NoiseSpace, steps: int) -> torch.Tensor:
    if space.kind == "flow":
        return torch.sin(torch.linspace(math.pi / 2, 0, steps + 1, dtype=torch.float64)) ** 2
    root = torch.linspace(TOP["ve"] ** (1 / 7), 0.03 ** (1 / 7), steps, dtype=torch.float64)
    return torch.cat([root**7, torch.zeros(1, dtype=torch.float64)])


def field(space: NoiseSpace, side: int = 16) -> PowerLawField:
    """Pictures with a 1/f spectrum: the exact steps differ from frequency to frequency."""
    return PowerLawField(2, side, space)


def flow(target: PowerLawField, x: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Where the exact path takes x: every frequency keeps its place in its own spread."""
    spread = lambda sigma: (target.space.alpha(sigma) ** 2 * target.stds() ** 2 + sigma**2).sqrt()
    return torch.fft.ifft2(torch.fft.fft2(x) * spread(t) / spread(s)).real


def exact(target: PowerLawField, x: torch.Tensor, fine: torch.Tensor) -> Trajectory:
    """The exact path from x through the levels `fine`."""
    states = [flow(target, x, fine[0], s) for s in fine]
    return Trajectory.recorded(fine, states, [target.denoise(a, s) for a, s in zip(states, fine[:-1], strict=False)])


def start(space: NoiseSpace, seed: int = 0, pictures: int = 1, side: int = 16) -> torch.Tensor:
    noise = torch.randn(pictures, 2, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TOP[space.kind] * noise


def two_m(space: NoiseSpace, sigmas: torch.Tensor, i: int) -> float:
    """c_1 of DPM-Solver++(2M) in step i, from its definition."""
    lam = [-float(space.log_ratio(s)) for s in sigmas]
    if i == 0 or sigmas[i + 1] == 0 or math.isinf(lam[i - 1]):
        return 0.0
    r = float(sigmas[i + 1] / sigmas[i])
    return (1 - r) * (lam[i + 1] - lam[i]) / (2 * (lam[i] - lam[i - 1]))


def run_of(solver: str, space: NoiseSpace, sigmas: torch.Tensor) -> FittedRun:
    rows = []
    for i in range(len(sigmas) - 1):
        c = two_m(space, sigmas, i) if solver == "dpmpp_2m" else 0.0
        rows.append((0.0, 0.0) if i == 0 else (0.0, 0.0, c))
    return FittedRun(tuple(sigmas.tolist()), tuple(rows))


def recorded(denoise, x, run: FittedRun) -> Trajectory:
    """The run as a recorder would see it."""
    states, said, answers = [x], [], []
    for i, sigma in enumerate(run.sigmas[:-1]):
        said.append(denoise(x, torch.tensor(sigma, dtype=torch.float64)))
        answers = [said[-1], *answers[:2]]
        x = advance(run, i, x, answers)
        states.append(x)
    return Trajectory.recorded(torch.tensor(run.sigmas, dtype=torch.float64), states, said)


def last(work):
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@pytest.fixture
def exactly(monkeypatch):
    """Exact answers are looked for without the ridge."""
    monkeypatch.setattr(kernel, "RIDGE", 1e-13)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("kind", list(SPACES))
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_it_becomes_the_solver_that_it_is_shown(kind, solver):
    space = SPACES[kind]
    sigmas, x = levels(space, 8), start(space)
    shown = run_of(solver, space, sigmas)
    path = recorded(field(space).denoise, x, shown)
    run, end = last(fit_steps(field(space).denoise, sigmas, path))
    torch.testing.assert_close(end, path.end, rtol=1e-6, atol=1e-8)
    other = start(space, seed=1)
    there = solve(field(space).denoise, other, shown)
    torch.testing.assert_close(solve(field(space).denoise, other, run), there, rtol=1e-4, atol=1e-5)


def adams_bashforth_2(denoise, x, sigmas) -> Trajectory:
    """Slopes by the two-step rule for uneven steps, the first by Euler."""
    states, said, before = [x], [], None
    for i, (s, t) in enumerate(pairwise(sigmas.tolist())):
        said.append(denoise(x, torch.tensor(s, dtype=torch.float64)))
        slope = (x - said[-1]) / s
        turn = 0 if before is None else (t - s) ** 2 / 2 * (slope - before) / (s - float(sigmas[i - 1]))
        x, before = x + (t - s) * slope + turn, slope
        states.append(x)
    return Trajectory.recorded(sigmas, states, said)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("kind", list(SPACES))
def test_it_becomes_adams_bashforth_with_all_answers_since_the_first(kind):
    """A slope of before holds a state of before, which the state of now and all answers since make up."""
    space = SPACES[kind]
    target, sigmas = field(space), levels(space, 6)
    path = adams_bashforth_2(target.denoise, start(space), sigmas)
    run, _ = last(fit_steps(target.denoise, sigmas, path, history=6))
    other = start(space, seed=5)
    there = adams_bashforth_2(target.denoise, other, sigmas).end
    plain = solve(target.denoise, other, run_of("euler", space, sigmas))
    assert (solve(target.denoise, other, run) - there).norm() < 1e-3 * (plain - there).norm()


def test_a_step_is_dpmpp_2m_of_the_host_in_both_spaces():
    for space in SPACES.values():
        sigmas, x = levels(space, 6), start(space)
        mine = solve(field(space).denoise, x, run_of("dpmpp_2m", space, sigmas))
        lam, old, theirs = -space.log_ratio(sigmas), None, x
        for i, (s, t) in enumerate(pairwise(sigmas)):
            d = field(space).denoise(theirs, s)
            h = lam[i + 1] - lam[i]
            blend = d
            if old is not None and t > 0 and torch.isfinite(lam[i - 1]):
                q = (lam[i] - lam[i - 1]) / h
                blend = (1 + 1 / (2 * q)) * d - old / (2 * q)
            theirs, old = t / s * theirs - space.alpha(t) * torch.expm1(-h) * blend, d
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("kind", list(SPACES))
def test_one_gaussian_is_followed_exactly_in_one_step_and_in_two(kind):
    space = SPACES[kind]
    target = Gaussian(torch.tensor(0.0, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64), space)
    x = start(space)
    fine = levels(space, 200)
    states = [target.flow(x, fine[0], s) for s in fine]
    path = Trajectory.recorded(fine, states, [target.denoise(a, s) for a, s in zip(states, fine[:-1], strict=False)])
    for steps in (1, 2):
        run, end = last(fit_steps(target.denoise, levels(space, steps), path))
        torch.testing.assert_close(end, path.end, rtol=1e-5, atol=1e-6)
        assert run.steps == steps and [len(row) for row in run.numbers] == [2, 3][:steps]


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("kind", list(SPACES))
def test_the_first_step_has_the_closed_form_numbers_on_a_gaussian_field(kind):
    """Of the state and of the answer alone: weighted least squares over frequencies, with their known gains."""
    space, side = SPACES[kind], 32
    target = field(space, side)
    x = start(space, pictures=64, side=side)
    path, sigmas = exact(target, x, levels(space, 100)), levels(space, 4)
    run, _ = last(fit_steps(target.denoise, sigmas, path))
    unit = torch.zeros_like(x[:1, :1])
    unit[..., 0, 0] = 1.0  # a point: its spectrum is flat, so that linear maps show their gains
    gain = torch.fft.fft2(target.denoise(unit, sigmas[0])).real.flatten()
    goal = torch.fft.fft2(flow(target, unit, sigmas[0], sigmas[1])).real.flatten()
    r = float(sigmas[1] / sigmas[0])
    columns = torch.stack([1 - gain, gain], dim=1)
    wanted = torch.linalg.lstsq(columns, (goal - r - (1 - r) * gain)[:, None]).solution.flatten()
    torch.testing.assert_close(torch.tensor(run.numbers[0], dtype=torch.float64), wanted, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("kind", daily(SPACES, "flow"))
def test_it_converges_on_other_noises_and_is_nearer_than_dpmpp_2m_at_every_count(kind):
    space = SPACES[kind]
    target = mixture_2d(space)
    draw = lambda seed: TOP[kind] * torch.randn(256, 2, generator=torch.Generator().manual_seed(seed)).double()
    long = run_of("dpmpp_2m", space, levels(space, 200))
    path, other = recorded(target.denoise, draw(0), long), draw(1)
    there, errors, plain = solve(target.denoise, other, long), [], []
    for steps in (6, 12, 24):
        run, _ = last(fit_steps(target.denoise, levels(space, steps), path))
        for found, one in ((errors, run), (plain, run_of("dpmpp_2m", space, levels(space, steps)))):
            found.append(float((solve(target.denoise, other, one) - there).norm(dim=1).median()))
    assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2]
    assert all(a < b for a, b in zip(errors, plain, strict=True)), (errors, plain)


def test_the_ridge_shares_equal_columns_alike():
    column = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers = kernel.least_squares([column, column, column], 3 * column)
    torch.testing.assert_close(numbers, torch.ones(3, dtype=torch.float64), rtol=kernel.RIDGE, atol=0)


def test_nothing_is_asked_for_twice_and_parts_are_left_out():
    space = SPACES["ve"]
    sigmas, x = levels(space, 5), start(space)
    path = recorded(field(space).denoise, x, run_of("euler", space, levels(space, 20)))
    asked = []

    def denoise(x, sigma):
        asked.append(float(sigma))
        return field(space).denoise(x, sigma)

    part = half(x)
    run, _ = last(fit_steps(denoise, sigmas, path, part))
    assert asked == pytest.approx(sigmas[:-1].tolist())
    spoiled = Trajectory(path.sigmas, torch.where(part, path.states, 99.0), path.slopes)
    spoiled.states[0] = path.states[0]
    again, _ = last(fit_steps(field(space).denoise, sigmas, spoiled, part))
    for row, wanted in zip(again.numbers, run.numbers, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("kind", list(SPACES))
def test_paper_knows_what_a_run_on_the_path_itself_would_do(kind):
    """Where the network's answers do not depend on the state, the cost on paper is the cost."""
    space = SPACES[kind]
    x, fine = start(space), levels(space, 60)
    blob = start(space, seed=3) / TOP[kind]
    denoise = lambda _, sigma: blob * (1 + 0.3 * torch.log(sigma + 0.5))
    path = recorded(denoise, x, run_of("euler", space, fine))
    sigmas = fine[::10].clone()
    run, _ = last(fit_steps(denoise, sigmas, path))
    state, answers, total = x, [], 0.0
    for i, sigma in enumerate(run.sigmas[:-1]):
        answers = [denoise(state, torch.tensor(sigma, dtype=torch.float64)), *answers[:2]]
        state = advance(run, i, state, answers)
        total += float((state - path.at(run.sigmas[i + 1])).square().sum()) / (run.sigmas[i + 1] + kernel.EARLY)
    assert OnPaper(path).cost(sigmas) == pytest.approx(total, rel=0.02, abs=1e-9 * float(x.square().sum()))


def test_the_search_on_paper_finds_better_levels_without_asking():
    space = SPACES["ve"]
    path = recorded(field(space).denoise, start(space), run_of("euler", space, levels(space, 50)))
    paper = OnPaper(path)
    poor = torch.cat([torch.linspace(TOP["ve"], 0.1, 8, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    found = search_levels(paper, poor, 0.03, space)
    assert paper.cost(found) < 0.5 * paper.cost(poor)
    assert found[0] == poor[0] and found[-1] == 0 and (found[:-1] > found[1:]).all() and found[-2] >= 0.03


@pytest.mark.parametrize("kind", daily(SPACES, "ve"))
def test_what_was_learned_beats_plain_steps_on_noises_it_has_not_seen(kind):
    space = SPACES[kind]
    target = field(space)
    long = run_of("euler", space, levels(space, 50))
    path = recorded(target.denoise, start(space), long)
    learned = last(learn(lambda _: target.denoise, path, 10, space, OnPaper(path)))
    other = start(space, seed=5, pictures=4)
    there = solve(target.denoise, other, long)
    plain = fidelity(solve(target.denoise, other, run_of("euler", space, levels(space, 10))), there)
    assert learned.evaluations == 20
    assert fidelity(solve(target.denoise, other, learned.run), there) > plain + 10
    assert learned.psnr > plain + 10


@pytest.mark.parametrize("kind", list(SPACES))
def test_polish_brings_the_end_nearer_on_other_noises_too_and_costs_what_it_says(kind):
    space = SPACES[kind]
    target, calls = field(space), []
    path = recorded(target.denoise, start(space, pictures=3), run_of("euler", space, levels(space, 50)))
    run, end = last(fit_steps(target.denoise, levels(space, 6), path))
    before = float((end - path.end).square().mean())

    def counted(x, sigma):
        calls.append(sigma)
        return target.denoise(x, sigma)

    better = last(kernel.polish(counted, run, path))
    assert len(calls) in [kernel.polish_cost(6) - 6 * k for k in range(5)]  # halved as often as it had to be
    assert float((solve(target.denoise, path.states[0], better) - path.end).square().mean()) < 0.7 * before
    assert better.shares != run.shares and better.sigmas == run.sigmas
    other = start(space, seed=5, pictures=4)
    there = solve(target.denoise, other, run_of("euler", space, levels(space, 50)))
    gained = fidelity(solve(target.denoise, other, better), there) - fidelity(solve(target.denoise, other, run), there)
    assert gained > 0.5


@pytest.mark.usefixtures("exactly")
def test_polish_of_one_step_is_its_least_squares():
    """The end is linear in the numbers of a single step, so any run comes to the fit's own in one move."""
    space = SPACES["ve"]
    target = field(space)
    path = recorded(target.denoise, start(space, pictures=3), run_of("euler", space, levels(space, 20)))
    sigmas = torch.tensor([TOP["ve"], 0.0], dtype=torch.float64)
    found = last(kernel.polish(target.denoise, FittedRun(tuple(sigmas.tolist()), ((0.3, -0.4),)), path))
    columns = kernel.step_columns(path.states[0], [target.denoise(path.states[0], sigmas[0])])
    rows = torch.stack([one.flatten() for one in (*columns, path.end - columns[1])])
    assert found.numbers[0] == pytest.approx(torch.linalg.lstsq(rows[:2].T, rows[2]).solution.tolist(), rel=1e-4)


def test_a_polish_that_does_not_help_a_picture_it_has_not_seen_is_dropped():
    """The last picture's path is another solver's: what the others want leads away from it."""
    space = SPACES["ve"]
    target = field(space)
    path = recorded(target.denoise, start(space, pictures=3), run_of("euler", space, levels(space, 30)))
    run, end = last(fit_steps(target.denoise, levels(space, 5), path))
    goal = path.end.clone()
    goal[-1] = end[-1] - (goal[-1] - end[-1])  # as far on the other side
    odd = Trajectory(path.sigmas, torch.cat([path.states[:-1], goal[None]]), path.slopes)
    assert last(kernel.polish(target.denoise, run, odd)) is run
    assert last(kernel.polish(target.denoise, run, path)) is not run
    alone = recorded(target.denoise, start(space), run_of("euler", space, levels(space, 30)))
    assert last(kernel.polish(target.denoise, run, alone)) is run


def test_half_of_a_batch_is_every_second_picture_and_of_one_picture_every_second_block():
    assert half(torch.zeros(4, 3, 16, 16)).flatten().tolist() == [True, False, True, False]
    mask = half(torch.zeros(1, 3, 16, 24))
    assert mask[:8, :8].all() and not mask[:8, 8:16].any() and mask[8:, 8:16].all() and mask.float().mean() == 0.5
    assert half(torch.zeros(1, 16, 2, 16, 16)).shape == (16, 16)
    assert half(torch.zeros(1, 2, 32)).shape == (32,)


def test_fidelity_is_the_mean_of_the_pictures_on_the_part_asked_for():
    goal = torch.tensor([0.0, 1.0]).repeat(8).reshape(1, 1, 4, 4)
    assert fidelity(goal + 0.1, goal) == pytest.approx(20, abs=1e-4)
    part = torch.zeros(4, 4, dtype=torch.bool)
    part[0] = True
    near = goal + 0.1
    near[..., 0, :] = goal[..., 0, :] + 0.01
    assert fidelity(near, goal, part) == pytest.approx(40, abs=1e-3)
    assert fidelity(goal, goal) == kernel.EQUAL


def test_levels_that_leave_the_recorded_run_are_refused():
    space = SPACES["ve"]
    path = recorded(field(space).denoise, start(space), run_of("euler", space, levels(space, 10)))
    with pytest.raises(ValueError, match=r"from sigma 14\.6 down to 0"):
        last(fit_steps(field(space).denoise, torch.tensor([20.0, 1.0, 0.0]), path))


def test_a_step_costs_no_more_than_twice_eulers_arithmetic():
    """Passes over the latent: Euler of the host makes a slope (2) and a step (2), ours one and one for each answer."""
    run = FittedRun((2.0, 1.5, 1.0, 0.5), ((0.0, 0.0), (0.0, 0.0, 0.1), (0.0, 0.0, 0.1, 0.1)))
    calls = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.zeros(1, 4, 8, 8)
    with Counting():
        advance(run, 2, x, [x, x, x])
        assert len(calls) <= 4
        kernel.probe(x, x)
    assert not any("item" in str(one) or "_local_scalar" in str(one) for one in calls)


def test_the_sign_grows_with_what_was_not_in_the_fit_and_is_one_on_it():
    space = SPACES["ve"]
    path = recorded(field(space).denoise, start(space), run_of("dpmpp_2m", space, levels(space, 60)))
    run, _ = last(fit_steps(field(space).denoise, levels(space, 8), path))

    def signed(denoise, x) -> float:
        answers, probes = [], []
        for i, sigma in enumerate(run.sigmas[:-1]):
            answers = [denoise(x, torch.tensor(sigma, dtype=torch.float64)), *answers[: run.history]]
            probes.append(kernel.probe(x, answers[0]))
            x = advance(run, i, x, answers)
        return kernel.distance(run, [*probes, kernel.probe(x, answers[0])])

    assert len(run.shares) == 8
    assert signed(field(space).denoise, start(space)) == pytest.approx(1, abs=1e-3)
    assert signed(field(space).denoise, start(space, seed=5)) < kernel.FAR
    wild = (
        lambda x, sigma: field(space).denoise(x, sigma)
        + 4 * torch.sin(20 * torch.log(sigma)) * start(space, 7) / TOP["ve"]
    )
    both = torch.cat([start(space), start(space, seed=5)])
    assert (
        signed(lambda x, sigma: torch.cat([field(space).denoise(x[:1], sigma), wild(x[1:], sigma)]), both) > kernel.FAR
    )
