"""Propagation inside the host: one object per run, the wrappers that feed it, and which network it is for."""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....kernels.propagation import (
    NOISY_REACH,
    PRIOR_NOISE_TIME,
    SAME_PLACE,
    Costs,
    FeatureCache,
    Reuse,
    add_prior_noise_,
    boundary_keys,
    fine_detail,
    make_plan,
    resemblance,
)
from ....models.calibration import FORECAST, Calibration, KeySteps, Point
from ..._plan.propagation import (
    CALIBRATED,
    EVERY_SECOND,
    TARGET,
    Choice,
    ReuseSettings,
    chosen_point,
    forecasts_answers,
    reuses_features,
    said_of,
    why_whole,
)
from ..calibrating import stands_aside
from ..clock import Clock, conditioning_changes, noise_space, patch_changes, step_times, why_not
from ..identity import network_of
from ..setting import guidance_of
from ..solvers import adds_noise, facts_of, solver_name
from .forecast import Forecasts, forecasts_of
from .guidance import OneSided, alternating, why_not_one_sided

LOG = logging.getLogger(__name__)
WHO = "Attune Propagation"
KEY = "attune.propagation"
RUN = f"{KEY}.run"  # of a run's options: its Propagation
DTYPES = {"as computed": None, "half": torch.float16}
DEVICES = {"as computed": None, "cpu": torch.device("cpu")}


