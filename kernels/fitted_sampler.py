"""A sampler of few steps, fitted to a long run of the user's own: same noise, same picture, fewer evaluations.

Every step is linear in the state and in the latest answers of the network, with r = sigma_next / sigma:

    x' = r x + (1 - r) D_i + a (x - D_i) + b D_i + c_1 (D_i - D_{i-1}) + ... + c_m (D_i - D_{i-m})

a = b = c = 0 is Euler's step, c_1 = (1 - r) h / (2 h_last) that of DPM-Solver++(2M); both hold on VE and on flow. The
numbers of a step are those that bring the states of the fitted run itself nearest to the recorded run at the step's
end, by least squares, so that a step repairs what those before it left over (after OLSS, Duan et al. 2023, arXiv
2305.14677, which fits the weights of all answers and explodes where these resemble each other). The ridge holds each
number by itself, for the noise that is left, x - D, and the answer D have little in common; with x and D in their
place, almost the same at low noise, it would cost what it gains. One recorded run and one run of the new sampler are
all that a fit costs. Where the levels lie is found on paper: along the recorded run every answer is known, so that a
whole run of other levels is a combination of recorded tensors, and its cost comes from their inner products without any
evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from .gate import Verdict, judge
from .schedules import resample_theta
from .space import NoiseSpace
from .timestep_aligner import BLOCK, Trajectory
from .tuner import moved_level, picture_errors
from .types import Denoiser, Latent, Sigmas

T = TypeVar("T")

HISTORY = 2  # earlier answers in a step
RIDGE = 0.1  # on columns of norm 1
NUDGE = 0.01  # of a number, to see how the end moves with it
WIDEST_SEARCH, FINEST_SEARCH = 0.5, 0.02  # of the gap to the neighbouring level
PAPER_GAIN = 1e-3  # relative gain at which the search on paper takes a move
TRIALS = 600  # on paper, a few milliseconds each
EARLY = 0.1  # of the search: an error at sigma counts 1 / (sigma + EARLY), for the steps after it repair a part of it
EQUAL = 120.0  # dB, where nothing differs that counts
PROBED = 1024  # elements of each picture, at equal distances, that the sign of leaving the fitted range is read from
FAR = 2.0  # of that sign: beyond, a run is far from what it was fitted to
CLEARLY = 3.0  # dB by which levels found on paper must beat the run's own: these are safer for other prompts
CHUNK = 1 << 16  # elements of the inner products at a time


@dataclass(frozen=True)
class FittedRun:
    """The levels of a run, decreasing, [n+1], and the numbers a, b, c_1, ... of each of its n steps.

    Step i has at most i earlier answers, so its row has from 2 to 2 + i numbers. shares: what `correction_shares` were
    on the pictures of the fit, [n], or ().
    """

    sigmas: tuple[float, ...]
    numbers: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.numbers)

    @property
    def history(self) -> int:
        """How many answers before the newest a run has to keep."""
        return max(map(len, self.numbers)) - 2

    def weights(self, i: int) -> tuple[float, list[float]]:
        """Of the state, and of the answers from the newest back, in step i."""
        a, b, *c = self.numbers[i]
        r = self.sigmas[i + 1] / self.sigmas[i]
        return r + a, [1 - r - a + b + sum(c), *(-one for one in c)]


def advance(run: FittedRun, i: int, x: Latent, answers: Sequence[Latent]) -> Latent:
    """The state after step i; answers: the network's, the newest first, at least as many as the step has numbers for.

    One multiplication and as many additions as there are answers, nothing is read back from the device.
    """
    of_state, of_answers = run.weights(i)
    out = x * of_state
    for answer, weight in zip(answers, of_answers, strict=False):
        out.add_(answer, alpha=weight)
    return out


def solve(denoise: Denoiser, x: Latent, run: FittedRun) -> Latent:
    """The end of the run from the state x at its first level."""
    answers: list[Latent] = []
    for i, sigma in enumerate(run.sigmas[:-1]):
        answers = [denoise(x, torch.tensor(sigma, dtype=torch.float64)), *answers[: run.history]]
        x = advance(run, i, x, answers)
    return x


def probe(x: Latent, denoised: Latent) -> Tensor:
    """A few elements of a state and of its answer, [2 b k] on the device: what `correction_shares` looks at."""
    apart = -(-x[0].numel() // PROBED)
    return torch.stack([x.flatten(1)[:, ::apart], denoised.flatten(1)[:, ::apart]]).float()


def correction_shares(run: FittedRun, probes: Sequence[Tensor]) -> Tensor:
    """How large the fitted part of each step is beside Euler's step, [n b]; probes: of each step, then of the end.

    It grows with the guidance and with whatever bends the paths more than they bent in the fit, long before a picture
    shows it.
    """
    x, denoised = torch.stack(list(probes)).unbind(1)  # [n+1 b k]
    ratio = torch.tensor([b / a for a, b in pairwise(run.sigmas)], dtype=x.dtype, device=x.device)[:, None, None]
    plain = torch.lerp(denoised[:-1], x[:-1], ratio)
    return (x[1:] - plain).norm(dim=2) / (plain - x[:-1]).norm(dim=2).clamp(min=1e-12)


def distance(run: FittedRun, probes: Sequence[Tensor]) -> float:
    """How far a run went from what it was fitted to: by which factor its `correction_shares` exceed those of the fit,
    the geometric mean over steps, of the picture that is farthest; beyond FAR it is not to be trusted."""
    fitted = torch.tensor(run.shares, dtype=torch.float32).clamp(min=1e-6)
    grown = correction_shares(run, probes).cpu().clamp(min=1e-6) / fitted[:, None]
    return float(grown.log().mean(dim=0).exp().max())


def fit_steps(
    denoise: Denoiser, sigmas: Sigmas, path: Trajectory, part: Tensor | None = None, history: int = HISTORY
) -> Generator[int, None, tuple[FittedRun, Latent]]:
    """A run over the levels `sigmas` that follows `path` from its first state, and where it ends; yields its steps.

    part: mask of the elements to fit to, which broadcasts against a state; None: all. ValueError for levels that do not
    lie within those of the path.
    """
    levels = check_within(sigmas, path)
    x = path.states[0]
    answers: list[Latent] = []
    numbers: list[tuple[float, ...]] = []
    probes: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        answers = [denoise(x, torch.tensor(sigma, dtype=torch.float64)), *answers[:history]]
        columns = step_columns(x, answers)
        target = path.at(sigma_next) - plain_step(x, answers[0], sigma, sigma_next)
        numbers.append(tuple(least_squares([_chosen(one, part) for one in columns], _chosen(target, part)).tolist()))
        probes.append(probe(x, answers[0]))
        x = advance(FittedRun(tuple(levels[: i + 2]), tuple(numbers)), i, x, answers)
        yield i + 1
    return _with_shares(FittedRun(tuple(levels), tuple(numbers)), [*probes, probe(x, answers[0])]), x


def _with_shares(run: FittedRun, probes: Sequence[Tensor]) -> FittedRun:
    """The run with its `correction_shares` on the pictures of these probes, geometric means."""
    shares = correction_shares(run, probes).clamp(min=1e-6).log().mean(dim=1).exp()
    return replace(run, shares=tuple(shares.tolist()))


def check_within(sigmas: Sigmas, path: Trajectory) -> list[float]:
    """The levels as numbers; ValueError unless they decrease and share both ends with the path."""
    levels, ends = sigmas.tolist(), (float(path.sigmas[0]), float(path.sigmas[-1]))
    near = lambda a, b: abs(a - b) <= 1e-5 * max(abs(a), abs(b))
    if not (near(levels[0], ends[0]) and near(levels[-1], ends[1]) and all(a > b for a, b in pairwise(levels))):
        raise ValueError(
            f"A fitted run goes from sigma {ends[0]:.4g} down to {ends[1]:.4g}, as the recorded one, but its levels "
            f"are {' '.join(f'{s:.4g}' for s in levels)}."
        )
    return levels


def plain_step(x: Latent, denoised: Latent, sigma: float, sigma_next: float) -> Latent:
    """The plain step: r x + (1 - r) D."""
    return torch.lerp(denoised, x, sigma_next / sigma)


def step_columns(x: Latent, answers: Sequence[Latent]) -> list[Latent]:
    """What the numbers of a step multiply: the noise left, the newest answer, its differences from those before."""
    return [x - answers[0], answers[0], *(answers[0] - earlier for earlier in answers[1:])]


def least_squares(columns: Sequence[Tensor], target: Tensor) -> Tensor:
    """The float64 numbers [k] with the least |sum_k n_k column_k - target|^2 and a ridge on columns of norm 1."""
    flat = torch.stack([one.reshape(-1) for one in (*columns, target)]).cpu()
    return solve_normal(inner_products(flat), RIDGE)


def inner_products(rows: Tensor) -> Tensor:
    """[k k] float64 of rows [k n], a part of n at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(CHUNK, dim=1):
        wide = part.double()
        total += wide @ wide.T
    return total


