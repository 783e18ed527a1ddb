"""How good is a sampler where the right answer is known? Stock schedules and solvers on exact denoisers, no network.

python dev.py bench exact [--solvers euler dpmpp_2m] [--steps 5 8 10 20 50] [--samples 1024]

`analytic_model(target)` is a MODEL whose network is the exact denoiser of a distribution (tests/analytic.py), with
the noise of SD1.5 or of SD3, so that the host's schedulers, samplers and MODEL -> MODEL nodes apply to it as to any
model; what is left between its output and the data is the error of schedule and solver alone. Two targets in either
space:

- a Gaussian field with a 1/f spectrum, like natural images. Every sampler here is linear on it, so the output is
  Gaussian, and driving each of its noises alone gives its spread per frequency without drawing samples: the KL
  divergence from the data, in nats per latent element, is exact.
- a mixture of two Gaussians in one dimension, far enough apart to bend the trajectories. Wasserstein-2 distance between
  the output and the data by their quantiles: mean over disjoint groups of seeds, with the standard error between them.

For deterministic solvers also the root mean square distance to where the exact probability-flow ODE takes the same
noise. Everything runs through the host's SamplerCustomAdvanced.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import _pack  # noqa: F401
from analytic import Gaussian, Mixture, PowerLawField, gaussian_kl
from comfy_process import Host
from harness import CORE
from pack.kernels.space import NoiseSpace
from results import DOCS, Table, markdown, record

SOLVERS = ["euler", "dpmpp_2m", "uni_pc", "heun", "euler_ancestral"]
STOCK = ["normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform", "beta", "kl_optimal"]
SCHEDULES = {
    "ve": [*STOCK, "core AYS", "core GITS", "KL-optimal"],
    "flow": [*STOCK, "core OptimalSteps", "KL-optimal"],
}
STOCHASTIC = {"euler_ancestral"}
SIDE = 16  # of the field, as latents of the demo models
GROUPS = 3
TITLES = {"ve": "noise of SD1.5 (VE)", "flow": "noise of SD3 (flow)"}


# --- a MODEL without a network ----------------------------------------------------------------------------------------


class AnalyticNetwork(nn.Module):
    """The exact denoiser in a network's place: scaled input and timestep in, eps or velocity out.

    It is conditioned on the timestep that it is given, like a network, so methods that change the timestep act on it,
    too. Timesteps may be fractional: between and beyond the trained ones ln sigma is linear in the timestep.
    """

    dtype = torch.float32

    def __init__(self, target: Gaussian | Mixture | PowerLawField, log_sigmas: Tensor):
        super().__init__()
        self.target, self.flow = target, target.space.kind == "flow"
        self.register_buffer("log_sigmas", log_sigmas)

    def sigma(self, timestep: Tensor) -> Tensor:
        """[b] -> [b]: the noise level of a timestep, 0 ... 999 or flow x 1000."""
        if self.flow:
            return timestep.double() / 1000
        low = timestep.double().floor().clamp(0, len(self.log_sigmas) - 2).long()
        a, b = self.log_sigmas[low], self.log_sigmas[low + 1]
        return (a + (timestep - low) * (b - a)).exp()

    def forward(
        self, x: Tensor, timesteps: Tensor, context=None, control=None, transformer_options=None, **_
    ) -> Tensor:
        sigma = self.sigma(timesteps)
        column = sigma.reshape(-1, *[1] * (x.ndim - 1))
        latent = x.double() if self.flow else x.double() * (column**2 + 1).sqrt()
        return ((latent - self.denoise(latent, sigma)) / column).to(x)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """A mixture in d dimensions reads a latent as rows of d elements."""
        if not isinstance(self.target, Mixture):
            return self.target.denoise(x, sigma)
        rows = x.reshape(-1, self.target.means.shape[1])
        return self.target.denoise(rows, sigma.repeat_interleave(len(rows) // len(x))).reshape(x.shape)


def analytic_model(target: Gaussian | Mixture | PowerLawField, channels: int = 4):
    """A MODEL that denoises `target` exactly; its latents are [b `channels` h w], on the CPU, in the target's scale.

    target.space decides the family: "ve" is an eps model with SD1.5's levels, "flow" a velocity model with SD3's shift.
    """
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    flow = target.space.kind == "flow"
    config = (comfy.supported_models.SD3 if flow else comfy.supported_models.SD15)({})
    config.unet_config = {"disable_unet_model_creation": True}
    config.latent_format = comfy.latent_formats.LatentFormat()
    config.latent_format.latent_channels = channels
    kind = comfy.model_base.ModelType.FLOW if flow else comfy.model_base.ModelType.EPS
    model = comfy.model_base.BaseModel(config, kind, device=torch.device("cpu"))
    network = AnalyticNetwork(target, model.model_sampling.sigmas.double().log())
    model.diffusion_model = network
    if not flow:
        model.model_sampling = _continuous(model.model_sampling)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def _continuous(sampling):
    """The same levels, but `timestep` returns the exact fraction where the stock class rounds to a trained timestep.

    Rounding is an error of the input, not of the sampler under test.
    """

    class Continuous(type(sampling)):
        def timestep(self, sigma: Tensor) -> Tensor:
            levels, log_sigma = self.sigmas.double().log(), sigma.double().log()
            low = (torch.searchsorted(levels, log_sigma) - 1).clamp(0, len(levels) - 2)
            return low + (log_sigma - levels[low]) / (levels[low + 1] - levels[low])

    sampling.__class__ = Continuous
    return sampling


# --- running it -------------------------------------------------------------------------------------------------------


class GivenNoise:
    """A NOISE that is the tensor it was made of."""

    seed = 0

    def __init__(self, noise: Tensor):
        self.noise = noise

    def generate_noise(self, latent: dict) -> Tensor:
        return self.noise.clone()


def levels(host: Host, model, name: str, steps: int) -> Tensor:
    """SIGMAS by the name of a stock scheduler, of a core node ("core AYS") or of one of ours."""
    import comfy.samplers

    if name in CORE:
        node, inputs = CORE[name]
        return host.call(node, steps=steps, denoise=1.0, **inputs)[0]
    if name in comfy.samplers.SCHEDULER_NAMES:
        return host.call("BasicScheduler", model=model, scheduler=name, steps=steps, denoise=1.0)[0]
    return host.call("AttuneScheduler", model=model, schedule=name, steps=steps, denoise=1.0)[0]


def sample(host: Host, model, solver, sigmas: Tensor, noise: Tensor, options: dict | None = None) -> Tensor:
    """The latents that a sampler of the host, by name or a SAMPLER, makes of `noise`, [b c h w]."""
    (guider,) = host.call("BasicGuider", model=model, conditioning=[[torch.zeros(1, 1, 1), {}]])
    (sampler,) = host.call("KSamplerSelect", sampler_name=solver) if isinstance(solver, str) else (solver,)
    sampler.extra_options = {**sampler.extra_options, **(options or {})}
    out, _ = host.call(
        "SamplerCustomAdvanced", noise=GivenNoise(noise), guider=guider, sampler=sampler,
        sigmas=sigmas.clone(),  # uni_pc writes into the levels it is given
        latent_image={"samples": torch.zeros_like(noise)},
    )  # fmt: skip
    return out["samples"]


def start(model, sigmas: Tensor, noise: Tensor) -> Tensor:
    """The x with which the host begins, float64: its own scaling of the noise at the first level."""
    sampling, first = model.model.model_sampling, sigmas[:1]
    largest = bool(first >= sampling.sigma_max * (1 - 1e-5))
    return sampling.noise_scaling(first.double(), noise.double(), torch.zeros_like(noise).double(), largest)


def gains(host: Host, model, solver: str, sigmas: Tensor, channels: int, side: int) -> Tensor:
    """Response [noises, frequencies ...] of a sampler's output to each of its independent noises, driven alone.

    The first is the starting noise, then one per step for a stochastic solver. An impulse holds every frequency with
    the same weight, so the transform of the output is the gain per frequency; sqrt(sum of squares) is the output's
    standard deviation when the noises are unit normal.
    """
    drives = 1 + (len(sigmas) - 1 if solver in STOCHASTIC else 0)
    impulse = torch.zeros(channels, side, side)
    impulse[:, 0, 0] = 1
    noise, injected = torch.zeros(drives, channels, side, side), iter(range(1, drives))
    noise[0] = impulse

    def drive(*_) -> Tensor:
        out = torch.zeros_like(noise)
        out[next(injected)] = impulse
        return out

    options = {"noise_sampler": drive} if solver in STOCHASTIC else {}
    return torch.fft.fft2(sample(host, model, solver, sigmas, noise, options).double()).real[:, 0]


# --- exact answers ----------------------------------------------------------------------------------------------------


def field_scores(host: Host, model, solver: str, sigmas: Tensor) -> tuple[float, float | None]:
    """KL(data || output) in nats per latent element, and the rms distance to the exact ODE's end."""
    target = model.model.diffusion_model.target
    gain = gains(host, model, solver, sigmas, 1, target.side)
    std = target.stds()
    kl = float(gaussian_kl(gain.square().sum(0).sqrt(), std)) / std.numel()
    if solver in STOCHASTIC:
        return kl, None
    begin = float(start(model, sigmas, torch.ones(1)))
    first = sigmas[0].double()
    exact = begin * std / (target.space.alpha(first) ** 2 * std**2 + first**2).sqrt()
    return kl, float((gain[0] - exact).square().mean().sqrt())


