"""Runs from the same noise through the host, each kept under a hash of all that could change it.

A `Scene` is what all runs of a comparison share, a `How` is one of these runs; `FitLab` draws it for some tasks, in
chunks that are always the same, fits short runs to long ones, and measures one run beside another. With `drawn_only`
what is not there raises NotDrawn.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from propagation import NODE
from propagation import counting as counting_parts
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from comfy_process import ROOT
from fitted_steps import CHEBYSHEV, TAYLOR, sample_forecast, sample_olss, sample_plan
from harness import ANY, CORE, Lab, Noise, Task, counting, prompt, tasks
from judge import load_judge
from looks import GROUPS
from metrics import jackknife, perceptual_distance, psnr

CHUNK = 4  # pictures at once; those of one group of seeds
FITTED, OLSS, PLAN = "fitted", "OLSS", "searched plan"
FRESH, LEARNED = 0, 100  # the first task that is drawn, and that is learned from: no prompt or seed is shared
EXACT_STEPS = 48  # of the exact path that is fitted to, as Attune Fit Sampler takes it
LORA = ROOT / "models" / "loras" / "attune_demo_flow_sizes.safetensors"
CONTROLNET = "attune_demo_controlnet.safetensors"
CODE = ("kernels/fitted_sampler", "kernels/timestep_aligner", "kernels/schedules")
FORMAT = 3  # raise it when the way of drawing or measuring changes


class NotDrawn(Exception):
    """Raised in place of computing, where only what is kept is wanted."""


@dataclass(frozen=True)
class Scene:
    """words: "plain", "object alone" or "negative". added: of "lora", "controlnet" and "fp16"."""

    model: str
    cfg: float = 3.0
    side: int = 128
    words: str = "plain"
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class How:
    """A run: a solver by name, with what it is made of where it is no stock one, its levels, and the MODEL -> MODEL
    nodes before it as in `harness.Cell`."""

    solver: str
    sigmas: tuple[float, ...]
    given: tuple = ()
    nodes: tuple = ()


@dataclass(frozen=True)
class Drawn:
    """Latents [n c h w]; evaluations of the whole network and of a part of it; how far a fitted run says it left its
    range, that of the farthest picture drawn at once, [n], else 0."""

    latents: Tensor
    whole: float
    part: float
    signs: Tensor


@dataclass(frozen=True)
class Fit:
    """A fitted run by the fields of its class, and what the node proved of it, dB of latents."""

    run: tuple[tuple[str, Any], ...]
    proved: float

    @property
    def how(self) -> How:
        return How(FITTED, dict(self.run)["sigmas"], tuple(one for one in self.run if one[0] != "sigmas"))


def work_of(count: int) -> list[Task]:
    return tasks(count)


def learned_from(count: int) -> list[Task]:
    return tasks(LEARNED + count, 900_000)[LEARNED:]


class FitLab(Lab):
    """A Lab that measures runs beside others, and fits short ones to long ones; all of it is kept."""

    drawn_only = False

    def drawn(self, scene: Scene, how: How, work: Sequence[Task], at_once: int = CHUNK) -> Drawn:
        found = [self._chunk(scene, how, work[i : i + at_once]) for i in range(0, len(work), at_once)]
        mean_of = lambda name: sum(getattr(one, name) for one in found) / len(found)
        whole = lambda name: torch.cat([getattr(one, name) for one in found])
        return Drawn(whole("latents"), mean_of("whole"), mean_of("part"), whole("signs"))

    def _chunk(self, scene: Scene, how: How, part: Sequence[Task]) -> Drawn:
        path = self.kept("drawn", [astuple(scene), astuple(how), self._code(how)], part, ".safetensors")
        if not path.exists():
            self.must_be_drawn()
            model, signs = self.model(scene, how), [0.0]
            with counting(model) as calls, counting_parts(model) as parts:
                latents = self.run_with(scene, model, self.solver(how, signs), how.sigmas, part)
            counts = (parts["middle"], parts["end"] - parts["middle"]) if is_propagated(how) else (calls[0], 0)
            keep_tensors(path, {"latents": latents}, {"facts": json.dumps([*counts, signs[-1]])})
        with safe_open(path, framework="pt") as file:
            whole, rest, sign = json.loads(file.metadata()["facts"])
            return Drawn(file.get_tensor("latents"), whole, rest, torch.full((len(part),), sign, dtype=torch.float64))

    def decoded(self, scene: Scene, how: How, part: Sequence[Task]) -> Tensor:
        """The pictures of a chunk, which are kept while memory lasts."""
        return self._decoded(scene, how, tuple(part))

    @lru_cache(maxsize=64)  # noqa: B019 - a benchmark has one lab
    def _decoded(self, scene: Scene, how: How, part: tuple[Task, ...]) -> Tensor:
        return self.pictures(scene.model, self.drawn(scene, how, part).latents)

    def pixels(self, scene: Scene, how: How, goal: How, work: Sequence[Task]) -> Tensor:
        """PSNR in dB of each picture to the other run's."""
        return self._compared("pixels", psnr, scene, how, goal, work)

    def perceptual(self, scene: Scene, how: How, goal: How, work: Sequence[Task]) -> Tensor:
        """The judge's perceptual distance of each picture to the other run's, in thousandths."""
        far = lambda a, b: 1000 * perceptual_distance(load_judge(), a, b)
        return self._compared("perceptual", far, scene, how, goal, work)

    def _compared(
        self, what: str, measure: Callable, scene: Scene, how: How, goal: How, work: Sequence[Task]
    ) -> Tensor:
        found: list[float] = []
        for i in range(0, len(work), CHUNK):
            part = work[i : i + CHUNK]
            path = self.kept(what, [astuple(scene), astuple(how), self._code(how), astuple(goal)], part, ".json")
            if not path.exists():
                self.must_be_drawn()
                made = self.pictures(scene.model, self.drawn(scene, how, part).latents)
                values = measure(made, self.decoded(scene, goal, part)).nan_to_num(0.0, 120.0, 0.0)
                keep(path, values.clamp(max=120.0).tolist())
            found += json.loads(path.read_text("utf-8"))
        return torch.tensor(found, dtype=torch.float64)

    def fidelity(self, latents: Tensor, goals: Tensor) -> Tensor:
        """dB of each picture's latents, as the node proves them; 0 for what is not finite."""
        kernel = self.host.module("kernels.fitted_sampler")
        found = [kernel.fidelity(a[None], b[None]) for a, b in zip(latents, goals, strict=True)]
        return torch.tensor(found, dtype=torch.float64).clamp(min=0.0)

    # --- what is fitted ---

    def learned(self, scene: Scene, goal: How, part: Sequence[Task], counts: Sequence[int]) -> dict[int, Fit]:
        """What Attune Fast Sampler learns from these pictures of a long run, drawn as one batch, for each count."""

        def work(run: Any, path: Any, space: Any, missing: Sequence[int]) -> dict[int, tuple]:
            kernel, last = self.host.module("kernels.fitted_sampler"), self.host.module("nodes._host.session").last
            paper = kernel.OnPaper(path)
            fits = {n: last(kernel.learn(run._denoise_over, path, n, space, paper)) for n in missing}
            return {n: (fields_of(fit.run), round(max(fit.psnr, 0.0), 2)) for n, fit in fits.items()}

        fits = lambda missing: self.taught(scene, goal, part, partial(work, missing=missing))
        return self._fits("learned", scene, goal, part, counts, fits)

    def followed(self, scene: Scene, noises: Sequence[Sequence[Task]], counts: Sequence[int]) -> dict[int, Fit]:
        """What Attune Fit Sampler fits to the exact paths of some noises, each a batch of the same prompts; what it
        proves is measured elsewhere."""
        goal = self.exact(scene.model, EXACT_STEPS)

        def fits(missing: Sequence[int]) -> dict[int, tuple]:
            session, kernel = self.host.module("nodes._host.session"), self.host.module("kernels.fitted_sampler")
            model, first = self.model(scene), noises[0]
            positive, negative = self.conditionings(scene, first)
            empty = session.empty_latent(model, self.empty(model, scene, len(first)))
            solver = session.solver_of(self.solver(goal), model)

            def work(solves: Any) -> list:
                drawn = [Noise([task.seed for task in part]).generate_noise({"samples": empty}) for part in noises]
                paths = [solves.record(torch.tensor(goal.sigmas), one) for one in drawn]
                none = lambda _: {"none": lambda _: paths[0].states[0]}
                given = [*paths, paths[0]], 1, list(missing), none, self.space(scene.model)
                return session.last(kernel.prove(solves.denoise_over, *given))

            ends = torch.tensor([goal.sigmas[0], 0.0])
            proofs = session.run_session(
                model, positive, negative, scene.cfg, solver, ends, empty, first[0].seed, self.space(scene.model), work
            )  # fmt: skip
            return {one.run.steps: (fields_of(one.run), one.psnr) for one in proofs}

        return self._fits("followed", scene, goal, [task for part in noises for task in part], counts, fits)

    def _fits(
        self, what: str, scene: Scene, goal: How, part: Sequence[Task], counts: Sequence[int], fits: Callable
    ) -> dict[int, Fit]:
        facts = [astuple(scene), astuple(goal), code_of_fits()]
        paths = {n: self.kept(f"{what} {n}", facts, part, ".json") for n in counts}
        missing = [n for n, path in paths.items() if not path.exists() and n < len(goal.sigmas) - 1]
        if missing and not self.drawn_only:
            for n, fit in fits(missing).items():
                keep(paths[n], fit)
        there = {n: json.loads(path.read_text("utf-8")) for n, path in paths.items() if path.exists()}
        return {n: Fit(tuple((name, frozen(one)) for name, one in run), proved) for n, (run, proved) in there.items()}

    def taught(self, scene: Scene, goal: How, part: Sequence[Task], work: Callable[[Any, Any, Any], Any]) -> Any:
        """work(the node's own run, recorded path, noise space) after a recorded run."""
        import comfy.samplers

        fast, found = self.host.module("nodes._host.fitted_sampler"), []
        inner = self.solver(goal)

        class Teacher(comfy.samplers.Sampler):
            def sample(self, guider, sigmas, *given):
                recorder = fast.Recorder(guider, sigmas.clone())
                end = inner.sample(recorder, sigmas, *given)
                run = fast._Run(fast.FastSampler(inner, None), guider, sigmas, *given)
                found.append(work(run, recorder.path(end), fast.NoiseSpace(fast.identify(guider.model_patcher).space)))
                return end

        self.run_with(scene, self.model(scene), Teacher(), goal.sigmas, part)
        return found[0]

    # --- levels, models and samplers ---

    def levels(self, model: str, name: str, steps: int) -> tuple[float, ...]:
        return self._levels(model, name, steps)

    @lru_cache(maxsize=4096)  # noqa: B019
    def _levels(self, model: str, name: str, steps: int) -> tuple[float, ...]:
        return self.sigmas(model, name, steps)

    def exact(self, model: str, steps: int) -> How:
        """The reference run of the tuner: DPM-Solver++(2M) where it comes nearest to the exact paths."""
        kernel, sampling = self.host.module("kernels.tuner"), self.models[model].get_model_object("model_sampling")
        ends = float(sampling.sigma_min), float(sampling.sigma_max)
        return How("dpmpp_2m", tuple(kernel.reference_levels(steps, self.space(model), *ends).float().tolist()))

    def space(self, model: str) -> Any:
        return self.host.module("kernels.space").NoiseSpace("ve" if model == "unet" else "flow")

    def stock_schedules(self, model: str) -> list[str]:
        """The host's schedulers, and its nodes' tables for this model."""
        import comfy.samplers

        tables = {"unet": ("core AYS", "core GITS"), "flow": ("core OptimalSteps",)}
        return [*comfy.samplers.SCHEDULER_NAMES, *(one for one in tables[model] if one in CORE)]

    def model(self, scene: Scene, how: How | None = None) -> Any:
        """The MODEL of a run."""
        call, model = self.host.call, self.models[scene.model]
        if "lora" in scene.added:
            folder = self.host.folders / "models" / "loras"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(LORA, folder / LORA.name)
            (model,) = call("LoraLoaderModelOnly", model=model, lora_name=LORA.name, strength_model=1.0)
        if "fp16" in scene.added:
            (model,) = call("ModelComputeDtype", model=model, dtype="fp16")
        for node, inputs in how.nodes if how else ():
            given = {name: self.given(name, value) for name, value in inputs}
            (model, *_) = call(node, model=model, **given)
        return model

    def given(self, name: str, value, part: Sequence[Task] = ()):
        """Profiles are named by file in the folder of what is kept."""
        if name == "profile" and isinstance(value, str):
            return self.host.module("models.store").load_profile(self.cache / value)
        return super().given(name, value, part)

    def solver(self, how: How, signs: list[float] | None = None) -> Any:
        """The SAMPLER of a run; signs: takes that of a fitted one."""
        import comfy.samplers

        ours = {TAYLOR: sample_forecast, CHEBYSHEV: sample_forecast, OLSS: sample_olss, PLAN: sample_plan}
        if how.solver == FITTED:
            return self._short(how, [] if signs is None else signs)
        if how.solver in ours:
            return comfy.samplers.KSAMPLER(partial(ours[how.solver], *how.given))
        if how.solver == "dpmpp_3m":
            given = {"eta": 0.0, "s_noise": 1.0, "noise_device": "cpu"}
            return self.host.call("SamplerDPMPP_3M_SDE", **given)[0]
        if how.solver == "er_sde":
            return self.host.call("SamplerER_SDE", solver_type="ODE", max_stage=3, eta=0.0, s_noise=0.0)[0]
        return self.host.call("KSamplerSelect", sampler_name=how.solver)[0]

    def _short(self, how: How, signs: list[float]) -> Any:
        """The short run of Attune Fast Sampler, by the node's own code."""
        import comfy.samplers

        fast = self.host.module("nodes._host.fitted_sampler")
        fitted = fast.FittedRun(sigmas=how.sigmas, **dict(how.given))

        class Short(comfy.samplers.Sampler):
            def sample(self, guider, sigmas, *given):
                end, sign = fast._Run(fast.FastSampler(None, None), guider, sigmas, *given)._short(fitted)
                signs.append(sign)
                return end

        return Short()

    def run_with(self, scene: Scene, model: Any, sampler: Any, sigmas: Sequence[float], part: Sequence[Task]) -> Tensor:
        """The latents that the host draws with a SAMPLER."""
        positive, negative = self.conditionings(scene, part)
        (guider,) = self.host.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=scene.cfg)
        given = {"noise": Noise([t.seed for t in part]), "sigmas": torch.tensor(sigmas)}
        given["latent_image"] = self.empty(model, scene, len(part))
        return self.host.call("SamplerCustomAdvanced", guider=guider, sampler=sampler, **given)[0]["samples"]

    def conditionings(self, scene: Scene, part: Sequence[Task]) -> tuple[list, list]:
        """Positive and negative."""
        what = [prompt(t.obj, ANY if scene.words == "object alone" else t.background) for t in part]
        without = ["a white background" if scene.words == "negative" else ""] * len(part)
        positive, negative = self.conditioning(what), self.conditioning(without)
        if "controlnet" not in scene.added:
            return positive, negative
        (net,) = self.host.call("ControlNetLoader", control_net_name=CONTROLNET)
        side, hint = scene.side // 8, torch.zeros(1, scene.side, scene.side, 3)
        hint[:, 2 * side : 6 * side, 4 * side : 7 * side] = 1
        return self.host.call(
            "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=net, image=hint, strength=1.0,
            start_percent=0.0, end_percent=1.0,
        )  # fmt: skip

    def empty(self, model: Any, scene: Scene, pictures: int) -> dict:
        channels = model.get_model_object("latent_format").latent_channels
        return {"samples": torch.zeros(pictures, channels, scene.side // 8, scene.side // 8)}

    # --- what is kept ---

    def must_be_drawn(self) -> None:
        if self.drawn_only:
            raise NotDrawn

    def _code(self, how: How) -> str:
        if how.solver == FITTED:
            return code_of_fits()
        return code_of("nodes/_host/propagation/*", "kernels/propagation") if is_propagated(how) else ""

    def kept(self, what: str, facts: Any, part: Sequence[Task], suffix: str) -> Path:
        import comfyui_version

        versions = [comfyui_version.__version__, torch.__version__, FORMAT, self.digests]
        text = json.dumps([what, facts, [astuple(task) for task in part], versions])
        return self.cache / f"short-{hashlib.sha256(text.encode()).hexdigest()[:32]}{suffix}"


def is_propagated(how: How) -> bool:
    return any(node == NODE for node, _ in how.nodes)


def fields_of(run: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(run, field.name)) for field in fields(run)]


def frozen(value: Any) -> Any:
    """Lists as tuples."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def code_of_fits() -> str:
    """Changes with the code that a fit and a fitted run go through."""
    return code_of(*CODE)


@lru_cache
def code_of(*names: str) -> str:
    files = [path for name in names for path in sorted(ROOT.glob(f"{name}.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def keep(path: Path, what: Any) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(what), "utf-8")
    temporary.replace(path)


def keep_tensors(path: Path, what: dict[str, Tensor], facts: dict[str, str]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: one.float().contiguous() for name, one in what.items()}, temporary, metadata=facts)
    temporary.replace(path)


# --- figures ---


def jackknifed(measure: Callable[[Tensor], float], n: int) -> tuple[float, float]:
    """A measure of pictures 0..n-1 and its standard error over groups of seeds: chunks in turn, where n fills them."""
    whole = CHUNK * GROUPS
    if n == 1:
        return measure(torch.arange(1)), math.nan
    if n % whole:
        return jackknife(measure, n, min(GROUPS, n))
    order = torch.arange(n).reshape(-1, GROUPS, CHUNK).transpose(1, 2).flatten()
    return jackknife(lambda kept: measure(order[kept]), n, GROUPS)


def spread(values: Tensor) -> tuple[float, float]:
    return jackknifed(lambda kept: float(values[kept].mean()), len(values))


def plus_minus(found: tuple[float, float], digits: int = 1) -> str:
    value, error = found
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def dB(values: Tensor | None) -> str | None:
    """Mean ± standard error (least)."""
    return None if values is None else f"{plus_minus(spread(values))} ({float(values.min()):.1f})"


def or_none(work: Callable[[], Any]) -> Any:
    """What it finds; None for what is not drawn."""
    try:
        return work()
    except NotDrawn:
        return None