def solve_normal(products: Tensor, ridge: float) -> Tensor:
    """The least-squares numbers [k] from the inner products [k+1 k+1] of k columns and, last, the target; `ridge`: on
    columns of norm 1."""
    gram, right = products[:-1, :-1], products[:-1, -1]
    norm = gram.diagonal().clamp(min=1e-30).sqrt()
    ridged = gram / norm / norm[:, None] + ridge * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(ridged, right / norm) / norm


def _chosen(x: Latent, part: Tensor | None) -> Tensor:
    return x if part is None else x[part.expand_as(x)]


# --- where the levels lie ---


class OnPaper:
    """A recorded run as vectors over its own states and slopes: [2 (n+1)], with their inner products."""

    def __init__(self, path: Trajectory):
        self._levels = path.sigmas.double().tolist()
        self._products = inner_products(torch.cat([path.states.flatten(1), path.slopes.flatten(1)]))

    def state(self, sigma: float) -> Tensor:
        """The path's state: the cubic Hermite polynomial, as in Trajectory."""
        i, t, h = self._place(sigma)
        n, vector = len(self._levels), self._nothing()
        vector[i] += 2 * t**3 - 3 * t**2 + 1
        vector[i + 1] += 3 * t**2 - 2 * t**3
        vector[n + i] += (t**3 - 2 * t**2 + t) * h
        vector[n + i + 1] += (t**3 - t**2) * h
        return vector

    def answer(self, sigma: float) -> Tensor:
        """What the network said near `sigma`: between two recorded answers x - sigma dx/dsigma, linear in ln sigma."""
        low = self._levels[-2] if self._levels[-1] == 0 else self._levels[-1]
        i, _, _ = self._place(max(sigma, low))
        i = min(i, len(self._levels) - 2 - (self._levels[-1] == 0))
        high, low = self._levels[i : i + 2]
        share = math.log(high / max(sigma, low)) / math.log(high / low) if i + 1 < len(self._levels) and low else 0.0
        vector, n = self._nothing(), len(self._levels)
        for at, weight in ((i, 1 - share), (i + 1, share)):
            vector[at] += weight
            vector[n + at] -= weight * self._levels[at]
        return vector

    def cost(self, sigmas: Sigmas, history: int = HISTORY) -> float:
        """The squared distances of a fitted run from the path, a weighted sum over its steps, if the network said near
        the path what it says on it."""
        levels, total = sigmas.tolist(), 0.0
        answers: list[Tensor] = []
        x = self.state(levels[0])
        for sigma, sigma_next in pairwise(levels):
            answers = [self.answer(sigma), *answers[:history]]
            plain, goal = plain_step(x, answers[0], sigma, sigma_next), self.state(sigma_next)
            columns = torch.stack([*step_columns(x, answers), goal - plain])
            x = plain + solve_normal(columns @ self._products @ columns.T, RIDGE) @ columns[:-1]
            total += max(float((x - goal) @ self._products @ (x - goal)), 0.0) / (sigma_next + EARLY)
        return total

    def _place(self, sigma: float) -> tuple[int, float, float]:
        """The step that holds `sigma`, how far into it, and its length."""
        i = next((i for i, level in enumerate(self._levels[1:]) if level <= sigma), len(self._levels) - 2)
        h = self._levels[i + 1] - self._levels[i]
        return i, min(max((sigma - self._levels[i]) / h, 0.0), 1.0), h

    def _nothing(self) -> Tensor:
        return torch.zeros(2 * len(self._levels), dtype=torch.float64)