def cdf(target: Mixture, x: Tensor, sigma: Tensor) -> Tensor:
    """P(X <= x) of a one-dimensional mixture at noise level sigma, x [n]."""
    alpha = target.space.alpha(sigma)
    spread = (alpha**2 * target.stds**2 + sigma**2).sqrt()  # [k]
    z = (x[:, None] - alpha * target.means[:, 0]) / spread
    return (target.weights * torch.special.ndtr(z)).sum(1)


def quantiles(target: Mixture, p: Tensor) -> Tensor:
    """The clean mixture's inverse distribution function by bisection, float64 [n]."""
    low, high = torch.full_like(p, -20.0), torch.full_like(p, 20.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(target, middle, torch.zeros(())) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def wasserstein(samples: Tensor, target: Mixture) -> float:
    """Wasserstein-2 distance of n one-dimensional samples to the target: sorted samples against its quantiles."""
    n = samples.numel()
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return float((samples.double().flatten().sort().values - quantiles(target, p)).square().mean().sqrt())


def stratified(n: int, seed: int) -> Tensor:
    """n unit normals [n], one in each n-th of the distribution, in random order: far less noisy than plain draws."""
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
    return torch.special.ndtri(p.clamp(1e-12, 1 - 1e-12)).float()


def mixture_noise(samples: int) -> Tensor:
    """[groups 1 side side]: one disjoint group of seeds per batch item."""
    side = math.isqrt(samples)
    return torch.stack([stratified(side * side, seed) for seed in range(GROUPS)]).reshape(GROUPS, 1, side, side)


def mixture_scores(host: Host, model, solver: str, sigmas: Tensor, noise: Tensor) -> tuple[float, float, float | None]:
    """Wasserstein-2 distance to the data, its standard error over the groups, and the rms distance to the ODE's end."""
    target = model.model.diffusion_model.target
    out = sample(host, model, solver, sigmas, noise)
    distances = torch.tensor([wasserstein(group, target) for group in out])
    error = None
    if solver not in STOCHASTIC:
        # In one dimension the flow keeps the order of the points, hence their quantiles.
        begin = start(model, sigmas, noise).flatten()
        exact = quantiles(target, cdf(target, begin, sigmas[0].double()))
        error = float((out.double().flatten() - exact).square().mean().sqrt())
    return float(distances.mean()), float(distances.std() / len(distances) ** 0.5), error


def field(space: str) -> PowerLawField:
    return PowerLawField(1, SIDE, NoiseSpace(space))


def mixture(space: str) -> Mixture:
    """Two bumps with mean 0 and variance 1, the left one broader and rarer."""
    weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in ([0.35, 0.65], [-1.2, 0.8], [0.3, 0.15]))
    mean = (weights * means).sum()
    spread = (weights * (stds**2 + (means - mean) ** 2)).sum().sqrt()
    return Mixture(weights, ((means - mean) / spread)[:, None], stds / spread, NoiseSpace(space))


