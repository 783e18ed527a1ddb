"""Encoder propagation inside the host's sampling loop: whole UNet steps recorded, the others run in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_base
import comfy.model_management
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ....kernels.encoder_propagation import Reuse
from ....kernels.feature_cache import Features
from ..._plan.propagation import ONE, Choice, Settings, choose, reuse_by_name
from .run import Propagation, applied, calc_cond_batch, outer_sample, predict_noise, run_key
from .unet_blocks import UNetView, blocks_a_side, control_features, measure_unet, recording

KEY = "attune.encoder_propagation"
MOST_AHEAD = 4


def unet_of(model: Any) -> openaimodel.UNetModel | None:
    """The UNet inside a MODEL, None for every other kind of network."""
    network = model.get_model_object("diffusion_model")
    return network if isinstance(network, openaimodel.UNetModel) else None


def top_blocks(unet: Any) -> int:
    """How many input blocks run at full resolution."""
    down = (
        i
        for i, block in enumerate(unet.input_blocks)
        if any(isinstance(layer, openaimodel.Downsample) or getattr(layer, "updown", False) for layer in block)
    )
    return next(down, len(unet.input_blocks))


def add_encoder_propagation(model: Any, settings: Settings) -> Any:
    """A clone of a UNet MODEL that samples with encoder propagation."""
    return applied(model, KEY, WRAPPERS, settings)


class EncoderPropagation(Propagation):
    """The run's object for a UNet."""

    name = "Attune Encoder Propagation"

    def inspect(self, noise: Tensor) -> None:
        unet: Any = unet_of(self.model)
        self.blocks, self.top = blocks_a_side(unet), top_blocks(unet)
        self.size = measure_unet(unet, *noise.shape[-2:])
        self.costs = self.size.costs
        self.views: dict[int, UNetView] = {}

    def choose(self, sigmas: list[float], shares: list[float], fresh_noise: bool) -> Choice:
        return choose(self.settings, sigmas, shares, self.costs, self.top, fresh_noise)

    def bytes_of(self, reuse: Reuse, dtype: torch.dtype | None) -> int:
        return self.rows * self.size.kept_elements(reuse) * self.element_size(dtype) * (1 + reuse.forecast)

    def thinner(self, reuse: Reuse) -> Reuse:
        return reuse_by_name(ONE, reuse.forecast, self.blocks, self.top)

    def close(self) -> None:
        super().close()
        self.views.clear()

    def view(self, unet: Any) -> UNetView:
        if id(unet) not in self.views:
            self.views[id(unet)] = UNetView(unet, self.reuse)
        return self.views[id(unet)]

    @torch.compiler.disable
    def prepare(
        self, executor: Any, x: Tensor, timesteps, context, y, control, options: dict, extra: dict
    ) -> tuple[Tensor | None, dict, Callable[[], None]]:
        """Before a call of the UNet: its answer, or the options to run it whole with and what to do afterwards."""
        whole = None, options, _nothing
        keys = self.keys_of(options, x.device)
        if keys is None or x.shape[0] % len(keys) or "_forward" in vars(executor.class_obj):
            self.counts["whole"] += 1
            return whole
        signature = self.signature(keys, x)
        if self.shorter:
            output = self._shorter(executor, keys, signature, x, timesteps, context, y, options, extra)
            if output is not None:
                return output, options, _nothing
            self.counts["missing"] += 1
        self.counts["whole"] += 1
        wanted = self.records(keys)
        if not (wanted or self.plan.captured):
            return whole
        # Recorded on every whole step, kept on some: torch.compile would compile a patch that comes and goes twice.
        found: Features = {}
        residuals = control_features(control, self.reuse, self.blocks, x.shape[0]) if wanted else None

        def keep() -> None:
            if found and residuals is not None:  # nothing is found where another wrapper answered in the UNet's place
                self.store(keys, signature, {**found, **residuals})

        return None, recording(options, self.reuse, self.blocks, found), keep

    def _shorter(self, executor, keys, signature, x, timesteps, context, y, options, extra) -> Tensor | None:
        ready = self.cache.ahead(keys, self.step) if self.clock.on_grid and self.sources is None else None
        if ready is not None and ready.shape[0] == x.shape[0]:
            self.counts["ready"] += 1
            return ready
        ahead = self._steps_ahead(executor, x, options, extra)
        n = len(ahead)
        times = [self.plan.times[i] for i in ahead] if n > 1 else [self.plan.time(self.clock.sigma)]
        each = [self.recall(keys, signature, time, x) for time in times]
        if any(features is None for features in each):
            return None
        features = each[0]
        if n > 1:
            features = {name: torch.cat([part[name] for part in each]) for name in features}
            timesteps = torch.cat([self._network_times(i, x) for i in ahead])
            x, context, y = (_repeat(value, n) for value in (x, context, y))
            options = {**options, **{name: options[name] * n for name in ("uuids", "cond_or_uncond")}}

        def call(part: Any, control: dict | None, options: dict) -> Tensor:
            inner = WrapperExecutor.new_class_executor(part._forward, part, executor.wrappers, executor.idx + 1)
            return inner.execute(x, timesteps, context, y, control, options, **extra)

        output = self.view(executor.class_obj).run(call, features, x, options)
        self.counts["part"] += 1
        if n == 1:
            return output
        now, *later = output.chunk(n)
        for i, part in zip(ahead[1:], later, strict=True):
            self.cache.keep_ahead(keys, i, part)
        return now

    def _steps_ahead(self, executor: Any, x: Tensor, options: dict, extra: dict) -> range:
        """The coming steps whose outputs are computed in one batch: they depend on the timestep only, not on x."""
        group, wanted = self.plan.group(self.step), self.settings.parallel
        alone = range(self.step, self.step + 1)
        if self.reuse.fresh or wanted == "off" or self.sources is not None or len(group) < 2 or extra:
            return alone
        if not self.clock.on_grid or not self._plain_times():
            return alone
        if wanted != "auto":
            return group[: int(wanted)]
        patched = any(options.get(name) for name in ("patches", "patches_replace"))
        if patched or executor.idx + 1 < len(executor.wrappers):
            return alone  # patches may look at the noise level, which is one for the whole batch
        free = comfy.model_management.get_free_memory(x.device)
        for n in range(min(len(group), MOST_AHEAD), 1, -1):
            if self.model.model.memory_required([n * x.shape[0], *x.shape[1:]]) * 1.5 < free:
                return group[:n]
        return alone

    def _plain_times(self) -> bool:
        """Whether the network is told the schedule's own timesteps, so that coming ones are known."""
        base = self.model.model
        stock = type(base).process_timestep is comfy.model_base.BaseModel.process_timestep
        return stock and "process_timestep" not in vars(base)

    def _network_times(self, step: int, x: Tensor) -> Tensor:
        sigma = torch.full((x.shape[0],), self.plan.sigmas[step], device=x.device)
        return self.model.model.model_sampling.timestep(sigma).float()


def _repeat(value: Tensor | None, n: int) -> Tensor | None:
    return None if value is None else value.repeat(n, *[1] * (value.ndim - 1))


@torch.compiler.disable(recursive=False)
def _diffusion_model(
    executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **extra
):
    """torch.compile runs this wrapper, too: decisions and shorter steps stay out of its graphs, whole steps are in."""
    options = transformer_options or {}
    run = options.get(run_key(KEY))
    if run is None or run.clock.step is None:
        return executor(x, timesteps, context, y, control, options, **extra)
    output, options, keep = run.prepare(executor, x, timesteps, context, y, control, options, extra)
    if output is None:
        output = executor(x, timesteps, context, y, control, options, **extra)
        torch.compiler.disable(keep)()
    return output


def _nothing() -> None:
    pass


WRAPPERS: dict[str, Any] = {
    WrappersMP.OUTER_SAMPLE: outer_sample(KEY, EncoderPropagation),
    WrappersMP.PREDICT_NOISE: predict_noise(KEY),
    WrappersMP.CALC_COND_BATCH: calc_cond_batch(KEY),
    WrappersMP.DIFFUSION_MODEL: _diffusion_model,
}
