"""What encoder and block propagation share inside the host: one object per run, and the wrappers that feed it."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from ....kernels.encoder_propagation import (
    PRIOR_NOISE_TIME,
    Costs,
    Reuse,
    add_prior_noise_,
    boundary_keys,
    make_plan,
    speedup,
)
from ....kernels.feature_cache import FeatureCache
from ..._plan.propagation import Choice, Settings
from ..clock import Clock, active_levels, conditioning_changes, noise_space, step_times, why_not
from ..solvers import adds_noise
from .control import DeferredControl

LOG = logging.getLogger(__name__)
DTYPES = {"as computed": None, "half": torch.float16}
DEVICES = {"as computed": None, "cpu": torch.device("cpu")}


class Propagation:
    """One sampling run: its plan, its features, and what was done. A subclass knows one kind of network."""

    name: str
    costs: Costs

    def __init__(self, guider: Any, settings: Settings, noise: Tensor, sampler: Any, sigmas: Tensor):
        self.model, self.settings, self.noise = guider.model_patcher, settings, noise
        sampling = self.model.get_model_object("model_sampling")
        self.space = noise_space(sampling)
        self.rows = noise.shape[0] * sum(len(side) for side in guider.conds.values())
        times, top_time = step_times(sampling, sigmas)
        shares = [time / top_time for time in times]
        levels = sigmas.tolist()  # a copy: uni_pc writes into the tensor
        self.inspect(noise)
        choice = self.choose(levels, shares, adds_noise(sampler))
        self.reuse, self.cache_dtype, cache_device, squeezed = self.within_limit(choice.reuse)
        self.said = choice.said + squeezed
        self.plan = make_plan(
            levels, times, choice.keys,
            forecast=self.reuse.forecast, last=choice.keep_last,
            always=boundary_keys(levels, conditioning_changes(sampling, guider.conds)),
            active=active_levels(sampling, settings.start_percent, settings.end_percent),
        )  # fmt: skip
        self.clock = Clock(self.plan, sampler)
        self.cache = FeatureCache(2 if self.reuse.forecast else 1, self.cache_dtype, cache_device)
        injects = settings.prior_noise > 0 and bool(noise.any())
        self.noisy = {i for i, share in enumerate(shares) if injects and share < PRIOR_NOISE_TIME}
        self.deferred: dict[int, DeferredControl] = {}
        self.lock = threading.Lock()  # newer hosts evaluate conditions in threads, one per GPU
        self.seen: Counter = Counter()
        self.counts: Counter = Counter()
        self.most_bytes = 0
        self.sources: tuple[int, int | None] | None = None  # a calibration's choice of captures

    # --- what a subclass says about its network ---

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

    # --- before and after the run ---

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
            self.name, self.said, len(keys), self.plan.steps, " ".join(map(str, keys)), 100 * share,
            speedup(self.plan.steps, len(keys), share), self.bytes_of(self.reuse, self.cache_dtype) / 1024**2,
        )  # fmt: skip

    def report(self) -> None:
        c = self.counts
        LOG.info(
            "%s: the network ran whole %d times (%d of them because features were missing), in part %d times, and %d "
            "outputs were ready; features took %.1f MB.",
            self.name, c["whole"], c["missing"], c["part"], c["ready"], self.most_bytes / 1024**2,
        )  # fmt: skip

    def close(self) -> None:
        self.cache.clear()
        self.deferred.clear()
        self.noise = None  # type: ignore[assignment]

    # --- during the run ---

    def begin(self, x: Tensor, sigma: Tensor) -> None:
        """An evaluation of the guided model begins."""
        step = self.clock.begin(sigma)
        self.seen.clear()
        if step in self.noisy and self.clock.on_grid:
            self.noisy.discard(step)
            self.noise = self.noise.to(x)
            add_prior_noise_(x, self.noise, self.clock.sigma, self.settings.prior_noise, self.space)

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

    def store(self, keys: list, signature: tuple, features: dict) -> None:
        with self.lock:
            self.cache.store(keys, self.step, self.plan.time(self.clock.sigma), signature, features)
            self.most_bytes = max(self.most_bytes, self.cache.bytes)

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


def applied(model: Any, key: str, wrappers: dict[str, Callable], settings: Settings) -> Any:
    """A clone of a MODEL with the wrappers under one key; applied twice, the later settings count."""
    patched = model.clone()
    for kind, wrapper in wrappers.items():
        patched.remove_wrappers_with_key(kind, key)
        patched.add_wrapper_with_key(kind, key, wrapper)
    patched.model_options["transformer_options"][key] = settings
    return patched


def outer_sample(key: str, propagation: type[Propagation]) -> Callable:
    """The OUTER_SAMPLE wrapper: makes the run's object and drops it, however the run ends."""

    def wrapper(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        reason = why_not(sampler, sigmas)
        if reason is not None:
            LOG.info("%s stands aside: %s.", propagation.name, reason)
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        saved = guider.model_options
        run = propagation(guider, saved["transformer_options"][key], noise, sampler, sigmas)
        run.announce()
        guider.model_options = comfy.model_patcher.create_model_options_clone(saved)
        guider.model_options["transformer_options"][run_key(key)] = run
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


def predict_noise(key: str) -> Callable:
    """The PREDICT_NOISE wrapper: tells the run's object that an evaluation begins."""

    def wrapper(executor, x, sigma, model_options, *args, **kwargs):
        run = model_options["transformer_options"].get(run_key(key))
        if run is not None:
            run.begin(x, sigma)
        return executor(x, sigma, model_options, *args, **kwargs)

    return wrapper


def calc_cond_batch(key: str) -> Callable:
    """The CALC_COND_BATCH wrapper: on a shorter step no ControlNet is computed until the network asks for it."""

    def wrapper(executor, model, conds, x, sigma, model_options, *args, **kwargs):
        run = model_options["transformer_options"].get(run_key(key))
        if run is not None and run.shorter:
            conds = [side and [run.deferring(cond) for cond in side] for side in conds]
        return executor(model, conds, x, sigma, model_options, *args, **kwargs)

    return wrapper


def run_key(key: str) -> str:
    return key + ".run"