# --- tables -----------------------------------------------------------------------------------------------------------


def pivot(title: str, rows: list[dict], steps: list[int], value: str, note: str, error: str | None = None) -> Table:
    """Solver and schedule down, steps across; the best schedule of a solver and step count is marked."""
    best = {}
    for row in rows:
        key = row["solver"], row["steps"]
        best[key] = min(best.get(key, math.inf), row[value])
    lines = []
    for solver, schedule in dict.fromkeys((row["solver"], row["schedule"]) for row in rows):
        line = [solver, schedule]
        for n in steps:
            row = next(r for r in rows if (r["solver"], r["schedule"], r["steps"]) == (solver, schedule, n))
            text = f"{row[value]:.3g}" + (f" ± {row[error]:.1g}" if error else "")
            line.append(f"**{text}**" if row[value] == best[solver, n] else text)
        lines.append(line)
    return Table(title, ["solver", "schedule", *(f"{n} steps" for n in steps)], lines, note)


def measure(host: Host, args: argparse.Namespace) -> tuple[list[Table], dict]:
    """All tables, and the rows behind them."""
    tables, data, noise = [], {}, mixture_noise(args.samples)
    for space in args.spaces:
        of_field, of_mixture = analytic_model(field(space), 1), analytic_model(mixture(space), 1)
        rows = []
        for solver in args.solvers:
            for name in SCHEDULES[space]:
                for steps in args.steps:
                    sigmas = levels(host, of_field, name, steps)
                    kl, field_error = field_scores(host, of_field, solver, sigmas)
                    w2, standard_error, mixture_error = mixture_scores(host, of_mixture, solver, sigmas, noise)
                    measured = {
                        "kl": kl, "field_error": field_error, "w2": w2, "standard_error": standard_error,
                        "mixture_error": mixture_error,
                    }  # fmt: skip
                    rounded = {key: None if value is None else float(f"{value:.6g}") for key, value in measured.items()}
                    rows.append({"solver": solver, "schedule": name, "steps": steps, **rounded})
                print(f"\r{space} {solver} {name}      ", end="", flush=True)
        data[space] = rows
        tables += tables_of(space, rows, args.steps, noise)
    print()
    return tables, data