def search_levels(
    paper: OnPaper, start: Sigmas, lowest: float, space: NoiseSpace, has_time: Callable[[], bool] = lambda: True
) -> Sigmas:
    """Levels for a fitted run by a pattern search on paper; the ends of `start` stay, no inner one below `lowest`."""
    best, move, trials = start.double(), WIDEST_SEARCH, 0
    least = paper.cost(best)
    while move >= FINEST_SEARCH and trials < TRIALS and has_time():
        gained = False
        for i in range(1, len(best) - 1):
            for direction in (1, -1):
                moved = moved_level(best, i, direction * move, space)
                if not (moved[:-1] > moved[1:]).all() or moved[i] < lowest:
                    continue
                cost, trials = paper.cost(moved), trials + 1
                if cost < (1 - PAPER_GAIN) * least:
                    best, least, gained = moved, cost, True
                    break
        move = move if gained else move / 2
    return best


# --- learning from a recorded run ---


@dataclass(frozen=True)
class Learned:
    """A fitted run, what it proved, dB of its end to the recorded one on the part that it was not fitted to, and the
    end."""

    run: FittedRun
    psnr: float
    evaluations: int
    end: Latent


def learn(
    denoise_over: Callable[[Sigmas], Denoiser], path: Trajectory, steps: int, space: NoiseSpace, paper: OnPaper
) -> Generator[int, None, Learned]:
    """A run of `steps` steps that follows `path`; yields after each of at most 2 `steps` evaluations.

    denoise_over: levels -> the network as a run over these asks it. paper: that of the path.

    Fitted to one half and proved on the other: of several pictures to every second one, of one to every second block of
    8x8 latent pixels. The recorded run's own levels, spread over fewer steps, and those of the search on paper are both
    run; the latter stay if they come clearly nearer on the unseen half.
    """
    run, psnr, end = yield from _nearest(denoise_over, path, steps, space, paper, half(path.states[0]))
    return Learned(run, psnr, 2 * steps, end)