class Propagation:
    """One sampling run: its plan, its features, and what was done. A subclass knows one kind of network.

    network: of the subclass, with its article. profile_kind: of the calibrations for it. inner: its own wrapper, by the
    host's kind of wrappers.
    """

    network: str
    profile_kind: str
    inner: dict[str, Callable]
    costs: Costs

    def __init__(self, guider: Any, settings: ReuseSettings, noise: Tensor, sampler: Any, sigmas: Tensor):
        self.model, self.settings, self.noise, self.sampler = guider.model_patcher, settings, noise, sampler
        sampling = self.model.get_model_object("model_sampling")
        self.space = noise_space(sampling)
        self.rows = noise.shape[0] * sum(len(side) for side in guider.conds.values())
        times, top_time = step_times(sampling, sigmas)
        shares = [time / top_time for time in times]
        level_at = lambda percent: float(sampling.percent_to_sigma(percent))
        levels = sigmas.tolist()  # a copy: uni_pc writes into the tensor
        self.inspect(noise)
        self.fresh_noise = adds_noise(sampler)
        choice = self.choose(levels, shares, self.fresh_noise)
        self.reuse, self.cache_dtype, cache_device, squeezed = self.within_limit(choice.reuse)
        self.said = choice.said + squeezed
        active = level_at(settings.start_percent), level_at(settings.end_percent)
        begins = conditioning_changes(sampling, guider.conds) + patch_changes(guider.model_options)
        changes = boundary_keys(levels, begins)
        self.plan = make_plan(
            levels, times, choice.keys,
            forecast=self.reuse.forecast, last=choice.keep_last, always=changes, active=active,
        )  # fmt: skip
        self.one_sided = self.sides(guider, changes, active)
        self.clock = Clock(self.plan, sampler)
        self.cache = FeatureCache(2 if self.reuse.forecast else 1, self.cache_dtype, cache_device, self.reach())
        injects = settings.prior_noise > 0 and bool(noise.any())
        self.noisy = {i for i, share in enumerate(shares) if injects and share < PRIOR_NOISE_TIME}
        self.deferred: dict[int, DeferredControl] = {}
        self.lock = threading.Lock()  # newer hosts evaluate conditions in threads, one per GPU
        self.seen: Counter = Counter()
        self.counts: Counter = Counter()
        self.most_bytes = 0
        self.sources: tuple[int, int | None] | None = None  # a calibration's choice of captures
        # Such a function may cut the latent into tiles, and move them from step to step.
        self.tiled = "model_function_wrapper" in guider.model_options
        self.details: dict[tuple, Tensor] = {}  # of the x that each condition's features were captured at

    def __deepcopy__(self, memo: dict) -> Propagation:
        """Other packs deep-copy a run's options to evaluate once more: it is the same run."""
        return self

    # --- what a subclass says about its network ---

    @classmethod
    def blocks_in(cls, model: Any) -> int:
        """How many blocks of this kind of network a MODEL has: 0 for another kind, 1 for one with nothing to reuse."""
        raise NotImplementedError

    @staticmethod
    def part(name: str) -> str:
        """What the input 'reuse' stands for; ValueError for a part of another kind of network."""
        raise NotImplementedError

    @classmethod
    def equip(cls, model: Any) -> None:
        """Add to a MODEL, a clone, what its network needs to be stood in for."""

    def inspect(self, noise: Tensor) -> None:
        """Look at the network for latents like `noise`; sets `costs`."""
        raise NotImplementedError

    def choose(self, sigmas: list[float], shares: list[float], fresh_noise: bool) -> Choice:
        raise NotImplementedError

    def bytes_of(self, reuse: Reuse, dtype: torch.dtype | None) -> int:
        """What the features of a run take at most."""
        raise NotImplementedError

    def thinner(self, reuse: Reuse) -> Reuse:
        """The reuse with the fewest features."""
        return reuse

    def reach(self) -> float:
        """How far forecasts of features go, as a share of the way along their line."""
        return NOISY_REACH if self.fresh_noise else 1.0

    # --- before and after the run ---

    def sides(self, guider: Any, changes: frozenset[int], active: tuple[float, float]) -> OneSided | None:
        """Which steps ask the positive alone, None where every step asks both prompts."""
        if self.settings.guidance != EVERY_SECOND:
            return None
        reason = why_not_one_sided(guider, self.noise)
        if reason is not None:
            LOG.info("%s: every step asks both prompts, for %s.", WHO, reason)
            return None
        within = [i for i in range(self.plan.steps) if active[1] <= self.plan.sigmas[i] <= active[0]]
        steps = alternating(self.plan, changes, self.settings.keep_last, within)
        return OneSided(steps, self.plan.keys, changes, self.space)

    def within_limit(self, reuse: Reuse) -> tuple[Reuse, torch.dtype | None, torch.device | None, str]:
        """The reuse, dtype and device that keep the features under the user's limit: half precision, less, the CPU."""
        s = self.settings
        dtype, device, limit = DTYPES[s.cache_dtype], DEVICES[s.cache_device], s.memory_limit * 1024**2
        if not limit or self.bytes_of(reuse, dtype) <= limit:
            return reuse, dtype, device, ""
        if self.bytes_of(reuse, torch.float16) <= limit:
            return reuse, torch.float16, device, "; features kept in half precision for the memory limit"
        less = self.thinner(reuse)
        if self.bytes_of(less, torch.float16) <= limit:
            return less, torch.float16, device, "; less is reused and kept in half precision for the memory limit"
        return less, torch.float16, torch.device("cpu"), "; less is reused and kept on the CPU for the memory limit"

    def element_size(self, dtype: torch.dtype | None) -> int:
        computed = self.model.model.manual_cast_dtype or self.model.model_dtype()
        return torch.empty((), dtype=dtype or computed).element_size()

    def announce(self) -> None:
        share, keys = self.costs.of_step(self.reuse), sorted(self.plan.keys)
        LOG.info(
            "%s: %s; %d of %d steps are key steps (%s), the others cost %.0f %%: %.2f times less computing; "
            "features take up to %.1f MB.",
            WHO, self.said, len(keys), self.plan.steps, " ".join(map(str, keys)), 100 * share,
            self.speed(share), self.bytes_of(self.reuse, self.cache_dtype) / 1024**2,
        )  # fmt: skip
        if self.one_sided is not None:
            LOG.info(
                "%s: %d of %d steps ask the positive alone (%s); what the negative would answer is predicted.",
                WHO, len(self.one_sided.steps), self.plan.steps, " ".join(map(str, sorted(self.one_sided.steps))),
            )  # fmt: skip

    def speed(self, share: float) -> float:
        """How many times less computing the run needs, where a step that is not a key step costs `share`."""
        whole, halved = self.plan.keys, self.one_sided.steps if self.one_sided is not None else frozenset()
        spent = sum((1 if i in whole else share) / (1 + (i in halved)) for i in range(self.plan.steps))
        return self.plan.steps / spent

    def report(self) -> None:
        c = self.counts
        if c:
            LOG.info(
                "%s: the network ran whole %d times (%d of them because features were missing), in part %d times, and "
                "%d outputs were ready; features took %.1f MB.",
                WHO, c["whole"], c["missing"], c["part"], c["ready"], self.most_bytes / 1024**2,
            )  # fmt: skip
        if len(self.plan.keys) < self.plan.steps and not (c["part"] or c["ready"]):
            reason = (
                "this network showed nothing of its blocks that can be reused"
                if c["unseen"]
                else "another node asks this network or this sampler in a way that cannot be followed"
            )
            LOG.warning("%s: %s, so every step ran whole and nothing was saved. Remove the node.", WHO, reason)
        if c["moved"]:
            LOG.info("%s: tiles moved, so %d calls of the network ran whole.", WHO, c["moved"])
        if self.one_sided is not None:
            LOG.info(
                "%s: the positive was asked alone %d times; %d times both were asked in its place, because nothing "
                "near enough was known or the last prediction was poor.", WHO, self.one_sided.saved,
                self.one_sided.missing,
            )  # fmt: skip

    def close(self) -> None:
        self.cache.clear()
        if self.one_sided is not None:
            self.one_sided.close()
        self.deferred.clear()
        self.details.clear()
        self.noise = None  # type: ignore[assignment]

    # --- during the run ---

    def begin(self, sigma: Tensor) -> None:
        """An evaluation of the guided model begins."""
        self.clock.begin(sigma)
        self.seen.clear()
        if self.one_sided is not None:
            self.one_sided.begin(self.clock.step)

    def answer(self, ask: Callable[[], Tensor], x: Tensor) -> Tensor:
        """What the guided model says at x; `ask()` asks it."""
        return ask()

    @property
    def step(self) -> int:
        return self.clock.step or 0

    @property
    def shorter(self) -> bool:
        """Whether the evaluation in progress may reuse features."""
        return self.sources is not None or (self.clock.step is not None and self.clock.step not in self.plan.keys)

    def records(self, keys: list) -> bool:
        """Whether the features of a whole call are wanted: a later step uses them, or one was missing."""
        wanted = self.shorter or self.step in self.plan.captured
        return wanted and (self.clock.on_grid or not all(self.cache.holds(key, self.step) for key in keys))

    def deferring(self, cond: dict) -> dict:
        """A condition whose ControlNet waits until its residuals are looked at."""
        control = cond.get("control")
        if control is None:
            return cond
        return {**cond, "control": self.deferred.setdefault(id(control), DeferredControl(control))}

    def recall(self, keys: list, signature: tuple, time: float, like: Tensor):
        return self.cache.recall(keys, signature, self.plan.last_key(self.step), time, like, self.sources)

    def store(self, keys: list, signature: tuple, features: dict, x: Tensor) -> None:
        with self.lock:
            self.cache.store(keys, self.step, self.plan.time(self.clock.sigma), signature, features)
            self.most_bytes = max(self.most_bytes, self.cache.bytes)
            if self.tiled:
                self.details |= zip(keys, self._details(keys, x), strict=True)

    def moved(self, keys: list, x: Tensor) -> bool:
        """Whether x is of another place of the picture than the captured features of its conditions.

        Asked only where another pack calls the network itself: it waits for the device, once a call.
        """
        if not self.tiled or self.sources is not None:
            return False
        pairs = [(self.details.get(key), now) for key, now in zip(keys, self._details(keys, x), strict=True)]
        found = [resemblance(then, now) for then, now in pairs if then is not None and then.shape == now.shape]
        moved = bool(found) and bool(torch.stack(found).min() < SAME_PLACE)
        self.counts["moved"] += moved
        return moved

    def _details(self, keys: list, x: Tensor) -> tuple[Tensor, ...]:
        """Of each condition's rows, without what an inpainting network is given beside the latent."""
        return fine_detail(x[:, : self.noise.shape[1]]).chunk(len(keys))

    def keys_of(self, options: dict, device: torch.device) -> list[tuple] | None:
        """The condition of each chunk of a call: its id, context window and device, how often it was seen before."""
        if "uuids" not in options:
            return None
        window = getattr(options.get("context_window"), "index_list", None)
        keys = []
        for uuid in options["uuids"]:  # one call may hold a condition twice: an area's negative has the positive's id
            condition = (uuid, window and tuple(window), device)
            keys.append((*condition, self.seen[condition]))
            self.seen[condition] += 1
        return keys

    def signature(self, keys: list, x: Tensor) -> tuple:
        """What must be the same for features to fit: rows, shape, dtype, device, and the strength of every hook."""
        hooks = getattr(self.model.current_hooks, "hooks", ())
        return (x.shape[0] // len(keys), *x.shape[1:], x.dtype, x.device, tuple(hook.strength for hook in hooks))

    # --- prior noise ---

    def stirring(self, sampler: Any) -> Any:
        """The SAMPLER with the prior noise added to its own state, before the model is first asked in a step.

        Between the solver and the guided model the host may copy the state (a mask does), so it is added in front.
        """
        facts = facts_of(sampler)
        if facts is None or not facts.keeps_state:
            raise ValueError(
                f"{WHO} cannot add 'prior_noise' with the sampler '{solver_name(sampler)}', which works on copies of "
                "the latent or is not known: set 'prior_noise' to 0, or choose a sampler such as 'euler' or 'dpmpp_2m'."
            )
        solve, stirred = sampler.sampler_function, copy.copy(sampler)

        @functools.wraps(solve)
        def solve_stirred(model, x, sigmas, *args, callback=None, **kwargs):
            def finished(facts_of_step):
                with_noise.calls = 0
                if callback is not None:
                    callback(facts_of_step)

            with_noise = _Stirred(self, model, facts.calls)
            return solve(with_noise, x, sigmas, *args, callback=finished, **kwargs)

        stirred.sampler_function = solve_stirred
        return stirred


class _Stirred:
    """A solver's model that adds the prior noise to the state it is first asked about in a step.

    calls: since the solver reported a step, which all of them do after the step's first call.
    """

    def __init__(self, run: Propagation, model: Any, per_step: int):
        self._run, self._model, self._per_step, self.calls = run, model, per_step, per_step - 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: Tensor, sigma: Tensor, *args, **kwargs) -> Tensor:
        run = self._run
        if self.calls >= self._per_step - 1:
            step = run.clock.begin(sigma)
            if step in run.noisy and run.clock.on_grid:
                run.noisy.discard(step)
                run.noise = run.noise.to(x)
                add_prior_noise_(x, run.noise, run.clock.sigma, run.settings.prior_noise, run.space)
        self.calls += 1
        return self._model(x, sigma, *args, **kwargs)