def tables_of(space: str, rows: list[dict], steps: list[int], noise: Tensor) -> list[Table]:
    target, draws = mixture(space), torch.Generator().manual_seed(0)
    exact = [wasserstein(quantiles(target, torch.special.ndtr(n.double().flatten())), target) for n in noise]
    drawn = [wasserstein(target.sample(noise[0].numel(), draws), target) for _ in range(64)]
    w2_note = (
        f"Bold: the best schedule of that solver. ±: standard error over {GROUPS} groups of seeds with "
        f"{noise[0].numel()} samples each. As many draws from the data score {sum(exact) / len(exact):.2g} with the "
        f"same stratified noise and {sum(drawn) / len(drawn):.2g} with independent noise: below the first, "
        "deterministic solvers cannot be told apart, below the second, stochastic ones."
    )
    kl_note = "Exact, without samples. Bold: the best schedule of that solver."
    ode = [row for row in rows if row["solver"] not in STOCHASTIC]
    where = TITLES[space]
    tables = [
        pivot(f"1/f field, {where}: KL in nats per element", rows, steps, "kl", kl_note),
        pivot(f"Mixture, {where}: Wasserstein-2", rows, steps, "w2", w2_note, "standard_error"),
    ]
    if ode:
        note = "Against where the exact ODE takes the same noise; data of variance 1. Bold: the best schedule."
        tables += [
            pivot(f"1/f field, {where}: rms distance to the exact ODE's end", ode, steps, "field_error", note),
            pivot(f"Mixture, {where}: rms distance to the exact ODE's end", ode, steps, "mixture_error", note),
        ]
    return tables


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--solvers", nargs="+", default=SOLVERS, choices=SOLVERS)
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 8, 10, 20, 50])
    parser.add_argument("--samples", type=int, default=1024, help="per group of seeds; a square number")
    parser.add_argument("--cache", type=Path, help="not used: everything is computed anew in minutes")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    if math.isqrt(args.samples) ** 2 != args.samples:
        parser.error("--samples must be a square number, such as 1024")
    with tempfile.TemporaryDirectory() as folder:
        tables, data = measure(Host(Path(folder)), args)
    print("\n".join(map(markdown, tables)))
    notes = [
        "Denoisers known in closed form in a network's place, sampled by the host: the error of schedule and solver "
        "alone, against answers that are exact. No table here says how a trained network behaves; it says what is left "
        "to blame on it.",
    ]
    record("exact", "Schedules and solvers where the answer is known", tables, began, (), notes, args.out, data)


if __name__ == "__main__":
    main()