def _nearest(
    denoise_over: Callable[[Sigmas], Denoiser],
    path: Trajectory,
    steps: int,
    space: NoiseSpace,
    paper: OnPaper | None,
    part: Tensor | None,
) -> Generator[int, None, tuple[FittedRun, float, Latent]]:
    """Of the fits over the path's own levels and over those found on paper, where these end clearly nearer outside of
    `part` (None: everywhere), the run, its dB there, and its end. Without `paper` the own levels alone."""
    plain = resample_theta(path.sigmas.double(), steps, space)
    plain[0], plain[-1] = path.sigmas[0], path.sigmas[-1]
    tried = [plain]
    if paper is not None and steps > 1:
        lowest = min(level for level in path.sigmas.tolist() if level > 0)
        tried.append(search_levels(paper, plain, lowest, space))
    found: list[tuple[FittedRun, float, Latent]] = []
    for sigmas in tried:
        run, end = yield from fit_steps(denoise_over(sigmas), sigmas, path, part)
        found.append((run, fidelity(end, path.end, None if part is None else ~part), end))
    own, *others = found
    return max([own, *(one for one in others if one[1] > own[1] + CLEARLY)], key=lambda one: one[1])


def half(x: Latent) -> Tensor:
    """Mask of half of x: every second picture of a batch; of a single one every second block of 8x8 latent pixels,
    smaller ones where a side has fewer than two of these."""
    if len(x) > 1:
        return (torch.arange(len(x)) % 2 == 0).reshape(-1, *[1] * (x.ndim - 1))
    sides = x.shape[-2:] if x.ndim > 3 else x.shape[-1:]
    block = max(min(BLOCK, *(side // 2 for side in sides)), 1)
    place = torch.zeros(1, dtype=torch.long)
    for side in sides:
        place = place[..., None] + torch.arange(side) // block
    return place[0] % 2 == 0


def fidelity(x: Latent, exact: Latent, part: Tensor | None = None) -> float:
    """dB of latents to those of another run, the mean over pictures; the peak is each exact picture's own range."""
    total, counted = 0.0, 0
    keep = None if part is None else part.expand_as(x)
    for i, (one, goal) in enumerate(zip(x.double(), exact.double(), strict=True)):
        inside = slice(None) if keep is None else keep[i]
        if not one[inside].numel():
            continue
        error, peak = float((one - goal)[inside].square().mean()), float(goal.max() - goal.min())
        total += EQUAL if error == 0 else min(EQUAL, 10 * math.log10(peak**2 / error)) if peak else 0.0
        counted += 1
    return total / counted if counted and math.isfinite(total) else -math.inf


# --- proving on pictures that no fit has seen ---


@dataclass(frozen=True)
class Proof:
    """What held-out pictures say of a fitted run beside the best known way to spend as many evaluations.

    rival: its name. psnr: dB of the run's ends to the long run's, the mean over the held-out pictures. end: of the
    first of these.
    """

    run: FittedRun
    rival: str
    verdict: Verdict
    psnr: float
    end: Latent


@dataclass(frozen=True)
class Attempt:
    """What is being done, the run that it is about, and what was proved so far."""

    stage: str
    run: FittedRun | None = None
    proofs: tuple[Proof, ...] = ()


def prove(
    denoise_over: Callable[[Sigmas], Denoiser],
    paths: Sequence[Trajectory],
    held_out: int,
    counts: Sequence[int],
    rivals: Callable[[int], dict[str, Callable[[int], Latent]]],
    space: NoiseSpace,
    levels: bool = True,
    doubt: float = 0.0,
    has_time: Callable[[], bool] = lambda: True,
) -> Generator[Attempt, None, list[Proof]]:
    """A fitted run for each count of steps, judged on the last `held_out` of the recorded `paths`.

    rivals: count -> the known ways to spend as many evaluations, by name: where they end from the noise of the i-th
    path; the best of them on the paths that are fitted is what a run must beat. levels: whether these are searched.
    doubt: how wrong the recorded ends may be, as in `judge`. Counts that no time is left for are left out.
    """
    fitted, unseen = joined(paths[:-held_out]), paths[-held_out:]
    paper, first = OnPaper(fitted) if levels else None, len(paths) - held_out
    proofs: list[Proof] = []
    for steps in counts:
        if proofs and not has_time():
            break
        known, errors = rivals(steps), {}
        for name, ends in known.items():
            errors[name] = float(_errors([ends(i) for i in range(first)], paths).mean())
            yield Attempt(f"known samplers, {steps} evaluations")
        rival = min(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
        work = _nearest(denoise_over, fitted, steps, space, paper, None)
        run, *_ = yield from _attempted(work, f"fitting {steps} steps")
        better = polish(denoise_over(torch.tensor(run.sigmas)), run, fitted)
        run = yield from _attempted(better, f"polishing {steps} steps")
        theirs, mine = [], []
        for i, path in enumerate(unseen):
            theirs.append(known[rival](first + i))
            mine.append(solve(denoise_over(torch.tensor(run.sigmas)), path.states[0], run))
            yield Attempt("held-out pictures", run)
        verdict = judge(_errors(theirs, unseen), _errors(mine, unseen), len(counts), doubt)
        psnr = sum(fidelity(end, path.end) for end, path in zip(mine, unseen, strict=True)) / held_out
        proofs.append(Proof(run, rival, verdict, psnr, mine[0]))
        yield Attempt("held-out pictures", run, tuple(proofs))
    return proofs


def polish(denoise: Denoiser, run: FittedRun, path: Trajectory) -> Generator[None, None, FittedRun]:
    """The run with all its numbers moved at once so that its end comes nearest to the path's: a step of Gauss-Newton by
    differences. Yields now and then; at most `polish_cost` evaluations.

    `fit_steps` brings each state near, and a state may be as far as it likes where the end comes nearer by it. How the
    end moves with a number is found by another run from that step on. The move is made on all pictures but the last and
    kept, then made on all, if the last one's end comes nearer by it: under strong guidance it often does not, for paths
    that bend much are far from linear. One picture alone is left as it is.
    """
    if path.states.shape[1] < 2:
        return run
    states, answers = _made(denoise, run, path.states[0])
    end, moves = states[-1], []
    for i, numbers in enumerate(run.numbers):
        for column in step_columns(states[i], answers[i])[: len(numbers)]:
            aside, _ = _made(denoise, run, states[i + 1] + NUDGE * column, i + 1, answers[i])
            moves.append(((aside[-1] - end) / NUDGE).cpu())
            yield
    found, before = run, picture_errors(end, path.end)
    for seen in (slice(None, -1), slice(None)):
        by = least_squares([one[seen] for one in moves], (path.end - end)[seen].cpu()).tolist()
        for share in (1.0, 0.5, 0.25):
            left = iter(by)
            moved = replace(run, numbers=tuple(tuple(one + share * next(left) for one in row) for row in run.numbers))
            states, answers = _made(denoise, moved, path.states[0])
            yield
            after = picture_errors(states[-1], path.end)
            if after[seen].mean() < before[seen].mean():
                break
        if not (after.mean() < before.mean() and after[-1] < before[-1]):
            return found
        found = _with_shares(moved, [probe(x, a[0]) for x, a in zip(states, [*answers, answers[-1]], strict=True)])
    return found


def _made(
    denoise: Denoiser, run: FittedRun, x: Latent, i: int = 0, answers: Sequence[Latent] = ()
) -> tuple[list[Latent], list[list[Latent]]]:
    """The states of a run from x at step i on, and what each step has of the network's answers, the newest first."""
    states, known = [x], [list(answers)]
    for k in range(i, run.steps):
        answer = denoise(states[-1], torch.tensor(run.sigmas[k], dtype=torch.float64))
        known.append([answer, *known[-1][: run.history]])
        states.append(advance(run, k, states[-1], known[-1]))
    return states, known[1:]


def polish_cost(steps: int, history: int = HISTORY) -> int:
    """Evaluations of `polish` at most, for each of two or more pictures."""
    return 7 * steps + sum((2 + min(i, history)) * (steps - 1 - i) for i in range(steps))


def _errors(ends: Sequence[Latent], paths: Sequence[Trajectory]) -> Tensor:
    return torch.cat([picture_errors(end, path.end) for end, path in zip(ends, paths, strict=False)])


def joined(paths: Sequence[Trajectory]) -> Trajectory:
    """Paths over the same levels as one of more pictures."""
    if len(paths) == 1:
        return paths[0]
    return Trajectory(
        paths[0].sigmas,
        torch.cat([one.states for one in paths], dim=1),
        torch.cat([one.slopes for one in paths], dim=1),
    )


def _attempted(work: Generator[Any, None, T], stage: str) -> Generator[Attempt, None, T]:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
        yield Attempt(stage)