# --- ControlNets that are computed only when the network looks at their residuals ---


class DeferredControl:
    """In the place of a ControlNet: computed when the network asks for its residuals, which a shorter step does not."""

    def __init__(self, control: Any):
        self._control = control

    def __getattr__(self, name: str) -> Any:
        if name == "_control":  # a copy in the making
            raise AttributeError(name)
        return getattr(self._control, name)

    def get_control(self, *args, **kwargs) -> Mapping:
        return DeferredResiduals(lambda: self._control.get_control(*args, **kwargs))


class DeferredResiduals(Mapping):
    """The host's dict of control residuals, computed at the first look into it."""

    def __init__(self, compute):
        self._compute = compute

    @functools.cached_property
    def _values(self) -> dict:
        return self._compute() or {}

    def __getitem__(self, name):
        return self._values[name]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)


# --- the wrappers ---


def outer_sample(propagation: type[Propagation]) -> Callable:
    """The OUTER_SAMPLE wrapper: makes the run's object and drops it, however the run ends."""

    def wrapper(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        saved = guider.model_options
        if stands_aside(saved, KEY):
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        reason = why_not(sampler, sigmas)
        if reason is not None:
            LOG.info("%s stands aside: %s.", WHO, reason)
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        run = propagation(guider, saved["transformer_options"][KEY], noise, sampler, sigmas)
        if run.noisy:
            sampler = run.stirring(sampler)
        run.announce()
        guider.model_options = comfy.model_patcher.create_model_options_clone(saved)
        guider.model_options["transformer_options"][RUN] = run
        if len(args) > 1:
            args = (args[0], run.clock.listen(args[1]), *args[2:])
        else:
            kwargs["callback"] = run.clock.listen(kwargs.get("callback"))
        try:
            output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            run.report()
            return output
        finally:
            run.close()
            guider.model_options = saved

    return wrapper


def run_of(model_options: dict) -> Any:
    """The run's object in the options of an evaluation, None outside of such a run."""
    return model_options["transformer_options"].get(RUN)


def _predict_noise(executor, x, sigma, model_options, *args, **kwargs):
    """PREDICT_NOISE: tells the run's object that an evaluation begins, and asks it for the answer."""
    run = run_of(model_options)
    ask = lambda: executor(x, sigma, model_options, *args, **kwargs)
    if run is None:
        return ask()
    run.begin(sigma)
    return run.answer(ask, x)


def _calc_cond_batch(executor, model, conds, x, sigma, model_options, *args, **kwargs):
    """CALC_COND_BATCH: on a shorter step no ControlNet is computed until the network asks for it, and on a one-sided
    step the negative is not asked."""
    run = run_of(model_options)
    if run is not None and run.shorter:
        conds = [side and [run.deferring(cond) for cond in side] for side in conds]
    ask = lambda conds: executor(model, conds, x, sigma, model_options, *args, **kwargs)
    if run is None or run.one_sided is None:
        return ask(conds)
    return run.one_sided.answers(ask, conds, x, model_options, run.clock)


def applied(
    model: Any, propagation: type[Propagation], settings: ReuseSettings, replaced: Mapping[str, Callable] | None = None
) -> Any:
    """A clone of a MODEL with the wrappers of a run; applied twice, the later settings count."""
    wrappers = {
        WrappersMP.OUTER_SAMPLE: outer_sample(propagation),
        WrappersMP.PREDICT_NOISE: _predict_noise,
        WrappersMP.CALC_COND_BATCH: _calc_cond_batch,
        **propagation.inner,
        **(replaced or {}),
    }
    patched = model.clone()
    for kind in (*wrappers, WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL):  # of an earlier node's kind of network
        patched.remove_wrappers_with_key(kind, KEY)
    for kind, wrapper in wrappers.items():
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    patched.model_options["transformer_options"][KEY] = settings
    propagation.equip(patched)
    return patched


# --- which network ---


class WholeSteps(Propagation):
    """The run's object where no features are reused: for every network. What is not asked is forecast."""

    network = "any network"
    profile_kind = FORECAST
    inner: dict[str, Callable] = {}
    part = staticmethod(lambda name: name)
    forecasts: Forecasts | None = None

    @classmethod
    def blocks_in(cls, model: Any) -> int:
        return 1

    def inspect(self, noise: Tensor) -> None:
        self.costs = Costs((1.0,), 0.0, (1.0,))

    def choose(self, sigmas: list[float], shares: list[float], fresh_noise: bool) -> Choice:
        return Choice(frozenset(range(len(sigmas) - 1)), Reuse(1, 1), 0, "every step whole")

    def bytes_of(self, reuse: Reuse, dtype: torch.dtype | None) -> int:
        return 0

    def sides(self, guider: Any, changes: frozenset[int], active: tuple[float, float]) -> OneSided | None:
        if not forecasts_answers(self.settings):
            return super().sides(guider, changes, active)
        fit = self.settings.calibration
        assert fit is not None
        point = chosen_point(self.settings, fit)
        assert point is not None  # where none is faithful enough the MODEL stays as it is
        found = forecasts_of(fit, point, self.sampler, self.plan.sigmas, changes)
        if isinstance(found, str):
            LOG.warning("%s: every step is asked, for %s.", WHO, found)
            return None
        if fit.setting and fit.setting != guidance_of(guider.model_options):
            LOG.warning(
                "%s: the profile's forecasts were fitted on a MODEL whose other nodes change guidance or masks "
                "otherwise (as CFGZeroStar and Differential Diffusion do). Pictures may lie farther from the whole run "
                "than it says: fit again with this MODEL.", WHO,
            )  # fmt: skip
        self.forecasts = found
        if not found.one_sided or why_not_one_sided(guider, self.noise) is not None:
            return None
        return OneSided(found.one_sided, found.keys, changes, self.space)

    def answer(self, ask: Callable[[], Tensor], x: Tensor) -> Tensor:
        return ask() if self.forecasts is None else self.forecasts.answer(ask, x, self.clock)

    def announce(self) -> None:
        if self.forecasts is not None:
            LOG.info("%s: %s.", WHO, self.forecasts.said())
        elif self.one_sided is not None:
            super().announce()

    def report(self) -> None:
        if self.forecasts is not None:
            LOG.info("%s: %s.", WHO, self.forecasts.done())
        elif self.one_sided is not None:
            super().report()

    def close(self) -> None:
        super().close()
        if self.forecasts is not None:
            self.forecasts.close()


def propagation_for(model: Any, settings: ReuseSettings | None = None) -> type[Propagation]:
    """The run's class for a MODEL's network; ValueError for one of which nothing can be reused, unless the settings
    reuse nothing."""
    from .transformer import TransformerPropagation  # these build on this file
    from .unet import UNetPropagation

    for kind in (UNetPropagation, TransformerPropagation):
        if kind.blocks_in(model) > 1:
            return kind
    if settings is not None and not reuses_features(settings):
        return WholeSteps
    network = type(network_of(model)).__name__
    raise ValueError(
        f"{WHO} works on a UNet (SD 1.x, SD 2.x, SDXL) and on a transformer (SD3, Flux, …) of at least 2 blocks, but "
        f"this MODEL is a {network}: connect another MODEL, or remove the node."
    )


def add_propagation(model: Any, settings: ReuseSettings) -> Any:
    """A clone of a MODEL that samples with propagation; the MODEL itself where no setting of a calibration is as
    faithful as is asked for. ValueError for a part that its network has not."""
    if said := why_whole(settings):
        LOG.warning("%s: %s", WHO, said)
        return model
    kind = WholeSteps if forecasts_answers(settings) else propagation_for(model, settings)
    kind.part(settings.reuse)
    return applied(model, kind, settings)


def key_steps_for(model: Any, profile: Calibration) -> KeySteps:
    """What a profile says of a MODEL's key steps; ValueError unless it is one for its kind of network and its size."""
    fit = profile.key_steps
    if profile.kind == FORECAST and fit is not None:
        return fit
    kind = propagation_for(model)
    if profile.kind != kind.profile_kind or fit is None:
        raise ValueError(
            f"The profile '{profile.name}' holds no key steps for {kind.network}: it is a "
            f"{profile.kind.replace('_', ' ')}. Make one with 'Attune Fit Propagation'."
        )
    blocks = kind.blocks_in(model)
    if fit.blocks != blocks:
        raise ValueError(
            f"The profile '{profile.name}' is for a network of {fit.blocks} blocks, but this MODEL has {blocks}: "
            "fit it again."
        )
    return fit


def with_calibration(
    model: Any, profile: Calibration, speed: float | None = None, fidelity: float = 0.0
) -> tuple[Any, Point | None, list[str]]:
    """A MODEL that samples as a profile of key steps says, which setting that is, and what to report.

    speed: how many times less computing; None takes the fastest setting that proved `fidelity`, of which there may be
    none: then it is the MODEL itself.
    """
    fit = key_steps_for(model, profile)
    settings = ReuseSettings(
        CALIBRATED if speed is None else TARGET, speed=speed or 1.0, calibration=fit, fidelity=fidelity
    )
    point = chosen_point(settings, fit)
    return add_propagation(model, settings), point, [why_whole(settings) if point is None else said_of(point, fit)]
